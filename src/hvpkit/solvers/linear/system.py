"""Systems A x = b with several right-hand sides: a :class:`hvpkit.solvers.driver.Solver` over one of the recurrences.

The columns of b are rows here, each with a recurrence of its own; those still at work share a block matvec. Where a
recurrence says that its residual is small enough, a matvec shows the true one. If that is larger, by rounding, the
recurrence starts again from it (iterative refinement), as long as a tenth is gained each time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.deadline import DeadlineReached, current_deadline
from hvpkit._utils.ranks import check_deadline_of
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.results.linear import NegativeCurvature, SolveProgress, SolveResult
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.checkpoint import Witness, coefficients
from hvpkit.solvers.driver import Assessment, Limits
from hvpkit.solvers.linear.arithmetic import Arithmetic
from hvpkit.solvers.linear.cg import ConjugateGradients, DirectionRow
from hvpkit.solvers.linear.minres import Minres
from hvpkit.solvers.linear.preconditioner import SamplePreconditioner
from hvpkit.solvers.linear.recurrence import (
    NEGATIVE,
    NON_FINITE,
    SINGULAR,
    Matrix,
    Recurrence,
    Row,
    take_steps,
)

METHODS: dict[str, Recurrence[Any]] = {"cg": ConjugateGradients(), "minres": Minres()}

REFINES = 0.9
"""Share of the true residual that is left after a recurrence began again from it, at most: else rounding limits it. Of
80 float32 systems at the edge of rounding MINRES then solves 79, with 0.5 57; others take up to a sixth more matvecs
until they are called limited."""

INCONSISTENT = 0.5
"""Share of the residual where it was nearly the least of all that a system is called singular above. Chosen by feel."""

LEAST_STEPS, LEAST_SHORT_STEPS, OVERSHOOT = 8, 64, 8
"""Steps between two assessments, at least, unless a row is ready before: of operators over examples or of long vectors,
and of others, whose steps may cost less than an assessment, which finds only rows that rounding limits; and one over
their share of those so far, at most."""

SHORT = 1e-2
"""Seconds of steps that are taken at once: what an interruption loses, at most, of those before it. Chosen by feel."""

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
        "the matvec budget is used up; residual_norm says how good x is; raise max_matvecs, tol or damping; where it "
        "has not fallen, hk.check says whether the matrix is symmetric, as it has to be"
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
class Column:
    """The verified solution of a right-hand side, so far.

    Attributes:
        best: the solution with the least true residual so far ``[n]``; zero at first.
        residual: its true residual norm over that of b.
        least: the same when it was nearly the least of all; infinite if it never was.
        status: empty while at work.
    """

    best: Tensor = field(metadata=LONG)
    residual: float
    least: float = math.inf
    status: str = ""


@dataclass(frozen=True)
class SystemState:
    """Solutions, finished or at work.

    Attributes:
        rows: at work.
        places: of these among the right-hand sides.
        columns: what is verified, of all right-hand sides.
        direction: of negative curvature, one row or none ``[..., n]``.
        curvature, column: of the direction.
        scale: what matvecs are divided by.
        num_steps: so far.
        num_matvecs: full-data matvecs, with those of the preconditioner.
        num_passes: the same, where a block counts once.
        fresh: rows whose solution at work is verified.
        is_ready: True if an assessment is due, or a row has converged by its recurrence, or has stopped.
    """

    rows: tuple[Row, ...]
    places: tuple[int, ...]
    columns: tuple[Column, ...]
    direction: Tensor = field(metadata=LONG)
    curvature: float = 0.0
    column: int = -1
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
        arithmetic: of vectors.
        precision: relative error of matvecs.
        rhs: right-hand sides over their units, ``[n]`` each.
        lengths: their norms.
        units: powers of two.
        method: a key of ``METHODS``.
        tol: relative residual norm.
        limits: budget and time limit.
        preconditioner: or None.
    """

    op: LinearOperator
    arithmetic: Arithmetic
    precision: float
    rhs: tuple[Tensor, ...]
    lengths: tuple[float, ...]
    units: tuple[float, ...]
    method: str
    tol: float
    limits: Limits
    preconditioner: SamplePreconditioner | None = None

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return len(self.rhs) * self.op.cost

    @property
    def first_steps(self) -> int:
        """Steps before the first assessment; none if all right-hand sides are zero."""
        return self._due(0) if any(self.lengths) else 0

    @property
    def exact(self) -> LinearOperator:
        """The operator that true residuals are of: in native arithmetic."""
        return self.op.exact or self.op

    @property
    def recurrence(self) -> Recurrence[Any]:
        """The method."""
        return METHODS[self.method]

    def _matrix(self, scale: float | None = None) -> Matrix:
        """Return A over its scale; None: that of the next matvec."""
        return Matrix(self.op, self.arithmetic, self.preconditioner, scale)

    def init(self) -> SystemState:
        """Return x = 0; rows of b that are zero are finished."""
        matrix = self._matrix()
        places = tuple(place for place, length in enumerate(self.lengths) if length)
        done = str(Status.CONVERGED)
        spent = self.preconditioner.spent if self.preconditioner else 0.0
        return SystemState(
            tuple(self.recurrence.begin(matrix, self.rhs[place], self.lengths[place]) for place in places),
            places,
            tuple(
                Column(torch.zeros_like(b), float(length > 0), status="" if length else done)
                for b, length in zip(self.rhs, self.lengths, strict=True)
            ),
            self.rhs[0].new_empty((0, len(self.rhs[0]))),
            num_matvecs=spent,
            num_passes=spent,
        )

    def step(self, state: SystemState) -> SystemState:
        """Take a step with each row at work, or several short ones; the first matvec sets the scale."""
        matrix = self._matrix(state.scale if state.num_steps else None)
        goals = [self.tol * self.lengths[place] for place in state.places]
        end = min(time.perf_counter() + SHORT, current_deadline())
        rows, taken = take_steps(self.recurrence, matrix, state.rows, goals, self._most_steps(state), end)
        num_steps, cost, scale = state.num_steps + taken, taken * self.op.cost, matrix.scale
        is_ready = any(row.is_ready(goal) or row.least == 1 for row, goal in zip(rows, goals, strict=True))
        return SystemState(
            rows,
            state.places,
            state.columns,
            state.direction,
            state.curvature,
            state.column,
            1.0 if scale is None else scale,
            num_steps,
            state.num_matvecs + len(rows) * cost,
            state.num_passes + cost,
            is_ready=is_ready or num_steps >= self._due(state.num_steps),
        )

    def _most_steps(self, state: SystemState) -> int:
        """Return how many steps may be taken at once: those before an assessment or the limit of matvecs.

        One where ranks step together, whose clocks differ.
        """
        if self.op.space.ranks is not None:
            return 1
        left = self.limits.remaining(state.num_matvecs) - self.step_cost
        affordable = 1 + int(left / (len(state.rows) * self.op.cost))
        return max(1, min(self._due(state.num_steps) - state.num_steps, affordable))

    def _due(self, num_steps: int) -> int:
        """Return the number of steps at the next assessment: a multiple of a power of two that grows with them."""
        is_cheap = self.arithmetic.is_short and not hasattr(self.op, "num_examples")
        interval = LEAST_SHORT_STEPS if is_cheap else LEAST_STEPS
        while interval * OVERSHOOT * 2 <= num_steps:
            interval *= 2
        return num_steps - num_steps % interval + interval

    def assess(self, state: SystemState) -> Assessment[SystemState]:
        """Compare residuals with tol, verify those that are small enough, and finish or begin again."""
        ready, left, sizes = [], [], self.arithmetic.norms([row.x for row in state.rows])
        for row, place, size in zip(state.rows, state.places, sizes, strict=True):
            length = self.lengths[place]
            # what a residual by recurrence has to reach: tol, or the rounding of its matvecs
            ready.append(row.is_ready(max(self.tol * length, self.precision * row.norm * size)))
            left.append(row.size / length)
        suspects = [row.multiplied.unsqueeze(1) for row in state.rows if row.stopped == NON_FINITE]
        if not suspects and (True in ready or any([row.least == 1 for row in state.rows])):
            state = self._judged(state, ready)
        done = [Status(column.status) for column in state.columns if column.status]
        known = left if state.places else [column.residual for column in state.columns]
        residual = max([math.inf if math.isnan(size) else size for size in known])
        progress = SolveProgress(residual=residual, num_converged=done.count(Status.CONVERGED))
        status = Status.NON_FINITE if suspects else None if state.places else worst(done)
        num_steps = self._due(state.num_steps) - state.num_steps
        return Assessment(state, progress, num_steps, status, suspects[0] if suspects else None)

    def finalize(self, state: SystemState, status: Status) -> SolveResult:
        """Return the best solutions, those at work verified."""
        unknown = [number for number, place in enumerate(state.places) if place not in state.fresh]
        if unknown:
            with suppress(DeadlineReached):  # then x is the best one that was verified before
                check_deadline_of(self.op.space.ranks)
                state, _ = self._verified(state, unknown)
        statuses, residuals, solutions = [], [], []
        for place, (column, unit) in enumerate(zip(state.columns, self.units, strict=True)):
            x, is_lost = self._times(column.best, unit, state.scale)
            small = column.residual <= self.tol and status is not Status.NON_FINITE
            ended = Status(column.status or status)
            ended = Status.CONVERGED if small and place in state.places else ended
            statuses.append(Status.ROUNDING_LIMITED if is_lost and ended.converged else ended)
            residuals.append(math.inf if is_lost else column.residual)
            solutions.append(x)
        overall, negative = worst(statuses), None
        if len(state.direction):
            negative = NegativeCurvature(state.direction[0], state.curvature * state.scale, state.column)
        parts = zip(residuals, self.lengths, self.units, strict=True)
        return SolveResult(
            solutions[0].unsqueeze(1) if len(solutions) == 1 else torch.stack(solutions, dim=1),
            torch.tensor(
                [residual * length * unit for residual, length, unit in parts],
                dtype=torch.float64,
                device="cpu",
            ),
            torch.tensor(residuals, dtype=torch.float64, device="cpu"),
            state.num_matvecs,
            state.num_passes,
            overall,
            tuple(statuses),
            MESSAGES[overall],
            0.0,
            (),
            self.method,
            negative,
        )

    def _times(self, x: Tensor, unit: float, scale: float) -> tuple[Tensor, bool]:
        """Return a solution times its unit over the scale, and True if that leaves the dtype's range."""
        exponent = math.frexp(unit)[1] - math.frexp(scale)[1]
        if not exponent:
            return x, False
        limits, found, left = torch.finfo(x.dtype), x, exponent
        highest = math.frexp(limits.max)[1]
        while left:
            part = max(-highest // 2, min(highest // 2, left))
            found, left = found * math.ldexp(1.0, part), left - part
        mantissa, power = math.frexp(float(self.op.space.peak(x)))
        # entries below the least normal number lose digits: in all no more than eps of the norm
        least, power = limits.tiny * math.sqrt(self.op.n), power + exponent
        is_safe = power <= highest and math.ldexp(mantissa, power) >= least
        return found, mantissa > 0 and not is_safe

    def _verified(
        self, state: SystemState, numbers: Sequence[int]
    ) -> tuple[SystemState, list[tuple[Tensor, Tensor, float]]]:
        """Verify rows at work by a matvec with their solutions; keep those that are the best so far.

        Returns:
            The state; and the solutions ``[n]``, their true residuals, and the norms of these over those of b.
        """
        places, columns = [state.places[number] for number in numbers], [*state.columns]
        pairs = zip(numbers, places, strict=True)
        solutions = [columns[place].best + state.rows[number].x for number, place in pairs]
        residuals = self._residuals(places, solutions, state.scale)
        found = []
        for place, x, r, size in zip(
            places, solutions, residuals, self.arithmetic.norms(residuals), strict=True
        ):
            relative = size / self.lengths[place]
            relative = math.inf if math.isnan(relative) else relative
            found.append((x, r, relative))
            if relative < columns[place].residual:
                columns[place] = Column(x, relative, columns[place].least)
        state = replace(
            state,
            columns=tuple(columns),
            fresh=(*state.fresh, *places),
            num_matvecs=state.num_matvecs + len(places) * self.exact.cost,
            num_passes=state.num_passes + self.exact.cost,
        )
        return state, found

    def _residuals(self, places: Sequence[int], solutions: Sequence[Tensor], scale: float) -> list[Tensor]:
        """Return the true residuals of solutions over their units and the scale, by one matvec with all."""
        arithmetic = self.arithmetic
        matrix = Matrix(self.exact, arithmetic, None, scale)
        images = arithmetic.tensors(matrix.images(arithmetic.vectors(solutions)))
        return [self.rhs[place] - image for place, image in zip(places, images, strict=True)]

    def _judged(self, state: SystemState, ready: Sequence[bool]) -> SystemState:
        """Verify rows at work; finish those that are ready, or begin again from their true residuals."""
        before, rows = state.columns, [*state.rows]
        numbers = [number for number, row in enumerate(rows) if ready[number] or row.least == 1]
        state, found = self._verified(state, numbers)
        columns = [*state.columns]
        for number, (x, r, residual) in zip(numbers, found, strict=True):
            place, row = state.places[number], rows[number]
            column, status = columns[place], ""
            least = column.residual if row.least == 1 else column.least
            if residual <= self.tol:
                status = str(Status.CONVERGED)
            elif not ready[number]:
                left = torch.zeros_like(x) if column.best is x else row.x
                rows[number] = replace(row, x=left, least=2)
            elif row.stopped == NEGATIVE:
                status, column = str(Status.NEGATIVE_CURVATURE), Column(x, residual)
                state = self._with_direction(state, row, place)
            elif residual <= REFINES * before[place].residual:
                size = residual * self.lengths[place]
                rows[number] = self.recurrence.begin(self._matrix(state.scale), r, size)
            else:
                is_singular = row.stopped == SINGULAR or INCONSISTENT * least < column.residual
                status = str(Status.SINGULAR if is_singular else Status.ROUNDING_LIMITED)
            columns[place] = Column(column.best, column.residual, least, status)
        kept = [number for number, place in enumerate(state.places) if not columns[place].status]
        return replace(
            state,
            rows=tuple(rows[number] for number in kept),
            places=tuple(state.places[number] for number in kept),
            columns=tuple(columns),
        )

    def _with_direction(self, state: SystemState, row: Row, place: int) -> SystemState:
        """Keep the first direction of negative curvature."""
        if len(state.direction) or not isinstance(row, DirectionRow):
            return state
        direction = row.p / self.op.space.peak(row.p)
        unit = direction / self.op.space.norm(direction)
        return replace(state, direction=unit[None], curvature=row.curvature, column=place)

    def identity(self, **more: Any) -> dict[str, Any]:
        """Return what must be the same when a solve continues from a checkpoint; tol and limits may change."""
        rows = [vector * unit for vector, unit in zip(self.rhs, self.units, strict=True)]
        b = digest(self.op.space.whole(torch.stack(rows, dim=1), self.op.n).mT)
        return {"solver": self.method, **self.op.identity(), "b": b, **more}

    def unpack(self, plain: dict[str, Any]) -> SystemState:
        """Return the state of its plain data."""
        like = self.rhs[0]

        def moved(item: dict[str, Any]) -> dict[str, Any]:
            return {
                key: value.to(like) if isinstance(value, Tensor) else value for key, value in item.items()
            }

        lists: dict[str, Any] = {name: tuple(plain[name]) for name in ("places", "fresh")}
        rows = tuple(self.recurrence.unpack(moved(row)) for row in plain["rows"])
        columns = tuple(Column(**moved(column)) for column in plain["columns"])
        return SystemState(**{**moved(plain), **lists, "rows": rows, "columns": columns})

    def resumed(self, state: SystemState) -> SystemState:
        """Verify by one matvec, counted, that a loaded state belongs to the operator.

        It is with a random combination of the solutions at work, whose residuals the recurrence has.

        Raises:
            ValueError: it belongs to another operator.
        """
        if not state.num_steps or not state.rows:
            return state
        weights, space = coefficients(len(state.rows)).to(self.rhs[0]), self.op.space
        places = state.places
        x = torch.stack(
            [state.columns[place].best + row.x for place, row in zip(places, state.rows, strict=True)]
        )
        image = torch.stack([self.rhs[place] - row.r for place, row in zip(places, state.rows, strict=True)])
        x, image, b = (
            weights @ x,
            weights @ image,
            weights @ torch.stack([self.rhs[place] for place in places]),
        )
        # rounding leaves the recurrence's residuals as far from the true ones as the norms of A and x say
        size = max(float(space.norm(b)), max(row.norm for row in state.rows) * float(space.norm(x)))
        cost = Witness(x, image, len(places)).check(self.op, state.scale, size)
        return replace(state, num_matvecs=state.num_matvecs + cost, num_passes=state.num_passes + cost)


def worst(statuses: list[Status]) -> Status:
    """Return the worst status."""
    return max(statuses, key=RANKS.index)
