r"""Both ends of an operator by Davidson's method, with cheaper operators for directions.

Method: Rayleigh-Ritz on an orthonormal basis V, with products of the last level only: values are true ones, whatever
the other levels are. V begins with the extreme Ritz vectors of a rough Lanczos solve of the first level (tol 0.05, and
a probability of at most 0.05 that an eigenvalue hides further out) and grows, for an end with Ritz value
:math:`\theta` and residual r, by

.. math:: t = f(A_S)\, r, \qquad f(x) = \frac{1}{\max(d(x), \delta)},

with :math:`A_S` a cheap level and d(x) the distance from :math:`\theta` inwards, negative beyond the end. The
preconditioner is the inverse of the whole cheap level, clamped: it is positive definite, so that eigenvalues which
:math:`A_S` has beyond the end are scaled and not chased. A few Lanczos steps on :math:`A_S` from r give
:math:`f(A_S) r`, and with it :math:`r' f(A_S) r`: by perturbation of second order, by how much :math:`\theta` is
still off, before the next product is spent. What the last direction gained over what was predicted says how good the
level is; where it is little, the next level takes over.

An end is also looked at from its neighbour: where the Ritz pair next to it may still gain enough to pass it, V grows by
that pair first. Else the method could stop at an inner eigenvalue, as one can that follows residuals alone; where the
next eigenvalue is only a few ``tol`` away it still can, now and then: docs/multifidelity.md has figures.

Cost: for each direction a product of the last level and ``num_inner`` of a cheap one. Memory: ``2 ncv + num_inner``
vectors.
Source: Davidson, J. Comput. Phys. 17 (1975) 87-94, doi:10.1016/0021-9991(75)90065-0; Morgan and Scott, SIAM J. Sci.
Stat. Comput. 7 (1986) 817-825, doi:10.1137/0907054. The clamped function of a sample is hvpkit's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.common.block import residuals_of, row_norms
from hvpkit.solvers.common.block_subspace import (
    Subspace,
    drop_non_finite,
    extend,
    multiply,
    rayleigh_ritz,
    start,
    turn,
)
from hvpkit.solvers.common.bounds import kato_temple
from hvpkit.solvers.common.convergence import Checked, eigen_result, final_status, floor, intervals, rounding
from hvpkit.solvers.common.rayleigh_ritz import select
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.driver import Assessment
from hvpkit.solvers.lanczos import rough_vectors
from hvpkit.solvers.matrix_function import Krylov, krylov_space

START_STEPS, START_SHARE = 80, 0.5
"""Lanczos steps on the first level for the first vectors, at most, and their share of what may be spent, at most."""

INNER_STEPS = 6, 30
"""Lanczos steps on a level for a direction: by default as many as cost a product, but at least and at most these."""

SETTLED = 0.1
"""They end early if the last of them changed what is predicted by no more than this share of it."""

CLAMP = 0.05
"""Of the spread of the spectrum: the most that a clamp is."""

NEAR = 10.0
"""In units of ``tol * |value|``: eigenvalues nearer to an end than that count as this far away in what bounds it."""

SAFETY, BEYOND = 10.0, 3.0
"""What a predicted error is multiplied by: the first, or the second times what the last directions gained over what was
predicted of them, if that is more."""

POOR, PATIENCE = 0.5, 3
"""A level is left if its last directions gained less than this share of what they predicted, in geometric mean; one
direction is enough if it gained very little."""

LEFT = Status.MAX_MATVECS
"""How the loop ends once all cheap levels were left: what they may do is done."""

ESTIMATED = (
    "every error is at most tol * |value| by a sample's estimate; that the values are the extreme ones is likely, not "
    'certain: method="lanczos" says how likely'
)
"""What convergence means here."""

ENDS = {"BE": (0, -1), "SA": (0,), "LA": (-1,)}


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for, with the levels, the most Lanczos steps on one for a direction, and what levels have cost."""

    levels: tuple[LinearOperator, ...]
    num_inner: int | None
    spent: float

    @property
    def ends(self) -> tuple[int, ...]:
        """Which ends: 0 the low one, -1 the high one."""
        return ENDS[self.which]

    def inner_steps(self, level: LinearOperator) -> int:
        """The most Lanczos steps on a level for a direction."""
        least, most = INNER_STEPS
        worth = round(self.levels[-1].cost / level.cost) if level.cost else most
        return min(self.num_inner or min(most, max(least, worth)), level.n)


@dataclass(frozen=True)
class State(Subspace):
    """A basis, and the direction that it grows by next.

    Ritz pairs go by their place: 0 the lowest, 1 the next, -1 the highest, -2 the next.

    Attributes:
        place: of the pair to grow by.
        residuals: of these pairs ``[4, n]``; fewer on a smaller basis.
        direction: what that pair's residual gave ``[n]``; its length does not matter.
        values: of the pairs, over scale.
        errors: what they may be off by: bounds, or predictions.
        predictions: what the ends' last directions promised to gain.
        gains: of the level's last directions, over what was predicted.
        level: the level that directions come from.
    """

    place: int = -1
    residuals: Tensor | None = None
    direction: Tensor | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)
    predictions: Mapping[int, float] = field(default_factory=dict)
    gains: tuple[float, ...] = ()
    level: int = 0


def init(op: LinearOperator, goal: Goal, ncv: int) -> State:
    """A state with room for the first rows."""
    return State(**vars(start(op, replace(goal, start=None), 0, ncv)))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Products with new rows; else a direction for the basis to grow by, from a cheap level."""
    if state.num_new:
        return multiply(op, state, 1)
    if not state.num_rows:
        return _started(op, goal, state)
    if state.residuals is None:
        return state  # the start gave fewer rows than it might
    return _directed(op, goal, state)


def _started(op: LinearOperator, goal: Goal, state: State) -> State:
    """The extreme Ritz vectors of the first level as new rows, from the caller's start or a random one."""
    level = goal.levels[0]
    affordable = START_SHARE * goal.left(goal.spent) / level.cost if level.cost else START_STEPS
    # also for the low end alone: the high one is not far, and would else be in every residual
    k, which = (1, "LA") if goal.which == "LA" else (min(2, op.n), "BE")
    found, new = rough_vectors(
        level,
        k,
        which,
        v0=goal.start,
        num_steps=min(START_STEPS, int(affordable), op.n),
        seed=goal.seed,
    )
    if not bool(torch.isfinite(new).all()):
        new = found.basis[:1]
    spent = goal.spent + found.num_matvecs
    return extend(op, goal, replace(state, num_matvecs=spent, scale=found.scale), new)


def _directed(op: LinearOperator, goal: Goal, state: State) -> State:
    r"""The state with :math:`f(A_S) r` and what it predicts that its pair will gain."""
    assert state.residuals is not None
    level, place = goal.levels[state.level], state.place
    end, residual = 0 if place >= 0 else -1, state.residuals[place]
    theta, inwards = state.values[place], 1.0 if end == 0 else -1.0
    size, spread = abs(state.values[end]), max(state.values[-1] - state.values[0], abs(theta))

    def weights(found: Krylov, share: float) -> Tensor:
        """The function f at the level's Ritz values, with a clamp of this share of the end's size."""
        clamp = max(min(share * size, CLAMP * spread), floor(op, state.norm))
        return found.coefficients[0] / (inwards * (found.values - theta)).clamp(min=clamp)

    def settled(found: Krylov) -> bool:
        before.append(float(found.coefficients[0] @ weights(found, NEAR * goal.tol)))
        return abs(before[-1] - before[-2]) <= SETTLED * before[-1]

    before = [0.0]
    found = krylov_space(level, residual, goal.inner_steps(level), state.scale, settled)
    state = replace(state, num_matvecs=state.num_matvecs + len(found.rows) * level.cost)
    squared = float(op.space.norm(residual)) ** 2
    gain, most = (
        squared * float(found.coefficients[0] @ weights(found, share)) for share in (1.0, NEAR * goal.tol)
    )
    if not math.isfinite(gain):
        return replace(state, direction=residual)
    likely = max([SAFETY, *(BEYOND * gain for gain in state.gains)]) * most
    return replace(
        state,
        direction=(found.coefficients @ weights(found, 1.0)).to(found.rows) @ found.rows,
        predictions={**state.predictions, place: gain} if place == end else state.predictions,
        errors={**state.errors, place: min(state.errors[place], likely)},
    )


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """The ends so far, whether they are good enough, and what to do next."""
    if state.num_fresh:
        state = _seen(op, goal, drop_non_finite(state))
    if not state.num_rows:
        nothing = math.nan, math.nan, math.inf, math.inf
        status = None if state.suspect is None else Status.NON_FINITE
        return Assessment(state, *nothing, status=status, num_steps=3)
    place = _select_target(op, goal, state)
    status = _status(op, goal, state, place is None)
    if status is None and place is not None:
        state = _aimed(op, goal, state, place)
    scale = float(state.scale)
    errors = [max(state.errors[end], rounding(op, state.norm)) * scale for end in (0, -1)]
    return Assessment(
        state,
        smallest=state.values[0] * scale,
        largest=state.values[-1] * scale,
        smallest_bound=errors[0],
        largest_bound=errors[1],
        status=status,
        num_steps=max(1, state.num_new),
        level=state.level,
    )


def _aimed(op: LinearOperator, goal: Goal, state: State, place: int) -> State:
    """The state about to grow by a pair: by its direction, if that is known, or by a residual that is rounding."""
    direction = state.direction if place == state.place else None
    if direction is None and state.residuals is not None and state.errors[place] <= floor(op, state.norm):
        direction = state.residuals[place]
    state = replace(state, place=place, direction=None)
    if direction is None:
        return state
    return extend(op, goal, _with_room(op, state), direction[None])


def _seen(op: LinearOperator, goal: Goal, state: State) -> State:
    """The state with new Ritz pairs: their values, errors and residuals, and what the last direction gained."""
    m = state.num_rows
    if not m:
        return state
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    state = replace(state, norm=max(state.norm, pairs.norm))
    chosen = select(pairs.values, min(m, 4), "BE")
    turned = (pairs.to_rows @ pairs.vectors[:, chosen]).mT.to(state.rows)
    vectors, images, found = turned @ state.rows[:m], turned @ state.images[:m], pairs.values[chosen]
    residuals = residuals_of(vectors, images, found)
    norms = row_norms(op.space, residuals).to("cpu", torch.float64)
    near = (NEAR * goal.tol * found.abs()).clamp(min=1e-300)
    bounds = torch.minimum(norms, torch.maximum(kato_temple(found, norms), norms**2 / near))
    places = [place for place in (0, 1, -2, -1) if -len(found) <= place < len(found)]
    values = {place: float(found[place]) for place in places}
    moved = {place: abs(value - state.values.get(place, math.inf)) for place, value in values.items()}
    gains, predicted = state.gains, state.predictions.get(state.place, 0.0)
    if predicted > 0:
        gains = (*gains, moved[state.place] / predicted)[-PATIENCE:]
    poor = math.prod(gains) < POOR**PATIENCE

    def error(place: int) -> float:
        """What was claimed before, where it still holds, or what is known now."""
        before = state.errors.get(place, math.inf)
        stale = poor or place == state.place or moved[place] > before
        return min(float(bounds[place]), math.inf if stale else before)

    asked = [end % len(found) for end in goal.ends][: len(found)]
    return replace(
        state,
        best=Checked(found[asked], vectors[asked].mT, norms[asked]),
        residuals=residuals,
        direction=None,
        values=values,
        errors={place: error(place) for place in places},
        gains=() if poor else gains,
        level=state.level + poor,
    )


def _select_target(op: LinearOperator, goal: Goal, state: State) -> int | None:
    """The pair to grow by, if any: the high end while it is not good enough, then the low one, then those next to them.

    Such a pair is good enough where what it may still gain does not take it past its end: else it may turn out to be
    the extreme one.
    """
    if state.num_rows < goal.k:
        return goal.ends[0]
    noise, least = rounding(op, state.norm), floor(op, state.norm)
    for end in reversed(goal.ends):
        if not state.errors[end] + noise <= max(goal.tol * abs(state.values[end]), least):
            return end
    for end in goal.ends if state.num_rows > 2 else ():
        beside = 1 if end == 0 else -2
        room = abs(state.values[beside] - state.values[end]) + goal.tol * abs(state.values[end])
        if not state.errors[beside] <= max(room, least):
            return beside
    return None


def _status(op: LinearOperator, goal: Goal, state: State, done: bool) -> Status | None:
    """Why it is over, if it is."""
    if state.suspect is not None:
        return Status.NON_FINITE
    whole, least = state.num_rows == op.n, floor(op, state.norm)
    if state.num_rows < goal.k or not (whole or done):
        return LEFT if goal.levels[state.level] is op else None
    values = torch.tensor([state.values[end] for end in goal.ends], dtype=torch.float64)
    bounds = torch.tensor([state.errors[end] for end in goal.ends], dtype=torch.float64)
    best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
    return final_status(best, goal.tol, least, values, bounds + rounding(op, state.norm))


def _with_room(op: LinearOperator, state: State) -> State:
    """The state with room for another row: half of the Ritz vectors from either end, if its basis is full."""
    m = state.num_rows
    if m < len(state.rows) or m == op.n:
        return state
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    return turn(state, pairs, pairs.vectors[:, select(pairs.values, m // 2, "BE")])


def finalize(op: LinearOperator, goal: Goal, state: State, status: Status) -> EigenResult:
    """The pairs of both ends, with the residuals that their products give: no further product is needed."""
    unit, best = float(state.scale), state.best
    found = Checked(best.values * unit, best.vectors, best.residual_norms * unit)
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    where = intervals(found, goal.which, goal.k, floor(op, state.norm) * unit, kind)
    errors = [state.errors[end] for end in goal.ends[: len(found.values)]]
    bounds = (torch.tensor(errors, dtype=torch.float64) + rounding(op, state.norm)) * unit
    return eigen_result(
        found,
        where,
        status,
        num_matvecs=state.num_matvecs,
        seconds=0.0,
        history=(),
        message=ESTIMATED if status is Status.CONVERGED else None,
        error_bounds=bounds,
    )
