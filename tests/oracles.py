"""Independent answers: dense float64 matrices that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector


def _split(vector: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = vector.split([p.numel() for p in params.values()])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, params.items(), strict=True)}


def scalar_loss(loss_fn: Callable, params: Mapping[str, Tensor], batch: object) -> Callable[[Tensor], Tensor]:
    """The mean loss of one batch as a function of the flat vector."""
    return lambda vector: loss_fn(_split(vector, params), batch).mean()


def gradient_at(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    point = point.detach().clone().requires_grad_()
    return torch.autograd.grad(function(point), point)[0]


def hessian_by_differences(loss_fn: Callable, params: Mapping[str, Tensor], batch: object) -> Tensor:
    """Dense Hessian ``[n, n]`` of the batch mean from fourth-order central differences of the gradient."""
    function = scalar_loss(loss_fn, params, batch)
    point = parameters_to_vector(params.values()).detach()
    assert point.dtype == torch.float64
    step = 1e-3
    columns = []
    for index in range(len(point)):
        unit = torch.zeros_like(point)
        unit[index] = step
        g = [gradient_at(function, point + factor * unit) for factor in (-2, -1, 1, 2)]
        columns.append((g[0] - 8 * g[1] + 8 * g[2] - g[3]) / (12 * step))
    return torch.stack(columns, dim=1)


def hessian_by_double_backward(loss_fn: Callable, params: Mapping[str, Tensor], batch: object) -> Tensor:
    """Dense Hessian ``[n, n]`` of the batch mean, row by row through torch.autograd."""
    point = parameters_to_vector(params.values()).detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the one backend with a second derivative
        value = scalar_loss(loss_fn, params, batch)(point)
    slope = torch.autograd.grad(value, point, create_graph=True)[0]
    if not slope.requires_grad:
        return torch.zeros(len(point), len(point), dtype=point.dtype)
    rows = [torch.autograd.grad(s, point, retain_graph=True)[0] for s in slope]
    return torch.stack(rows)


def product_by_double_backward(
    loss_fn: Callable, params: Mapping[str, Tensor], batch: object, v: Tensor
) -> Tensor:
    """Hessian of the batch mean times ``v`` ``[n]``, through torch.autograd."""
    point = parameters_to_vector(params.values()).detach().requires_grad_()
    slope = torch.autograd.grad(scalar_loss(loss_fn, params, batch)(point), point, create_graph=True)[0]
    return torch.autograd.grad(slope, point, v)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected (absolute where that is zero)."""
    scale = float(torch.linalg.vector_norm(expected)) or 1.0
    return float(torch.linalg.vector_norm(found.double() - expected.double())) / scale
