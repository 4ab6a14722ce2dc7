r"""Importance sampling of examples: scores, unbiased samples that favour high ones, and their standard errors.

With inclusion probabilities :math:`\pi_i` and weights :math:`1/(N \pi_i)` a weighted sum over a sample has the mean
over all N examples as its expectation, whatever the probabilities are. They only decide its variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.deadline import check_deadline
from hvpkit._utils.monitoring import advance
from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.ranks import together
from hvpkit._utils.typing import Batch, LossFn, Seed
from hvpkit._utils.validation import check_like
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.curvature.batches import Problem, check_per_example
from hvpkit.data import Data
from hvpkit.objective import Objective

if TYPE_CHECKING:
    from hvpkit.curvature.operator import CurvatureOperator

Importance = str | Callable[[object, Batch], Tensor] | None
"""Scores of examples: a name of :data:`SCORES`, a function ``(params, batch) -> [B]``, or None: all the same."""

UNIFORM_SHARE = 0.05
"""Share of the probability that does not follow the scores, so that each example can be drawn. By feel."""


Score: TypeAlias = Callable[[LossFn, object, Batch, "int | None"], Tensor]
"""``(loss_fn, params, batch, size)``: a score for each of the ``size`` examples; None: one for the whole batch."""


def _residual(loss_fn: LossFn, params: object, batch: Batch, size: int | None) -> Tensor:
    """Return the norm of each loss's gradient with respect to the outputs: ``|p - y|`` for cross entropy.

    Of a whole batch, the root mean square of these norms.
    """
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
        total = losses.mean() * max(1, losses.numel()) ** 0.5 if size is None else losses.sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    if size is None:
        root_mean_square: Tensor = torch.linalg.vector_norm(torch.cat([x.reshape(-1) for x in gradients]))
        return root_mean_square
    check_per_example(losses, size)
    norms: Tensor = torch.linalg.vector_norm(
        torch.cat([x.reshape(size, -1) for x in gradients], dim=1), dim=1
    )
    return norms


def _is_real(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def _loss(loss_fn: LossFn, params: object, batch: Batch, size: int | None) -> Tensor:
    with torch.no_grad():
        losses = loss_fn(params, batch).abs()
    return losses.mean() if size is None else losses


def _gradient(loss_fn: LossFn, params: object, batch: Batch, size: int | None) -> Tensor:
    """Return the norm of each example's gradient with respect to the parameters, one example at a time.

    Of a whole batch, the norm of the gradient of its mean loss.
    """

    def norm(examples: Batch) -> Tensor:
        leaves = [leaf.detach().requires_grad_() for leaf in _pytree.tree_leaves(params)]
        spec = _pytree.tree_structure(params)
        with torch.enable_grad():
            value = loss_fn(_pytree.tree_unflatten(leaves, spec), examples).mean()
            gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()

    if size is None:
        return norm(batch)
    singles = (_pytree.tree_map(lambda x, i=i: x[i : i + 1], batch) for i in range(size))
    return torch.stack([norm(one) for one in singles])


SCORES: dict[str, Score] = {
    "residual": _residual,
    "loss": _loss,
    "gradient": _gradient,
}


def scores(problem: Problem, importance: Importance) -> Tensor:
    """Return the scores of all units, examples or whole batches, ``[num_units]``, float64, on the CPU; one pass.

    Raises:
        ValueError: an unknown name; scores that are negative, not finite, or not one for each example.
    """
    loss_fn, data = problem.loss_fn, problem.data
    if importance is None:
        return torch.ones(data.num_units, dtype=torch.float64, device="cpu")
    params = problem.params
    if callable(importance):
        score: Score = lambda loss_fn, params, batch, size: importance(params, batch)  # noqa: E731, ARG005
    elif isinstance(importance, str) and importance in SCORES:
        score = SCORES[importance]
    else:
        raise ValueError(
            f"importance must be one of {', '.join(SCORES)}, a function, or None; got {importance!r}"
        )
    ranks = data.ranks
    with together(ranks, "scores"), exact_derivatives(problem.device):
        found = torch.zeros(
            data.num_units, dtype=torch.float64, device="cpu"
        )  # inside: not an inference tensor
        for batch, size, _, number, start in data.share():
            check_deadline()
            values = score(loss_fn, params, batch, None if data.whole else size)
            shapes = [(size,)] + [()] * data.whole
            if not isinstance(values, Tensor) or values.shape not in shapes:
                shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"importance must give one score for each example, [{size}]; got {shape}")
            values = values.detach().to("cpu", torch.float64)
            first = data.own_units.start + (number if data.whole else start)
            found[first : first + (1 if data.whole else size)] = values.mean() if data.whole else values
            advance(0.0, "sampling")
    if ranks is not None:  # each has zeros where it has no example: the bits are those of one process
        found = torch.stack(ranks.gather(found)).sum(dim=0)
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise ValueError("importance gave a score that is negative, NaN or infinite")
    return found


def inclusion(scores: Tensor, num_examples: int, uniform_share: float = UNIFORM_SHARE) -> Tensor:
    r"""Return probabilities ``[N]`` in (0, 1] that sum to ``num_examples``: :math:`\min(1, c\, s_i)`.

    A share of them is uniform.

    Example:
        >>> import torch
        >>> inclusion(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2, uniform_share=0.0)
        tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    size = scores.double() / scores.sum()
    size = (1 - uniform_share) * size + uniform_share / len(scores)
    certain = torch.zeros(len(scores), dtype=torch.bool, device="cpu")
    while True:
        left, rest = num_examples - int(certain.sum()), size[~certain].sum()
        chances = torch.where(certain, 1.0, size * (left / rest if float(rest) > 0 else 0.0))
        more = (chances >= 1) & ~certain
        if not bool(more.any()):
            return chances
        certain |= more


def systematic(chances: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Draw the indices of a systematic sample with these inclusion probabilities ``[N]``, sorted.

    The size is the sum of the probabilities, rounded down or up.
    """
    source = generator(seed, stream)
    order = torch.randperm(len(chances), generator=source, device="cpu")
    begin = torch.rand((), generator=source, dtype=torch.float64, device="cpu")
    marks = torch.cat([begin[None], begin + torch.cumsum(chances[order], 0)]).floor()
    return order[marks.diff() >= 1].sort().values


def importance_sample(
    scores: Tensor, data: Data, num_examples: int, seed: int, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a sample of the data by scores ``[N]``; return its indices and the weights that make it unbiased.

    Samples of other streams of a seed are independent.
    """
    if not float(scores.sum()) > 0:
        scores = torch.ones_like(scores)
    shares = data.shares
    chances = inclusion(scores * shares, data.count_units(num_examples))
    chosen = systematic(chances, seed, stream)
    return chosen, shares[chosen] / chances[chosen]


def sampling_error(sample: CurvatureOperator, vectors: Tensor, *, seed: Seed = 0) -> Tensor:
    r"""Estimate the standard errors of a sample's quadratic forms, taken for those over all the data.

    .. math:: \mathrm{se}(v' H_S v) = \Big| \sum_{i \in S} \pm w_i \sqrt{1 - \pi_i}\; v' H_i v \Big|

    with the weights :math:`w_i` of the sample, the inclusion probabilities :math:`\pi_i` of its examples, one sign for
    a random half of them, and the other for the rest: examples that are certain to be in the sample add no variance.
    One number is accurate to a factor of two or three only; average squares over seeds for more. A Ritz value of the
    sample, :math:`v' H_S v` at a vector that was fitted to it, has a bias besides: the vector's Rayleigh quotient on
    the data, one product, shows it.

    Args:
        sample: of :meth:`hvpkit.CurvatureOperator.coarsen`.
        vectors: v, ``[n]`` or columns ``[n, k]``.
        seed: of the halves.

    Returns:
        ``[k]`` (0-d for one vector), float64, on the CPU.

    Raises:
        TypeError: ``sample`` is no sample.
        ValueError: vectors of another shape, dtype or device; fewer than two examples that are not certain.

    Cost:
        ``k`` products of the sample.

    Source:
        Balanced half-samples: Wolter, Introduction to Variance Estimation (2007), doi:10.1007/978-0-387-35099-8, ch. 3.

    Example:
        >>> import torch, hvpkit as hk
        >>> g = torch.Generator().manual_seed(0)
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
        >>> H = hk.hessian(loss_fn, torch.ones(3), torch.randn(1000, 3, generator=g))
        >>> sample, v = H.coarsen(100, importance=None), torch.tensor([1.0, 0.0, 0.0])
        >>> error = abs(float(v @ (sample @ v) - v @ (H @ v)))
        >>> bool(error < 4 * sampling_error(sample, v))
        True
    """
    subset = getattr(sample, "subset", None)  # None: a plain operator, or examples that cannot be left out
    if subset is None:
        raise TypeError(f"sample must be what H.coarsen(...) returns, got {sample!r}")
    weights, chances = _weights(sample)
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(vectors) != sample.n:
        raise ValueError(f"vectors must be a tensor of shape [{sample.n}] or [{sample.n}, k]")
    check_like(vectors, sample, name="vectors")
    uncertain = (chances < 1).nonzero().flatten()
    if len(uncertain) < 2:
        raise ValueError(f"sample must have two examples that are in it by chance, and {sample!r} has fewer")
    shuffled = uncertain[
        torch.randperm(len(uncertain), generator=generator(resolve_seed(seed)), device="cpu")
    ]
    shares = weights * (1 - chances).sqrt()
    columns = vectors.reshape(sample.n, -1)
    forms = []
    for half in shuffled.tensor_split(2):
        images = subset(half, shares[half]) @ columns
        forms.append(sample.space.dots(columns.mT, images).diagonal())
    errors: Tensor = (forms[0] - forms[1]).to("cpu", torch.float64).abs()
    return errors if vectors.ndim == 2 else errors[0]


def _weights(sample: CurvatureOperator) -> tuple[Tensor, Tensor]:
    """Return the weights of the sample's examples and their inclusion probabilities, float64, on the CPU."""
    data, share = sample.data, sample.data_share
    if data.weights is None or share >= 1:
        raise TypeError(f"sample must be what H.coarsen(...) returns, and {sample!r} is over all of its data")
    weights = data.weights.to("cpu", torch.float64)
    over = weights * (data.num_examples / share) / data.unit_sizes
    return weights, torch.where(over > 1 + 1e-5, 1 / over, 1.0)
