r"""Keskar's sharpness: the largest rise of the loss in a small box around the parameters.

Method: projected gradient ascent in the box. Each step is one of a first-order optimiser on the coordinates,
clipped to the box. The loss over all data is evaluated at each iterate; the result is the highest one.

Cost: one gradient over all data a step, which gives the loss as well.
Memory: about ten vectors and the optimiser's own; with a subspace, its basis ``[n, p]``.
Sources: Keskar et al., ICLR 2017, arXiv:1609.04836, for the measure; Iyer et al., JMLR 24(65), 2023,
arXiv:2003.03977, for projected gradient ascent on all data.

Departures from the papers:
1. The ascent begins at a random point of the box and not at its centre, where the gradient vanishes at a minimum.
2. It stops where the Frank-Wolfe gap is small: the gradient allows no further rise. The papers fix the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvpkit._utils.monitoring import advance
from hvpkit._utils.random import generator, normal_vector, resolve_seed
from hvpkit._utils.ranks import call_on_first
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import check_choice, check_count, check_monitor, check_positive, check_tolerance
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import Layout, check_params, join
from hvpkit.curvature.batch_means import check_batch_mean
from hvpkit.curvature.batch_sums import all_finite, blame_batch, sum_over
from hvpkit.curvature.batches import (
    Leaves,
    LossShare,
    check_loss,
    gradient_of,
    loss_shares,
)
from hvpkit.data import Data, as_data
from hvpkit.errors import NonFiniteError
from hvpkit.objective import check_loss_fn, normalized

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

ADVICE = {
    "converged": "the gradient allows no further rise: a local maximum in the box, and a lower bound of the global "
    "one; a larger num_starts may find a higher one",
    "rising": "the gradient allows a further rise in the box: the value is a lower bound; raise lr or max_steps, or "
    "use optimizer='adam', whose steps do not shrink with the gradient",
    "rounding-limited": "the rise is too small, relative to the rounding of the loss, for tol; use float64, or a "
    "larger epsilon",
}


@dataclass(frozen=True, repr=False)
class Sharpness:
    """The highest loss found in the box; ``float()`` gives ``value``.

    Attributes:
        value: 100 (max_loss - loss) / (1 + loss): a lower bound of the sharpness, as another maximum may be higher.
        loss: at the parameters.
        max_loss: the highest loss of all iterates, including the parameters themselves.
        perturbation: flat ``[n]``; ``max_loss`` is the loss at the parameters plus this.
        gap: the further rise to the best point of the box if the loss were linear there (Frank-Wolfe gap).
        num_steps: steps of all ascents together.
        num_passes: gradients over all data.
        status: ``"converged"`` (gap at most tol times the rise), ``"rising"``, or ``"rounding-limited"``.
    """

    value: float
    loss: float
    max_loss: float
    perturbation: Tensor
    gap: float
    num_steps: int
    num_passes: int
    status: str

    @property
    def converged(self) -> bool:
        """True if the gradient allows no further rise."""
        return self.status == "converged"

    @property
    def message(self) -> str:
        """The status in words, with the remedy."""
        return ADVICE[self.status]

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"<Sharpness: {self.value:.6g}, {self.status}, {self.num_passes} passes>"


@dataclass(frozen=True)
class Point:
    """A point of the box, and the loss there."""

    displacement: Tensor
    loss: float
    gradient: Tensor
    gap: float


@dataclass(frozen=True)
class Box:
    """The loss at ``origin + basis @ z`` (without a basis ``origin + z``) for ``|z| <= radius``."""

    loss_fn: LossFn
    layout: Layout
    data: Data
    origin: Tensor
    basis: Tensor | None
    radius: Tensor

    def displacement(self, z: Tensor) -> Tensor:
        """Return the displacement from the origin, flat ``[n]``: a copy."""
        return z.clone() if self.basis is None else self.basis @ z

    def at(self, z: Tensor) -> Point:
        """Evaluate the loss and its gradient by the coordinates, over all data in one pass."""
        batch_share = 1 / (self.data.num_batches or math.inf)
        with exact_derivatives(z.device):
            displacement = self.displacement(z)
            leaves = self.layout.split(self.origin + displacement)

            def term(share: LossShare) -> Leaves:
                found = _gradient_and_loss(share, leaves)
                advance(batch_share, "full data")
                return found

            ranks, like = self.data.ranks, [*leaves, leaves[0].new_zeros(())]
            total = sum_over(loss_shares(self.loss_fn, self.layout, self.data), term, like, ranks)
            if not all_finite(total):
                where = loss_shares(self.loss_fn, self.layout, self.data)
                raise NonFiniteError(blame_batch("loss in the box, or its gradient,", where, term, ranks))
            gradient = join(total[:-1]) if self.basis is None else self.basis.mT @ join(total[:-1])
        gap = (gradient.abs() * (self.radius - gradient.sign() * z)).sum()  # no term is negative
        return Point(displacement, float(total[-1]), gradient, float(gap))

    def start(self, seed: int, number: int, gradient: Tensor) -> Tensor:
        """Draw a random point of the box; the first one on the side that the gradient at the origin points to."""
        uniform = torch.rand(
            len(self.radius), generator=generator(seed, number + 1), dtype=torch.float64, device="cpu"
        )
        unit = (2 * uniform - 1).to(self.radius)
        if number == 0:
            unit = torch.where(gradient == 0, unit, gradient.sign() * unit.abs())
        return unit * self.radius

    def ascend(self, z: Tensor, make: Callable[[list[Tensor]], Optimizer], max_steps: int) -> Iterator[Point]:
        """Yield the points of an ascent that starts at z."""
        ascent = make([z])
        if not isinstance(ascent, Optimizer):
            raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(ascent).__name__}")
        yield (point := self.at(z))
        for _ in range(max_steps):
            z.grad = -point.gradient
            ascent.step()
            z.clamp_(-self.radius, self.radius)
            yield (point := self.at(z))


def _gradient_and_loss(share: LossShare, leaves: Leaves) -> Leaves:
    losses: Leaves = []

    def recorded(points: Leaves) -> Tensor:
        losses.append(share(points))
        return losses[0]

    return [*gradient_of(recorded, leaves), losses[0].detach()]


def keskar_sharpness(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    epsilon: float = 1e-4,
    lr: float = 1e-3,
    max_steps: int = 1000,
    optimizer: str | Callable[[list[Tensor]], Optimizer] = "sgd",
    num_starts: int = 1,
    subspace_dim: int | None = None,
    tol: float = 1e-2,
    seed: Seed = 0,
    monitor: Callable[[Sharpness], object] | None = None,
) -> Sharpness:
    r"""Find the sharpness of a minimum: the largest rise of the loss in a box around it, in percent.

    .. math::
        \phi = 100 \, \frac{\max_{z \in C} L(w + A z) - L(w)}{1 + L(w)}, \qquad
        C = \{ z : |z_i| \le \epsilon (|(A^+ w)_i| + 1) \}

    where A is the identity, or has p random columns of norm 1. All losses are means over all examples. Projected
    gradient ascent finds a local maximum, a lower bound of the global one; the status says if one was reached. The
    first start is random, with each coordinate on the side that the gradient at w points to (on either side where it is
    zero, as at a minimum); further ones are anywhere in the box.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors, the point w.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        epsilon: size of the box. Keskar et al. take 1e-3 and 5e-4, Iyer et al. 1e-4.
        lr: learning rate of the optimiser. The box is about ``2 epsilon`` wide: in flat directions SGD at the default
            rate does not reach its faces in 1,000 steps; Adam at a rate of ``epsilon / 10`` does in about 20.
        max_steps: the most steps of each ascent.
        optimizer: ``"sgd"``, ``"adam"``, or a function that makes an optimiser from a list, as
            ``lambda z: torch.optim.SGD(z, lr=1e-3, momentum=0.9)``. The list holds one tensor, all coordinates
            ``[n]`` or ``[p]``; ``lr`` is then not used, and ``step()`` is called without a closure.
        num_starts: number of ascents from different points; the highest loss counts.
        subspace_dim: p, or None for the whole space. Keskar et al. take 100.
        tol: an ascent stops where the gradient allows no further rise by more than ``tol * (loss - loss(w))``.
        seed: of the starts and the subspace.
        monitor: called with the :class:`Sharpness` so far after each evaluation.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.grad`; an argument out of its range, named; an ``epsilon`` that
            the dtype of the parameters cannot resolve; a loss of -1 or less, where the measure is not defined.
        NonFiniteError: the loss or its gradient is NaN or infinite at an iterate.

    Cost:
        At most ``1 + num_starts * (max_steps + 1)`` gradients over all data, each about 3 forward passes;
        ``num_passes`` counts them. Gradients of minibatches would save little, as each loss takes a full pass.

    Source:
        Keskar et al., ICLR 2017, arXiv:1609.04836; Iyer et al., JMLR 24(65), 2023, arXiv:2003.03977.

    Example:
        >>> import torch
        >>> def loss_fn(w, x):
        ...     return (x * w**2).sum(-1)
        >>> w, x = torch.zeros(2, dtype=torch.float64), torch.tensor([[1.0, 5.0], [3.0, 7.0]], dtype=torch.float64)
        >>> found = keskar_sharpness(loss_fn, w, x, epsilon=0.1, lr=0.1)
        >>> round(found.value, 6), found.status  # 100 * (2 + 6) * 0.1**2
        (8.0, 'converged')
    """
    for name, value in (("epsilon", epsilon), ("lr", lr)):
        check_positive(name, value)
    check_tolerance("tol", tol)
    check_monitor(monitor, "monitor(sharpness)")
    for name, count in (("max_steps", max_steps), ("num_starts", num_starts)):
        check_count(name, count, 1)
    seed = resolve_seed(seed)
    if isinstance(optimizer, str):
        optimizer = partial(OPTIMIZERS[check_choice("optimizer", optimizer, tuple(OPTIMIZERS))], lr=lr)
    elif not callable(optimizer):
        raise TypeError(f"optimizer must be a name or a function of a list, got {type(optimizer).__name__}")
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    examples = as_data(data, device=leaves[0].device)
    with exact_derivatives(leaves[0].device):
        loss_fn = normalized(loss_fn, examples)
        first = examples.first()
        check_loss(next(loss_shares(loss_fn, layout, first)), leaves)
        check_batch_mean(loss_fn, params, examples, first)
        box = _box(loss_fn, layout, examples, join(leaves), epsilon, subspace_dim, seed)
    base = best = box.at(torch.zeros_like(box.radius))
    if base.loss <= -1:
        raise ValueError(f"loss_fn must have a mean above -1, as 1 + loss divides the rise; got {base.loss}")
    num_steps, num_passes = 0, 1
    for number in range(num_starts):
        start = box.start(seed, number, base.gradient)
        for step, point in enumerate(box.ascend(start, optimizer, max_steps)):
            num_steps, num_passes = num_steps + (step > 0), num_passes + 1
            over = point.gap <= tol * (point.loss - base.loss)
            if point.loss > best.loss - (_rounding(best, point) if over else 0.0):
                best = point
            if monitor is not None:
                so_far = _sharpness(base, best, tol, num_steps, num_passes)
                call_on_first(examples.ranks, monitor, so_far)
            if over:
                break
    return _sharpness(base, best, tol, num_steps, num_passes)


def _box(
    loss_fn: LossFn,
    layout: Layout,
    data: Data,
    origin: Tensor,
    epsilon: float,
    subspace_dim: int | None,
    seed: int,
) -> Box:
    basis, coordinates, n = None, origin, layout.n
    if subspace_dim is not None:
        p = check_count("subspace_dim", subspace_dim, 1, n)
        basis = normal_vector(n * p, dtype=origin.dtype, device=origin.device, seed=seed).view(n, p)
        basis /= torch.linalg.vector_norm(basis, dim=0)
        # full rank, so "gels" suffices; torch's default, gelsy, is not reproducible to the bit
        coordinates = torch.linalg.lstsq(basis, origin.unsqueeze(1), driver="gels").solution.squeeze(1)
    box = Box(loss_fn, layout, data, origin, basis, epsilon * (coordinates.abs() + 1))
    wanted = box.displacement(box.radius)
    lost = torch.linalg.vector_norm((origin + wanted) - origin - wanted, dtype=torch.float64)
    if lost > 0.01 * torch.linalg.vector_norm(wanted, dtype=torch.float64):
        raise ValueError(
            f"epsilon must be larger for parameters of {origin.dtype}, or the parameters of higher precision "
            f"(model.double()): a step of epsilon = {epsilon:g} is lost to rounding"
        )
    return box


def _sharpness(base: Point, best: Point, tol: float, num_steps: int, num_passes: int) -> Sharpness:
    rise, noise = best.loss - base.loss, _rounding(base, best)
    if best.gap > max(tol * rise, noise):
        status = "rising"
    else:
        status = "converged" if tol * rise >= noise else "rounding-limited"
    value = 100 * rise / (1 + base.loss)
    return Sharpness(value, base.loss, best.loss, best.displacement, best.gap, num_steps, num_passes, status)


def _rounding(one: Point, other: Point) -> float:
    """Bound the rounding error of the difference of two losses."""
    return 4 * torch.finfo(one.gradient.dtype).eps * max(abs(one.loss), abs(other.loss))
