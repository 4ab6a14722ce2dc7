r"""Which examples a cheap operator is made of: scores, and unbiased samples that favour high ones.

With inclusion probabilities :math:`\pi_i` and weights :math:`1/(N \pi_i)` a weighted sum over a sample has the mean
over all N examples as its expectation, whatever the probabilities are. They decide how far it scatters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.random import generator
from hvpkit._utils.typing import Batch, LossFn
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import Layout, batch_size, unflatten
from hvpkit.curvature.products import Leaves, check_per_example
from hvpkit.data import Data
from hvpkit.objective import Objective

Importance = str | Callable[[object, Batch], Tensor] | None
"""How to score examples: a name of :data:`SCORES`, a function ``(params, batch) -> [B]``, or None: all alike."""

UNIFORM_SHARE = 0.05
"""Of the probability that does not follow the scores: nothing is left out altogether."""


def _residual(loss_fn: LossFn, params: object, batch: Batch) -> Tensor:
    """Norm of the gradient of each loss with respect to the outputs: ``|p - y|`` for cross entropy."""
    if not isinstance(loss_fn, Objective):
        raise ValueError(
            'importance="residual" needs outputs: take an hk.Objective as loss_fn, as of hk.from_module, or '
            'importance="loss" or "gradient"'
        )
    with torch.no_grad():
        outputs, spec = _pytree.tree_flatten(loss_fn.forward(params, batch))
    points = [x.detach().requires_grad_() if _is_real(x) else x for x in outputs]
    wanted = [point for point in points if _is_real(point)]
    if not wanted:
        raise ValueError('importance="residual" needs outputs that are real tensors; take importance="loss"')
    with torch.enable_grad():
        losses = loss_fn.output_loss(_pytree.tree_unflatten(points, spec), batch)
        slopes = torch.autograd.grad(losses.sum(), wanted, allow_unused=True, materialize_grads=True)
    size = batch_size(batch)
    check_per_example(losses, size)
    norms: Tensor = torch.linalg.vector_norm(torch.cat([x.reshape(size, -1) for x in slopes], dim=1), dim=1)
    return norms


def _is_real(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def _loss(loss_fn: LossFn, params: object, batch: Batch) -> Tensor:
    with torch.no_grad():
        return loss_fn(params, batch).abs()


def _gradient(loss_fn: LossFn, params: object, batch: Batch) -> Tensor:
    """Norm of each example's gradient with respect to the parameters, one example at a time."""

    def norm(index: int) -> Tensor:
        one = _pytree.tree_map(lambda x: x[index : index + 1], batch)
        leaves = [leaf.detach().requires_grad_() for leaf in _pytree.tree_leaves(params)]
        spec = _pytree.tree_structure(params)
        with torch.enable_grad():
            value = loss_fn(_pytree.tree_unflatten(leaves, spec), one).sum()
            slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()

    return torch.stack([norm(index) for index in range(batch_size(batch))])


SCORES: dict[str, Callable[[LossFn, object, Batch], Tensor]] = {
    "residual": _residual,
    "loss": _loss,
    "gradient": _gradient,
}


def scores(loss_fn: LossFn, layout: Layout, leaves: Leaves, data: Data, importance: Importance) -> Tensor:
    """Scores of all examples ``[N]``, float64, on the CPU; one pass over the data.

    Raises:
        ValueError: an unknown name; scores that are negative, not finite, all zero, or not one for each example.
    """
    if importance is None:
        return torch.ones(data.num_examples, dtype=torch.float64)
    params = unflatten(leaves, layout.spec)
    if callable(importance):
        score: Callable[[Batch], Tensor] = lambda batch: importance(params, batch)  # noqa: E731
    elif importance in SCORES:
        score = lambda batch: SCORES[importance](loss_fn, params, batch)  # noqa: E731
    else:
        raise ValueError(
            f"importance must be one of {', '.join(SCORES)}, a function, or None; got {importance!r}"
        )
    found = []
    with exact_derivatives(leaves[0].device):
        for batch, _ in data.weighted():
            values = score(batch)
            if not isinstance(values, Tensor) or values.shape != (batch_size(batch),):
                shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"importance must give one score for each example, [{batch_size(batch)}]; got {shape}"
                )
            found.append(values.detach().to("cpu", torch.float64))
    result = torch.cat(found)
    if not bool(torch.isfinite(result).all()) or bool((result < 0).any()):
        raise ValueError("importance gave a score that is negative, NaN or infinite")
    return result if float(result.sum()) > 0 else torch.ones_like(result)


def inclusion(scores: Tensor, num_examples: int, uniform_share: float = UNIFORM_SHARE) -> Tensor:
    r"""Probabilities ``[N]`` in (0, 1] that sum to ``num_examples``: :math:`\min(1, c\, s_i)`, with a uniform share.

    Example:
        >>> import torch
        >>> inclusion(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2, uniform_share=0.0)
        tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    size = scores.double() / scores.sum()
    size = (1 - uniform_share) * size + uniform_share / len(scores)
    certain = torch.zeros(len(scores), dtype=torch.bool)
    while True:
        left, rest = num_examples - int(certain.sum()), size[~certain].sum()
        chances = torch.where(certain, 1.0, size * (left / rest if float(rest) > 0 else 0.0))
        more = (chances >= 1) & ~certain
        if not bool(more.any()):
            return chances
        certain |= more


def systematic(chances: Tensor, seed: int) -> Tensor:
    """Indices of a systematic sample with these inclusion probabilities ``[N]``, in random order of the examples.

    Its size is the sum of the probabilities, rounded down or up.
    """
    source = generator(seed)
    order = torch.randperm(len(chances), generator=source)
    begin = torch.rand((), generator=source, dtype=torch.float64)
    marks = torch.cat([begin[None], begin + torch.cumsum(chances[order], 0)]).floor()
    return order[marks.diff() >= 1].sort().values
