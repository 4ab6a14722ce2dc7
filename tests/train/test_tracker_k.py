"""Tracking of several eigenvalues of an end, against dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.train import SpectrumTracker


def data(num_examples: int = 150) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(num_examples, 5, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (num_examples,), generator=g)


def module() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def dense(model: nn.Module, wrt: Any = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors of the Hessian, and the gradient, by double backward in plain torch."""
    x, y = data()
    params = [p for name, p in model.named_parameters() if wrt is None or name.startswith(wrt)]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True) for entry in gradient]
    H = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if r is None else r.flatten()
                    for r, p in zip(row, params, strict=True)
                ]
            )
            for row in rows
        ]
    )
    g = gradient.detach()
    if scale is not None:
        H, g = scale[:, None] * H * scale, scale * g
    return (*torch.linalg.eigh((H + H.mT) / 2), g)


def run(tracker: SpectrumTracker, optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    x, y = data()
    for step in steps:
        tracker(model, step=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("which", "k", "wrt"),
    [("LA", 3, None), ("SA", 2, None), ("BE", 3, None), ("LA", 1, None), ("LA", 3, "2.*"), ("LA", 2, "0.*")],
)
def test_values_overlaps_and_the_gradients_share_are_those_of_dense_matrices(
    which: str, k: int, wrt: str | None
) -> None:
    model, before = module(), None
    tracker = SpectrumTracker.for_module(
        F.cross_entropy, data(), k=k, which=which, wrt=wrt, tol=1e-6, atol=0.0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(0, 9, 3):
        found = tracker(model, step=step)
        values, vectors, gradient = dense(model, None if wrt is None else wrt[:2])
        n = len(values)
        low = {"LA": 0, "SA": k, "BE": k // 2}[which]
        places = [*range(low), *range(n - (k - low), n)]
        assert found.values.tolist() == pytest.approx(values[places].tolist(), rel=1e-4)
        V = vectors[:, places]
        known = tracker.alignments[step]
        assert known.gradient_share == pytest.approx(
            float((V.mT @ gradient).square().sum() / gradient.square().sum()), abs=1e-3
        )
        if before is None:
            assert math.isnan(known.overlap)
        else:
            assert known.overlap == pytest.approx(float((before.mT @ V).square().sum() / k), abs=1e-3)
            assert 0 <= known.overlap <= 1 + 1e-9
        before = V
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            optimizer.step()
    record = tracker.records[-1]
    assert record["eigenvalue_0"] == float(found.values[0])
    assert record["overlap"] == tracker.alignments[6].overlap
    assert len(tracker.records) == 3


def test_preconditioned_by_an_optimizer_as_it_is_at_each_measurement() -> None:
    model = module()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    tracker = SpectrumTracker.for_module(
        F.cross_entropy, data(), k=2, precondition=optimizer, tol=1e-6, every=2
    )
    for step in range(5):
        found = tracker(model, step=step)
        if found is not None:
            state = [optimizer.state[p] for p in model.parameters()]
            D = torch.cat(
                [((s["exp_avg_sq"] / (1 - 0.999 ** float(s["step"]))).sqrt() + 1e-8).flatten() for s in state]
            )
            values, vectors, gradient = dense(model, scale=D.rsqrt())
            assert found.values.tolist() == pytest.approx(values[-2:].tolist(), rel=1e-4)
            share = (vectors[:, -2:].mT @ gradient).square().sum() / gradient.square().sum()
            assert tracker.alignments[step].gradient_share == pytest.approx(float(share), abs=1e-3)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert [*tracker.alignments] == [0, 2, 4]


def test_both_ends_of_a_preconditioned_hessian() -> None:
    model = module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = SpectrumTracker.for_module(F.cross_entropy, data())
    scaled = SpectrumTracker.for_module(F.cross_entropy, data(), precondition=torch.full((66,), 4.0).double())
    same = SpectrumTracker.for_module(F.cross_entropy, data(), precondition=optimizer)
    assert scaled(model).largest.value == pytest.approx(plain(model).largest.value / 4)
    assert same(model).largest.value == pytest.approx(plain(model).largest.value)
    assert not scaled.alignments


def test_a_file_keeps_values_and_alignments(tmp_path: Path) -> None:
    model, file = module(), tmp_path / "top.jsonl"
    options: dict[str, Any] = {"k": 2, "path": file, "every": 2}
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run(tracker, optimizer, model, range(4))
    again = SpectrumTracker.for_module(F.cross_entropy, data(), **options)
    assert repr(again) == repr(tracker)
    assert repr(again).startswith("<SpectrumTracker: 2 measurements; at step 2: 0.")
    assert [step for step, _ in again.results] == [0, 2]
    for (_, one), (_, other) in zip(again.results, tracker.results, strict=True):
        assert torch.equal(one.values, other.values)
        assert one.intervals == other.intervals
    assert again.alignments[2] == tracker.alignments[2]
    assert math.isnan(again.alignments[0].overlap)
    run(again, optimizer, model, range(4, 8))
    assert math.isnan(again.alignments[4].overlap)  # vectors are not in the file
    assert 0 < again.alignments[6].overlap <= 1 + 1e-6
    assert len(file.read_text().splitlines()) == 4
    assert all(json.loads(line)["tracker"]["k"] == 2 for line in file.read_text().splitlines())
    with pytest.raises(ValueError, match="k was 2 and is 3"):
        SpectrumTracker.for_module(F.cross_entropy, data(), k=3, path=file)
    with pytest.raises(ValueError, match="k was 2 and is None"):
        SpectrumTracker.for_module(F.cross_entropy, data(), path=file)


def test_training_that_goes_back_drops_alignments_too() -> None:
    model = module()
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), k=1)
    run(tracker, torch.optim.SGD(model.parameters(), lr=0.1), model, range(5))
    tracker(model, step=2)
    assert [*tracker.alignments] == [step for step, _ in tracker.results] == [0, 1, 2]


def test_picture_has_a_curve_for_each_eigenvalue() -> None:
    model = module()
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), k=3)
    run(tracker, torch.optim.SGD(model.parameters(), lr=0.1), model, range(3))
    ax = tracker.plot()
    curves = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 3
    for place, line in enumerate(curves):
        assert [*line.get_ydata()] == [float(found.values[2 - place]) for _, found in tracker.results]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["eigenvalues"]
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "words"), [({"k": 0}, "^k must"), ({"which": "LM", "k": 2}, "^which must")]
)
def test_bad_input_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpectrumTracker.for_module(F.cross_entropy, data(), **options)


def test_more_than_there_are() -> None:
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), k=67)
    with pytest.raises(ValueError, match="k must"):
        tracker(module())
    assert isinstance(hk.train.Alignment(0.0, 0.0), tuple)


def test_the_largest_are_followed_and_a_restart_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 2, "every": 2, "mode": "reverse-over-reverse"}

    def trained(path: Path, *parts: range) -> list[dict[str, Any]]:
        model = module()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for steps in parts:
            tracker = SpectrumTracker.for_module(F.cross_entropy, data(), path=path, **options)
            run(tracker, optimizer, model, steps)
        records = [{k: v for k, v in entry.items() if k != "seconds"} for entry in tracker.records]
        return [{k: v for k, v in entry.items() if k != "overlap"} for entry in records]

    whole = trained(tmp_path / "whole.jsonl", range(10))
    assert trained(tmp_path / "parts.jsonl", range(5), range(5, 10)) == whole
    assert (tmp_path / "parts.jsonl.space").exists()
    cold = SpectrumTracker.for_module(F.cross_entropy, data(), method="lanczos", **options)
    model = module()
    run(cold, torch.optim.SGD(model.parameters(), lr=0.1), model, range(10))
    for one, other in zip(whole, cold.records, strict=True):
        assert one["eigenvalue_1"] == pytest.approx(other["eigenvalue_1"], rel=1e-2)
    passes = [sum(entry["passes"] for entry in records[1:]) for records in (whole, cold.records)]
    assert passes[0] < 0.7 * passes[1]


def test_a_damaged_space_is_said_and_costs_passes_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 1, "path": tmp_path / "top.jsonl"}
    model = module()
    run(
        SpectrumTracker.for_module(F.cross_entropy, data(), **options),
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        range(2),
    )
    (tmp_path / "top.jsonl.space").write_text("{}")
    with pytest.warns(hk.UnsavedWarning, match="nothing is recycled"):
        tracker = SpectrumTracker.for_module(F.cross_entropy, data(), **options)
    found = tracker(model)
    objective, params = hk.from_module(model, F.cross_entropy)
    truth = hk.lanczos(hk.hessian(objective, params, data()), 1, which="LA", tol=1e-6)
    assert float(found.values[0]) == pytest.approx(float(truth.values[0]), rel=1e-2)


def test_a_continued_tracker_refuses_other_parameters(tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 1, "path": tmp_path / "top.jsonl"}
    SpectrumTracker.for_module(F.cross_entropy, data(), **options)(module())
    again = SpectrumTracker.for_module(F.cross_entropy, data(), **options)
    with pytest.raises(ValueError, match=r"^params has .* parameters in all, and .* in the last measurement"):
        again(nn.Sequential(module(), nn.Linear(module()[-1].out_features, 6).double()))
