"""A problem of 75 parameters in the place of the benchmarks' problems, with references of its own."""

import matplotlib
import pytest
import torch
from torch import nn

import _problems as problems
import _references as references


def examples():
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 5, generator=g), torch.randint(0, 3, (64,), generator=g)


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def two_layers(monkeypatch, tmp_path):
    recipe = problems.Recipe(examples, network, 3)
    monkeypatch.setattr(problems, "RECIPES", {"two layers": recipe})
    monkeypatch.setattr(references, "FILE", tmp_path / "references.json")
    return recipe


@pytest.fixture(scope="module")
def no_window():
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


@pytest.fixture
def ends():
    """Both ends of the Hessian of a network's mean cross entropy, from the float64 dense matrix."""

    def of(model, x, y):
        return dense_ends(model.double(), x.double(), y)

    return of


def dense_ends(model, x, y):
    weights = list(model.parameters())
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in flat]
    values = torch.linalg.eigvalsh(torch.stack([torch.cat([p.flatten() for p in row]) for row in rows]))
    return [float(values[0]), float(values[-1])]
