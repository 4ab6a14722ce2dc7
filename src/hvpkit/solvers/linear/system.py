"""Systems A x = b with several right-hand sides: a :class:`hvpkit.solvers.driver.Solver` over one of the recurrences.

The columns of b are rows here, each with a recurrence of its own; those still at work share a block matvec. Where a
recurrence says that its residual is small enough, a matvec shows the true one. If that is larger, by rounding, the
recurrence starts again from it (iterative refinement), as long as it halves each time.
"""

from __future__ import annotations

import math
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

METHODS: dict[str, Recurrence[Any]] = {"cg": ConjugateGradients(), "minres": Minres()}

REFINES = 0.5
"""Share of the true residual that is left after a recurrence began again from it, at most: else rounding limits it.
Chosen by feel."""

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
class SystemState:
    """Solutions, finished or at work.

    Attributes:
        iterates: of the rows at work.
        vectors: of their recurrence.
        best: solutions of all rows with the least true residual so far ``[k, n]``; zero at first.
        residuals: their true residual norms over those of b ``[k]``, float64 on the CPU.
        least: the same when they were nearly the least of all ``[k]``; infinite if they never were.
        places: rows at work.
        statuses: of all rows; empty while at work.
        fresh: rows whose solution at work is verified.
        direction: of negative curvature, with its curvature over scale, one row or none ``[..., n]``.
        curvature, column: of the direction.
        scale: what matvecs are divided by, 0-d.
        num_steps: so far.
        num_matvecs: full-data matvecs, with those of the preconditioner.
        num_passes: the same, where a block counts once.
    """

    iterates: Iterates
    vectors: Directions | LanczosVectors
    best: Tensor = field(metadata=LONG)
    residuals: Tensor
    least: Tensor
    places: tuple[int, ...]
    statuses: tuple[str, ...]
    direction: Tensor = field(metadata=LONG)
    scale: Tensor
    fresh: tuple[int, ...] = ()
    curvature: float = 0.0
    column: int = -1
    num_steps: int = 0
    num_matvecs: float = 0.0
    num_passes: float = 0.0


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
            Iterates.of(r),
            self.recurrence.begin(self._matrix([]), r),
            torch.zeros_like(rhs),
            (norms > 0).to(norms),
            torch.full_like(norms, math.inf),
            tuple(places),
            tuple("" if row in places else str(Status.CONVERGED) for row in range(len(rhs))),
            rhs[:0],
            rhs.new_ones(()),
            num_matvecs=spent,
            num_passes=spent,
        )

    def step(self, state: SystemState) -> SystemState:
        """Take a step with each row at work; the first matvec sets the scale."""
        scales = [state.scale] if state.num_steps else []
        iterates, vectors = self.recurrence.advance(self._matrix(scales), state.iterates, state.vectors)
        return replace(
            state,
            iterates=iterates,
            vectors=vectors,
            scale=scales[0],
            fresh=(),
            num_steps=state.num_steps + 1,
            num_matvecs=state.num_matvecs + len(state.places) * self.op.cost,
            num_passes=state.num_passes + self.op.cost,
        )

    def assess(self, state: SystemState) -> Assessment[SystemState]:
        """Compare residuals with tol, verify those that are small enough, and finish or begin again."""
        reasons = [int(reason) for reason in state.iterates.stopped.tolist()]
        norms = self._norms(state.iterates.r) / self._sizes[[*state.places]]
        ready = (norms <= self._goal(state)) | (state.iterates.stopped.cpu() != RUNNING)
        least = state.iterates.least.cpu() == 1
        suspect = None
        if NON_FINITE in reasons:
            suspect = self.recurrence.multiplied(state.vectors)[reasons.index(NON_FINITE)].unsqueeze(1)
        elif bool((ready | least).any()):
            state = self._judged(state, ready, least, reasons)
        done = [Status(status) for status in state.statuses if status]
        left = norms if state.places else state.residuals
        progress = SolveProgress(
            residual=float(left.nan_to_num(math.inf).max()), num_converged=done.count(Status.CONVERGED)
        )
        status = Status.NON_FINITE if suspect is not None else None if state.places else worst(done)
        num_steps = assessment_interval(self.op, state.num_steps)
        return Assessment(state, progress, num_steps, status, suspect)

    def _goal(self, state: SystemState) -> Tensor:
        """Return what a residual by recurrence has to reach ``[a]``: tol, or the rounding of its matvecs."""
        sizes = self._norms(state.iterates.x) / self._sizes[[*state.places]]
        rounding = self.op.precision * state.iterates.norm.to("cpu", torch.float64) * sizes
        return rounding.clamp(min=self.tol)

    def finalize(self, state: SystemState, status: Status) -> SolveResult:
        """Return the best solutions, those at work verified."""
        unknown = [row for row, place in enumerate(state.places) if place not in state.fresh]
        if unknown:
            state, _, _ = self._verified(state, unknown)
        statuses = list(state.statuses)
        for place in state.places:
            small = float(state.residuals[place]) <= self.tol
            statuses[place] = Status.CONVERGED if small and status is not Status.NON_FINITE else status
        x = state.best.clone()
        lost = self._scale_(x, state.scale)
        residuals = torch.where(lost, torch.inf, state.residuals)
        found = [
            Status.ROUNDING_LIMITED if out and one == Status.CONVERGED else Status(one)
            for out, one in zip(lost.tolist(), statuses, strict=True)
        ]
        overall, negative = worst(found), None
        if len(state.direction):
            negative = NegativeCurvature(
                state.direction[0], state.curvature * float(state.scale), state.column
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

    def _matrix(self, scales: list[Tensor]) -> Matrix:
        """Return A over its scale; of the first matvec, if there is no scale yet, which is then added to the list."""

        def apply(rows: Tensor) -> Tensor:
            images = self.op.product(rows.mT).mT
            if not scales:
                scales.append(power_of_two(self.op.space.peak(images)))
            return images / scales[0]

        return Matrix(apply, self.preconditioner, self.op.space)

    @cached_property
    def _sizes(self) -> Tensor:
        """Norms of the right-hand sides over their units ``[k]``."""
        return self._norms(self.rhs)

    def _norms(self, rows: Tensor) -> Tensor:
        """Return norms ``[k]`` in float64 on the CPU."""
        return row_norms(self.op.space, rows).to("cpu", torch.float64)

    def _verified(self, state: SystemState, rows: list[int]) -> tuple[SystemState, Tensor, Tensor]:
        """Verify rows at work by a matvec with their solutions; keep those that are the best so far.

        Returns:
            The state, the true residuals ``[p, n]``, and their norms over those of b ``[p]``.
        """
        places = [state.places[row] for row in rows]
        x = state.best[places] + state.iterates.x[rows]
        residuals = self.rhs[places] - self.exact.product(x.mT).mT / state.scale
        norms = (self._norms(residuals) / self._sizes[places]).nan_to_num(math.inf, posinf=math.inf)
        better = norms < state.residuals[places]
        taken = better.to(x.device)
        best = _put(state.best, places, rows_where(taken, x, state.best[places]))
        left = rows_where(~taken, state.iterates.x[rows], torch.zeros_like(x))
        known = _put(state.residuals, places, torch.where(better, norms, state.residuals[places]))
        state = replace(
            state,
            iterates=replace(state.iterates, x=_put(state.iterates.x, rows, left)),
            best=best,
            residuals=known,
            fresh=(*state.fresh, *places),
            num_matvecs=state.num_matvecs + len(rows) * self.exact.cost,
            num_passes=state.num_passes + self.exact.cost,
        )
        return state, residuals, norms

    def _judged(self, state: SystemState, ready: Tensor, least: Tensor, reasons: list[int]) -> SystemState:
        """Verify rows at work; finish those that are ready, or begin again from their true residuals."""
        rows, before = (ready | least).nonzero().flatten().tolist(), state.residuals
        state, residuals, norms = self._verified(state, rows)
        waiting = least.nonzero().flatten().tolist()
        places = [state.places[row] for row in waiting]
        noted = _put(state.iterates.least, waiting, state.iterates.least.new_tensor(2.0))
        state = replace(
            state,
            iterates=replace(state.iterates, least=noted),
            least=_put(state.least, places, state.residuals[places]),
        )
        statuses, again = list(state.statuses), []
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
                singular = reason == SINGULAR or REFINES * state.least[place] < state.residuals[place]
                statuses[place] = str(Status.SINGULAR if singular else Status.ROUNDING_LIMITED)
        state = replace(state, statuses=tuple(statuses))
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
            iterates=with_rows(state.iterates, rows, Iterates.of(residuals)),
            vectors=with_rows(state.vectors, rows, begun),
        )

    def _with_direction(self, state: SystemState, row: int, residual: float) -> SystemState:
        """Keep the iterate of a row that met negative curvature, and the first such direction."""
        place = state.places[row]
        state = replace(
            state,
            best=_put(state.best, [place], state.best[[place]] + state.iterates.x[[row]]),
            residuals=_put(state.residuals, [place], torch.tensor([residual], dtype=torch.float64)),
        )
        if len(state.direction) or not isinstance(state.vectors, Directions):
            return state
        direction, curvature = state.vectors.p[row], float(state.vectors.curvature[row])
        unit = direction / self.op.space.peak(direction)
        unit = unit / self.op.space.norm(unit)
        return replace(state, direction=unit[None], curvature=curvature, column=place)

    def _scale_(self, x: Tensor, scale: Tensor) -> Tensor:
        """Multiply solutions by their unit over the scale, in place; return where that left the dtype's range."""
        exponents = (torch.log2(self.units) - torch.log2(scale)).round()
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
        x = weights @ (state.best[places] + state.iterates.x)
        b, r = weights @ self.rhs[places], weights @ state.iterates.r
        # rounding leaves the recurrence's residuals as far from the true ones as the norms of A and x say
        size = max(float(space.norm(b)), float(state.iterates.norm.max()) * float(space.norm(x)))
        cost = Witness(x, b - r, len(rows)).check(self.op, state.scale, size)
        return replace(state, num_matvecs=state.num_matvecs + cost, num_passes=state.num_passes + cost)


def worst(statuses: list[Status]) -> Status:
    """Return the worst status."""
    return max(statuses, key=RANKS.index)


def rows_of(tree: T, rows: list[int]) -> T:
    """Return these rows of each tensor of a dataclass."""
    return type(tree)(**{name: value[rows] for name, value in vars(tree).items()})


def with_rows(tree: T, rows: list[int], new: T) -> T:
    """Return a dataclass of tensors with rows replaced by those of ``new``."""
    return type(tree)(**{name: _put(value, rows, getattr(new, name)) for name, value in vars(tree).items()})


def _put(values: Tensor, rows: list[int], new: Tensor) -> Tensor:
    values = values.clone()
    values[rows] = new
    return values
