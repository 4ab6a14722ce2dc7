"""The loop that runs every solver: budget, time limit, monitor, history and checkpoint.

A solver is a frozen dataclass of an operator and the arguments of the method, with four methods over an explicit
state: see :class:`Solver`. :func:`run` takes it from the start to the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import Field, dataclass, replace
from functools import wraps
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.deadline import DeadlineReached, deadline
from hvpkit._utils.monitoring import expect, monitored
from hvpkit._utils.ranks import Ranks, agreed, call_on_first, watching
from hvpkit._utils.signals import ending_after_cleanup, signals_deferred
from hvpkit._utils.validation import check_monitor, check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.interop import aslinearoperator
from hvpkit.operators.vectors import as_shards
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers.checkpoint import Checkpoint, Counted, Saved

OVERSHOOT_CPU, OVERSHOOT_GPU = 32, 8
"""One over the share of steps that may follow the one at which a solve has converged. An assessment is cheap on a CPU;
on a GPU it waits for the device. Chosen by feel."""

LIMITS = (Status.MAX_MATVECS, Status.TIME_LIMIT)
"""Statuses of a solve that may continue."""

GRACE = 1.1
"""Time for the final check to end by, in units of the time limit; a check that takes longer is left out. Chosen by
feel."""

ROUNDED_UP = 1 + 1e-12
"""Factor of a budget, so that rounding in sums of costs does not forbid the last matvec."""

Monitor = Callable[[Progress], object]
"""Called with each entry of the history; its return value is ignored, an exception from it ends the solve. It may have
more methods: see :mod:`hvpkit._utils.monitoring`."""

P = ParamSpec("P")
T = TypeVar("T")


class Entry(Protocol):
    """One entry of a history, as :class:`hvpkit.Progress`: a dataclass whose ``str`` shows the values so far."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def num_matvecs(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def seconds_left(self) -> float: ...


class Result(Protocol):
    """The requirement on a result: a dataclass with ``history``, ``seconds`` and the fields below."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def message(self) -> str: ...
    @property
    def status(self) -> Status: ...


S = TypeVar("S", bound=Counted)
R = TypeVar("R", bound=Result)
R_co = TypeVar("R_co", bound=Result, covariant=True)


@dataclass(frozen=True)
class Assessment(Generic[S]):
    """The findings of a solver about its state.

    Attributes:
        state: to continue from: the one assessed, or what a restart made of it.
        progress: the values so far; the loop adds matvecs and seconds.
        num_steps: steps until the next assessment, at most: a state may have ``is_ready``, True where another step
            would be too many.
        status: set if the solve is over.
        suspect: vectors ``[n, p]`` whose matvec was not finite, if that is the status.
        handover: set if the method can do nothing more, without a status: its caller continues by another one.
        num_left: an estimate of the full-data matvecs that are left; infinite if it is not known.
    """

    state: S
    progress: Entry
    num_steps: int
    status: Status | None = None
    suspect: Tensor | None = None
    handover: bool = False
    num_left: float = math.inf


@dataclass(frozen=True)
class Limits:
    """Budget and time limit of a solve.

    Attributes:
        max_matvecs: full-data matvecs, those of the final check included.
        time_limit: seconds, or None. A step is not begun if it and the final check would run past it, by
            the time that matvecs took so far. One that runs past it all the same ends between two batches.
        reserve: matvecs kept back for the final check.
        minimum: matvecs without which there is no answer at all: until then no time is kept back.
    """

    max_matvecs: float
    time_limit: float | None
    reserve: float
    minimum: float

    def __post_init__(self) -> None:
        check_positive("max_matvecs", self.max_matvecs)
        least = self.minimum + self.reserve
        if self.max_matvecs < least:
            raise ValueError(
                f"max_matvecs must be at least {least:g}, what one estimate of each value and its check "
                f"take; got {self.max_matvecs:g}"
            )
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)

    def remaining(self, num_matvecs: float) -> float:
        """Return the full-data matvecs that are left for steps after ``num_matvecs``."""
        return self.max_matvecs * ROUNDED_UP - self.reserve - num_matvecs

    def within(self, num_left: float, num_matvecs: float) -> float:
        """Return ``num_left``, or the full-data matvecs until the limit if that is less; infinite if not known."""
        return min(num_left, self.max_matvecs - num_matvecs) if math.isfinite(num_left) else num_left

    def seconds_left(self, num_left: float, num_matvecs: float, seconds: float) -> float:
        """Return the time for ``num_left`` more full-data matvecs, or until a limit if that is less."""
        num_left = self.within(num_left, num_matvecs)
        until = math.inf if self.time_limit is None else self.time_limit - seconds
        return max(0.0, min(num_left * seconds / num_matvecs, until))

    def exceeded_by(self, step_cost: float, num_matvecs: float, seconds: float) -> Status | None:
        """Return the limit that another step would exceed, if any."""
        ahead = step_cost + self.reserve
        if num_matvecs + ahead > self.max_matvecs * ROUNDED_UP:
            return Status.MAX_MATVECS
        if self.time_limit is None:
            return None
        if num_matvecs < max(self.minimum, step_cost):
            return Status.TIME_LIMIT if seconds >= self.time_limit else None
        return Status.TIME_LIMIT if seconds * (1 + ahead / num_matvecs) > self.time_limit else None


class Solver(Protocol[S, R_co]):
    """An iterative method on an operator, in four methods over an explicit, frozen state.

    :func:`run` calls ``init`` once, then ``assess`` and as many times ``step`` as that says, in turn, until ``assess``
    returns a status or a limit is reached, and ``finalize`` once. A solver with ``first_steps`` takes these before.
    """

    @property
    def op(self) -> LinearOperator:
        """The operator."""

    @property
    def limits(self) -> Limits:
        """The budget."""

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""

    def init(self) -> S:
        """Return the state before the first step."""

    def step(self, state: S) -> S:
        """Advance the state by one step; a linear system by several short ones, of which its state knows the number.

        Tensor code without host synchronisation, but for linear systems, whose next step needs the numbers of the
        last. It donates (reuses) the input buffers: rows of the basis that a
        state uses are not changed by later steps before a restart, but a state that is to be kept past one has to
        be cloned. This keeps memory at ``ncv`` vectors. A step whose matvec is interrupted leaves the state valid.
        """

    def assess(self, state: S) -> Assessment[S]:
        """Return the values so far, whether the solve is over, and the state to continue from.

        May wait for the device, and may restart: an assessment donates the buffers too, and is not repeated, except
        that the state of an assessment that ended the solve gives the same status again.
        """

    def finalize(self, state: S, status: Status) -> R_co:
        """Return the result, with ``status`` or a more exact one; may spend the reserved matvecs.

        It checks the deadline before each, and returns what is not verified if that has passed. The loop fills in
        ``history`` and ``seconds``.
        """


@dataclass(frozen=True)
class Ended(Generic[S]):
    """Where the loop ended.

    Attributes:
        state: the last one.
        status: why it ended; None if the solver hands over to another one.
        history: one entry for each assessment.
        began: start of the solve on the clock of ``time.perf_counter``; set back by the time before a checkpoint.
        suspect: vectors ``[n, p]`` whose matvec was not finite.
        verified: full-data matvecs that verified the operator of a checkpoint.
        end: of the final check, at the latest, on the same clock.
    """

    state: S
    status: Status | None
    history: tuple[Entry, ...]
    began: float
    suspect: Tensor | None = None
    verified: float = 0.0
    end: float = math.inf


def full_precision(
    solver: Callable[Concatenate[LinearOperator, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """Convert the first argument to an operator; keep the caller's autocast and inference mode away from the solver.

    The solver's ``monitor`` is told of its begin and end. Vectors of an :class:`hvpkit.EigenResult` over a mesh become
    DTensors, if they are not yet.

    Raises:
        TypeError, ValueError: on call, as of :func:`hvpkit.aslinearoperator`.
    """

    @wraps(solver)
    def solve(op: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        op = aslinearoperator(op)
        check_monitor(kwargs.get("monitor"))  # type: ignore[arg-type]
        ranks = op.space.ranks
        if ranks is not None:
            ranks.meet(solver.__name__)
        nothing, device = nullcontext(), op.device.type
        monitor = kwargs.get("monitor") if ranks is None or ranks.is_first else None
        with (  # what is not needed would take a small solve as long as a step
            nothing if ranks is None else watching(ranks),
            nothing if monitor is None else monitored(monitor),
            torch.inference_mode(False) if torch.is_inference_mode_enabled() else nothing,
            torch.no_grad(),
            torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nothing,
        ):
            found = solver(op, *args, **kwargs)
            if isinstance(found, EigenResult):
                return replace(found, vectors=as_shards(op, found.vectors))
            return found

    return solve


def assessment_interval(op: LinearOperator, num_steps: int) -> int:
    """Return the steps until the next assessment after ``num_steps`` steps."""
    return max(1, num_steps // (OVERSHOOT_CPU if op.device.type == "cpu" else OVERSHOOT_GPU))


def with_vectors_of(found: EigenResult, solved: LinearOperator, asked: LinearOperator) -> EigenResult:
    """Return the result of a solve on ``solved`` with vectors as of ``asked``: on its device, DTensors on a mesh."""
    vectors, ranks = found.vectors.to(asked.device), solved.space.ranks
    if ranks is not None and solved.space.sharded and not asked.space.sharded:
        vectors = ranks.shards(vectors, asked.n)
    return replace(found, vectors=vectors)


def run(
    solver: Solver[S, R_co],
    *,
    monitor: Callable[[Any], object] | None = None,
    checkpoint: Checkpoint[S] | None = None,
) -> R_co:
    """Run a solver from the start, or from a checkpoint, to its result.

    Args:
        solver: the method.
        monitor: called after each assessment with the new entry of the history.
        checkpoint: the solve continues from it, if it holds one, and is saved to it: now and then, at a limit, and
            when a step or the monitor raises, as by an interruption from the keyboard, or a signal ends the process:
            SIGTERM or SIGHUP, unless the caller has a handler. Cleared when the solve is done.
    """
    with nullcontext() if checkpoint is None else ending_after_cleanup():
        ended = iterate(solver, monitor=monitor, checkpoint=checkpoint)
        try:
            found = conclude(solver, ended)
        except BaseException:
            # at a limit it is saved before the assessment, so that a larger one goes on to the same bits
            if checkpoint is not None and ended.status not in LIMITS:
                seconds = time.perf_counter() - ended.began
                checkpoint.save(Saved(ended.state, 0, ended.history, seconds, ended.verified))
            raise
        if checkpoint is not None and (found.status.converged or found.status is Status.COMPLETED):
            checkpoint.clear()
    return found


def iterate(
    solver: Solver[S, Any],
    *,
    monitor: Callable[[Any], object] | None = None,
    checkpoint: Checkpoint[S] | None = None,
) -> Ended[S]:
    """Step and assess until the solver says that it is over, or another step would exceed a limit."""
    state, now, time_limit = solver.init(), time.perf_counter(), solver.limits.time_limit
    seconds = math.inf if time_limit is None else time_limit
    saved, end = Saved(state, getattr(solver, "first_steps", 0), (), 0.0), now + seconds
    if checkpoint is not None:
        try:
            with deadline(end):
                saved = checkpoint.load(state) or saved
        except DeadlineReached:  # the file stays as it is
            _reraise_before(end, solver.op.space.ranks)
            return Ended(state, Status.TIME_LIMIT, (), now)
    loop = _Loop(solver, saved, end, monitor, checkpoint)
    del state, saved  # they would keep the first state's buffers
    try:
        while True:
            loop.advance()
            if loop.limit is not None:
                loop.save()
            found = loop.assess()
            if found.status or found.handover or loop.limit:
                status = found.status or (None if found.handover else loop.limit)
                history, end = tuple(loop.history), now + GRACE * seconds
                return Ended(loop.state, status, history, loop.began, found.suspect, loop.verified, end)
            del found  # it would keep the vectors of a state before the next step's
    except BaseException as error:
        if solver.op.space.ranks is not None:
            solver.op.space.ranks.fail(error)  # so that all save together
        if not loop.assessing and loop.limit is None:  # at a limit it is saved already, before an assessment
            loop.save()
        raise


class _Loop(Generic[S]):
    """A solve between its start and its end: the state, and what is counted beside it.

    Args:
        solver: the method.
        saved: where it begins.
        end: of the last step, on the clock of ``time.perf_counter``.
        monitor, checkpoint: as for :func:`run`.
    """

    def __init__(
        self,
        solver: Solver[S, Any],
        saved: Saved[S],
        end: float,
        monitor: Callable[[Any], object] | None,
        checkpoint: Checkpoint[S] | None,
    ) -> None:
        self.solver, self.monitor, self.checkpoint, self.end = solver, monitor, checkpoint, end
        self.state, self.num_steps, self.history = saved.state, saved.num_steps, list[Entry](saved.history)
        self.began, self.verified = time.perf_counter() - saved.seconds, saved.verified
        self.limits, space = solver.limits, solver.op.space
        if saved.seconds:
            most, seconds = self.limits.max_matvecs + saved.verified, self.limits.time_limit
            seconds = None if seconds is None else seconds + saved.seconds
            self.limits = replace(self.limits, max_matvecs=most, time_limit=seconds)
        self.ranks, self.sharded = space.ranks, space.sharded
        self.assessing = False
        self.limit: Status | None = None

    def advance(self) -> None:
        """Take the steps until the next assessment, or until another one would exceed a limit, which is noted."""
        step, cost, is_timed = self.solver.step, self.solver.step_cost, self.limits.time_limit is not None
        plain = nullcontext()
        while self.num_steps:
            seconds = agreed(self.ranks, time.perf_counter() - self.began) if is_timed else 0.0
            self.limit = self.limits.exceeded_by(cost, self.state.num_matvecs, seconds)
            if self.limit is not None:
                return
            try:
                # parts of vectors are of no use if one rank leaves amid a step: signals wait for its matvec
                with deadline(self.end) if is_timed else plain, signals_deferred() if self.sharded else plain:
                    # together, whenever a signal comes
                    self.state, self.num_steps = step(self.state), self.num_steps - 1
            except DeadlineReached:  # the state before the step is the last one
                _reraise_before(self.end, self.ranks)
                self.limit = Status.TIME_LIMIT
                return
            if getattr(self.state, "is_ready", False):
                self.num_steps = 0
            if self.checkpoint is not None and self.checkpoint.due():
                self.save()

    def assess(self) -> Assessment[S]:
        """Assess the state and continue from what that says; note its values, and tell the monitor."""
        with signals_deferred() if self.sharded or self.checkpoint is not None else nullcontext():
            self.assessing = True  # an assessment may change buffers: nothing to save in the midst of it
            found = self.solver.assess(self.state)
            num_left = 0 if found.status else found.num_steps  # a solve that is over takes no step more
            self.state, self.num_steps, self.assessing = found.state, num_left, False
            is_new = self._note(found)
        expect(0.0 if found.status else self.limits.within(found.num_left, self.state.num_matvecs))
        if is_new and self.monitor is not None:
            call_on_first(self.ranks, self.monitor, self.history[-1])
        return found

    def _note(self, found: Assessment[S]) -> bool:
        """Append the findings to the history, unless no matvec was made since its last entry: return whether it was."""
        num_matvecs = self.state.num_matvecs
        if not num_matvecs or (self.history and self.history[-1].num_matvecs == num_matvecs):
            return False
        seconds = time.perf_counter() - self.began
        left = 0.0 if found.status else self.limits.seconds_left(found.num_left, num_matvecs, seconds)
        entry = replace(found.progress, num_matvecs=num_matvecs, seconds=seconds, seconds_left=left)
        self.history.append(entry)
        return True

    def save(self) -> None:
        """Save the solve, if there is a checkpoint and something to save."""
        if self.checkpoint is not None and self.state.num_matvecs:
            seconds, history = time.perf_counter() - self.began, tuple(self.history)
            self.checkpoint.save(Saved(self.state, self.num_steps, history, seconds, self.verified))


def _reraise_before(end: float, ranks: Ranks | None) -> None:
    """Raise the DeadlineReached that is being handled again if it is that of a caller, before this solve's own."""
    passed = time.perf_counter() >= end
    if not (passed if ranks is None else ranks.any(passed)):
        raise


def conclude(solver: Solver[S, R_co], ended: Ended[S], status: Status | None = None) -> R_co:
    """Return the result of a solver where the loop ended; ``status`` is for one that handed over."""
    status = ended.status or status
    assert status is not None, "a solver that hands over has to be given a status"
    with deadline(ended.end):
        found = solver.finalize(ended.state, status)
    return completed(found, solver.op, ended.history, ended.began, ended.suspect)


def completed(
    found: R, op: LinearOperator, history: tuple[Entry, ...], began: float, suspect: Tensor | None
) -> R:
    """Return the result with its history and seconds, and the origin of non-finite matvecs in its message.

    ``suspect`` are vectors ``[n, p]`` whose matvec was not finite, or None.
    """
    message = found.message if suspect is None else f"{found.message}; {op.blame(suspect)}"
    return replace(found, history=history, message=message, seconds=time.perf_counter() - began)
