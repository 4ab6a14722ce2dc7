"""What estimators return, and the loop that every one of them samples in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_positive
from hvpkit.estimators.probe import KINDS, UNIT, draw
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.solvers.driver import Assessment, Limits, run

MIN_SAMPLES = 10
"""Samples before a standard error may end a run: of fewer it is itself too uncertain."""

V = TypeVar("V", float, Tensor)


@dataclass(frozen=True)
class EstimateProgress:
    """Progress of an estimator: what ``monitor`` is called with and ``history`` keeps.

    Attributes:
        num_matvecs: full-data matvecs so far.
        seconds: since the start.
        value: the estimate so far; of a diagonal, its Euclidean norm.
        stderr: standard error of the value; of a diagonal, the Euclidean norm of those of its entries.
    """

    num_matvecs: float
    seconds: float
    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.1g}"


Monitor = Callable[[EstimateProgress], object]
"""Called with each entry of the history; its return value is ignored, an exception from it ends the run."""


@dataclass(frozen=True, repr=False)
class Estimate(Generic[V]):
    """A value with its standard error.

    Attributes:
        value: a float, or a tensor.
        stderr: standard error of the value, or of each entry: the spread that other seeds would show. Zero where the
            value is exact to rounding, infinite where fewer than two samples leave it unknown.
        samples: what the value is the mean of, one for each probe, ``[num_samples, ...]``, float64 on the CPU; not
            kept for a diagonal: ``[0, n]``.
        num_samples: probes that the value rests on.
        num_matvecs: full-data products spent.
        seconds: wall time.
        status: why it stopped.
        message: the status in words, with what to do.
        history: one entry for each assessment; of a function of a density, those of the density.
    """

    value: V
    stderr: V
    samples: Tensor
    num_samples: int
    num_matvecs: float
    seconds: float
    status: Status
    message: str
    history: tuple[EstimateProgress, ...] | tuple[Progress, ...]

    @property
    def converged(self) -> bool:
        """Whether the standard error is as small as asked for, or the value exact. Never so without ``tol``."""
        return self.status.converged

    def __repr__(self) -> str:
        def show(value: V) -> str:
            return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value:.6g}"

        return (
            f"<Estimate: {show(self.value)} ± {show(self.stderr)}, {self.status}, {self.num_samples} samples, "
            f"{self.num_matvecs:g} products>"
        )


MESSAGES = {
    Status.CONVERGED: "the standard error is at most tol * |value|",
    Status.INVARIANT_SUBSPACE: "every column was multiplied: the value is exact to rounding",
    Status.COMPLETED: "all samples that were asked for are taken; stderr says how well the value is known",
    Status.MAX_MATVECS: "the products asked for are spent; stderr says how well the value is known; raise num_matvecs "
    "or tol",
    Status.TIME_LIMIT: "the time limit is reached; stderr says how well the value is known",
    Status.NON_FINITE: "a product gave NaN or infinity; the value is from the probes before it",
}


@dataclass(frozen=True)
class Plan:
    """What is asked for: the arguments of an estimator that its steps need.

    Attributes:
        method: its name.
        probe: kind of probes.
        seed: of all random vectors.
        num_probes: at most.
        block_size: probes of a step.
        num_products: that a probe takes.
        tol: relative standard error at which it is over, or None.
    """

    method: str
    probe: str
    seed: int
    num_probes: int
    block_size: int
    num_products: int
    tol: float | None

    @property
    def exact(self) -> bool:
        """Whether the probes are all columns of the identity."""
        return self.probe == UNIT

    def next_block(self, num_probes: int) -> range:
        """Numbers of the next probes; a block that is not full comes first: the budget has room for the others."""
        first = (self.num_probes - 1) % self.block_size + 1
        return range(num_probes, num_probes + (self.block_size if num_probes else first))


def make_plan(
    op: LinearOperator,
    method: str,
    num_products: dict[str, int],
    *,
    num_matvecs: float,
    tol: float | None,
    block_size: int,
    seed: Seed,
    probe: str = KINDS[0],
) -> Plan:
    """The plan that a user function's arguments make: all columns instead of random probes where the budget has room.

    Args:
        op: the operator.
        method: one of those in ``num_products``.
        num_products: what a probe takes by each method.
        num_matvecs: budget.
        tol: relative standard error to stop at, or None.
        block_size: probes of a step, at most.
        seed: of random vectors.
        probe: kind of probes.

    Raises:
        ValueError: an argument out of its range, named.
    """
    check_choice("method", method, tuple(num_products))
    check_choice("probe", probe, KINDS)
    budget = math.floor(check_positive("num_matvecs", num_matvecs) / op.cost * (1 + 1e-12))
    tol = None if tol is None else check_positive("tol", tol)
    block_size, seed = check_count("block_size", block_size, 1), resolve_seed(seed)
    if op.n <= budget:
        return Plan("hutchinson", UNIT, seed, op.n, min(block_size, op.n), 1, None)
    each = num_products[method]
    if budget < 2 * each:
        raise ValueError(
            f"num_matvecs must be at least {2 * each * op.cost:g}, two probes of {each} products each, without "
            f"which there is no standard error; got {num_matvecs:g}"
        )
    return Plan(method, probe, seed, budget // each, min(block_size, budget // each), each, tol)


class Sampling(Protocol):
    """What the loop must know of an estimator's state."""

    @property
    def num_probes(self) -> int: ...
    @property
    def num_matvecs(self) -> float: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def num_good(self) -> Tensor: ...


S = TypeVar("S", bound=Sampling)


@dataclass(frozen=True)
class Mean:
    """A mean of samples ``[k, ...]`` with its standard error, all over a state's scale."""

    value: Tensor
    stderr: Tensor
    samples: Tensor


def mean_of(samples: Tensor, share: float = 0.0) -> Mean:
    """The mean over the first dimension of ``samples`` ``[k, ...]``.

    ``share`` of all there is to draw from was drawn, without replacement: only the rest is uncertain.
    """
    k = len(samples)
    value = samples.mean(dim=0) if k else samples.new_full(samples.shape[1:], math.nan)
    if share >= 1:
        return Mean(value, torch.zeros_like(value), samples)
    if k < 2:
        return Mean(value, torch.full_like(value, math.inf), samples)
    return Mean(value, samples.std(dim=0) * ((1 - share) / k) ** 0.5, samples)


@dataclass(frozen=True)
class Estimator(Generic[S]):
    """Sampling until a plan is done, as a :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        plan: what is asked for.
        start: state without a sample.
        step: takes the next block of samples.
        evaluate: the mean over the first so many probes of a state.
        time_limit: seconds, or None.
    """

    op: LinearOperator
    plan: Plan
    start: S
    step: Callable[[S], S]
    evaluate: Callable[[S, int], Mean]
    time_limit: float | None
    _known: dict[int, Mean] = field(default_factory=dict, init=False)

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.plan.block_size * self.plan.num_products * self.op.cost

    @property
    def limits(self) -> Limits:
        """What the plan costs, and the time limit."""
        budget = self.plan.num_probes * self.plan.num_products * self.op.cost
        return Limits(budget, self.time_limit, 0.0, self.step_cost)

    def init(self) -> S:
        return self.start

    def assess(self, state: S) -> Assessment[S]:
        found, scale = self._mean(state), float(state.scale)
        value, stderr = (
            float(x if x.ndim == 0 else torch.linalg.vector_norm(x)) * scale
            for x in (found.value, found.stderr)
        )
        status, suspect = _judge(self.op, self.plan, state, found), None
        if status is Status.NON_FINITE:
            block = self.plan.next_block(int(state.num_good))
            suspect = draw(self.op, self.plan.probe, self.plan.seed, block).mT
        progress = EstimateProgress(0.0, 0.0, value, stderr)
        return Assessment(
            state, progress, 1 + state.num_probes // (8 * self.plan.block_size), status, suspect
        )

    def finalize(self, state: S, status: Status) -> Estimate[Tensor]:
        found, k, scale = self._mean(state), int(state.num_good), float(state.scale)
        return Estimate(
            found.value * scale,
            found.stderr * scale,
            found.samples * scale,
            k,
            state.num_matvecs,
            0.0,
            status,
            MESSAGES[status],
            (),
        )

    def _mean(self, state: S) -> Mean:
        k = int(state.num_good)
        if k not in self._known:
            self._known.clear()
            self._known[k] = self.evaluate(state, k)
        return self._known[k]


def estimate(
    op: LinearOperator,
    plan: Plan,
    state: S,
    step: Callable[[S], S],
    evaluate: Callable[[S, int], Mean],
    *,
    time_limit: float | None,
    monitor: Monitor | None,
) -> Estimate[Tensor]:
    """Sample until the plan is done; ``evaluate`` says what a state and so many of its probes give."""
    return run(Estimator(op, plan, state, step, evaluate, time_limit), monitor=monitor)


def _judge(op: LinearOperator, plan: Plan, state: Sampling, found: Mean) -> Status | None:
    """The status of an estimate that is over."""
    if state.num_good < state.num_probes:
        return Status.NON_FINITE
    if plan.exact:
        return Status.INVARIANT_SUBSPACE if state.num_probes == op.n else None
    if plan.tol is None:
        return Status.COMPLETED if state.num_probes == plan.num_probes else None
    if state.num_probes < min(MIN_SAMPLES, plan.num_probes):
        return None
    error, size = torch.linalg.vector_norm(found.stderr), torch.linalg.vector_norm(found.value)
    return Status.CONVERGED if bool(error <= plan.tol * size) else None


def as_floats(found: Estimate[Tensor]) -> Estimate[float]:
    """An estimate of one number, as a float."""
    rest = {field.name: getattr(found, field.name) for field in fields(found)[2:]}
    return Estimate(float(found.value), float(found.stderr), **rest)
