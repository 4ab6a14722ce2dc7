r"""Curvature matvecs from first derivatives alone, in float64: the reference for exact ones.

Each matvec K v is the gradient at the point p of a loss in which central differences with step h stand for
the other derivatives, as :math:`q \mapsto \frac{1}{2h} [\ell(q + hv) - \ell(q - hv)]` for the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.autodiff.pytree import check_params, flatten, join, unflatten
from hvpkit.curvature.batches import Leaves, Problem, gradient_of
from hvpkit.curvature.float64 import in_float64
from hvpkit.curvature.functional import mean_gradient
from hvpkit.objective import Objective, normalized


def matvec_by_differences(kind: str, problem: Problem, v: Tensor) -> tuple[Tensor, float]:
    """Return the matvec with ``v [n]`` in float64, and how far it moves with a step of twice the size.

    The step is the parameters' norm times eps^(1/2), less than the eps^(1/3) of fewest errors: few units of a ReLU
    network change sides within it, and those that do show in the second figure.

    Raises:
        RuntimeError, TypeError: the loss does not run in float64.
    """
    point = join(problem.leaves).double()
    norm = torch.linalg.vector_norm(v.double())
    size = float(torch.linalg.vector_norm(point).clamp(min=1.0))
    step = torch.finfo(torch.float64).eps ** 0.5 * size
    params, direction = (problem.layout.unflatten(flat) for flat in (point, v / norm))
    loss_fn = in_float64(problem.loss_fn)

    def matvec(step: float) -> Tensor:
        loss = normalized(DIFFERENCES[kind](loss_fn, params, direction, step), problem.data)
        layout, leaves = check_params(params)
        gradient: Tensor = layout.flatten(mean_gradient(loss, layout, leaves, problem.data))
        return gradient.mul(norm)

    near = matvec(step)
    return near, float(torch.linalg.vector_norm(matvec(2 * step) - near))


def _central(function: Callable[[float], Leaves], step: float) -> Leaves:
    pairs = zip(function(step), function(-step), strict=True)
    return [(ahead - behind) / (2 * step) for ahead, behind in pairs]


def _moved(params: Tree, v: Tree, h: float) -> Tree:
    return _pytree.tree_map(lambda p, d: p + h * d, params, v)


def _hessian(loss_fn: LossFn, _: Tree, v: Tree, step: float) -> LossFn:
    """Return a loss with gradient H v."""
    return lambda params, batch: _central(lambda h: [loss_fn(_moved(params, v, h), batch)], step)[0]


def _empirical_fisher(loss_fn: LossFn, point: Tree, v: Tree, step: float) -> LossFn:
    """Return a loss whose gradient at the point is the mean of g g'v, over the gradients g of single examples."""

    def loss(params: Tree, batch: Batch) -> Tensor:
        derivatives = _central(lambda h: [loss_fn(_moved(point, v, h), batch)], step)[0]
        return derivatives * loss_fn(params, batch)

    return loss


def _ggn(objective: Objective, point: Tree, v: Tree, step: float) -> LossFn:
    """Return a loss with gradient J'u at the point, for u the output loss's Hessian times J v."""

    def loss(params: Tree, batch: Batch) -> Tensor:
        outputs, spec = flatten(objective.forward(params, batch))
        tangents = _central(lambda h: flatten(objective.forward(_moved(point, v, h), batch))[0], step)

        def output_loss(leaves: Leaves) -> Tensor:
            return objective.output_loss(unflatten(leaves, spec), batch)

        def gradient(h: float) -> Leaves:
            moved = [z.detach() + h * t for z, t in zip(outputs, tangents, strict=True)]
            return gradient_of(lambda leaves: output_loss(leaves).sum(), moved)

        inner = [z * u for z, u in zip(outputs, _central(gradient, step), strict=True)]
        by_example = output_loss(outputs).ndim > 0
        return torch.stack([leaf.flatten(1).sum(1) if by_example else leaf.sum() for leaf in inner]).sum(0)

    return loss


DIFFERENCES: dict[str, Callable[[Any, Tree, Tree, float], LossFn]] = {
    "hessian": _hessian,
    "ggn": _ggn,
    "empirical-fisher": _empirical_fisher,
}
