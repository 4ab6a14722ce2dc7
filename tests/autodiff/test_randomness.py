from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error
from problems import cross_entropy

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


X, Y, W = reals(12, 4), torch.arange(12) % 3, reals(4, 3)
G = torch.Generator().manual_seed(0)

DRAWING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "dropout1d": lambda h: F.dropout1d(h[:, None], 0.5, training=True)[:, 0],
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel_softmax": F.gumbel_softmax,
    "noise": lambda h: h + torch.randn_like(h),
    "noise of an own generator": lambda h: h + torch.randn(h.shape, generator=G),
    "attention": lambda h: F.scaled_dot_product_attention(*[h[None, :, None]] * 3, dropout_p=0.5)[0, :, 0],
    "one bit": lambda h: h * (1 + torch.bernoulli(torch.tensor(0.5))),
}

REPEATABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout off": lambda h: F.dropout(h, 0.5, training=False),
    "rrelu in evaluation": lambda h: F.rrelu(h, training=False),
    "seeded noise": lambda h: h + torch.randn(h.shape, generator=torch.Generator().manual_seed(2)),
    "seeded dropout": lambda h: seeded(h),
}


def seeded(h: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return F.dropout(h, 0.5, training=True)


def losses(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    return lambda w, batch: cross_entropy(function(batch[0] @ w), batch[1])


@pytest.mark.parametrize("name", DRAWING)
def test_losses_that_draw_other_numbers_in_each_call_are_refused(name: str) -> None:
    before, loss_fn = torch.get_rng_state(), losses(DRAWING[name])
    for front_door in (hk.hessian, hk.grad, lambda *arguments: hk.hvp(*arguments, W)):
        with pytest.raises(
            ValueError, match=r"loss_fn draws other random numbers in each call \(aten\..*switch"
        ):
            front_door(loss_fn, W, (X, Y))
    for mode in MODES:
        with pytest.raises(ValueError, match="loss_fn draws other random numbers"):
            hk.hvp(loss_fn, W, (X, Y), W, mode=mode)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REPEATABLE)
def test_losses_that_draw_the_same_numbers_are_taken(name: str, mode: str) -> None:
    loss_fn = losses(REPEATABLE[name])
    oracle = hessian_by_double_backward(lambda p, batch: loss_fn(p["w"], batch), {"w": W}, (X, Y))
    H = hk.hessian(loss_fn, W, (X, Y), mode=mode)
    assert relative_error(H @ W.flatten(), oracle @ W.flatten()) < 1e-8
    assert torch.equal(H @ W.flatten(), H @ W.flatten())
