"""Fisher matrices: second moments of gradients, at the data's targets or at the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.random import generator
from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.autodiff.pytree import Layout, batch_size, unflatten
from hvpkit.curvature.batches import Leaves, Problem, WeightedBatch
from hvpkit.curvature.functional import batch_matvec, checked
from hvpkit.curvature.ggn import BatchGGN, ggn_of_batch, loss_matvec
from hvpkit.objective import Objective, check_loss_fn, normalized_in_batch


def fisher_vp(
    loss_fn: LossFn, params: Tree, batch: Batch, v: Tree, *, mode: str = "forward-over-reverse"
) -> Tree:
    r"""Multiply the empirical Fisher matrix of one batch by a vector, :math:`\frac1B \sum_i g_i (g_i^\top v)`.

    :math:`g_i` is the gradient of the loss of example i. It is the Gauss-Newton matrix of half the squared losses.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``.
        params: as in :func:`hvpkit.hvp`.
        batch: as in :func:`hvpkit.hvp`.
        v: as in :func:`hvpkit.hvp`.
        mode: how the inner products :math:`g_i^\top v` are made: see :func:`hvpkit.ggnvp`.

    Returns:
        A tree shaped like ``params``. Nothing of the caller's is written to.

    Raises:
        TypeError: as :func:`hvpkit.hvp`.
        ValueError: a 0-d loss, whose examples are not known apart; and as :func:`hvpkit.hvp`.

    Cost:
        About 6 forward passes.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: batch @ p
        >>> fisher_vp(loss_fn, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.ones(2))
        tensor([2., 3.])
    """
    check_loss_fn(loss_fn, params)
    loss_fn = normalized_in_batch(loss_fn, batch)
    return batch_matvec(empirical_fisher_of_batch, checked(loss_fn), params, batch, v, mode)


def empirical_fisher_of_batch(
    loss_fn: LossFn, layout: Layout, leaves: Leaves, batch: WeightedBatch, /
) -> BatchGGN:
    """Return one batch's share of the empirical Fisher matrix."""
    return ggn_of_batch(Objective(loss_fn, _half_square), layout, leaves, batch)


def _half_square(losses: Tensor, _: Batch) -> Tensor:
    if losses.ndim == 0:
        raise ValueError(
            "loss_fn returned a 0-d mean, but a Fisher matrix is made of the gradients of single examples; "
            "return one loss for each example, shape [B]"
        )
    return 0.5 * losses.square()


@dataclass(frozen=True)
class Likelihood:
    """A distribution of targets given outputs z, for losses that are its negative logarithm up to weights.

    Attributes:
        name: ``"gaussian"`` (z: means), ``"bernoulli"`` (logits) or ``"categorical"`` (logits).
        dim: the dimension of the outputs that holds the classes of a categorical one; None for the others.
    """

    name: str
    dim: int | None = None

    def covariance(self, z: Tensor, u: Tensor) -> Tensor:
        """Multiply the covariance of scores, the Hessian of the negative log likelihood at ``z``, by ``u``."""
        if self.dim is not None:
            p = z.softmax(self.dim)
            return p * (u - (p * u).sum(self.dim, keepdim=True))
        return u * torch.sigmoid(z) * torch.sigmoid(-z) if self.name == "bernoulli" else u

    def score(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Return the gradient of the negative log likelihood at a target drawn by one uniform number a prediction."""
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # probabilities add up to one
        if self.dim is not None:
            p = wide.softmax(self.dim)
            cumulative = p.cumsum(self.dim)
            total = cumulative.narrow(self.dim, -1, 1)  # one, up to rounding
            drawn = (cumulative <= uniform.unsqueeze(self.dim) * total).sum(self.dim, keepdim=True)
            drawn = drawn.clamp(max=p.shape[self.dim] - 1)
            score = p.scatter_add(self.dim, drawn, -torch.ones_like(total))
        elif self.name == "bernoulli":
            p = torch.sigmoid(wide)
            score = p - (uniform < p).to(p)
        else:
            score = torch.special.ndtri(uniform)
        return score.to(z)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return inner products, one for each prediction."""
        return a * b if self.dim is None else (a * b).sum(self.dim)

    def weights(self, curvature: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Tensor:
        """Return the weight of each prediction in a loss with this ``curvature``, measured at outputs zero."""
        zero, probe = torch.zeros_like(like), torch.ones_like(like)
        if self.dim is not None:
            probe.narrow(self.dim, 1, probe.shape[self.dim] - 1).zero_()
        return self.dot(probe, curvature(zero, probe)) / self.dot(probe, self.covariance(zero, probe))


LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def find_likelihood(objective: Objective, problem: Problem, name: str | None) -> Likelihood:
    """Find the likelihood whose negative logarithm the loss is; with a ``name``, only that one is tried.

    The test compares Hessians of the first batch's loss with respect to random outputs.

    Raises:
        ValueError: there is none; or the outputs are not one tensor with the examples along its first dimension.
    """
    batch = next(iter(problem.data))
    with torch.no_grad():
        outputs = objective.forward(problem.params, batch)
    like, curvature = _curvature(objective.output_loss, outputs, batch)
    candidates = [Likelihood("gaussian"), Likelihood("bernoulli")]
    if like.ndim > 1:
        candidates += [Likelihood("categorical", dim) for dim in dict.fromkeys((1, like.ndim - 1))]
    random = generator(0)
    z, u = (torch.randn(like.shape, generator=random, device="cpu").to(like) for _ in range(2))
    expected = curvature(z, u)
    for likelihood in candidates:
        weights = likelihood.weights(curvature, like)
        if likelihood.dim is not None:
            weights = weights.unsqueeze(likelihood.dim)
        apart = torch.linalg.vector_norm(weights * likelihood.covariance(z, u) - expected)
        fits = apart <= torch.finfo(like.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
        if name in (None, likelihood.name) and bool(fits) and bool(expected.any()):
            return likelihood
    wanted = f"any of {LIKELIHOODS}" if name is None else repr(name)
    raise ValueError(
        f"likelihood: output_loss is not minus the logarithm of {wanted} (on the first batch), so that predictions "
        "of the model's own are not known; take hvpkit.ggn, or hvpkit.empirical_fisher"
    )


def fisher_of_batch(
    objective: Objective,
    layout: Layout,
    leaves: Leaves,
    batch: WeightedBatch,
    /,
    *,
    likelihood: Likelihood,
    num_samples: int,
    seed: int,
) -> BatchGGN:
    """Return one batch's share of the Fisher matrix of sampled predictions.

    It is the Gauss-Newton matrix of a loss of the outputs whose Hessian is the second moment of the scores.
    """
    loss_at = partial(_sampled_loss, objective.output_loss, likelihood, num_samples, seed, batch.start)
    return BatchGGN(objective.forward, loss_at, layout, leaves, batch)


def _sampled_loss(
    output_loss: LossFn,
    likelihood: Likelihood,
    num_samples: int,
    seed: int,
    start: int,
    outputs: Tree,
    batch: Batch,
) -> LossFn:
    r"""Return the loss :math:`\frac12 \sum w (s^\top z)^2` of outputs z for the scores s sampled at ``outputs``."""
    z, curvature = _curvature(output_loss, outputs, batch)
    weights = likelihood.weights(curvature, z)
    uniforms = _uniforms(seed, start, (*weights.shape, num_samples), z.device)
    scores = [likelihood.score(z, uniform) for uniform in uniforms.unbind(-1)]
    with torch.no_grad():
        by_example = output_loss(outputs, batch).ndim > 0

    def loss(outputs: Tree, batch: Batch) -> Tensor:
        z, _ = _curvature(output_loss, outputs, batch)
        squares = torch.stack([likelihood.dot(score, z).square() for score in scores]).mean(0)
        losses = (0.5 * weights * squares).reshape(len(z), -1).sum(1)
        return losses if by_example else losses.sum()

    return loss


def _curvature(
    output_loss: LossFn, outputs: Tree, batch: Batch
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return the one tensor of the outputs, and the function ``(z, u)`` to the loss's Hessian at z times u."""
    leaves, spec = _pytree.tree_flatten(outputs)
    floating = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    size = _num_examples(batch)
    if len(floating) != 1 or (size is not None and leaves[floating[0]].shape[:1] != (size,)):
        shapes = [tuple(leaves[i].shape) for i in floating]
        raise ValueError(
            "objective: a Fisher matrix of the model's predictions needs outputs that are one tensor with the "
            f"{'' if size is None else f'{size} '}examples along its first dimension, got shapes {shapes}; let "
            "forward return that tensor"
        )
    (place,) = floating

    def loss(values: Leaves) -> Tensor:
        replaced = [values[0] if i == place else leaf for i, leaf in enumerate(leaves)]
        return output_loss(unflatten(replaced, spec), batch).sum()

    def curvature(z: Tensor, u: Tensor) -> Tensor:
        return loss_matvec(loss, [z], [u])[0]

    return leaves[place], curvature


def _num_examples(batch: Batch) -> int | None:
    """Return the number of examples in a batch; None if it has no common first dimension: it is read whole."""
    try:
        return batch_size(batch)
    except (TypeError, ValueError):
        return None


def _uniforms(seed: int, start: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw numbers in (0, 1) that depend on the example's index and not on its batch."""
    stream = np.random.PCG64(seed).advance(start * prod(shape[1:]))
    return torch.from_numpy(np.random.Generator(stream).random(shape) + 2.0**-54).to(device)
