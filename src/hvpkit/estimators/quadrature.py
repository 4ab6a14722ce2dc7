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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.random import generator
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.results.spectral_measure import Measure
from hvpkit.solvers import krylov
from hvpkit.solvers.common.rayleigh_ritz import Ritz
from hvpkit.solvers.driver import Assessment, Limits, Monitor, run_solver


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


@dataclass(frozen=True)
class Measured:
    """The measures that a method found.

    Attributes:
        measures: one for each group of vectors.
        status: why it stopped.
        history: one entry for each assessment.
        num_matvecs: full-data matvecs spent.
        blame: the vectors ``[n, k]`` of the last matvec.
    """

    measures: list[Measure]
    status: Status
    history: tuple[Progress, ...]
    num_matvecs: float
    blame: Tensor


@dataclass(frozen=True)
class State:
    """The Krylov space of the present group of vectors, and the measures of the groups before.

    Attributes:
        krylov: of the present vectors.
        finished: of the vectors before.
        num_before: full-data matvecs that those took.
    """

    krylov: krylov.State
    finished: tuple[Measure, ...] = ()
    num_before: float = 0.0

    @property
    def num_matvecs(self) -> float:
        """Full-data matvecs so far."""
        return self.num_before + self.krylov.num_matvecs


def init(op: LinearOperator, goal: Goal, group: int = 0) -> State:
    """Return the state before the first matvec of a group of vectors."""
    size, seed = goal.sizes[group], goal.seed_of(group)
    if not goal.spans(op.n):
        return State(krylov.start(op, size * (goal.num_steps + 1), size, seed))
    normal = torch.randn(op.n, op.n, generator=generator(seed), dtype=torch.float64)
    everything = torch.linalg.qr(normal).Q.to(op.device, op.dtype)
    start = krylov.start(op, op.n, 1, seed)
    return State(replace(start, basis=everything, alive=torch.ones_like(start.alive), num_frontier=op.n))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Multiply as many vectors of the frontier as a block matvec may have columns."""
    return replace(state, krylov=krylov.step(op, state.krylov, min(goal.width, matvecs_left(goal, state))))


def matvecs_left(goal: Goal, state: State) -> int:
    """Return the number of matvecs left for the present group."""
    return goal.sizes[len(state.finished)] * goal.num_steps - state.krylov.num_products


def measure(krylov_state: krylov.State, pairs: Ritz, size: int) -> Measure:
    """Return the rules of the start vectors, which are the first rows of the basis."""
    scale, weights = float(krylov_state.scale), pairs.coefficients[:size] ** 2
    return Measure(pairs.values * scale, weights, weights, pairs.residual_norms * scale)


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """Find the Ritz values so far; go on to the next group if this one is done."""
    space, poisoned = krylov.compact(state.krylov)
    pairs, _ = krylov.project(op, space)
    state, status, scale = replace(state, krylov=space), None, float(space.scale)
    if poisoned:
        status = Status.NON_FINITE
    elif not (matvecs_left(goal, state) and space.num_frontier):
        finished = (*state.finished, measure(space, pairs, goal.sizes[len(state.finished)]))
        if len(finished) < len(goal.sizes):
            state = replace(init(op, goal, len(finished)), finished=finished, num_before=state.num_matvecs)
        else:
            state = replace(state, finished=finished)
            status = Status.INVARIANT_SUBSPACE if goal.spans(op.n) else Status.COMPLETED
    some = len(pairs.values) > 0
    done, left = state.krylov.num_products, 0 if status else matvecs_left(goal, state)
    return Assessment(
        state,
        smallest=float(pairs.values[0]) * scale if some else math.nan,
        largest=float(pairs.values[-1]) * scale if some else math.nan,
        smallest_bound=float(pairs.residual_norms[0]) * scale if some else math.inf,
        largest_bound=float(pairs.residual_norms[-1]) * scale if some else math.inf,
        status=status,
        num_steps=max(1, min(math.ceil(left / goal.width), done // goal.width // 4)),
    )


def measures(op: LinearOperator, goal: Goal, state: State) -> list[Measure]:
    """Return the measures of complete groups; if there is none, of the group that a limit cut."""
    if state.finished or not state.krylov.num_multiplied:
        return list(state.finished)
    space, _ = krylov.compact(state.krylov)
    return [measure(space, krylov.project(op, space)[0], goal.sizes[0])]


def solve(op: LinearOperator, goal: Goal, *, time_limit: float | None, monitor: Monitor | None) -> Measured:
    """Measure all groups, or as many as the time allows."""
    num_matvecs, step_cost = sum(goal.sizes) * goal.num_steps, goal.width * op.cost
    ended = run_solver(
        init(op, goal),
        lambda state: step(op, goal, state),
        lambda state: assess(op, goal, state),
        step_cost=step_cost,
        limits=Limits(
            num_matvecs * op.cost + step_cost, time_limit, 0.0, step_cost
        ),  # `assess` keeps to the matvecs
        monitor=monitor,
    )
    space = ended.state.krylov
    blame = space.basis[space.num_multiplied : space.num_multiplied + 1].mT
    return Measured(
        measures(op, goal, ended.state), ended.status, ended.history, ended.state.num_matvecs, blame
    )
