from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.train import SpectrumTracker
from hvpkit.train.tensorboard import scalars, write_scalars
from hvpkit.zoo import mlp


def tracker_of(steps: range, **options: object) -> tuple[SpectrumTracker, list[hk.ExtremeResult]]:
    g = torch.Generator().manual_seed(0)
    data = torch.randn(60, 4, generator=g), torch.randint(3, (60,), generator=g)
    model = mlp(in_features=4, hidden=[5], num_classes=3)
    tracker = SpectrumTracker.for_module(F.cross_entropy, data, **options)
    return tracker, [ex for step in steps if (ex := tracker(model, step=step)) is not None]


def test_scalars_are_all_numbers_of_a_measurement() -> None:
    tracker, (ex,) = tracker_of(range(1))
    assert scalars(tracker.records[0]) == {
        "spectrum/smallest": ex.smallest.value,
        "spectrum/smallest_lower": ex.smallest.interval.lower,
        "spectrum/smallest_upper": ex.smallest.interval.upper,
        "spectrum/smallest_residual_norm": ex.smallest.residual_norm,
        "spectrum/largest": ex.largest.value,
        "spectrum/largest_lower": ex.largest.interval.lower,
        "spectrum/largest_upper": ex.largest.interval.upper,
        "spectrum/largest_residual_norm": ex.largest.residual_norm,
        "spectrum/passes": ex.num_matvecs,
        "spectrum/seconds": ex.seconds,
    }


def test_curves_in_the_event_file_are_those_of_the_tracker(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, found = tracker_of(range(9), every=4)
    with SummaryWriter(tmp_path) as writer:
        for record in tracker.records:
            write_scalars(writer, record)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(tracker.records[0]))
    for tag, values in {
        "spectrum/smallest": [ex.smallest.value for ex in found],
        "spectrum/largest": [ex.largest.value for ex in found],
        "spectrum/largest_upper": [ex.largest.interval.upper for ex in found],
        "spectrum/passes": [ex.num_matvecs for ex in found],
    }.items():
        curve = events.Scalars(tag)
        assert [event.step for event in curve] == [0, 4, 8]
        assert [event.value for event in curve] == pytest.approx(values, rel=1e-7)  # they are kept in float32


def test_unknown_bound_is_written_as_infinite() -> None:
    written = {}

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            written[tag, global_step] = scalar_value

    write_scalars(Writer(), {"step": 7, "largest": 2.0, "largest_upper": math.inf, "status": "max-matvecs"})
    assert written == {("spectrum/largest", 7): 2.0, ("spectrum/largest_upper", 7): math.inf}


def test_importing_takes_no_trainer_along() -> None:
    script = (
        "import sys, hvpkit.train, hvpkit.train.tensorboard\n"
        "print({name.split('.')[0] for name in sys.modules} & {'lightning', 'transformers', 'tensorboard'})"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"
