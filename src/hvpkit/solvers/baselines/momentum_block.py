r"""Power iteration with momentum on a block: the iteration of power, stochastic power and Oja's method.

.. math:: W_{t+1} R_{t+1} = (A_t + \sigma_t I)\, W_t - \beta\, W_{t-1} R_t^{-1}

with W orthonormal and R triangular, by Gram-Schmidt: each vector is deflated by those before it. :math:`A_t` is the
operator, or that of a minibatch. Without a shift and momentum this is orthogonal iteration. In Oja's rule the shift is
one over the step size.

An assessment is Rayleigh-Ritz with full-data matvecs: results, the stop, shifts and a chosen momentum rest on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers.baselines.sampling import Schedule, draw, examples_of
from hvpkit.solvers.common.bounds import TINY
from hvpkit.solvers.common.convergence import (
    MIN_STEPS,
    attainable_accuracy,
    check_pairs,
    check_symmetric,
    final_status,
    intervals,
    progress_of,
    rounding,
)
from hvpkit.solvers.common.orthogonalize import (
    orthonormalise_,
    power_of_two,
    residuals_of,
    row_norms,
    start_,
)
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, no_pairs, num_at_low_end, ritz
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.common.vector_memory import FEWER, check_room
from hvpkit.solvers.driver import Assessment, Limits, Monitor, assessment_interval, run

VECTORS_PER_PAIR = 16
"""Vectors that a solve takes memory for, for each pair: 9 to 16 were measured."""

MARGIN = 2.0
"""Error bound at the stop, in residual norms. In a dense spectrum the components decay exponentially from the edge, and
their mean distance from it, the error, is as large as their standard deviation, the residual norm."""


@dataclass(frozen=True)
class Goal(Request):
    """The checked arguments of a solver.

    Attributes:
        momentum: beta, in units of eigenvalues squared; None: chosen at assessments.
        num_examples: examples that minibatches are drawn from.
        schedule: sizes of minibatches; None: all data always.
        period: full-data matvecs per vector that minibatches may cost between two assessments.
        anchored: use minibatches only for the difference from the best vectors so far (variance reduction).
        next_shift: magnitude of the next step's shift over scale, for Oja's rule; None: chosen at assessments.
    """

    momentum: float | None = 0.0
    num_examples: int = 0
    schedule: Schedule | None = None
    period: float = 1.0
    anchored: bool = False
    next_shift: Callable[[MomentumBlockState], Tensor] | None = None

    def ends(self) -> list[tuple[float, slice]]:
        """Return each end (-1 low, 1 high, 0 the dominant one) with its rows, the indices of its ascending values."""
        low = num_at_low_end(self.k, self.which)
        parts = [(0.0 if self.which == "LM" else -1.0, slice(0, low)), (1.0, slice(low, self.k))]
        return [(end, rows) for end, rows in parts if rows.start < rows.stop]


@dataclass(frozen=True, kw_only=True)
class Pairs(RitzPairs):
    """Ritz pairs over scale, with their images as rows ``[k, n]``."""

    images: Tensor

    @property
    def rows(self) -> Tensor:
        """The vectors as rows ``[k, n]``."""
        return self.vectors.mT


@dataclass(frozen=True)
class MomentumBlockState:
    """A block, its image, and the best pairs so far.

    Attributes:
        rows: W, orthonormal ``[k, n]``.
        images: its image over scale, by all data or a minibatch ``[k, n]``; None: to be computed by all data.
        previous: the block before, in coordinates of this one ``[k, n]``; None without momentum.
        scale: divisor of matvecs, 0-d.
        shift, momentum: sigma over scale and beta over scale squared, of each row ``[k, 1]``.
        fresh: True if ``images`` is by all data and not yet assessed.
        best: the best pairs of all assessments.
        last: residual norms at the last assessment; None if the shift is newer.
        norm: largest norm of a full-data matvec with a unit vector, over scale.
        num_steps: so far.
        num_before: steps before the last assessment.
        num_since: steps before the last change of the shift.
        num_drawn: minibatches so far.
        growth: factor of their sizes.
        unchecked: cost of the minibatches since the last full-data matvec.
        num_matvecs: full-data matvecs so far, minibatches by their share.
    """

    rows: Tensor
    images: Tensor | None
    previous: Tensor | None
    scale: Tensor
    shift: Tensor
    momentum: Tensor
    fresh: bool = False
    best: Pairs | None = None
    last: Tensor | None = None
    norm: float = 0.0
    num_steps: int = 0
    num_before: int = 0
    num_since: int = 0
    num_drawn: int = 0
    growth: int = 1
    unchecked: float = 0.0
    num_matvecs: float = 0.0


def init(op: LinearOperator, goal: Goal) -> MomentumBlockState:
    """Return the state before the first step.

    Raises:
        MemoryError: the blocks do not fit into the memory that is free.
    """
    check_room(op, VECTORS_PER_PAIR * goal.k, FEWER)
    rows = torch.empty(goal.k, op.n, dtype=op.dtype, device=op.device)
    start_(op, rows, goal.k, goal.start, goal.seed)
    nothing = rows.new_zeros(goal.k, 1)
    return MomentumBlockState(rows, None, None, rows.new_ones(()), nothing, nothing)


def step(op: LinearOperator, goal: Goal, state: MomentumBlockState) -> MomentumBlockState:
    """Compute the next block and its image. No host synchronisation."""
    moved = state if state.images is None else _moved(op, goal, state, state.images)
    size = next_size(op, goal, state)
    sample = op if size is None else draw(op, size, goal.seed, state.num_drawn)
    if size is not None and goal.anchored and state.best is not None:
        images = _anchored(op, sample, moved, state.best)
    else:
        images = sample.product(moved.rows.mT.contiguous()).mT
        if state.num_steps == 0:
            moved = replace(moved, scale=power_of_two(images.abs().max()))
        images = images / moved.scale
    if state.images is not None:  # keep an image that is not finite until the assessment
        finite = torch.isfinite(state.images).all()
        moved = replace(moved, rows=torch.where(finite, moved.rows, state.rows))
        images = torch.where(finite, images, state.images)
    cost = goal.k * sample.cost
    return replace(
        moved,
        images=images,
        fresh=size is None,
        num_steps=state.num_steps + 1,
        num_drawn=state.num_drawn + (size is not None),
        unchecked=0.0 if size is None else state.unchecked + cost,
        num_matvecs=state.num_matvecs + cost,
    )


def _moved(op: LinearOperator, goal: Goal, state: MomentumBlockState, images: Tensor) -> MomentumBlockState:
    """Return the state with the next block."""
    shift = state.shift
    if goal.next_shift is not None:
        size = goal.next_shift(state)
        shift = torch.cat([(end * size).expand(rows.stop - rows.start, 1) for end, rows in goal.ends()])
    tiny = torch.finfo(op.dtype).eps  # keeps a vector that the operator maps to zero
    target = torch.addcmul(images, shift + tiny, state.rows)
    if state.previous is not None:
        target = torch.addcmul(target, state.momentum, state.previous, value=-1.0)
    rows, zero = torch.empty_like(target), target.new_zeros(())
    triangle = target.new_zeros(goal.k, goal.k)
    for row, vector in enumerate(target):
        triangle[row, :row], triangle[row, row], _ = orthonormalise_(op.space, rows, row, vector, zero)
    if goal.momentum != 0:  # each end has a recurrence of its own
        parts = [
            torch.linalg.solve_triangular(triangle[part, part], state.rows[part], upper=False)
            for _, part in goal.ends()
        ]
        state = replace(state, previous=torch.cat(parts))
    return replace(state, rows=rows, shift=shift)


def _anchored(op: LinearOperator, sample: LinearOperator, state: MomentumBlockState, anchor: Pairs) -> Tensor:
    r"""Return :math:`A_b (W - V V'W) + (A V) V'W`, over scale, with anchors V: variance reduction."""
    overlaps = op.space.dots(state.rows, anchor.rows.mT)
    rest = state.rows - overlaps @ anchor.rows
    return sample.product(rest.mT.contiguous()).mT / state.scale + overlaps @ anchor.images


def next_size(op: LinearOperator, goal: Goal, state: MomentumBlockState) -> int | None:
    """Return the examples of the next minibatch; None for all: at the start, after a period, and at that size."""
    if goal.schedule is None or state.images is None:
        return None
    size = examples_of(goal.schedule, state.num_drawn) * state.growth
    spent = state.unchecked + goal.k * op.cost * size / goal.num_examples
    return size if size < goal.num_examples and spent <= goal.period * goal.k * op.cost * (1 + 1e-9) else None


def assess(op: LinearOperator, goal: Goal, state: MomentumBlockState) -> Assessment[MomentumBlockState]:
    """Return the best pairs so far, whether they suffice, and the state to continue from."""
    status, suspect, progress = None, None, Progress()
    if state.fresh and state.images is not None:
        finite = torch.isfinite(state.images).all(dim=1)
        if bool(finite.all()):
            state, status = _assessed(op, goal, state, state.images)
        else:
            status, suspect = Status.NON_FINITE, state.rows[int(finite.int().argmin())].unsqueeze(1)
    if state.best:
        progress = progress_of(state.best.values, state.best.residual_norms, state.scale)
    return Assessment(state, progress, _num_steps(op, goal, state), status, suspect)


def _num_steps(op: LinearOperator, goal: Goal, state: MomentumBlockState) -> int:
    """Return the steps until the next assessment: up to the next full-data matvec, or a small share of all."""
    if goal.schedule is None:
        return assessment_interval(op, state.num_steps)
    count = 1
    while (size := next_size(op, goal, state)) is not None:
        cost = goal.k * op.cost * size / goal.num_examples
        state = replace(state, num_drawn=state.num_drawn + 1, unchecked=state.unchecked + cost)
        count += 1
    return count


def _assessed(
    op: LinearOperator, goal: Goal, state: MomentumBlockState, images: Tensor
) -> tuple[MomentumBlockState, Status | None]:
    """Return the state with its Ritz pairs, and the status if the solve is over.

    Raises:
        NotSymmetricError: the operator is not symmetric beyond rounding.
    """
    projected, best = op.space.dots(state.rows, images.mT).to("cpu", torch.float64), state.best
    small, norm = ritz(projected, projected[:0]), max(state.norm, float(row_norms(op.space, images).max()))
    asymmetry = small.asymmetry
    if best is not None:
        difference = op.space.dots(best.rows, images.mT) - op.space.dots(best.images, state.rows.mT)
        asymmetry = max(asymmetry, float(difference.abs().max()))
    check_symmetric(op, asymmetry, norm)
    rotation = small.vectors.mT.to(images)
    rows, images = rotation @ state.rows, rotation @ images
    norms = row_norms(op.space, residuals_of(rows, images, small.values)).to("cpu", torch.float64)
    pairs = Pairs(small.values, rows.mT, norms, images=images)
    whole, least, bounds = goal.k == op.n, attainable_accuracy(op, norm), MARGIN * norms + rounding(op, norm)
    if best is None or _gain(goal, best, pairs) >= -least:
        best = pairs
    right_side, shift = _sides(goal, state, pairs, least)
    deep = state.num_steps - state.num_since >= MIN_STEPS
    good = (bounds <= least) | (bounds <= goal.allowed(pairs.values, norm)) & deep
    state = replace(state, norm=norm, best=best, fresh=False)
    if whole or (bool(good.all()) and right_side):
        status = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
        return replace(state, best=pairs), final_status(status, goal, norm, least, pairs.values, bounds)
    if deep and goal.next_shift is None and not torch.equal(shift, state.shift):
        return _restarted(op, goal, state, shift), None
    return _tuned(goal, state, pairs), None


def _gain(goal: Goal, best: Pairs, pairs: Pairs) -> float:
    """Return the sum of the distances by which these values lie further out than the best ones."""
    gain = 0.0
    for end, rows in goal.ends():
        new, old = pairs.values[rows], best.values[rows]
        gain += float((end * (new - old) if end else new.abs() - old.abs()).sum())
    return gain


def _sides(goal: Goal, state: MomentumBlockState, pairs: Pairs, least: float) -> tuple[bool, Tensor]:
    """Return True if all shifted Ritz values are clearly on the side of their ends, and a better shift.

    An end gets its first shift if a value is not, or if its residual falls more slowly than one over the steps, as
    between two ends of the same magnitude; the next if an eigenvalue is clearly on the other side.
    """
    right_side, shift, values, norms = True, state.shift.clone(), pairs.values, pairs.residual_norms
    for end, rows in goal.ends():
        before = float(shift[rows.start])
        distance = end * (values[rows] + before) + least
        right_side &= not end or bool((distance >= norms[rows]).all())
        slow = distance < norms[rows] * max(1.0, state.num_steps / 4)
        if end and bool((slow if before == 0 else distance < -norms[rows]).any()):
            reach = max(
                float((norms - end * values).max()), float(values[rows].hypot(norms[rows])[slow].max())
            )
            shift[rows] = end * max(reach, end * before)
    return right_side, shift


def _restarted(
    op: LinearOperator, goal: Goal, state: MomentumBlockState, shift: Tensor
) -> MomentumBlockState:
    """Return the state with another shift, and random vectors added to W."""
    block = torch.empty_like(state.rows)
    start_(op, block, goal.k, state.rows.mT, goal.seed)
    return replace(
        state, rows=block, images=None, previous=None, shift=shift, last=None, num_since=state.num_steps
    )


def _tuned(goal: Goal, state: MomentumBlockState, pairs: Pairs) -> MomentumBlockState:
    r"""Return the state with momentum and minibatch sizes chosen from the last two assessments.

    If the last wanted pair's residual falls by :math:`\rho` a step under the best momentum, the ratio of the first
    unwanted eigenvalue to it is :math:`2 \rho / (1 + \rho^2)`; a smaller momentum gives a larger one, and so rises.
    """
    norms, last, growth, momentum = pairs.residual_norms, state.last, state.growth, state.momentum
    if goal.momentum is not None:
        momentum = torch.full_like(momentum, goal.momentum) / state.scale.square()
    elif last is not None:
        momentum = momentum.clone()
        for _, rows in goal.ends():
            shifted = (pairs.values[rows] + float(state.shift[rows.start])).abs()
            place = int(shifted.argmin())
            fall = min(float(norms[rows][place] / last[rows][place].clamp(min=TINY)), 1.0)
            rate = fall ** (1 / (state.num_steps - state.num_before))
            momentum[rows] = (float(shifted[place]) * rate / (1 + rate**2)) ** 2
    if goal.anchored and last is not None and bool(norms.max() >= last.max()):
        growth *= 2
    return replace(state, momentum=momentum, growth=growth, last=norms, num_before=state.num_steps)


def finalize(op: LinearOperator, goal: Goal, state: MomentumBlockState, status: Status) -> EigenResult:
    """Return the best pairs with true residuals, for one more matvec each."""
    best, found = state.best, state.best or no_pairs(state.rows.mT)
    result = check_pairs(
        op, goal, found, state.scale, state.norm, status=status, num_matvecs=state.num_matvecs
    )
    if result.status is Status.INVARIANT_SUBSPACE:
        return result
    unit, message = float(state.scale), result.message
    if goal.momentum and best is not None and not result.converged:
        shifted = float((best.values + state.shift[:, 0].to(best.values)).abs().min()) * unit
        if 4 * goal.momentum >= shifted**2:
            message += (
                f"; with a momentum above {shifted**2 / 4:.3g}, as far as is known, iterates rotate for ever"
            )
    # eigenvalues closer than the error allowed cannot be distinguished
    reach = torch.maximum(result.residual_norms, goal.allowed(result.values, state.norm * unit))
    wide, noise = RitzPairs(result.values, result.vectors, reach), rounding(op, state.norm) * unit
    where = intervals(wide, goal, noise, "residual")
    return replace(result, intervals=where, message=message)


@dataclass(frozen=True)
class MomentumBlock:
    """The functions of this file as a :class:`hvpkit.solvers.driver.Solver`."""

    op: LinearOperator
    goal: Goal

    @property
    def limits(self) -> Limits:
        """Of the goal."""
        return self.goal.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.goal.k * self.op.cost

    def init(self) -> MomentumBlockState:
        return init(self.op, self.goal)

    def step(self, state: MomentumBlockState) -> MomentumBlockState:
        return step(self.op, self.goal, state)

    def assess(self, state: MomentumBlockState) -> Assessment[MomentumBlockState]:
        return assess(self.op, self.goal, state)

    def finalize(self, state: MomentumBlockState, status: Status) -> EigenResult:
        return finalize(self.op, self.goal, state, status)


def solve(op: LinearOperator, goal: Goal, monitor: Monitor | None) -> EigenResult:
    """Run the solver from the start to the result."""
    return run(MomentumBlock(op, goal), monitor=monitor)
