"""The sampling loop of every estimator: a plan of probes, steps until it is done, a mean with its standard error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_positive, check_tolerance
from hvpkit.estimators.probe import KINDS, UNIT, draw
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.results.estimate import Estimate, EstimateProgress, Mean
from hvpkit.solvers.checkpoint import Checkpoint, Witness
from hvpkit.solvers.driver import Assessment, Limits, run

MIN_SAMPLES = 20
"""Samples before a standard error may end a run: it is checked after each block, where a small one by chance ends it.
In 3,750 runs on 168 matrices, with 10, 20 and 32 samples the error was more than twice tol in 2.6, 2.0 and 1.8 %, and
more than three standard errors in 1.9, 1.2 and 1.3 %."""

Monitor = Callable[[EstimateProgress], object]
"""Called with each entry of the history; its return value is ignored, an exception from it ends the run."""

MESSAGES = {
    Status.CONVERGED: "the standard error is at most tol * |value|",
    Status.INVARIANT_SUBSPACE: "every column was multiplied: the value is as exact as the matvecs",
    Status.COMPLETED: (
        "all samples asked for are taken; stderr says how well the value is known; raise num_matvecs for more accuracy"
    ),
    Status.MAX_MATVECS: "num_matvecs is spent and stderr is more than tol * |value|; raise num_matvecs or tol",
    Status.TIME_LIMIT: "the time limit is reached; stderr says how well the value is known",
    Status.NON_FINITE: "a matvec gave NaN or infinity; the value is from the probes before it",
}


@dataclass(frozen=True)
class Plan:
    """The checked arguments of an estimator.

    Attributes:
        method: name of the method.
        probe: kind of probes.
        seed: of all random vectors.
        num_probes: at most.
        block_size: probes of a step.
        cost: matvecs per probe.
        tol: relative standard error to stop at, or None.
    """

    method: str
    probe: str
    seed: int
    num_probes: int
    block_size: int
    cost: int
    tol: float | None

    @property
    def exact(self) -> bool:
        """True if the probes are all columns of the identity."""
        return self.probe == UNIT

    def next_block(self, num_probes: int) -> range:
        """Return the numbers of the next probes; an incomplete block comes first, so that later ones fit the budget."""
        first = (self.num_probes - 1) % self.block_size + 1
        return range(num_probes, num_probes + (self.block_size if num_probes else first))


def make_plan(
    op: LinearOperator,
    method: str,
    costs: dict[str, int],
    *,
    num_matvecs: float,
    tol: float | None,
    block_size: int,
    seed: Seed,
    probe: str = KINDS[0],
) -> Plan:
    """Check an estimator's arguments; take all columns instead of random probes where the budget allows.

    Args:
        op: the operator.
        method: a key of ``costs``.
        costs: matvecs per probe of each method.
        num_matvecs: budget in full-data matvecs.
        tol: relative standard error to stop at, or None.
        block_size: probes of a step, at most.
        seed: of random vectors.
        probe: kind of probes.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_choice("method", method, tuple(costs))
    check_choice("probe", probe, KINDS)
    budget = math.floor(check_positive("num_matvecs", num_matvecs) / op.cost * (1 + 1e-12))
    tol = None if tol is None else check_tolerance("tol", tol)
    block_size, seed = check_count("block_size", block_size, 1), resolve_seed(seed)
    if op.n <= budget:
        return Plan("hutchinson", UNIT, seed, op.n, min(block_size, op.n), 1, None)
    cost = costs[method]
    if budget < 2 * cost:
        raise ValueError(
            f"num_matvecs must be at least {2 * cost * op.cost:g}, two probes of {cost} products each, without "
            f"which there is no standard error; got {num_matvecs:g}"
        )
    return Plan(method, probe, seed, budget // cost, min(block_size, budget // cost), cost, tol)


class Sampled(Protocol):
    """The part of an estimator's state that the loop reads."""

    @property
    def num_probes(self) -> int: ...
    @property
    def num_matvecs(self) -> float: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def num_good(self) -> Tensor: ...
    @property
    def witness(self) -> Witness: ...


S = TypeVar("S", bound=Sampled)


@dataclass(frozen=True)
class Estimator(Generic[S]):
    """Sampling until a plan is done, as a :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        plan: the checked arguments.
        start: state without a sample.
        advance: takes the next block of samples.
        evaluate: returns the mean over a state's first k probes, over its scale.
        time_limit: seconds, or None.
    """

    op: LinearOperator
    plan: Plan
    start: S
    advance: Callable[[LinearOperator, Plan, S], S]
    evaluate: Callable[[LinearOperator, Plan, S, int], Mean]
    time_limit: float | None
    _cached: dict[int, Mean] = field(default_factory=dict, init=False)

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.plan.block_size * self.plan.cost * self.op.cost

    @property
    def limits(self) -> Limits:
        """Cost of the plan, and the time limit."""
        budget = self.plan.num_probes * self.plan.cost * self.op.cost
        return Limits(budget, self.time_limit, 0.0, self.step_cost)

    def init(self) -> S:
        return self.start

    def step(self, state: S) -> S:
        return self.advance(self.op, self.plan, state)

    def assess(self, state: S) -> Assessment[S]:
        found, scale = self._mean(state), float(state.scale)
        value, stderr = (
            float(x if x.ndim == 0 else self.op.space.norm(x)) * scale for x in (found.value, found.stderr)
        )
        status, suspect = _final_status(self.op, self.plan, state, found), None
        if status is Status.NON_FINITE:
            block = self.plan.next_block(int(state.num_good))
            suspect = draw(self.op, self.plan.probe, self.plan.seed, block).mT
        num_steps = 1 + state.num_probes // (8 * self.plan.block_size)
        # with tol it may end before that
        num_left = (self.plan.num_probes - state.num_probes) * self.plan.cost * self.op.cost
        progress = EstimateProgress(0.0, 0.0, value, stderr)
        return Assessment(state, progress, num_steps, status, suspect, num_left=num_left)

    def finalize(self, state: S, status: Status) -> Estimate[Tensor]:
        found, scale = self._mean(state), float(state.scale)
        scaled = found.value * scale, found.stderr * scale, found.samples * scale
        return Estimate(*scaled, int(state.num_good), state.num_matvecs, 0.0, status, MESSAGES[status], ())

    def _mean(self, state: S) -> Mean:
        k = int(state.num_good)
        if k not in self._cached:
            self._cached.clear()
            self._cached[k] = self.evaluate(self.op, self.plan, state, k)
        return self._cached[k]


def estimate(
    op: LinearOperator,
    plan: Plan,
    state: S,
    step: Callable[[LinearOperator, Plan, S], S],
    evaluate: Callable[[LinearOperator, Plan, S, int], Mean],
    *,
    time_limit: float | None,
    monitor: Monitor | None,
    checkpoint: str | os.PathLike[str] | None,
    trim: Callable[[S], S] = lambda state: state,
) -> Estimate[Tensor]:
    """Sample until the plan is done: see :class:`Estimator`; ``trim`` drops what a checkpoint need not hold."""
    file = None
    if checkpoint is not None:
        asked = {"estimator": evaluate.__module__.rpartition(".")[2], **asdict(plan)}
        del asked["tol"]  # may change, as limits may
        file = Checkpoint[S](
            checkpoint,
            {**asked, **op.identity()},
            op,
            trim,
            lambda loaded: _verified(op, loaded),
            EstimateProgress,
        )
    found = run(Estimator(op, plan, state, step, evaluate, time_limit), monitor=monitor, checkpoint=file)
    if file is not None and found.status is Status.MAX_MATVECS:
        file.clear()  # all probes of the plan are taken
    return found


def _verified(op: LinearOperator, state: S) -> S:
    """Verify by one matvec, counted, that a loaded state belongs to the operator."""
    cost = state.witness.check(op, state.scale)
    changed: Any = state  # a dataclass, which a protocol cannot say
    return replace(changed, num_matvecs=state.num_matvecs + cost)  # type: ignore[no-any-return]


def _final_status(op: LinearOperator, plan: Plan, state: Sampled, found: Mean) -> Status | None:
    """Return the status of an estimate that is done, else None."""
    if state.num_good < state.num_probes:
        return Status.NON_FINITE
    if plan.exact:
        return Status.INVARIANT_SUBSPACE if state.num_probes == op.n else None
    if plan.tol is None:
        return Status.COMPLETED if state.num_probes == plan.num_probes else None
    if state.num_probes < min(MIN_SAMPLES, plan.num_probes):
        return None
    error, size = (x.abs() if x.ndim == 0 else op.space.norm(x) for x in (found.stderr, found.value))
    return Status.CONVERGED if bool(error <= plan.tol * size) else None
