"""The loss along a line and on a plane through parameter space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpkit._utils.ranks import whole
from hvpkit._utils.typing import LossFn, Tree
from hvpkit.autodiff.pytree import check_params
from hvpkit.curvature.functional import loss
from hvpkit.data import as_data


def loss_along(
    loss_fn: LossFn, params: Tree, data: object, direction: Tensor, distances: Sequence[float] | Tensor
) -> Tensor:
    r"""Compute mean losses :math:`L(p + t u)` over all examples, for each distance t.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors, the point p.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        direction: flat vector u, ``[n]``, as an eigenvector.
        distances: values of t, ``[m]``.

    Returns:
        Losses ``[m]``, in the order of ``distances``.

    Raises:
        ValueError: ``direction`` has another shape; else as :func:`hvpkit.loss`.

    Cost:
        One forward pass over the data per distance.

    Example:
        >>> import torch
        >>> loss_along(lambda p, batch: (p * batch).sum(-1) ** 2, torch.zeros(2), torch.eye(2),
        ...            torch.tensor([1.0, 0.0]), [0.0, 2.0])
        tensor([0., 2.])
    """
    layout, leaves = check_params(params)
    direction = whole(direction)
    if direction.shape != (layout.n,):
        raise ValueError(f"direction must have shape [{layout.n}], got {list(direction.shape)}")
    examples = as_data(data, device=leaves[0].device)
    origin = layout.flatten(params)
    points = (origin + float(t) * direction for t in distances)
    return torch.stack([loss(loss_fn, layout.unflatten(point), examples) for point in points])


def loss_on_plane(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    directions: Tensor,
    first: Sequence[float] | Tensor,
    second: Sequence[float] | Tensor,
) -> Tensor:
    r"""Compute mean losses :math:`L(p + s u + t v)` over all examples, for each pair of distances s and t.

    Args:
        loss_fn: as for :func:`loss_along`.
        params: the point p.
        data: as for :func:`loss_along`.
        directions: columns u and v, ``[n, 2]``, as two eigenvectors.
        first: values of s, ``[a]``.
        second: values of t, ``[b]``.

    Returns:
        Losses ``[a, b]``.

    Raises:
        ValueError: ``directions`` has another shape; else as :func:`hvpkit.loss`.

    Cost:
        One forward pass over the data per pair.

    Example:
        >>> import torch
        >>> loss_on_plane(lambda p, batch: (p * batch).sum(-1) ** 2, torch.zeros(2), torch.eye(2), torch.eye(2),
        ...               [0.0, 2.0], [0.0, 1.0, 4.0])
        tensor([[ 0.0000,  0.5000,  8.0000],
                [ 2.0000,  2.5000, 10.0000]])
    """
    layout, leaves = check_params(params)
    directions = whole(directions)
    if directions.shape != (layout.n, 2):
        raise ValueError(f"directions must have shape [{layout.n}, 2], got {list(directions.shape)}")
    examples = as_data(data, device=leaves[0].device)
    origin = layout.flatten(params)
    starts = (layout.unflatten(origin + float(s) * directions[:, 0]) for s in first)
    return torch.stack([loss_along(loss_fn, start, examples, directions[:, 1], second) for start in starts])
