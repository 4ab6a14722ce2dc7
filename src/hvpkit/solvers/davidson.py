r"""Both ends of an operator by Davidson's method, with cheaper operators for directions.

Method: Rayleigh-Ritz on an orthonormal basis V, with matvecs of the last level only: values are true ones for any
other levels. V begins with the extreme Ritz vectors of a rough Lanczos solve of the first level (tol 0.05, and
a probability of at most 0.05 that an eigenvalue hides further out) and is expanded, for an end with Ritz value
:math:`\theta` and residual r, by

.. math:: t = f(A_S)\, r, \qquad f(x) = \frac{1}{\max(d(x), \delta)},

with :math:`A_S` a cheap level and d(x) the distance from :math:`\theta` inwards, negative beyond the end. The
preconditioner is the inverse of the whole cheap level, clamped: it is positive definite, so that it scales parts in
eigenvalues of :math:`A_S` beyond the end, and does not move towards them. A few Lanczos steps on :math:`A_S` from r
give :math:`f(A_S) r`, and with it :math:`r' f(A_S) r`: by second-order perturbation theory, the remaining error of
:math:`\theta`, before the next matvec is spent. The ratio of the gain of the last direction to its predicted gain
shows how good the level is; where it is small, the next level takes over.

The neighbour of an end is checked too: where the Ritz pair next to the end may still gain enough to pass it, V is
expanded for that pair first. Else the method could stop at an inner eigenvalue, as one can that follows residuals
alone; where the next eigenvalue is only a few ``tol`` away it still can, now and then: docs/multifidelity.md has
figures.

Cost: for each direction a matvec of the last level and ``num_inner`` of a cheap one. Memory: ``2 ncv + num_inner``
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
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers.common import block_subspace
from hvpkit.solvers.common.block_subspace import BlockSubspace
from hvpkit.solvers.common.bounds import TINY, kato_temple
from hvpkit.solvers.common.convergence import (
    attainable_accuracy,
    eigen_result,
    final_status,
    intervals,
    progress_of,
    rounding,
)
from hvpkit.solvers.common.orthogonalize import residuals_of, row_norms
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, select
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.driver import Assessment, Limits
from hvpkit.solvers.krylov import krylov_space
from hvpkit.solvers.rough_start import rough_vectors

MAX_START_STEPS, START_SHARE = 80, 0.5
"""Lanczos steps on the first level for the first vectors, at most, and their share of the budget, at most. Chosen by
feel."""

MIN_INNER_STEPS, MAX_INNER_STEPS = 6, 30
"""Lanczos steps on a level for a direction, by default: as many as cost a matvec of the last level, within these.
Chosen by feel."""

SETTLED = 0.1
"""Relative change of the predicted gain at which these steps end early. Chosen by feel."""

CLAMP = 0.05
"""The clamp, at most, as a share of the spread of the spectrum. Chosen by feel."""

NEAR = 10.0
"""In units of ``tol * |value|``: eigenvalues nearer to an end than that count as this far away in its error bound.
Chosen by feel."""

PREDICTION_FACTOR = 10.0
"""Factor of a predicted error. With 3.3 for 10, 3 of 7 solves of two small ResNets were 1.4 to 1.6 % off for 1 % asked,
as a mixture with an inner eigenvalue 1.9 % away."""

GAIN_FACTOR = 3.0
"""The factor is this times the ratio of gain to predicted gain of the last directions, if that is more than
``PREDICTION_FACTOR``. Chosen by feel."""

POOR_GAIN, NUM_GAINS = 0.5, 3
"""A level is left if the geometric mean of its last gains, in units of the predicted ones, is less than the first; the
mean is over the second, so that one direction is enough if its gain is very small. Chosen by feel."""

ESTIMATED = (
    "every error is at most tol * |value| by a sample's estimate; that the values are the extreme ones is likely, not "
    'certain: method="lanczos" says how likely'
)
"""The message of convergence."""

ENDS = {"BE": (0, -1), "SA": (0,), "LA": (-1,)}


@dataclass(frozen=True)
class DavidsonState(BlockSubspace):
    """A basis, and the direction that expands it next.

    Ritz pairs are known by their place: 0 the lowest, 1 the next, -1 the highest, -2 the next.

    Attributes:
        target: place of the pair to expand for.
        residuals: of these pairs ``[4, n]``; fewer on a smaller basis.
        direction: the direction for the target's residual ``[n]``, of any norm.
        values: of the pairs, over scale.
        errors: their error bounds, or predicted errors.
        predictions: predicted gains of the ends' last directions.
        gains: of the level's last directions, in units of the predicted ones.
        level: index of the level that directions come from.
    """

    target: int = -1
    residuals: Tensor | None = None
    direction: Tensor | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)
    predictions: Mapping[int, float] = field(default_factory=dict)
    gains: tuple[float, ...] = ()
    level: int = 0


@dataclass(frozen=True)
class Davidson:
    """The solver for the cheap levels of :func:`hvpkit.multifidelity`: see :class:`hvpkit.solvers.driver.Solver`.

    It hands over once all cheap levels are left.

    Attributes:
        request: what is asked for.
        levels: operators of rising cost, the last one asked about.
        ncv: the most basis vectors before a restart.
        num_inner: the most Lanczos steps on a level for a direction, or None.
        spent: full-data matvecs that making the levels has cost.
    """

    request: Request
    levels: tuple[LinearOperator, ...]
    ncv: int
    num_inner: int | None = None
    spent: float = 0.0

    @property
    def op(self) -> LinearOperator:
        """The operator asked about."""
        return self.levels[-1]

    @property
    def limits(self) -> Limits:
        """Of the request."""
        return self.request.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return max(self.op.cost, *(self.inner_steps(level) * level.cost for level in self.levels[:-1]))

    @property
    def ends(self) -> tuple[int, ...]:
        """The ends asked for: 0 the low one, -1 the high one."""
        return ENDS[self.request.which]

    def inner_steps(self, level: LinearOperator) -> int:
        """Return the most Lanczos steps on a level for a direction."""
        worth = round(self.op.cost / level.cost) if level.cost else MAX_INNER_STEPS
        return min(self.num_inner or min(MAX_INNER_STEPS, max(MIN_INNER_STEPS, worth)), level.n)

    def init(self) -> DavidsonState:
        """Return a state with room for the first rows."""
        without_start = replace(self.request, start=None)
        return DavidsonState(**vars(block_subspace.start(self.op, without_start, 0, self.ncv)))

    def step(self, state: DavidsonState) -> DavidsonState:
        """Multiply a new row; else find a direction to expand the basis by, on a cheap level."""
        if state.num_new:
            return block_subspace.multiply(self.op, state, 1)
        if not state.num_rows:
            return self._start(state)
        if state.residuals is None:
            return state  # the start gave fewer rows than it might
        return self._find_direction(state, state.residuals[state.target])

    def _start(self, state: DavidsonState) -> DavidsonState:
        """Append the extreme Ritz vectors of the first level, from the caller's start or a random one."""
        level, asked = self.levels[0], self.request
        remaining = START_SHARE * self.limits.remaining(self.spent)
        affordable = remaining / level.cost if level.cost else MAX_START_STEPS
        # also for the low end alone: the high one is not far, and would else be in every residual
        k, which = (1, "LA") if asked.which == "LA" else (min(2, self.op.n), "BE")
        num_steps = min(MAX_START_STEPS, int(affordable), self.op.n)
        found, new = rough_vectors(level, k, which, v0=asked.start, num_steps=num_steps, seed=asked.seed)
        if not bool(torch.isfinite(new).all()):
            new = found.basis[:1]
        state = replace(state, num_matvecs=self.spent + found.num_matvecs, scale=found.scale)
        return block_subspace.extend(self.op, asked, state, new)

    def _find_direction(self, state: DavidsonState, residual: Tensor) -> DavidsonState:
        r"""Compute :math:`f(A_S) r` for the target pair, and its predicted gain and error."""
        level, target, tol = self.levels[state.level], state.target, self.request.tol
        end = 0 if target >= 0 else -1
        theta, inwards = state.values[target], 1.0 if end == 0 else -1.0
        size, spread = abs(state.values[end]), max(state.values[-1] - state.values[0], abs(theta))

        def weights(pairs: RitzPairs, share: float) -> Tensor:
            """Return f at the level's Ritz values times the coefficients of r, with a clamp of a share of the size."""
            clamp = max(min(share * size, CLAMP * spread), attainable_accuracy(self.op, state.norm))
            return pairs.vectors[0] / (inwards * (pairs.values - theta)).clamp(min=clamp)

        def settled(pairs: RitzPairs) -> bool:
            gains.append(float(pairs.vectors[0] @ weights(pairs, NEAR * tol)))
            return abs(gains[-1] - gains[-2]) <= SETTLED * gains[-1]

        gains = [0.0]
        space = krylov_space(level, residual, self.inner_steps(level), state.scale, settled)
        pairs, rows = space.pairs, space.rows
        state = replace(state, num_matvecs=state.num_matvecs + len(rows) * level.cost)
        squared = float(self.op.space.norm(residual)) ** 2
        gain, largest_gain = (
            squared * float(pairs.vectors[0] @ weights(pairs, share)) for share in (1.0, NEAR * tol)
        )
        if not math.isfinite(gain):
            return replace(state, direction=residual)
        predicted = max([PREDICTION_FACTOR, *(GAIN_FACTOR * ratio for ratio in state.gains)]) * largest_gain
        return replace(
            state,
            direction=(pairs.vectors @ weights(pairs, 1.0)).to(rows) @ rows,
            predictions={**state.predictions, target: gain} if target == end else state.predictions,
            errors={**state.errors, target: min(state.errors[target], predicted)},
        )

    def assess(self, state: DavidsonState) -> Assessment[DavidsonState]:
        """Update the Ritz pairs, test convergence, and select the next target."""
        op = self.op
        if state.num_fresh:
            state = self._update_pairs(block_subspace.drop_non_finite(state))
        if not state.num_rows:
            status = None if state.suspect is None else Status.NON_FINITE
            return Assessment(state, Progress(), 3, status, state.suspect)
        target = self._select_target(state)
        status = self._status(state, done=target is None)
        handover = status is None and self.levels[state.level] is op
        if status is None and target is not None and not handover:
            state = self._prepare_expansion(state, target)
        values, errors = (
            torch.tensor([known[end] for end in (0, -1)], dtype=torch.float64)
            for known in (state.values, state.errors)
        )
        bounds = errors.clamp(min=rounding(op, state.norm))
        progress = progress_of(values, bounds, state.scale, state.level)
        return Assessment(state, progress, max(1, state.num_new), status, state.suspect, handover)

    def _prepare_expansion(self, state: DavidsonState, target: int) -> DavidsonState:
        """Prepare the basis expansion for the target pair: append its direction, or a residual that is rounding."""
        direction = state.direction if target == state.target else None
        attainable = attainable_accuracy(self.op, state.norm)
        if direction is None and state.residuals is not None and state.errors[target] <= attainable:
            direction = state.residuals[target]
        state = replace(state, target=target, direction=None)
        if direction is None:
            return state
        return block_subspace.extend(self.op, self.request, self._with_room(state), direction[None])

    def _update_pairs(self, state: DavidsonState) -> DavidsonState:
        """Compute new Ritz pairs: values, errors and residuals, and the gain of the last direction."""
        op, m = self.op, state.num_rows
        if not m:
            return state
        projection = block_subspace.rayleigh_ritz(op, state.rows[:m], state.images[:m])
        state = replace(state, norm=max(state.norm, projection.norm))
        chosen = select(projection.values, min(m, 4), "BE")
        rotation = (projection.to_rows @ projection.vectors[:, chosen]).mT.to(state.rows)
        vectors, images = rotation @ state.rows[:m], rotation @ state.images[:m]
        found = projection.values[chosen]
        residuals = residuals_of(vectors, images, found)
        norms = row_norms(op.space, residuals).to("cpu", torch.float64)
        near = (NEAR * self.request.tol * found.abs()).clamp(min=TINY)
        bounds = torch.minimum(norms, torch.maximum(kato_temple(found, norms), norms**2 / near))
        places = [place for place in (0, 1, -2, -1) if -len(found) <= place < len(found)]
        values = {place: float(found[place]) for place in places}
        moved = {place: abs(value - state.values.get(place, math.inf)) for place, value in values.items()}
        gains, predicted = state.gains, state.predictions.get(state.target, 0.0)
        if predicted > 0:
            gains = (*gains, moved[state.target] / predicted)[-NUM_GAINS:]
        poor = math.prod(gains) < POOR_GAIN**NUM_GAINS

        def error(place: int) -> float:
            """Return the earlier error bound, where it still holds, or the new one."""
            before = state.errors.get(place, math.inf)
            stale = poor or place == state.target or moved[place] > before
            return min(float(bounds[place]), math.inf if stale else before)

        wanted = [end % len(found) for end in self.ends][: len(found)]
        return replace(
            state,
            best=RitzPairs(found[wanted], vectors[wanted].mT, norms[wanted]),
            residuals=residuals,
            direction=None,
            values=values,
            errors={place: error(place) for place in places},
            gains=() if poor else gains,
            level=state.level + poor,
        )

    def _select_target(self, state: DavidsonState) -> int | None:
        """Select the pair to expand for: the high end until it has converged, then the low one, then their neighbours.

        A neighbour has converged where its error does not let it pass its end: else it may be the extreme one. None if
        all have converged.
        """
        if state.num_rows < self.request.k:
            return self.ends[0]
        noise, attainable = rounding(self.op, state.norm), attainable_accuracy(self.op, state.norm)

        def allowed(end: int) -> float:
            return float(
                self.request.allowed(torch.tensor(state.values[end], dtype=torch.float64), state.norm)
            )

        for end in reversed(self.ends):
            if not state.errors[end] + noise <= max(allowed(end), attainable):
                return end
        for end in self.ends if state.num_rows > 2 else ():
            neighbour = 1 if end == 0 else -2
            room = abs(state.values[neighbour] - state.values[end]) + allowed(end)
            if not state.errors[neighbour] <= max(room, attainable):
                return neighbour
        return None

    def _status(self, state: DavidsonState, *, done: bool) -> Status | None:
        """Return the status if the solve is over."""
        if state.suspect is not None:
            return Status.NON_FINITE
        whole, noise = state.num_rows == self.op.n, rounding(self.op, state.norm)
        if state.num_rows < self.request.k or not (whole or done):
            return None
        values = torch.tensor([state.values[end] for end in self.ends], dtype=torch.float64)
        bounds = torch.tensor([state.errors[end] for end in self.ends], dtype=torch.float64)
        best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
        attainable = attainable_accuracy(self.op, state.norm)
        return final_status(best, self.request, state.norm, attainable, values, bounds + noise)

    def _with_room(self, state: DavidsonState) -> DavidsonState:
        """Make room for another row: if the basis is full, keep half of the Ritz vectors, from either end."""
        m = state.num_rows
        if m < len(state.rows) or m == self.op.n:
            return state
        projection = block_subspace.rayleigh_ritz(self.op, state.rows[:m], state.images[:m])
        kept = projection.vectors[:, select(projection.values, m // 2, "BE")]
        return block_subspace.rotate(state, projection, kept)

    def finalize(self, state: DavidsonState, status: Status) -> EigenResult:
        """Return the pairs of the ends, with residuals from known matvecs: no further one is needed."""
        unit = float(state.scale)
        found = state.best.scaled(unit)
        kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
        slack = attainable_accuracy(self.op, state.norm) * unit
        where = intervals(found, self.request, slack, kind)
        errors = [state.errors[end] for end in self.ends[: len(found.values)]]
        bounds = (torch.tensor(errors, dtype=torch.float64) + rounding(self.op, state.norm)) * unit
        message = ESTIMATED if status is Status.CONVERGED else None
        return eigen_result(found, where, status, state.num_matvecs, message=message, error_bounds=bounds)
