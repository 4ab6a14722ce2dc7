from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpkit as hk
from hvpkit import zoo
from oracles import product_by_double_backward, relative_error

IMAGES, TOKENS = (3, 16, 16), (8,)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "c1": (zoo.c1, (3, 32, 32)),
    "c2": (zoo.c2, (3, 32, 32)),
    **{
        f"resnet8-{batchnorm=}-{residual=}": (
            partial(zoo.cifar_resnet, 8, batchnorm=batchnorm, residual=residual, width=4),
            IMAGES,
        )
        for batchnorm in (True, False)
        for residual in (True, False)
    },
    "resnet8-projection": (partial(zoo.cifar_resnet, 8, shortcut="projection", width=4), IMAGES),
    "resnet18": (partial(zoo.resnet18_cifar, width=2), IMAGES),
    "mlp": (partial(zoo.mlp, in_features=3 * 16 * 16, hidden=[8, 8]), IMAGES),
    "vit": (partial(zoo.tiny_vit, image_size=16, width=8, num_heads=2, num_layers=2), IMAGES),
    "gpt": (partial(zoo.tiny_gpt, context=8, width=8, num_heads=2), TOKENS),
}
every_model = pytest.mark.parametrize("name", MODELS)


def next_token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.mT, targets, reduction="none").mean(-1)


def problem(
    name: str, batchnorm: str = "eval"
) -> tuple[hk.Objective, dict[str, Tensor], tuple[Tensor, Tensor]]:
    make, shape = MODELS[name]
    g = torch.Generator().manual_seed(4)
    if name == "gpt":
        sequences = torch.randint(0, 64, (4, 9), generator=g)
        x, y = sequences[:, :-1], sequences[:, 1:]
    else:
        x, y = torch.randn(4, *shape, generator=g, dtype=torch.float64), torch.arange(4)
    criterion = next_token_loss if name == "gpt" else nn.CrossEntropyLoss()
    return *hk.from_module(make().double(), criterion, batchnorm=batchnorm), (x, y)


def direction(params: dict[str, Tensor]) -> Tensor:
    n = sum(p.numel() for p in params.values())
    return torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@every_model
@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_products_agree_with_double_backward(name: str, mode: str) -> None:
    objective, params, batch = problem(name)
    v = direction(params)
    with sdpa_kernel(SDPBackend.MATH):
        expected = product_by_double_backward(objective, params, batch, v)
    assert float(expected.norm()) > 0
    assert relative_error(hk.hessian(objective, params, batch, mode=mode) @ v, expected) < 1e-11


@pytest.mark.parametrize("name", ["c1", "resnet8-batchnorm=True-residual=True", "resnet18"])
def test_products_on_batch_statistics_agree_with_double_backward(name: str) -> None:
    objective, params, batch = problem(name, "batch")
    v = direction(params)
    expected = product_by_double_backward(objective, params, batch, v)
    H = hk.hessian(objective, params, [batch], mode="forward-over-reverse")
    assert relative_error(H @ v, expected) < 1e-10


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("c1", "c2")])  # large
def test_the_preflight_finds_nothing(name: str) -> None:
    objective, params, batch = problem(name)
    report = hk.check(hk.hessian(objective, params, batch, mode="forward-over-reverse"))
    assert report.ok, report
