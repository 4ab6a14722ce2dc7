"""Fisher matrices: second moments of gradients, at the data's targets or at the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from hvpkit.curvature.ggn import ggn_term, ggn_terms, loss_product
from hvpkit.curvature.products import Leaves, Term, batch_product, dependent
from hvpkit.data import Data
from hvpkit.objective import Objective


def fisher_vp(
    loss_fn: LossFn, params: Tree, batch: Batch, v: Tree, *, mode: str = "forward-over-reverse"
) -> Tree:
    r"""Product with the empirical Fisher matrix of one batch, :math:`\frac1B \sum_i g_i (g_i^\top v)`.

    :math:`g_i` is the gradient of the loss of example i. It is the Gauss-Newton matrix of half the squared losses.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``.
        params: tree of floating tensors, the point.
        batch: tree of tensors with a common first dimension.
        v: tree shaped like ``params``, of its dtype and device.
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
    return batch_product(empirical_terms, dependent(loss_fn), params, batch, v, mode)


def empirical_terms(loss_fn: LossFn, layout: Layout, leaves: Leaves, data: Data) -> Iterator[Term]:
    """What each batch adds to products with the empirical Fisher matrix at ``leaves``."""
    return ggn_terms(Objective(loss_fn, _half_square), layout, leaves, data)


def _half_square(losses: Tensor, _: Batch) -> Tensor:
    if losses.ndim == 0:
        raise ValueError(
            "loss_fn returned a 0-d mean, but a Fisher matrix is made of the gradients of single examples; "
            "return one loss for each example, shape [B]"
        )
    return 0.5 * losses.square()


@dataclass(frozen=True)
class Likelihood:
    """A distribution of targets given outputs z, minus whose logarithm a loss is but for weights of predictions.

    Attributes:
        name: ``"gaussian"`` (z: means), ``"bernoulli"`` (logits) or ``"categorical"`` (logits).
        dim: the dimension of the outputs that holds a categorical one's classes; None for the others.
    """

    name: str
    dim: int | None = None

    def covariance(self, z: Tensor, u: Tensor) -> Tensor:
        """The covariance of scores, which is the Hessian of minus the log likelihood at ``z``, times ``u``."""
        if self.dim is not None:
            p = z.softmax(self.dim)
            return p * (u - (p * u).sum(self.dim, keepdim=True))
        return u * torch.sigmoid(z) * torch.sigmoid(-z) if self.name == "bernoulli" else u

    def score(self, z: Tensor, uniform: Tensor) -> Tensor:
        """The gradient of minus the log likelihood at a target drawn with ``uniform``, one number a prediction."""
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # probabilities add up to one
        if self.dim is not None:
            p = wide.softmax(self.dim)
            steps = p.cumsum(self.dim)
            total = steps.narrow(self.dim, -1, 1)  # one, but for rounding
            drawn = (steps <= uniform.unsqueeze(self.dim) * total).sum(self.dim, keepdim=True)
            drawn = drawn.clamp(max=p.shape[self.dim] - 1)
            score = p.scatter_add(self.dim, drawn, -torch.ones_like(total))
        elif self.name == "bernoulli":
            p = torch.sigmoid(wide)
            score = p - (uniform < p).to(p)
        else:
            score = torch.special.ndtri(uniform)
        return score.to(z)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products, one for each prediction."""
        return a * b if self.dim is None else (a * b).sum(self.dim)

    def weights(self, curvature: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Tensor:
        """By how much a loss with this ``curvature`` weighs each prediction: found at outputs zero."""
        zero, probe = torch.zeros_like(like), torch.ones_like(like)
        if self.dim is not None:
            probe.narrow(self.dim, 1, probe.shape[self.dim] - 1).zero_()
        return self.dot(probe, curvature(zero, probe)) / self.dot(probe, self.covariance(zero, probe))


LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def find_likelihood(
    objective: Objective, layout: Layout, leaves: Leaves, data: Data, name: str | None
) -> Likelihood:
    """The likelihood of which the loss is minus the logarithm, of this ``name`` if there is one.

    What tells is the Hessian of the first batch's loss by outputs that are random.

    Raises:
        ValueError: none is; or the outputs are not one tensor with the examples along its first dimension.
    """
    batch = next(iter(data))
    with torch.no_grad():
        outputs = objective.forward(unflatten(leaves, layout.spec), batch)
    like, curvature = _curvature(objective.output_loss, outputs, batch)
    candidates = [Likelihood("gaussian"), Likelihood("bernoulli")]
    if like.ndim > 1:
        candidates += [Likelihood("categorical", dim) for dim in dict.fromkeys((1, like.ndim - 1))]
    random = generator(0)
    z, u = (torch.randn(like.shape, generator=random).to(like) for _ in range(2))
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


def fisher_terms(
    objective: Objective,
    layout: Layout,
    leaves: Leaves,
    data: Data,
    *,
    likelihood: Likelihood,
    num_samples: int,
    seed: int,
) -> Iterator[Term]:
    """What each batch adds to products with the Fisher matrix of sampled predictions at ``leaves``.

    It is the Gauss-Newton matrix of a loss of the outputs whose Hessian is the second moment of the scores.
    """
    start = 0
    for batch, weights in data.weighted():
        loss_at = partial(_sampled_loss, objective.output_loss, likelihood, num_samples, seed, start)
        yield ggn_term(objective.forward, loss_at, layout, leaves, batch, weights, data.num_examples)
        start += batch_size(batch)


def _sampled_loss(
    output_loss: LossFn,
    likelihood: Likelihood,
    num_samples: int,
    seed: int,
    start: int,
    outputs: Tree,
    batch: Batch,
) -> LossFn:
    """Half the squares of outputs along the scores at ``outputs``, a weighted sum for each example."""
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
    """The one tensor of the outputs, and the Hessian of the loss by it: ``(z, u)`` to its product at z with u."""
    leaves, spec = _pytree.tree_flatten(outputs)
    floating = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    size = batch_size(batch)
    if len(floating) != 1 or leaves[floating[0]].shape[:1] != (size,):
        shapes = [tuple(leaves[i].shape) for i in floating]
        raise ValueError(
            "objective: a Fisher matrix of the model's predictions needs outputs that are one tensor with the "
            f"{size} examples along its first dimension, got shapes {shapes}; let forward return that tensor"
        )
    (place,) = floating

    def loss(values: Leaves) -> Tensor:
        replaced = [values[0] if i == place else leaf for i, leaf in enumerate(leaves)]
        return output_loss(unflatten(replaced, spec), batch).sum()

    def curvature(z: Tensor, u: Tensor) -> Tensor:
        return loss_product(loss, [z], [u])[0]

    return leaves[place], curvature


def _uniforms(seed: int, start: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in (0, 1), of which each example has its own, whatever batch it comes in."""
    stream = np.random.PCG64(seed).advance(start * prod(shape[1:]))
    return torch.from_numpy(np.random.Generator(stream).random(shape) + 2.0**-54).to(device)
