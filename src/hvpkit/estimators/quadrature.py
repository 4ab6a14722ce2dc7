r"""Stochastic Lanczos quadrature: spectral measures of random vectors.

Method: for a unit vector v, Ritz values :math:`\theta_k` of its Krylov space of m steps and the squared first
components :math:`w_k` of their coefficients are a Gauss rule, :math:`v'f(A)v \approx \sum_k w_k f(\theta_k)`, exact
for polynomials of degree up to 2m - 1; the mean over random v is :math:`\operatorname{tr} f(A) / n`. Several vectors
share one basis, each with a rule of its own on all of its Ritz values.

Cost: one matvec per step and vector; orthogonalisation as for :mod:`hvpkit.solvers.lanczos`.
Memory: the basis, ``num_steps + 1`` vectors for each that shares it.
Source: Golub and Meurant, Matrices, Moments and Quadrature, Princeton (2010), doi:10.1515/9781400833887; Ubaru, Chen,
Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075-1099, doi:10.1137/16M1104974; Ghorbani, Krishnan, Xiao, ICML 2019,
arXiv:1901.10159.

Departures:
1. Full reorthogonalisation, twice: no copies of converged Ritz values.
2. Start vectors are orthonormal, and not independent: each is uniform on the sphere, and their mean has a smaller
   variance. With n of them and one step the spectrum is exact.
3. A block Krylov space, whose rules are at least as exact as those of its vectors alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.random import generator
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.results.spectral_measure import Measure, deflate
from hvpkit.solvers import krylov
from hvpkit.solvers.checkpoint import Checkpoint, Witness
from hvpkit.solvers.common.convergence import progress_of
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.driver import Assessment, Limits, Monitor, run
from hvpkit.solvers.plain_state import restored

SHORTER = 0.5
"""Share of the steps whose rules are compared with those of all: the error is less than the change where it halves from
there on."""


@dataclass(frozen=True)
class Goal:
    """The checked arguments of a spectral density.

    Attributes:
        num_steps: matvecs with each vector.
        sizes: number of vectors that share a basis, one basis after another.
        width: columns of a block matvec, at most.
        seed: of random vectors.
    """

    num_steps: int
    sizes: tuple[int, ...]
    width: int
    seed: int

    def seed_of(self, group: int) -> int:
        """Return the seed of a group of vectors."""
        return generator(self.seed, group).initial_seed()

    def spans(self, n: int) -> bool:
        """Return True if the vectors are a basis of all n dimensions."""
        return self.sizes == (n,)


MESSAGES = {
    Status.INVARIANT_SUBSPACE: "every column was multiplied: the spectrum is as exact as the matvecs",
    Status.COMPLETED: "all steps of all probes are taken; raise num_probes or num_steps for more accuracy",
    Status.MAX_MATVECS: "the matvecs are spent before all steps were taken; the density is from the matvecs before",
    Status.TIME_LIMIT: "the time limit is reached; the density is from the matvecs before it",
    Status.NON_FINITE: "a matvec gave NaN or infinity; the density is from the matvecs before it",
}


@dataclass(frozen=True)
class Measured:
    """The measures that a method found.

    Attributes:
        measures: one for each group of vectors.
        shorter: the same from fewer steps, where the method has them: see ``SHORTER``.
        num_matvecs: full-data matvecs spent.
        status: why it stopped.
        message: the status in words.
        seconds: wall time.
        history: one entry for each assessment.
    """

    measures: list[Measure]
    num_matvecs: float
    status: Status
    message: str
    seconds: float = 0.0
    history: tuple[Progress, ...] = ()
    shorter: tuple[Measure, ...] = ()


@dataclass(frozen=True)
class QuadratureState:
    """The Krylov space of the present group of vectors, and the measures of the groups before.

    Attributes:
        krylov: of the present vectors.
        finished: of the vectors before.
        shorter: the same from fewer steps.
        num_before: full-data matvecs that those took.
        witness: a random combination of the vectors of the last group, and of their matvecs over ``witness_scale``.
        witness_scale: what the matvecs of that group were divided by, 0-d.
    """

    krylov: krylov.KrylovState
    witness: Witness
    witness_scale: Tensor
    finished: tuple[Measure, ...] = ()
    shorter: tuple[Measure, ...] = ()
    num_before: float = 0.0

    @property
    def num_matvecs(self) -> float:
        """Full-data matvecs so far."""
        return self.num_before + self.krylov.num_matvecs


def init(op: LinearOperator, goal: Goal, group: int = 0, buffer: Tensor | None = None) -> QuadratureState:
    """Return the state before the first matvec of a group of vectors; it may reuse the basis of the group before."""
    size, seed = goal.sizes[group], goal.seed_of(group)
    none = Witness.empty(op), torch.ones((), dtype=op.dtype, device=op.device)
    if not goal.spans(op.n):
        return QuadratureState(
            krylov.start(op, size * (goal.num_steps + 1), size, seed, buffer=buffer), *none
        )
    normal = torch.randn(op.n, op.n, generator=generator(seed), dtype=torch.float64, device="cpu")
    everything = op.space.local(torch.linalg.qr(normal).Q.to(op.device, op.dtype).mT).mT.contiguous()
    start = krylov.start(op, op.n, 1, seed)
    whole = replace(start, basis=everything, alive=torch.ones_like(start.alive), num_frontier=op.n)
    return QuadratureState(whole, *none)


def step(op: LinearOperator, goal: Goal, state: QuadratureState) -> QuadratureState:
    """Multiply as many vectors of the frontier as a block matvec may have columns."""
    return replace(state, krylov=krylov.step(op, state.krylov, min(goal.width, matvecs_left(goal, state))))


def matvecs_left(goal: Goal, state: QuadratureState) -> int:
    """Return the number of matvecs left for the present group."""
    return goal.sizes[len(state.finished)] * goal.num_steps - state.krylov.num_products


def measure(op: LinearOperator, krylov_state: krylov.KrylovState, pairs: RitzPairs, size: int) -> Measure:
    """Return the rules of the start vectors, which are the first rows of the basis."""
    scale, weights = float(krylov_state.scale), pairs.vectors[:size] ** 2
    nodes, residual_norms = pairs.values * scale, pairs.residual_norms * scale
    deflated = deflate(nodes, weights, residual_norms, op.n, rounding_of(op, nodes))
    return Measure(nodes, weights, weights, residual_norms, deflated)


def shorter_measure(op: LinearOperator, krylov_state: krylov.KrylovState, size: int) -> Measure:
    """Return the rules from the first of the steps: their distance shows the error of the quadrature."""
    m = max(1, round(SHORTER * krylov_state.num_multiplied / size)) * size
    m = min(m, krylov_state.num_multiplied)
    frontier = min(size, krylov_state.num_rows - m)
    state = replace(krylov_state, num_multiplied=m, num_frontier=frontier)
    return measure(op, state, krylov.project(op, state)[0], size)


def rounding_of(op: LinearOperator, nodes: Tensor) -> float:
    """Return the rounding error of nodes ``[K]``, at least one: 32 eps times the largest."""
    return 32 * op.precision * float(nodes.abs().max())


def assess(op: LinearOperator, goal: Goal, state: QuadratureState) -> Assessment[QuadratureState]:
    """Find the Ritz values so far; go on to the next group if this one is done."""
    space, poisoned = krylov.compact(state.krylov)
    pairs, _ = krylov.project(op, space)
    state, status, suspect, scale = replace(state, krylov=space), None, None, space.scale
    if poisoned:
        status, suspect = Status.NON_FINITE, space.basis[space.num_multiplied].unsqueeze(1)
    elif len(state.finished) == len(goal.sizes) - 1 and is_complete(goal, state):
        status = Status.INVARIANT_SUBSPACE if goal.spans(op.n) else Status.COMPLETED
    elif is_complete(goal, state):
        finished, shorter = measures(op, goal, state, is_done=True)
        witness = krylov.witness(space)
        state = replace(
            init(op, goal, len(finished), space.basis),
            witness=witness,
            witness_scale=space.scale,
            finished=tuple(finished),
            shorter=shorter,
            num_before=state.num_matvecs,
        )
    progress = progress_of(pairs.values, pairs.residual_norms, scale)
    done, left = state.krylov.num_products, 0 if status else matvecs_left(goal, state)
    num_steps = max(1, min(math.ceil(left / goal.width), done // goal.width // 4))
    num_left = (sum(goal.sizes) * goal.num_steps) * op.cost - state.num_matvecs
    return Assessment(state, progress, num_steps, status, suspect, num_left=num_left)


def is_complete(goal: Goal, state: QuadratureState) -> bool:
    """Return True if all steps of the present group are taken, or no vector is left."""
    return not (matvecs_left(goal, state) and state.krylov.num_frontier)


def measures(
    op: LinearOperator, goal: Goal, state: QuadratureState, is_done: bool = False
) -> tuple[list[Measure], tuple[Measure, ...]]:
    """Return the measures of complete groups, and those from fewer steps; if there is none, of the group cut short.

    ``is_done`` if the present group is complete.
    """
    if (state.finished and not is_done) or not state.krylov.num_multiplied:
        return list(state.finished), state.shorter
    space, size = krylov.compact(state.krylov)[0], goal.sizes[len(state.finished)]
    whole = measure(op, space, krylov.project(op, space)[0], size)
    shorter = shorter_measure(op, space, size) if space.num_frontier else whole
    return [*state.finished, whole], (*state.shorter, shorter)


def verify(op: LinearOperator, state: QuadratureState) -> QuadratureState:
    """Verify by one matvec, counted, that a loaded state belongs to the operator."""
    if state.krylov.num_multiplied:
        return replace(state, krylov=krylov.verify(op, state.krylov))
    return replace(state, num_before=state.num_before + state.witness.check(op, state.witness_scale))


@dataclass(frozen=True)
class Quadrature:
    """The functions of this file as a :class:`hvpkit.solvers.driver.Solver`."""

    op: LinearOperator
    goal: Goal
    time_limit: float | None

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.goal.width * self.op.cost

    @property
    def limits(self) -> Limits:
        """The time limit, and a budget that is never reached: assessments keep to the matvecs of the goal."""
        num_matvecs = sum(self.goal.sizes) * self.goal.num_steps
        return Limits(num_matvecs * self.op.cost + self.step_cost, self.time_limit, 0.0, self.step_cost)

    def init(self) -> QuadratureState:
        return init(self.op, self.goal)

    def step(self, state: QuadratureState) -> QuadratureState:
        return step(self.op, self.goal, state)

    def assess(self, state: QuadratureState) -> Assessment[QuadratureState]:
        return assess(self.op, self.goal, state)

    def finalize(self, state: QuadratureState, status: Status) -> Measured:
        is_done = status in (Status.COMPLETED, Status.INVARIANT_SUBSPACE)
        found, shorter = measures(self.op, self.goal, state, is_done)
        return Measured(found, state.num_matvecs, status, MESSAGES[status], shorter=shorter)


def solve(
    op: LinearOperator,
    goal: Goal,
    *,
    time_limit: float | None,
    monitor: Monitor | None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Measured:
    """Measure all groups, or as many as the time allows."""
    file = None
    if checkpoint is not None:
        file = Checkpoint[QuadratureState](
            checkpoint,
            {"estimator": "quadrature", **asdict(goal), **op.identity()},
            op,
            lambda state: replace(state, krylov=krylov.trim(state.krylov)),
            lambda state: verify(op, state),
            unpack=lambda saved: restored(init(op, goal, len(saved["finished"])), saved),
        )
    return run(Quadrature(op, goal, time_limit), monitor=monitor, checkpoint=file)
