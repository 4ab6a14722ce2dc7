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
    """Return the mean loss of one batch as a function of the flat vector."""
    return lambda vector: loss_fn(_split(vector, params), batch).mean()


def gradient_at(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    point = point.detach().clone().requires_grad_()
    return torch.autograd.grad(function(point), point)[0]


def hessian_by_differences(loss_fn: Callable, params: Mapping[str, Tensor], batch: object) -> Tensor:
    """Compute the dense Hessian ``[n, n]`` of the batch mean by fourth-order central differences of the gradient."""
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


def ggn_by_differences(
    forward: Callable, output_loss: Callable, params: Mapping[str, Tensor], batch: object
) -> Tensor:
    """Compute the dense Gauss-Newton matrix ``[n, n]`` of the mean over examples by fourth-order differences.

    The sum over examples of J' H J, with J the Jacobian of an example's outputs and H the Hessian of its loss.
    """

    def derivatives(function: Callable[[Tensor], Tensor], units: Tensor) -> Tensor:
        steps = [[function(factor * 1e-3 * unit) for factor in (-2, -1, 1, 2)] for unit in units]
        return torch.stack([(f[0] - 8 * f[1] + 8 * f[2] - f[3]) / 0.012 for f in steps], dim=-1)

    point = parameters_to_vector(params.values()).detach()
    z = forward(params, batch).detach()
    rows = z.reshape(len(z), -1)

    def slopes(shift: Tensor) -> Tensor:
        return gradient_at(lambda rows: output_loss(rows.view(z.shape), batch).sum(), rows + shift)

    def outputs(shift: Tensor) -> Tensor:
        return forward(_split(point + shift, params), batch).detach().reshape(rows.shape)

    jacobians = derivatives(outputs, torch.eye(len(point), dtype=point.dtype))
    curvatures = derivatives(slopes, torch.eye(rows.shape[1], dtype=point.dtype))
    return (jacobians.mT @ curvatures @ jacobians).mean(0)


def jacobian(function: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """Compute the dense Jacobian ``[m, n]`` of the flattened values of ``function``, row by row with torch.autograd."""
    point = parameters_to_vector(params.values()).detach().requires_grad_()
    values = function(_split(point, params)).flatten()
    return torch.stack([torch.autograd.grad(value, point, retain_graph=True)[0] for value in values])


def ggn_by_jacobian(
    forward: Callable,
    output_loss: Callable,
    params: Mapping[str, Tensor],
    batch: object,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the dense J' H J ``[n, n]`` of the weighted sum over examples (the mean), with a dense H."""

    def loss(outputs: Tensor) -> Tensor:
        losses = output_loss(outputs, batch)
        return losses.mean() if weights is None else losses @ weights

    J = jacobian(lambda p: forward(p, batch), params)
    z = forward(params, batch).detach()
    H = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
    return J.mT @ H @ J


def second_moment(
    loss_fn: Callable, params: Mapping[str, Tensor], batch: object, weights: Tensor | None = None
) -> Tensor:
    """Compute the dense weighted sum (the mean) of g g' over the gradients g of single examples, ``[n, n]``."""
    gradients = jacobian(lambda p: loss_fn(p, batch), params)
    if weights is None:
        weights = torch.full((len(gradients),), 1 / len(gradients), dtype=gradients.dtype)
    return gradients.mT @ (weights[:, None] * gradients)


def hessian_by_double_backward(loss_fn: Callable, params: Mapping[str, Tensor], batch: object) -> Tensor:
    """Compute the dense Hessian ``[n, n]`` of the batch mean, row by row with torch.autograd."""
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
    """Compute the Hessian of the batch mean times ``v`` ``[n]`` with torch.autograd."""
    point = parameters_to_vector(params.values()).detach().requires_grad_()
    slope = torch.autograd.grad(scalar_loss(loss_fn, params, batch)(point), point, create_graph=True)[0]
    return torch.autograd.grad(slope, point, v)[0]


def ggn_product(
    forward: Callable, output_loss: Callable, params: Mapping[str, Tensor], batch: object, v: Tensor
) -> Tensor:
    """Compute J' H J ``v`` of the batch mean: J v by differences, H and J' with torch.autograd."""
    point = parameters_to_vector(params.values()).detach().requires_grad_()
    outputs = forward(_split(point, params), batch)
    with torch.no_grad():
        step = 1e-6
        z = [forward(_split(point + h * v, params), batch) for h in (step, -step)]
    leaf = outputs.detach().requires_grad_()
    slope = torch.autograd.grad(output_loss(leaf, batch).mean(), leaf, create_graph=True)[0]
    cotangent = torch.autograd.grad(slope, leaf, (z[0] - z[1]) / (2 * step))[0]
    return torch.autograd.grad(outputs, point, cotangent)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected`` (absolute where that is zero)."""
    scale = float(torch.linalg.vector_norm(expected)) or 1.0
    return float(torch.linalg.vector_norm(found.double() - expected.double())) / scale
