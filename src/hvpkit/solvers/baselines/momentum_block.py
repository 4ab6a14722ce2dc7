r"""Power iteration with momentum on a block: what power, stochastic power and Oja's method have in common.

.. math:: W_{t+1} R_{t+1} = (A_t + \sigma_t I)\, W_t - \beta\, W_{t-1} R_t^{-1}

with W orthonormal and R triangular, by Gram-Schmidt: each vector is deflated by those before it. :math:`A_t` is the
operator, or that of a minibatch. Without a shift and momentum this is orthogonal iteration. Oja's rule is the same
with one over the step size for a shift.

A look is Rayleigh-Ritz with a product of all data: results, the stop, shifts and a chosen momentum rest on looks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.baselines.sampling import Schedule, draw, examples_of
from hvpkit.solvers.common.block import power_of_two, residuals_of, row_norms, start_
from hvpkit.solvers.common.convergence import (
    Checked,
    check_pairs,
    check_symmetric,
    concluded,
    final_status,
    floor,
    intervals,
    rounding,
)
from hvpkit.solvers.common.orthogonalize import orthonormalise_
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end, ritz
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.driver import Assessment, Monitor, run_solver

MARGIN = 2.0
"""Residuals in an error bound at the stop. In a dense spectrum the components fall exponentially from the edge, and
their mean distance from it, the error, is as large as their standard deviation, the residual."""

DEPTH = 12
"""Steps without which neither a small residual nor the sign of a Ritz value says anything."""


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for.

    Attributes:
        momentum: beta, in units of eigenvalues squared; None: chosen by looks.
        schedule: sizes of minibatches; None: all data always.
        period: full-data products that minibatches may cost, for each vector, between two looks.
        anchored: whether minibatches only correct the products of the best vectors so far.
        next_shift: the size of the next step's shift over scale, for Oja's rule; None: by looks.
    """

    momentum: float | None = 0.0
    schedule: Schedule | None = None
    period: float = 1.0
    anchored: bool = False
    next_shift: Callable[[State], Tensor] | None = None

    def ends(self) -> list[tuple[float, slice]]:
        """Each end (-1 low, 1 high, 0 the dominant one) with its rows, which are places of ascending values too."""
        low = num_at_low_end(self.k, self.which)
        parts = [(0.0 if self.which == "LM" else -1.0, slice(0, low)), (1.0, slice(low, self.k))]
        return [(end, rows) for end, rows in parts if rows.start < rows.stop]


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs over scale: ascending values ``[k]``, vectors and products in rows ``[k, n]``, residuals ``[k]``."""

    values: Tensor
    rows: Tensor
    images: Tensor
    residual_norms: Tensor


@dataclass(frozen=True)
class State:
    """A block, its product, and the best pairs so far.

    Attributes:
        rows: W, orthonormal ``[k, n]``.
        images: its product over scale, of all data or of a minibatch ``[k, n]``; None: to be made of all data.
        previous: the block before, in coordinates of this one ``[k, n]``; None without momentum.
        scale: what products are divided by, 0-d.
        shift, momentum: sigma over scale and beta over scale squared, of each row ``[k, 1]``.
        fresh: whether ``images`` is of all data, and no look has seen it.
        best: the best pairs of all looks.
        last: norms of the residuals at the last look; None if the shift is newer.
        norm: largest norm of a full-data product with a unit vector, over scale.
        num_steps: so far.
        num_before: those before the last look.
        num_since: those before the shift was taken.
        num_drawn: minibatches so far.
        growth: factor of their sizes.
        unchecked: what those since the last full-data product cost.
        num_matvecs: full-data products so far, minibatches by their share.
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


def init(op: LinearOperator, goal: Goal) -> State:
    """A state at the start."""
    rows = torch.empty(goal.k, op.n, dtype=op.dtype, device=op.device)
    start_(op, rows, goal.k, goal.start, goal.seed)
    nothing = rows.new_zeros(goal.k, 1)
    return State(rows, None, None, rows.new_ones(()), nothing, nothing)


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """The next block and its product. Waits for nothing: on a GPU, scalars stay there."""
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
    if state.images is not None:  # what is not finite stays, for a look to see
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


def _moved(op: LinearOperator, goal: Goal, state: State, images: Tensor) -> State:
    """The state with the next block."""
    shift = state.shift
    if goal.next_shift is not None:
        size = goal.next_shift(state)
        shift = torch.cat([(end * size).expand(rows.stop - rows.start, 1) for end, rows in goal.ends()])
    tiny = torch.finfo(op.dtype).eps  # keeps a vector that the operator makes zero
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


def _anchored(op: LinearOperator, sample: LinearOperator, state: State, anchor: Pairs) -> Tensor:
    r"""The product with W over scale by a minibatch: :math:`A_b (W - V V'W) + (A V) V'W`, with anchors V."""
    overlaps = op.space.dots(state.rows, anchor.rows.mT)
    rest = state.rows - overlaps @ anchor.rows
    return sample.product(rest.mT.contiguous()).mT / state.scale + overlaps @ anchor.images


def next_size(op: LinearOperator, goal: Goal, state: State) -> int | None:
    """Examples of the next minibatch; None for all: where no product is known, after a period, and at that size."""
    total = getattr(op, "num_examples", None)
    if goal.schedule is None or total is None or state.images is None:
        return None
    size = examples_of(goal.schedule, state.num_drawn) * state.growth
    spent = state.unchecked + goal.k * op.cost * size / total
    return size if size < total and spent <= goal.period * goal.k * op.cost * (1 + 1e-9) else None


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """The best pairs so far, whether they are good enough, and the state to go on from."""
    status = None
    if state.fresh and state.images is not None:
        if bool(torch.isfinite(state.images).all()):
            state, status = _judged(op, goal, state, state.images)
        else:
            status = Status.NON_FINITE
    best, unit = state.best, float(state.scale)
    return Assessment(
        state,
        smallest=float(best.values[0]) * unit if best else math.nan,
        largest=float(best.values[-1]) * unit if best else math.nan,
        smallest_bound=float(best.residual_norms[0]) * unit if best else math.inf,
        largest_bound=float(best.residual_norms[-1]) * unit if best else math.inf,
        status=status,
        num_steps=_num_steps(op, goal, state),
    )


def _num_steps(op: LinearOperator, goal: Goal, state: State) -> int:
    """Steps until the next look: on to a full-data product, or a few that may be too many."""
    if goal.schedule is None:
        return max(1, state.num_steps // (32 if op.device.type == "cpu" else 8))
    count = 1
    while (size := next_size(op, goal, state)) is not None:
        cost = goal.k * op.cost * size / (getattr(op, "num_examples", None) or size)
        state = replace(state, num_drawn=state.num_drawn + 1, unchecked=state.unchecked + cost)
        count += 1
    return count


def _judged(op: LinearOperator, goal: Goal, state: State, images: Tensor) -> tuple[State, Status | None]:
    """The state after a look at its Ritz pairs, and why it is over, if it is.

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
    turn = small.coefficients.mT.to(images)
    rows, images = turn @ state.rows, turn @ images
    norms = row_norms(op.space, residuals_of(rows, images, small.values)).to("cpu", torch.float64)
    pairs = Pairs(small.values, rows, images, norms)
    whole, least, bounds = goal.k == op.n, floor(op, norm), MARGIN * norms + rounding(op, norm)
    if best is None or _gain(goal, best, pairs) >= -least:
        best = pairs
    right_side, shift = _sides(goal, state, pairs, least)
    deep = state.num_steps - state.num_since >= DEPTH
    good = (bounds <= least) | (bounds <= goal.tol * pairs.values.abs()) & deep
    state = replace(state, norm=norm, best=best, fresh=False)
    if whole or (bool(good.all()) and right_side):
        status = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
        return replace(state, best=pairs), final_status(status, goal.tol, least, pairs.values, bounds)
    if deep and goal.next_shift is None and not torch.equal(shift, state.shift):
        return _restarted(op, goal, state, shift), None
    return _tuned(goal, state, pairs), None


def _gain(goal: Goal, best: Pairs, pairs: Pairs) -> float:
    """How much further out these values are than the best ones, in all."""
    gain = 0.0
    for end, rows in goal.ends():
        new, old = pairs.values[rows], best.values[rows]
        gain += float((end * (new - old) if end else new.abs() - old.abs()).sum())
    return gain


def _sides(goal: Goal, state: State, pairs: Pairs, least: float) -> tuple[bool, Tensor]:
    """Whether all shifted Ritz values are clearly on the side of their ends, and the shift that is better.

    The first shift is for an end where one is not, or where its residual falls more slowly than one over the steps, as
    between two ends of the same size; the next for one where an eigenvalue is clearly on the other side.
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


def _restarted(op: LinearOperator, goal: Goal, state: State, shift: Tensor) -> State:
    """The state with another shift, and random vectors added to W."""
    block = torch.empty_like(state.rows)
    start_(op, block, goal.k, state.rows.mT, goal.seed)
    return replace(
        state, rows=block, images=None, previous=None, shift=shift, last=None, num_since=state.num_steps
    )


def _tuned(goal: Goal, state: State, pairs: Pairs) -> State:
    r"""The state with its momentum, and the size of its minibatches, as the last two looks suggest.

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
            fall = min(float(norms[rows][place] / last[rows][place].clamp(min=1e-300)), 1.0)
            rate = fall ** (1 / (state.num_steps - state.num_before))
            momentum[rows] = (float(shifted[place]) * rate / (1 + rate**2)) ** 2
    if goal.anchored and last is not None and bool(norms.max() >= last.max()):
        growth *= 2
    return replace(state, momentum=momentum, growth=growth, last=norms, num_before=state.num_steps)


def finalize(op: LinearOperator, goal: Goal, state: State, status: Status) -> EigenResult:
    """The best pairs with true residuals, for one more product each."""
    best, nothing = state.best, torch.zeros(0, dtype=torch.float64)
    found = Checked(nothing, state.rows[:0].mT, nothing)
    if best is not None:
        found = Checked(best.values, best.rows.mT, best.residual_norms)
    result = check_pairs(
        op,
        found,
        state.scale,
        state.norm,
        k=goal.k,
        which=goal.which,
        tol=goal.tol,
        status=status,
        num_matvecs=state.num_matvecs,
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
    reach = torch.maximum(result.residual_norms, goal.tol * result.values.abs())  # what is not told apart
    wide, noise = Checked(result.values, result.vectors, reach), rounding(op, state.norm) * unit
    where = intervals(wide, goal.which, goal.k, noise, "residual")
    return replace(result, intervals=where, message=message)


def solve(op: LinearOperator, goal: Goal, monitor: Monitor | None) -> EigenResult:
    """From the start to the result."""
    begin = time.perf_counter()
    ended = run_solver(
        init(op, goal),
        lambda state: step(op, goal, state),
        lambda state: assess(op, goal, state),
        step_cost=goal.k * op.cost,
        limits=goal.limits,
        monitor=monitor,
    )
    state, suspect = ended.state, None
    if ended.status is Status.NON_FINITE and state.images is not None:
        suspect = state.rows[int(torch.isfinite(state.images).all(dim=1).int().argmin())]
    return concluded(op, finalize(op, goal, state, ended.status), ended.history, begin, suspect)
