"""The one loop that every solver runs in: budget, time limit, monitor and history."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch

from hvpkit._utils.validation import check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.solvers.checkpoint import Checkpoint, Saved


class SolverState(Protocol):
    """What the loop must know of a state: the products that it cost, in full-data products."""

    @property
    def num_matvecs(self) -> float: ...


S = TypeVar("S", bound=SolverState)
Monitor = Callable[[Progress], object]
"""Called with each entry of the history; what it returns is ignored, what it raises ends the solve."""


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(
    solver: Callable[Concatenate[LinearOperator, P], R],
) -> Callable[Concatenate[LinearOperator, P], R]:
    """The solver where neither the caller's autocast nor inference mode reaches its own arithmetic.

    Raises:
        TypeError: on call, if the first argument is no LinearOperator.
    """

    @wraps(solver)
    def solve(op: LinearOperator, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(op, LinearOperator):
            raise TypeError(
                f"the operator must be a hvpkit.LinearOperator, got {type(op).__name__}; "
                "hvpkit.aslinearoperator makes one of matrices and other operators"
            )
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(op.device.type, enabled=False):
            return solver(op, *args, **kwargs)

    return solve


@dataclass(frozen=True)
class Assessment(Generic[S]):
    """What a look at a state found.

    Attributes:
        state: the state to go on from: the one looked at, or what a restart made of it.
        smallest, largest: the ends so far.
        smallest_bound, largest_bound: their residuals' norms.
        status: set if the solve is over.
        num_steps: steps until the next look; each look waits for the device.
        level: of several operators, the one that is drawn on.
    """

    state: S
    smallest: float
    largest: float
    smallest_bound: float
    largest_bound: float
    status: Status | None
    num_steps: int
    level: int = 0


@dataclass(frozen=True)
class Run(Generic[S]):
    """Where the loop ended, and the seconds that an earlier part of the solve took."""

    state: S
    status: Status
    history: tuple[Progress, ...]
    seconds_before: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a solve may spend, in full-data products and in seconds.

    Attributes:
        max_matvecs: products, those of the final check included.
        time_limit: seconds, or None. A step is not begun if it and the final check would run past it, by
            the time that products took so far.
        reserve: products kept back for the final check.
        minimum: products that the time limit does not cut, without which there is no answer at all.
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

    def broken_by(self, step_cost: float, spent: float, seconds: float) -> Status | None:
        """The limit that another step would break, if any."""
        ahead = step_cost + self.reserve
        if spent + ahead > self.max_matvecs * (1 + 1e-12):
            return Status.MAX_MATVECS
        if self.time_limit is None or spent < max(self.minimum, step_cost):
            return None
        return Status.TIME_LIMIT if seconds * (1 + ahead / spent) > self.time_limit else None


def run_solver(
    state: S,
    step: Callable[[S], S],
    assess: Callable[[S], Assessment[S]],
    *,
    step_cost: float,
    limits: Limits,
    monitor: Monitor | None = None,
    checkpoint: Checkpoint[S] | None = None,
    verified: Callable[[S], S] | None = None,
) -> Run[S]:
    """Steps until a look says that it is over, or another step would break a limit.

    Args:
        state: where to begin.
        step: one step; does not wait for the device.
        assess: what the state has found; may wait for the device, and may restart.
        step_cost: full-data products of a step.
        limits: what may be spent.
        monitor: called after each look.
        checkpoint: where the solve goes on from, if it holds one, and is saved: now and then, at a limit, and
            when something is raised in a step, as by an interruption from the keyboard.
        verified: given the state of a checkpoint, the state to go on from, or an error.
    """
    saved = Saved(state, 0, (), 0.0)
    if checkpoint is not None and (earlier := checkpoint.load(state)) is not None:
        saved = earlier if verified is None else replace(earlier, state=verified(earlier.state))
    state, num_steps, history = saved.state, saved.num_steps, list(saved.history)
    begin = time.perf_counter() - saved.seconds
    if limits.time_limit is not None:
        limits = replace(limits, time_limit=limits.time_limit + saved.seconds)
    looking = False

    def save() -> None:
        if checkpoint is not None and state.num_matvecs:
            checkpoint.save(Saved(state, num_steps, tuple(history), time.perf_counter() - begin))

    try:
        while True:
            limit: Status | None = None
            while num_steps:
                limit = limits.broken_by(step_cost, state.num_matvecs, time.perf_counter() - begin)
                if limit is not None:
                    break
                state = step(state)
                num_steps -= 1
            if limit is not None or (checkpoint is not None and checkpoint.due()):
                save()
            looking = True  # a look may change buffers: nothing to save in the midst of it
            found = assess(state)
            state, num_steps, looking = found.state, found.num_steps, False
            if state.num_matvecs and (not history or history[-1].num_matvecs != state.num_matvecs):
                seconds = time.perf_counter() - begin
                bounds = found.smallest_bound, found.largest_bound
                ends = found.smallest, found.largest
                history.append(Progress(state.num_matvecs, seconds, *ends, *bounds, found.level))
                if monitor is not None:
                    monitor(history[-1])
            status = found.status or limit
            if status is not None:
                return Run(state, status, tuple(history), saved.seconds)
    except BaseException:
        if not looking:
            save()
        raise
