"""Losses, gradients and Hessian-vector products: pure functions on trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_choice, check_like
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import Layout, check_params, unflatten
from hvpkit.autodiff.randomness import check_repeatable
from hvpkit.curvature.batch_means import means_checked
from hvpkit.curvature.batch_sums import all_finite, blame_batch, sum_over
from hvpkit.curvature.batches import (
    INDEPENDENT,
    MODES,
    Kind,
    Leaves,
    LossShare,
    gradient_of,
    hessian_of_batch,
    loss_shares,
    weighted_batches,
)
from hvpkit.data import Data, as_data, whole_batch
from hvpkit.errors import NonFiniteError
from hvpkit.objective import check_loss_fn, normalized, normalized_in_batch

R = TypeVar("R")


def hvp(loss_fn: LossFn, params: Tree, batch: Batch, v: Tree, *, mode: str = "forward-over-reverse") -> Tree:
    r"""Multiply the Hessian of the mean loss over one batch by a vector, :math:`\nabla^2 L(p)\, v`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors, the point.
        batch: tree of tensors with a common first dimension.
        v: tree shaped like ``params``, of its dtype and device. Its values are not checked.
        mode: ``"forward-over-reverse"``: the directional derivative of the gradient;
            ``"reverse-over-reverse"``: the gradient of the gradient's inner product with ``v``, least
            memory; ``"finite-difference"``: central differences of the gradient with step
            :math:`\epsilon^{1/3} \max(1, \|p\|) / \|v\|`, about two thirds of the dtype's digits, where
            the others lack a derivative. Values that the loss detaches, or computes under ``torch.no_grad``, are
            constants in the others, and move with the parameters in differences.

    Returns:
        A tree shaped like ``params``. Nothing of the caller's is written to.

    Raises:
        TypeError: a leaf that is no floating tensor, a loss of integer dtype.
        ValueError: shapes, dtypes or devices that disagree; an unknown mode; a loss that is neither
            ``[B]`` nor 0-d, does not depend on ``params``, or draws other random numbers in each call.

    Cost:
        About 9 forward passes; 6 gradients' worth of them with finite differences.

    Source:
        Pearlmutter, Neural Computation 6 (1994) 147-160, doi:10.1162/neco.1994.6.1.147.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (batch * p["w"]).sum(-1) ** 2
        >>> params, batch = {"w": torch.ones(2)}, torch.tensor([[1.0, 2.0]])
        >>> hvp(loss_fn, params, batch, {"w": torch.tensor([1.0, 0.0])})
        {'w': tensor([2., 4.])}
    """
    check_loss_fn(loss_fn, params)
    loss_fn = normalized_in_batch(loss_fn, batch)
    return batch_matvec(hessian_of_batch, checked(loss_fn), params, batch, v, mode)


def batch_matvec(kind: Kind, function: Any, params: Tree, batch: Batch, v: Tree, mode: str) -> Tree:
    """Validate the arguments and multiply one batch's curvature of this kind by a tree."""
    check_choice("mode", mode, MODES)
    layout, leaves = check_params(params, finite=False)
    direction = [check_like(leaf, leaves[0]) for leaf in layout.leaves(v)]
    with exact_derivatives(leaves[0].device):
        whole = next(weighted_batches(whole_batch(batch)))
        linear = kind(function, layout, leaves, whole).linearize(mode)
        return unflatten(linear([direction])[0], layout.spec)


def checked(function: Callable[[Tree, Batch], R]) -> Callable[[Tree, Batch], R]:
    """Wrap a function of params and a batch: raise ValueError if its result is random or independent of params."""

    def wrapped(params: Tree, batch: Batch) -> R:
        device = _pytree.tree_leaves(params)[0].device
        result = check_repeatable(lambda: function(params, batch), device)
        floating = [
            leaf
            for leaf in _pytree.tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if floating and torch.is_grad_enabled() and not any(leaf.requires_grad for leaf in floating):
            raise ValueError(INDEPENDENT)
        return result

    return wrapped


def grad(loss_fn: LossFn, params: Tree, data: object) -> Tree:
    """Return the gradient of the mean loss over all examples, a tree shaped like ``params``.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.

    Raises:
        TypeError, ValueError: as :func:`hvp` and :func:`hvpkit.as_data`; a 0-d loss that is a sum over its batch, or
            no mean over examples where data is cut into batches.
        NonFiniteError: the gradient is not finite; names the first batch at fault.

    Cost:
        One pass of 3 forward passes' work.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (p * batch).sum(-1)
        >>> grad(loss_fn, torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([2., 4.])
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    examples = as_data(data, device=leaves[0].device)
    loss_fn = means_checked(normalized(loss_fn, examples), examples)
    return mean_gradient(loss_fn, layout, leaves, examples)


def mean_gradient(loss_fn: LossFn, layout: Layout, leaves: Leaves, examples: Data) -> Tree:
    """Return the gradient of the mean loss, which is not checked to be one."""

    def gradient(share: LossShare) -> Leaves:
        return gradient_of(share, leaves)

    with exact_derivatives(leaves[0].device):
        ranks, shares = examples.ranks, enumerate(loss_shares(loss_fn, layout, examples))
        checked_shares = (_checked_share(share) if number == 0 else share for number, share in shares)
        total = sum_over(checked_shares, gradient, leaves, ranks)
        if not all_finite(total):
            raise NonFiniteError(
                blame_batch("gradient", loss_shares(loss_fn, layout, examples), gradient, ranks)
            )
        return unflatten(total, layout.spec)


def _checked_share(share: LossShare) -> LossShare:
    """Wrap a share of the mean: raise ValueError if it is random or independent of the leaves."""

    def wrapped(points: Leaves) -> Tensor:
        value = check_repeatable(lambda: share(points), points[0].device)
        if not value.requires_grad:
            raise ValueError(INDEPENDENT)
        return value

    return wrapped


def loss(loss_fn: LossFn, params: Tree, data: object) -> Tensor:
    """Return the mean loss over all examples, 0-d.

    Args:
        loss_fn: as in :func:`grad`.
        params: as in :func:`grad`.
        data: as in :func:`grad`.

    Raises:
        TypeError, ValueError: as :func:`grad`.
        NonFiniteError: the loss is not finite; names the first batch at fault.

    Cost:
        One forward pass over the data.

    Example:
        >>> import torch
        >>> loss(lambda p, batch: (p - batch) ** 2, torch.tensor(1.0), torch.tensor([0.0, 3.0]))
        tensor(2.5000)
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    examples = as_data(data, device=leaves[0].device)
    loss_fn = means_checked(normalized(loss_fn, examples), examples)

    def value(share: LossShare) -> Leaves:
        return [share(leaves).detach()]

    with exact_derivatives(leaves[0].device):
        ranks, like = examples.ranks, leaves[0].new_zeros(())
        total = sum_over(loss_shares(loss_fn, layout, examples), value, [like], ranks)
        if not all_finite(total):
            raise NonFiniteError(blame_batch("loss", loss_shares(loss_fn, layout, examples), value, ranks))
        return total[0]
