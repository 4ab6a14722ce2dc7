from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hvpkit as hk
from hvpkit.autodiff.exact import Autocast, exact_derivatives
from oracles import (
    ggn_by_jacobian,
    gradient_at,
    hessian_by_double_backward,
    relative_error,
    scalar_loss,
    second_moment,
)
from problems import cross_entropy

CPU = torch.device("cpu")
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {mode: 1e-5 for mode in MODES[:2]} | {"finite-difference": 1e-2}  # in float32
SHARED = torch.autocast("cpu")

CONTEXTS = {
    "bfloat16": partial(torch.autocast, "cpu"),
    "float16": partial(torch.autocast, "cpu", torch.float16),
    "of torch.amp": partial(torch.amp.autocast, "cpu"),
    "one for all calls": lambda: SHARED,
}


class Net(nn.Module):
    """Perceptron that calls its layers under a context of its own."""

    def __init__(self, context: object = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            return self.layers(x)
        with self.context():
            return self.layers(x)


def problem(context: object, dtype: torch.dtype) -> tuple:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Net(context).to(dtype)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return *hk.from_module(model, cross_entropy), (x, torch.arange(12) % 3)


OBJECTIVE, PARAMS, DATA = problem(None, torch.float64)
HESSIAN = hessian_by_double_backward(OBJECTIVE, PARAMS, DATA)
GGN = ggn_by_jacobian(OBJECTIVE.forward, OBJECTIVE.output_loss, PARAMS, DATA)
V = torch.randn(len(HESSIAN), 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONTEXTS)
def test_autocast_in_the_loss_does_not_round_matvecs(name: str, mode: str) -> None:
    objective, params, data = problem(CONTEXTS[name], torch.float32)
    for kind, oracle in ((hk.hessian, HESSIAN), (hk.ggn, GGN)):
        K = kind(objective, params, data, mode=mode)
        assert relative_error(K @ V, oracle @ V.double()) < TOLERANCE[mode]
    assert SHARED._enabled


def test_autocast_in_the_loss_does_not_round_anything_else() -> None:
    objective, params, data = problem(CONTEXTS["bfloat16"], torch.float32)
    F_ = hk.empirical_fisher(objective, params, data)
    assert relative_error(F_ @ V, second_moment(OBJECTIVE, PARAMS, DATA) @ V.double()) < 1e-5
    slope = gradient_at(scalar_loss(OBJECTIVE, PARAMS, DATA), F_.flatten(PARAMS))
    assert relative_error(F_.flatten(hk.grad(objective, params, data)), slope) < 1e-5
    assert relative_error(hk.loss(objective, params, data), OBJECTIVE(PARAMS, DATA).mean()) < 1e-6
    along = hk.quadratic_form(objective, params, data, F_.unflatten(V[:, 0])).mean()
    assert relative_error(along, V[:, 0].double() @ HESSIAN @ V[:, 0].double()) < 1e-5
    H = hk.hessian(objective, params, data)
    assert hk.check(H).ok
    ends = torch.linalg.eigvalsh(HESSIAN)[[0, -1]]
    found = hk.extreme_eigenvalues(H)
    assert torch.allclose(torch.tensor([found.smallest.value, found.largest.value]).double(), ends, rtol=2e-2)


def test_arithmetic_that_was_asked_for_stays_on() -> None:
    for context in (None, CONTEXTS["bfloat16"]):
        objective, params, data = problem(context, torch.float32)
        H = hk.hessian(objective, params, data, arithmetic="bf16", mode=MODES[1])
        assert 1e-4 < relative_error(H @ V, HESSIAN @ V.double()) < 0.1
        assert 1e-4 < H.precision < 0.1


def test_autocast_comes_back() -> None:
    def on() -> bool:
        with torch.autocast("cpu"):
            return torch.is_autocast_enabled("cpu")

    before = torch.autocast.__enter__
    with exact_derivatives(CPU), exact_derivatives(CPU):
        assert not on()
        with Autocast("cpu"):
            assert on()
            with torch.autocast("cpu", enabled=False):
                assert not torch.is_autocast_enabled("cpu")
                assert not on()
        assert not on()
    with pytest.raises(KeyError), exact_derivatives(CPU):
        raise KeyError
    assert torch.autocast.__enter__ is before
    assert on()


def test_a_loss_that_needs_autocast_for_its_dtypes_is_told_so() -> None:
    def mixed(w: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return (x.bfloat16() @ w).float().square().sum(1)

    w, x = torch.ones(4, 2), torch.ones(3, 4)
    mixed(w, x)
    for mode in MODES:
        with pytest.raises(RuntimeError, match="dtype") as caught:
            hk.hvp(mixed, w, x, w, mode=mode)
        notes = [note for note in caught.value.__notes__ if "torch.autocast" in note]
        assert notes == [
            "hvpkit: the loss opens torch.autocast, which is off in exact derivatives; where dtypes disagree "
            "without it, convert to the dtype of the parameters"
        ]
    with pytest.raises(RuntimeError, match="dtype") as caught:
        hk.hvp(lambda w, x: (x.bfloat16() @ w).sum(1), w, x, w)
    assert not [note for note in getattr(caught.value, "__notes__", ()) if "torch.autocast" in note]
