"""Callbacks in data-parallel training: all ranks measure together, and have the numbers."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from distributed import training
from distributed.ranks import launch
from hvpkit.train import SpectrumTracker


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


FOLLOWED = """
import sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import hvpkit as hk

folder = Path(sys.argv[1])
mesh = init_device_mesh("cpu", (dist.get_world_size() if dist.is_initialized() else 2,))
g = torch.Generator().manual_seed(0)
x, y = torch.randn(40, 6, generator=g).double(), torch.arange(40) % 3
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
data, criterion = hk.as_data((x, y), mesh=mesh), torch.nn.CrossEntropyLoss()


def tracker():
    return hk.train.SpectrumTracker.for_module(
        criterion, data, k=2, path=folder / "top.jsonl", mode="reverse-over-reverse"
    )


def measured(one, steps):
    for step in steps:
        one(model, step=step)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1.02)


measured(tracker(), range(3))
continued = tracker()
measured(continued, range(3, 5))
dist.barrier()
for name in ("top.jsonl.space", "top.jsonl.space.safetensors"):
    if mesh.get_rank() == 0:
        (folder / name).unlink()
        (folder / name).mkdir()
dist.barrier()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    measured(continued, [5])
assert any("recycled could not be written" in str(one.message) for one in said), said
records = [[entry["eigenvalue_0"], entry["eigenvalue_1"], entry["passes"]] for entry in continued.records]
if mesh.get_rank() == 0:
    print(records)
dist.destroy_process_group()
"""


def test_ranks_follow_the_top_and_continue_and_one_cannot_write(tmp_path: Path) -> None:
    (script := tmp_path / "followed.py").write_text(FOLLOWED)
    done = launch(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=g).double(), torch.arange(40) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tracker = SpectrumTracker.for_module(F.cross_entropy, data, k=2, mode="reverse-over-reverse")
    for *values, passes in found:
        ex = tracker(model)
        assert values == pytest.approx(ex.values.tolist(), rel=1e-9)
        assert passes == ex.num_matvecs
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1.02)
    assert len(found) == 6
    assert sum(passes for *_, passes in found[1:]) < 5 * found[0][2]
