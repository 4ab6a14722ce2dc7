"""Values that a loss computes under no_grad are constants in every mode, as those that it detaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.autodiff.forward_mode import jvp
from oracles import hessian_by_double_backward, relative_error

f64 = torch.float64
G = torch.Generator().manual_seed(0)
DATA = torch.randn(20, 4, dtype=f64, generator=G), torch.randint(0, 3, (20,), generator=G)
PARAMS = {"a": torch.randn(4, 5, dtype=f64, generator=G), "b": torch.randn(5, 3, dtype=f64, generator=G)}
MODES = ("auto", "reverse-over-reverse", "forward-over-reverse")


def under_no_grad(weight: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return weight()


def by_decorator(weight: Callable[[], Tensor]) -> Tensor:
    return torch.no_grad()(weight)()


def by_set_grad_enabled(weight: Callable[[], Tensor]) -> Tensor:
    with torch.set_grad_enabled(False):
        return weight()


def half_enabled(weight: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            found = weight()
        return 2 * found


def enabled(weight: Callable[[], Tensor]) -> Tensor:
    with torch.set_grad_enabled(True):
        return weight()


def detached(weight: Callable[[], Tensor]) -> Tensor:
    return weight().detach()


WAYS = (under_no_grad, by_decorator, by_set_grad_enabled, half_enabled, enabled, detached)


def weighted(way: Callable) -> hk.Objective:
    """Outputs times a weight of each example that is computed from them."""

    def forward(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        z = torch.tanh(batch[0] @ p["a"]) @ p["b"]
        return z * way(lambda: torch.sigmoid(z).sum(1, keepdim=True))

    return hk.Objective(forward, lambda z, batch: F.cross_entropy(z, batch[1], reduction="none"))


def ggn_by_jacobian(objective: hk.Objective) -> Tensor:
    leaves = [p.clone().requires_grad_() for p in PARAMS.values()]
    outputs = objective.forward(dict(zip(PARAMS, leaves, strict=True)), DATA)
    rows = [torch.autograd.grad(z, leaves, retain_graph=True) for z in outputs.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*outputs.shape, -1)
    chances = outputs.detach().softmax(1)
    B = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    return torch.einsum("nci,ncd,ndj->ij", J, B, J) / len(J)


@pytest.mark.parametrize("way", WAYS)
def test_values_under_no_grad_are_constants_in_every_mode(way: Callable) -> None:
    objective = weighted(way)
    H, G = hessian_by_double_backward(objective, PARAMS, DATA), ggn_by_jacobian(objective)
    v = {name: torch.ones_like(p) for name, p in PARAMS.items()}
    ones = torch.ones(len(H), dtype=f64)
    for mode in MODES:
        assert relative_error(hk.hessian(objective, PARAMS, DATA, mode=mode).to_dense(), H) < 1e-12
        assert relative_error(hk.ggn(objective, PARAMS, DATA, mode=mode).to_dense(), G) < 1e-12
    products = hk.hvp(objective, PARAMS, DATA, v), hk.ggnvp(objective, PARAMS, DATA, v)
    for product, matrix in zip(products, (H, G), strict=True):
        assert relative_error(torch.cat([leaf.flatten() for leaf in product.values()]), matrix @ ones) < 1e-12
    assert abs(hk.quadratic_form(objective, PARAMS, DATA, v).mean() - ones @ H @ ones) < 1e-12 * H.norm()


def test_contexts_are_as_they_were_after_a_derivative_and_after_an_error() -> None:
    methods = [
        (kind, kind.__enter__, kind.__exit__)
        for kind in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)
    ]

    def fails(p: Tensor) -> Tensor:
        with torch.no_grad():
            raise KeyError(p)

    p = torch.ones(2)
    assert jvp(lambda p: p**2, (p,), (p,))[1].tolist() == [2.0, 2.0]
    with pytest.raises(KeyError):
        jvp(fails, (p,), (p,))
    assert torch.is_grad_enabled()
    assert all((kind.__enter__, kind.__exit__) == (enter, leave) for kind, enter, leave in methods)
    assert jvp(lambda p: p**2, (p,), (p,))[1].tolist() == [2.0, 2.0]  # forward mode is on


def test_a_gradient_of_no_loss_is_refused_though_a_mode_agrees_with_its_differences() -> None:
    def switched(weight: Callable[[], Tensor]) -> Tensor:
        torch.set_grad_enabled(False)  # a function call, no context
        found = weight()
        torch.set_grad_enabled(True)
        return found

    with pytest.raises(ArithmeticError, match=r"only forward-over-reverse agrees .* gradient of no loss"):
        hk.hessian(weighted(switched), PARAMS, DATA)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * slope

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


def test_contexts_that_transforms_enter_for_themselves_leave_forward_mode_on() -> None:
    x = DATA[0]

    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = torch.func.grad(lambda q: Cube.apply(x @ q).sum())(p).square().sum().sqrt()
        inner = torch.func.grad(lambda q: Cube.apply(x @ q).sum())(p)
        return (x @ p) * inner.square().sum().sqrt() * weight / 1e3 + Cube.apply(x @ p)

    p, v = torch.randn(4, dtype=f64, generator=G), torch.ones(4, dtype=f64)

    def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
        size = (x.mT @ (3 * (x @ p["p"]) ** 2)).norm()
        return (x @ p["p"]) * size * size.detach() / 1e3 + (x @ p["p"]) ** 3

    H = hessian_by_double_backward(plain, {"p": p}, x)
    for mode in MODES[1:]:
        assert relative_error(hk.hvp(loss_fn, p, x, v, mode=mode), H @ v) < 1e-12
