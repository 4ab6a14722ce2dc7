"""Systems A x = b with several right-hand sides: a :class:`hvpkit.solvers.driver.Solver` over one of the recurrences.

The columns of b are rows here, each with a recurrence of its own; those still at work share a block matvec. Where a
recurrence says that its residual is small enough, a matvec shows the true one. If that is larger, by rounding, the
recurrence starts again from it (iterative refinement), as long as it halves each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.results.linear import NegativeCurvature, SolveProgress, SolveResult
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.checkpoint import Witness, coefficients
from hvpkit.solvers.common.orthogonalize import power_of_two, row_norms
from hvpkit.solvers.driver import Assessment, Limits, assessment_interval
from hvpkit.solvers.linear.cg import ConjugateGradients, Directions
from hvpkit.solvers.linear.minres import LanczosVectors, Minres
from hvpkit.solvers.linear.preconditioner import SamplePreconditioner
from hvpkit.solvers.linear.recurrence import (
    NEGATIVE,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Iterates,
    Matrix,
    Recurrence,
    rows_where,
)

T = TypeVar("T")
V = TypeVar("V", Tensor, tuple[Any, ...])

METHODS: dict[str, Recurrence[Any]] = {"cg": ConjugateGradients(), "minres": Minres()}

REFINES = 0.9
"""Share of the true residual that is left after a recurrence began again from it, at most: else rounding limits it. Of
80 float32 systems at the edge of rounding MINRES then solves 79, with 0.5 57; others take up to a sixth more matvecs
until they are called limited."""

INCONSISTENT = 0.5
"""Share of the residual where it was nearly the least of all that a system is called singular above. Chosen by feel."""

LEAST_STEPS = 8
"""Steps between two assessments, unless a row is ready before: an assessment costs half of what a cheap step does.
Chosen by feel."""

SAFE = 1 / 16
"""Exponent of matvecs that are not scaled, at most, over the largest of the dtype: the fourth power and a sum over many
entries are still in range. Chosen by feel."""

RANKS = (
    Status.CONVERGED,
    Status.MAX_MATVECS,
    Status.TIME_LIMIT,
    Status.ROUNDING_LIMITED,
    Status.SINGULAR,
    Status.NEGATIVE_CURVATURE,
    Status.NON_FINITE,
)
"""From the best to the worst."""

MESSAGES = {
    Status.CONVERGED: "every true residual norm is at most tol * |b|",
    Status.MAX_MATVECS: (
        "the matvec budget is used up; residual_norm says how good x is; raise max_matvecs, tol or damping"
    ),
    Status.TIME_LIMIT: "the time limit is reached; residual_norm says how good x is; raise time_limit or tol",
    Status.ROUNDING_LIMITED: (
        "the rounding of the matvecs does not allow tol; residual_norm says how good x is; use float64, raise tol, or "
        "add damping"
    ),
    Status.SINGULAR: Status.SINGULAR.advice,
    Status.NEGATIVE_CURVATURE: Status.NEGATIVE_CURVATURE.advice,
    Status.NON_FINITE: "a matvec gave NaN or infinity; x is from the matvecs before it",
}


@dataclass(frozen=True)
class Found:
    """Verified solutions of all rows, and their statuses.

    Attributes:
        best: solutions with the least true residual so far ``[k, n]``; zero at first.
        residuals: their true residual norms over those of b ``[k]``, float64 on the CPU.
        least: the same when they were nearly the least of all ``[k]``; infinite if they never were.
        statuses: empty while at work.
        direction: of negative curvature, one row or none ``[..., n]``.
        curvature, column: of the direction.
    """

    best: Tensor = field(metadata=LONG)
    residuals: Tensor
    least: Tensor
    statuses: tuple[str, ...]
    direction: Tensor = field(metadata=LONG)
    curvature: float = 0.0
    column: int = -1


@dataclass(frozen=True)
class SystemState:
    """Solutions, finished or at work.

    Attributes:
        iterates: of the rows at work.
        vectors: of their recurrence.
        found: what is verified.
        places: rows at work.
        scale: what matvecs are divided by.
        num_steps: so far.
        num_matvecs: full-data matvecs, with those of the preconditioner.
        num_passes: the same, where a block counts once.
        fresh: rows whose solution at work is verified.
        is_ready: True if a row has converged by its recurrence, or has stopped.
    """

    iterates: Iterates
    vectors: Directions | LanczosVectors
    found: Found
    places: tuple[int, ...]
    scale: float = 1.0
    num_steps: int = 0
    num_matvecs: float = 0.0
    num_passes: float = 0.0
    fresh: tuple[int, ...] = ()
    is_ready: bool = False


@dataclass(frozen=True)
class LinearSystem:
    """The solver: see :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: A, damping included.
        rhs: right-hand sides over their units, rows ``[k, n]``.
        units: powers of two ``[k]``.
        method: a key of ``METHODS``.
        tol: relative residual norm.
        limits: budget and time limit.
        preconditioner: or None.
    """

    op: LinearOperator
    rhs: Tensor
    units: Tensor
    method: str
    tol: float
    limits: Limits
    preconditioner: SamplePreconditioner | None = None

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return len(self.rhs) * self.op.cost

    @property
    def exact(self) -> LinearOperator:
        """The operator that true residuals are of: in native arithmetic."""
        return self.op.exact or self.op

    @property
    def recurrence(self) -> Recurrence[Any]:
        """The method."""
        return METHODS[self.method]

    def init(self) -> SystemState:
        """Return x = 0; rows of b that are zero are finished."""
        rhs, norms = self.rhs, self._sizes
        places = norms.nonzero().flatten().tolist()
        r = rhs[places]
        spent = self.preconditioner.spent if self.preconditioner else 0.0
        return SystemState(
            Iterates.of(r, norms[places].tolist()),
            self.recurrence.begin(self._matrix([]), r),
            Found(
                torch.zeros_like(rhs),
                (norms > 0).to(norms),
                torch.full_like(norms, math.inf),
                tuple("" if row in places else str(Status.CONVERGED) for row in range(len(rhs))),
                rhs[:0],
            ),
            tuple(places),
            num_matvecs=spent,
            num_passes=spent,
        )

    def step(self, state: SystemState) -> SystemState:
        """Take a step with each row at work; the first matvec sets the scale."""
        scales = [state.scale] if state.num_steps else []
        iterates, vectors = self.recurrence.advance(self._matrix(scales), state.iterates, state.vectors)
        return SystemState(
            iterates,
            vectors,
            state.found,
            state.places,
            scales[0],
            state.num_steps + 1,
            state.num_matvecs + len(state.places) * self.op.cost,
            state.num_passes + self.op.cost,
            is_ready=any(self._ready(iterates, state.places)) or 1 in iterates.least,
        )

    def _ready(
        self, iterates: Iterates, places: tuple[int, ...], goals: Sequence[float] | None = None
    ) -> list[bool]:
        """Return which rows have reached their goal, by default tol, or have stopped."""
        lengths, goals = self._lengths, goals or [self.tol] * len(places)
        rows = zip(iterates.sizes, goals, places, iterates.stopped, strict=True)
        return [size <= goal * lengths[place] or reason != RUNNING for size, goal, place, reason in rows]

    def assess(self, state: SystemState) -> Assessment[SystemState]:
        """Compare residuals with tol, verify those that are small enough, and finish or begin again."""
        state, iterates, suspect = replace(state, is_ready=False), state.iterates, None
        ready = self._ready(iterates, state.places, self._goals(state))
        left = self._relative(state, iterates.sizes)
        if NON_FINITE in iterates.stopped:
            row = iterates.stopped.index(NON_FINITE)
            suspect = self.recurrence.multiplied(state.vectors)[row].unsqueeze(1)
        elif any(ready) or 1 in iterates.least:
            state = self._judged(state, ready)
        done = [Status(status) for status in state.found.statuses if status]
        known = left if state.places else state.found.residuals.tolist()
        residual = max(math.inf if math.isnan(size) else size for size in known)
        progress = SolveProgress(residual=residual, num_converged=done.count(Status.CONVERGED))
        status = Status.NON_FINITE if suspect is not None else None if state.places else worst(done)
        num_steps = max(LEAST_STEPS, assessment_interval(self.op, state.num_steps))
        return Assessment(state, progress, num_steps, status, suspect)

    def _relative(self, state: SystemState, sizes: Sequence[float]) -> list[float]:
        """Return norms of vectors of the rows at work over those of their right-hand sides."""
        return [size / self._lengths[place] for size, place in zip(sizes, state.places, strict=True)]

    def _goals(self, state: SystemState) -> list[float]:
        """Return what a residual by recurrence has to reach: tol, or the rounding of its matvecs."""
        sizes, norms = self._relative(state, self._norms(state.iterates.x).tolist()), state.iterates.norms
        return [
            max(self.tol, self.op.precision * norm * size) for norm, size in zip(norms, sizes, strict=True)
        ]

    def finalize(self, state: SystemState, status: Status) -> SolveResult:
        """Return the best solutions, those at work verified."""
        unknown = [row for row, place in enumerate(state.places) if place not in state.fresh]
        if unknown:
            state, _, _ = self._verified(state, unknown)
        statuses = list(state.found.statuses)
        for place in state.places:
            small = float(state.found.residuals[place]) <= self.tol
            statuses[place] = Status.CONVERGED if small and status is not Status.NON_FINITE else status
        x = state.found.best.clone()
        lost = self._scale_(x, state.scale)
        residuals = torch.where(lost, torch.inf, state.found.residuals)
        found = [
            Status.ROUNDING_LIMITED if out and one == Status.CONVERGED else Status(one)
            for out, one in zip(lost.tolist(), statuses, strict=True)
        ]
        overall, negative = worst(found), None
        if len(state.found.direction):
            negative = NegativeCurvature(
                state.found.direction[0], state.found.curvature * state.scale, state.found.column
            )
        units = self.units.to("cpu", torch.float64)
        return SolveResult(
            x.mT,
            residuals * self._sizes * units,
            residuals,
            state.num_matvecs,
            state.num_passes,
            overall,
            tuple(found),
            MESSAGES[overall],
            0.0,
            (),
            self.method,
            negative,
        )

    def _matrix(self, scales: list[float]) -> Matrix:
        """Return A over its scale; of the first matvec, if there is no scale yet, which is then added to the list."""

        def apply(rows: Tensor) -> Tensor:
            images = self.op.product(rows.mT).mT
            if not scales:
                scales.append(_scale_of(self.op.space.peak(images), images.dtype))
            return images if scales[0] == 1 else images / scales[0]

        return Matrix(apply, self.preconditioner, self.op.space)

    @cached_property
    def _sizes(self) -> Tensor:
        """Norms of the right-hand sides over their units ``[k]``."""
        return self._norms(self.rhs)

    @cached_property
    def _lengths(self) -> list[float]:
        """The same, as numbers."""
        return self._sizes.tolist()

    def _norms(self, rows: Tensor) -> Tensor:
        """Return norms ``[k]`` in float64 on the CPU."""
        return row_norms(self.op.space, rows).to("cpu", torch.float64)

    def _verified(self, state: SystemState, rows: list[int]) -> tuple[SystemState, Tensor, Tensor]:
        """Verify rows at work by a matvec with their solutions; keep those that are the best so far.

        Returns:
            The state, the true residuals ``[p, n]``, and their norms over those of b ``[p]``.
        """
        places = [state.places[row] for row in rows]
        x = state.found.best[places] + state.iterates.x[rows]
        residuals = self.rhs[places] - self.exact.product(x.mT).mT / state.scale
        norms = (self._norms(residuals) / self._sizes[places]).nan_to_num(math.inf, posinf=math.inf)
        found = state.found
        better = norms < found.residuals[places]
        taken = better.to(x.device)
        best = _put(found.best, places, rows_where(taken, x, found.best[places]))
        left = rows_where(~taken, state.iterates.x[rows], torch.zeros_like(x))
        known = _put(found.residuals, places, torch.where(better, norms, found.residuals[places]))
        state = replace(
            state,
            iterates=replace(state.iterates, x=_put(state.iterates.x, rows, left)),
            found=replace(found, best=best, residuals=known),
            fresh=(*state.fresh, *places),
            num_matvecs=state.num_matvecs + len(rows) * self.exact.cost,
            num_passes=state.num_passes + self.exact.cost,
        )
        return state, residuals, norms

    def _judged(self, state: SystemState, ready: list[bool]) -> SystemState:
        """Verify rows at work; finish those that are ready, or begin again from their true residuals."""
        reasons, least = state.iterates.stopped, state.iterates.least
        rows, before = (
            [row for row in range(len(ready)) if ready[row] or least[row] == 1],
            state.found.residuals,
        )
        state, residuals, norms = self._verified(state, rows)
        places = [place for place, one in zip(state.places, least, strict=True) if one == 1]
        noted = tuple(2 if one == 1 else one for one in least)
        state = replace(
            state,
            iterates=replace(state.iterates, least=noted),
            found=replace(state.found, least=_put(state.found.least, places, state.found.residuals[places])),
        )
        statuses, again = list(state.found.statuses), []
        for number, row in enumerate(rows):
            place, reason, residual = state.places[row], reasons[row], float(norms[number])
            if residual <= self.tol:
                statuses[place] = str(Status.CONVERGED)
            elif not ready[row]:
                continue
            elif reason == NEGATIVE:
                statuses[place] = str(Status.NEGATIVE_CURVATURE)
                state = self._with_direction(state, row, residual)
            elif residual <= REFINES * float(before[place]):
                again.append(number)
            else:
                singular = (
                    reason == SINGULAR
                    or INCONSISTENT * state.found.least[place] < state.found.residuals[place]
                )
                statuses[place] = str(Status.SINGULAR if singular else Status.ROUNDING_LIMITED)
        state = replace(state, found=replace(state.found, statuses=tuple(statuses)))
        if again:
            state = self._restarted(state, [rows[number] for number in again], residuals[again])
        kept = [row for row, place in enumerate(state.places) if not statuses[place]]
        return replace(
            state,
            iterates=rows_of(state.iterates, kept),
            vectors=rows_of(state.vectors, kept),
            places=tuple(state.places[row] for row in kept),
        )

    def _restarted(self, state: SystemState, rows: list[int], residuals: Tensor) -> SystemState:
        """Begin the recurrence of these rows again from true residuals ``[p, n]``."""
        begun = self.recurrence.begin(self._matrix([state.scale]), residuals)
        return replace(
            state,
            iterates=with_rows(state.iterates, rows, Iterates.of(residuals, self._norms(residuals).tolist())),
            vectors=with_rows(state.vectors, rows, begun),
        )

    def _with_direction(self, state: SystemState, row: int, residual: float) -> SystemState:
        """Keep the iterate of a row that met negative curvature, and the first such direction."""
        place, found = state.places[row], state.found
        found = replace(
            found,
            best=_put(found.best, [place], found.best[[place]] + state.iterates.x[[row]]),
            residuals=_put(found.residuals, [place], torch.tensor([residual], dtype=torch.float64)),
        )
        if not len(found.direction) and isinstance(state.vectors, Directions):
            direction = state.vectors.p[row] / self.op.space.peak(state.vectors.p[row])
            unit = direction / self.op.space.norm(direction)
            found = replace(found, direction=unit[None], curvature=state.vectors.curvature[row], column=place)
        return replace(state, found=found)

    def _scale_(self, x: Tensor, scale: float) -> Tensor:
        """Multiply solutions by their unit over the scale, in place; return where that left the dtype's range."""
        exponents = (torch.log2(self.units) - math.log2(scale)).round()
        half = (exponents / 2).floor()
        before = x.clone()
        for part in (half, exponents - half):
            x.mul_(torch.exp2(part)[:, None])
        back = x.clone()
        for part in (half, exponents - half):
            back.mul_(torch.exp2(-part)[:, None])
        difference, size = self._norms(back - before), self._norms(before)
        return ~(difference <= torch.finfo(x.dtype).eps * size)

    def identity(self, **more: Any) -> dict[str, Any]:
        """Return what must be the same when a solve continues from a checkpoint; tol and limits may change."""
        b = digest(self.op.space.whole((self.rhs * self.units[:, None]).mT, self.op.n).mT)
        return {"solver": self.method, **self.op.identity(), "b": b, **more}

    def resumed(self, state: SystemState) -> SystemState:
        """Verify by one matvec, counted, that a loaded state belongs to the operator.

        It is with a random combination of the solutions at work, whose residuals the recurrence has.

        Raises:
            ValueError: it belongs to another operator.
        """
        rows = [*range(len(state.places))]
        state = replace(state, iterates=rows_of(state.iterates, rows), vectors=rows_of(state.vectors, rows))
        if not state.num_steps or not rows:
            return state
        places, weights, space = [*state.places], coefficients(len(rows)).to(self.rhs), self.op.space
        x = weights @ (state.found.best[places] + state.iterates.x)
        b, r = weights @ self.rhs[places], weights @ state.iterates.r
        # rounding leaves the recurrence's residuals as far from the true ones as the norms of A and x say
        size = max(float(space.norm(b)), max(state.iterates.norms) * float(space.norm(x)))
        cost = Witness(x, b - r, len(rows)).check(self.op, state.scale, size)
        return replace(state, num_matvecs=state.num_matvecs + cost, num_passes=state.num_passes + cost)


def _scale_of(peak: Tensor, dtype: torch.dtype) -> float:
    """Return 1 where the squares of images with this peak are well within the dtype's range, else a power of two."""
    scale, most = float(power_of_two(peak)), torch.finfo(dtype).max ** SAFE
    return 1.0 if 1 / most <= scale <= most else scale


def worst(statuses: list[Status]) -> Status:
    """Return the worst status."""
    return max(statuses, key=RANKS.index)


def rows_of(tree: T, rows: list[int]) -> T:
    """Return these rows of each tensor and tuple of a dataclass."""
    return type(tree)(
        **{
            name: tuple(value[row] for row in rows) if isinstance(value, tuple) else value[rows]
            for name, value in vars(tree).items()
        }
    )


def with_rows(tree: T, rows: list[int], new: T) -> T:
    """Return a dataclass of tensors and tuples with rows replaced by those of ``new``."""
    return type(tree)(**{name: _put(value, rows, getattr(new, name)) for name, value in vars(tree).items()})


def _put(values: V, rows: list[int], new: V) -> V:
    if isinstance(values, tuple):
        fresh = dict(zip(rows, new, strict=True))
        return tuple(fresh.get(row, value) for row, value in enumerate(values))
    values = values.clone()
    values[rows] = new
    return values
