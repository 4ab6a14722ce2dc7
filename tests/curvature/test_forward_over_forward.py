from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.curvature.forward_over_forward import quadratic_form
from oracles import product_by_double_backward, relative_error
from problems import NETWORKS, cross_entropy, network


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tree_like(params: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    pieces = v.split([p.numel() for p in params.values()])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, params.items(), strict=True)}


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_inner_product_with_the_hessians_product_for_each_example(
    name: str, batchnorm: str
) -> None:
    problem = network(name, num_examples=4)
    objective, params = hk.from_module(problem.model, cross_entropy, batchnorm=batchnorm)
    v = normal(sum(p.numel() for p in params.values()))
    found = quadratic_form(objective, params, problem.data, tree_like(params, v))
    assert found.shape == (4,)
    assert not found.requires_grad
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.stack(
            [
                v @ product_by_double_backward(lambda p, b, i=i: objective(p, b)[i], params, problem.data, v)
                for i in range(4)
            ]
        )
    assert relative_error(found, expected) < 1e-12


def test_the_curvature_of_a_batch_mean_is_one_number() -> None:
    problem = network("mlp")
    loss_fn = lambda p, batch: problem.objective(p, batch).mean()  # noqa: E731
    of_mean = quadratic_form(loss_fn, problem.params, problem.data, problem.params)
    of_each = quadratic_form(problem.objective, problem.params, problem.data, problem.params)
    assert of_mean.shape == ()
    assert torch.allclose(of_mean, of_each.mean(), rtol=1e-13)


def test_a_loss_linear_along_v_has_none() -> None:
    x, p = normal(3, 2), normal(2)
    assert quadratic_form(lambda p, x: x @ p, p, x, p).tolist() == [0.0, 0.0, 0.0]
    assert quadratic_form(lambda p, x: (x @ p) ** 2, p, x, torch.zeros(2).double()).tolist() == [0.0] * 3


IMAGES, ROWS, C = normal(3, 4, 3, 2), normal(3, 6), normal(4).abs() + 0.5
FUNCTIONS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "layer norm": (ROWS, lambda x: F.layer_norm(x, (6,))),
    "layer norm of two dimensions": (
        IMAGES,
        lambda x: F.layer_norm(x, (3, 2), normal(3, 2), normal(3, 2), 0.1),
    ),
    "batch norm": (IMAGES, lambda x: F.batch_norm(x, None, None, C, -C, True)),
    "batch norm of rows": (ROWS, lambda x: F.batch_norm(x, None, None, training=True, eps=0.1)),
    "batch norm by running statistics": (IMAGES, lambda x: F.batch_norm(x, C, C, -C, C) ** 2),
    "instance norm": (IMAGES, lambda x: F.instance_norm(x)),
    "instance norm with weights": (IMAGES, lambda x: F.instance_norm(x, weight=C, bias=C, eps=0.1)),
    "instance norm by running statistics": (
        IMAGES,
        lambda x: F.instance_norm(x, C, C, use_input_stats=False) ** 2,
    ),
    "group norm": (IMAGES, lambda x: F.group_norm(x, 2, C, C)),
    "rms norm": (ROWS, lambda x: F.rms_norm(x, (6,))),
    "modules of norms": (
        IMAGES,
        nn.Sequential(
            nn.InstanceNorm2d(4),
            nn.LayerNorm([4, 3, 2]),
            nn.GroupNorm(2, 4),
            nn.BatchNorm2d(4, track_running_stats=False),
        ).double(),
    ),
    "silu": (ROWS, F.silu),
    "silu in place": (ROWS, nn.Sequential(nn.Identity(), nn.SiLU(inplace=True))),
    "mish": (ROWS, lambda x: F.mish(2 * x, inplace=True)),
    "glu": (ROWS, F.glu),
    "glu along another dimension": (IMAGES, lambda x: F.glu(x, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_torch_differentiates_forward_twice_wrongly_are_right(name: str) -> None:
    x, function = FUNCTIONS[name]
    v, mix = normal(*x.shape, seed=1), normal(*function(x.clone()).shape, seed=2)

    def loss(p: Tensor) -> Tensor:
        return (function(1.0 * p) * mix).sum().sin()

    found = quadratic_form(lambda p, _: loss(p), x, normal(3), v)
    h = 1e-3
    f = [loss(x + factor * h * v) for factor in (-2, -1, 0, 1, 2)]
    expected = (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * h * h)
    assert float(expected.detach().abs()) > 1e-3
    assert relative_error(found, expected.detach()) < 1e-6


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.linalg.slogdet, "slogdet"),
        (lambda A: torch.logdet(A), "logdet"),
        (lambda A: A.det(), "det"),
        (lambda A: torch.linalg.solve(A, A), "solve"),
        (lambda A: torch.layer_norm(A, (3,)), "layer_norm"),
        (lambda A: A.cholesky_inverse(), "cholesky_inverse"),
    ],
)
def test_functions_that_stay_wrong_are_refused_by_name(function: Callable, name: str) -> None:
    def loss(p: Tensor, _: Tensor) -> Tensor:
        found = function(p @ p.mT + torch.eye(3))
        return found[-1].sum() if isinstance(found, tuple) else found.sum()

    with pytest.raises(ValueError, match=f"loss_fn calls {name}, which torch gets wrong"):
        quadratic_form(loss, normal(3, 3), normal(2), normal(3, 3))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def test_custom_functions_whose_saved_tensors_torch_takes_for_constants_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss_fn calls a torch\.autograd\.Function, which torch gets wrong"
    ):
        quadratic_form(lambda p, x: Square.apply(x @ p), normal(2), normal(3, 2), normal(2))
    assert Square.apply(torch.ones(2)).tolist() == [1.0, 1.0]


def test_functions_without_forward_mode_say_what_may_do() -> None:
    with pytest.raises(NotImplementedError) as caught:
        quadratic_form(lambda p, x: torch.cdist(x @ p, x).sum(1), normal(2, 2), normal(3, 2), normal(2, 2))
    assert "the inner product of v and hvp may do" in caught.value.__notes__[0]


def test_nothing_is_recorded_for_a_backward_pass() -> None:
    seen = []

    def loss(p: Tensor, x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return (x @ p) ** 2

    p = normal(2).requires_grad_()
    assert not quadratic_form(loss, p, normal(3, 2), p).requires_grad
    assert seen == [False]
    assert p.grad is None


def test_running_statistics_are_left_alone() -> None:
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    quadratic_form(
        lambda p, _: F.batch_norm(p, mean, var, training=True).pow(3).sum(1), ROWS, normal(3), ROWS
    )
    assert mean.tolist() == [0.0] * 6
    assert var.tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("loss_fn", "v", "error", "reason"),
    [
        (lambda _, x: x.sum(1), normal(2), ValueError, "loss_fn does not depend on params"),
        (lambda p, x: x @ p.detach(), normal(2), ValueError, "loss_fn does not depend on params"),
        (lambda p, x: x * p, normal(2), ValueError, "loss_fn returned shape"),
        (lambda p, x: (x @ p).long(), normal(2), TypeError, "loss_fn returned dtype torch.int64"),
        (lambda p, x: x @ p, normal(3), ValueError, "v must be shaped like the parameters"),
        (lambda p, x: x @ p, normal(2).float(), ValueError, "v has dtype torch.float32"),
    ],
)
def test_bad_arguments_are_refused(loss_fn: Callable, v: Tensor, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        quadratic_form(loss_fn, normal(2), normal(3, 2), v)


def test_parameters_of_integers_are_refused() -> None:
    p = normal(2).long()
    with pytest.raises(TypeError, match="must be floating point"):
        quadratic_form(lambda p, x: (x @ p).abs(), p, normal(3, 2), p)
