"""Callbacks in data-parallel training: all ranks measure together, and have the numbers."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hvpkit as hk
from distributed import training
from distributed.ranks import launch


@pytest.mark.parametrize("library", ["lightning", "lightning-fsdp2", "transformers"])
def test_all_ranks_share_a_measurement_and_have_its_numbers(library: str, tmp_path: Path) -> None:
    package = library.removesuffix("-fsdp2")
    pytest.importorskip(package)
    import_module(f"hvpkit.train.{package}")  # before ranks are forked
    done = launch(2, training.__file__, library, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["numbers"] == second["numbers"]
    last, other = first["state"], second["state"]
    statistics = [name for name in last if "running" in name]
    assert len(statistics) == 2
    assert all(last[name] != other[name] for name in statistics)  # each rank's own
    assert all(last[name] == other[name] for name in last if "layers.0" in name or "layers.3" in name)
    lines = (tmp_path / "spectrum.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [step for step, *_ in first["numbers"]]

    net = training.Net()
    net.load_state_dict({name.removeprefix("net."): torch.tensor(value) for name, value in last.items()})
    objective, params = hk.from_module(net, F.cross_entropy)
    ex = hk.extreme_eigenvalues(hk.hessian(objective, params, (training.X, training.Y)), tol=1e-4)
    assert first["numbers"][-1][1] == pytest.approx(ex.largest.value, rel=3e-4)
    assert first["numbers"][-1][2] == pytest.approx(ex.smallest.value, rel=3e-4)
    if library.startswith("lightning"):
        assert first["epochs"] == second["epochs"] == 1  # stopped by the spectrum
        assert first["best"] == second["best"] == "epoch=0.ckpt"
        assert (tmp_path / "epoch=0.ckpt").exists()
    else:
        assert first["logged"] == [largest for _, largest, *_ in first["numbers"]]


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    (script := tmp_path / "two_ranks.py").write_text(page.split("```python\n")[1].split("```")[0])
    done = launch(2, str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    objective, params = hk.from_module(hk.zoo.digits_cnn(seed=0), torch.nn.CrossEntropyLoss())
    ex = hk.extreme_eigenvalues(hk.hessian(objective, params, hk.zoo.digits()))
    assert line == f"{ex.smallest.value:.3f} {ex.largest.value:.3f} in {ex.num_matvecs:g} passes"
