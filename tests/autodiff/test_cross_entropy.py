from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hvpkit.autodiff.cross_entropy import cross_entropy

G = torch.Generator().manual_seed(0)
ROWS = torch.randn(6, 4, dtype=torch.float64, generator=G)
IMAGES = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=G)
CLASSES = torch.tensor([0, 3, 1, -100, 2, 2])
PIXELS = torch.randint(4, (2, 3, 2), generator=G)
WEIGHT = torch.rand(4, dtype=torch.float64, generator=G)

CASES: dict[str, tuple[Tensor, Tensor, dict]] = {
    "mean": (ROWS, CLASSES, {}),
    "none": (ROWS, CLASSES, {"reduction": "none"}),
    "sum": (ROWS, CLASSES, {"reduction": "sum"}),
    "another class ignored": (ROWS, CLASSES.clamp(min=0), {"ignore_index": 2}),
    "classes in the second of four dimensions": (IMAGES, PIXELS, {"reduction": "none"}),
    "mean of pixels, some ignored": (IMAGES, PIXELS, {"ignore_index": 1}),
    "classes laid out last": (IMAGES.movedim(1, -1).contiguous().movedim(-1, 1), PIXELS, {}),
    "the class zero ignored": (ROWS, CLASSES.clamp(min=0), {"ignore_index": 0, "reduction": "none"}),
    "classes in bytes": (ROWS, CLASSES.clamp(min=0).to(torch.uint8), {}),
    "confident logits": (200 * ROWS, CLASSES, {"reduction": "none"}),
    "weights of classes": (ROWS, CLASSES, {"weight": WEIGHT}),
    "smoothed labels": (ROWS, CLASSES, {"label_smoothing": 0.1}),
    "probabilities": (ROWS, ROWS.softmax(1), {}),
    "one example": (ROWS[0], CLASSES[0], {}),
}


def derivatives(function: Callable, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute value, gradient and Hessian-vector product of a function that is not linear in the losses."""
    point = z.detach().requires_grad_()
    losses = function(point)
    (slope,) = torch.autograd.grad(losses.sin().sum(), point, create_graph=True)
    direction = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    return losses, slope, torch.autograd.grad(slope, point, direction)[0]


@pytest.mark.parametrize("case", CASES)
def test_value_and_both_derivatives_are_those_of_torch(case: str) -> None:
    z, target, options = CASES[case]
    found = derivatives(lambda z: cross_entropy(z, target, **options), z)
    expected = derivatives(lambda z: F.cross_entropy(z, target, **options), z)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_positional_arguments_are_in_torchs_order() -> None:
    arguments = (ROWS, CLASSES.clamp(min=0), None, None, 3, None, "none")
    assert torch.equal(cross_entropy(*arguments), F.cross_entropy(*arguments))


def test_targets_that_are_no_class_are_refused_as_torch_refuses_them() -> None:
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        cross_entropy(ROWS, CLASSES + 1)
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        cross_entropy(ROWS, CLASSES, ignore_index=0)


def test_it_maps_over_examples() -> None:
    def slope(z: Tensor, target: Tensor) -> Tensor:
        return torch.func.grad(lambda z: cross_entropy(z, target, reduction="sum"))(z)

    z, target = IMAGES[:, :, :, 0].mT, PIXELS[:, :, 0]
    mapped = torch.func.vmap(slope)(z, target)
    assert torch.allclose(mapped, torch.stack([slope(*pair) for pair in zip(z, target, strict=True)]))


def test_where_all_targets_are_ignored_losses_are_zero_and_their_mean_is_none() -> None:
    ignored = torch.full((6,), -100)
    assert not cross_entropy(ROWS, ignored, reduction="none").any()
    assert torch.isnan(cross_entropy(ROWS, ignored))
    assert torch.isnan(F.cross_entropy(ROWS, ignored))
