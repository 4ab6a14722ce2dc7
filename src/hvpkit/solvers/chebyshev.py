r"""Subspace iteration with Chebyshev filters.

Method: a few steps of block Lanczos show where the spectrum ends. Then vectors are filtered: multiplied by a
Chebyshev polynomial in A that stays small on the unwanted interval [a, b] and grows outside of it,

.. math:: p_m(\lambda) = T_m\!\left(\frac{\lambda - c}{e}\right), \qquad c = \frac{a + b}{2}, \quad e = \frac{b - a}{2}.

Rayleigh-Ritz follows, and the next filter, until the residuals are small. Where both ends are wanted, the unwanted
interval is the bulk between them.

Cost: 32 Lanczos products, or four for each vector of the block if that is more, unless fewer are enough; in each
cycle as many as the degrees add up to, and one more for each vector filtered; at the end one for each pair. Filters
need no orthogonalisation.
Memory: 64 vectors, or eight for each of the block if that is more, and some eight for each of the block.
Source: Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006) 172-184, doi:10.1016/j.jcp.2006.03.017; bounds of
the spectrum: Zhou, Li, Linear Algebra Appl. 435 (2011) 480-493, doi:10.1016/j.laa.2010.06.034; degrees: Winkelmann,
Springer, Di Napoli, ACM Trans. Math. Softw. 45 (2019) 21, doi:10.1145/3313828.

Departures from the papers:
1. The Lanczos steps start from the block, so that its Ritz vectors are the first to be filtered, copies of a multiple
   eigenvalue among them.
2. Rayleigh-Ritz is on the filtered vectors and on those before the filter, whose products are known: values never
   get worse, and a filter that did not help does no harm.
3. Accurate Ritz vectors are kept out of the filter by projection, wanted or not: also outliers that would widen the
   unwanted interval.
4. The recurrence is scaled by lengths of vectors and not by an estimate of the spectrum's end.
5. Once as many products are spent as the space has dimensions, up to a thousand, the subspace becomes all of it:
   hard small problems end exactly.
6. The operator is divided by a power of two near its first product.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.chebyshev_filter import Filter, make_plan, next_term
from hvpkit.solvers.common.block import residuals_of, row_norms
from hvpkit.solvers.common.block_subspace import (
    Subspace,
    drop_non_finite,
    extend,
    finalize,
    multiply,
    outcome,
    rayleigh_ritz,
    start,
    turn,
)
from hvpkit.solvers.common.convergence import Checked, concluded, is_converged
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end, select
from hvpkit.solvers.common.request import Request, Start, check_arguments
from hvpkit.solvers.driver import Assessment, Monitor, full_precision, run_solver

WHICH = ("LA", "SA", "BE")

NUM_GUARDS = 1
"""Vectors beside the wanted ones, at each end where several are wanted."""

DEPTH, MAX_ROWS = 12, 32
"""Products without which a small residual says nothing, as a start may happen to be near any eigenvector; and vectors
that are kept through a filter, of which there are at least four for each of the block."""

PACE = 5
"""Terms of a filter between looks."""


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for, with the number of vectors to filter and to keep."""

    width: int
    max_rows: int


@dataclass(frozen=True)
class State(Subspace):
    """Rows that are Ritz vectors once they have been looked at, and a filter under way.

    Attributes:
        filter: or None. The first rows are those kept out of it.
        ends: smallest and largest value and their bounds, as a look reports them, over scale.
    """

    filter: Filter | None = None
    ends: tuple[float, float, float, float] = (math.nan, math.nan, math.inf, math.inf)


def init(op: LinearOperator, goal: Goal) -> State:
    """A state with the start as new rows."""
    return State(**vars(start(op, goal, goal.width, goal.max_rows + goal.width)))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Multiplies the vectors in the filter, or else new rows. Waits for nothing."""
    if state.filter is None:
        return multiply(op, state, goal.width)
    locked = state.rows[: len(state.filter.plan.locked)]
    spent = state.num_matvecs + state.filter.num_active * op.cost
    return replace(state, filter=next_term(op, state.filter, state.scale, locked), num_matvecs=spent)


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """What a filter gave as new rows; Rayleigh-Ritz where these are multiplied; and what comes next."""
    status = None
    if state.filter is not None:
        state, status = _filtered(op, goal, state, state.filter)
    elif state.num_fresh:
        state, status = _judged(op, goal, drop_non_finite(state))
    scale = float(state.scale)
    smallest, largest, low, high = (end * scale for end in state.ends)
    num_steps = math.ceil(state.num_new / goal.width)
    if state.filter is not None:
        num_steps = min(state.filter.num_left, PACE)
    return Assessment(state, smallest, largest, low, high, status, num_steps)


def _filtered(op: LinearOperator, goal: Goal, state: State, filtered: Filter) -> tuple[State, Status | None]:
    """The state with a filter's vectors as new rows, once it is through."""
    if not bool(torch.isfinite(filtered.current).all()):
        suspect = state.rows[len(filtered.plan.locked)].clone()
        return replace(state, filter=None, suspect=suspect), Status.NON_FINITE
    if filtered.num_left:
        return state, None
    return extend(op, goal, replace(state, filter=None), filtered.current), None


def _judged(op: LinearOperator, goal: Goal, state: State) -> tuple[State, Status | None]:
    """The state with its rows turned to Ritz vectors, and with what is to be multiplied next if it is not over."""
    m = state.num_rows
    if not m:
        return state, Status.NON_FINITE
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    state = turn(state, pairs, pairs.vectors)
    values, wanted = pairs.values, select(pairs.values, goal.k, goal.which)
    residuals = residuals_of(state.rows[:m], state.images[:m], values)
    norms = row_norms(op.space, residuals).to("cpu", torch.float64)
    found = Checked(values[wanted], state.rows[wanted].mT, norms[wanted])
    ends = float(values[0]), float(values[-1]), float(norms[0]), float(norms[-1])
    state = replace(state, ends=ends, best=found)
    early = m < op.n and state.num_matvecs < DEPTH * op.cost
    done = is_converged(op, 0.0 if early else goal.tol, state.norm, found.values, found.residual_norms)
    status = outcome(op, goal, state, found, done, whole=m == op.n)
    if status is not None:
        return state, status
    if m < goal.max_rows:
        largest = torch.argsort(norms, descending=True)[: goal.width]
        return extend(op, goal, state, residuals[largest.to(op.device)]), None
    return _planned(op, goal, state, values, norms)


def _planned(
    op: LinearOperator, goal: Goal, state: State, values: Tensor, norms: Tensor
) -> tuple[State, Status | None]:
    """The state with a filter: its rows are the locked ones, those to filter, and others from both ends."""
    width = goal.width
    plan = make_plan(op, goal, width, goal.max_rows - width, state.norm, values, norms)
    most = int((goal.left(state.num_matvecs) / op.cost - width) / len(plan.filtered))
    if most < 1:
        return state, Status.MAX_MATVECS
    plan = replace(plan, degrees=[min(degree, most) for degree in plan.degrees])
    kept = plan.locked + plan.filtered
    others = [place for place in range(state.num_rows) if place not in set(kept)]
    spare = select(values[others], goal.max_rows - len(kept), "BE")
    kept += [others[place] for place in spare]
    for matrix in (state.rows, state.images):
        matrix[: len(kept)] = matrix[kept]
    inputs = state.rows[len(plan.locked) : len(plan.locked + plan.filtered)].clone()
    moving = Filter(inputs, torch.zeros_like(inputs), plan)
    return replace(state, filter=moving, num_rows=len(kept)), None


@full_precision
def chebyshev(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    block_size: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""A few eigenpairs at the ends of the spectrum, by Chebyshev-filtered subspace iteration.

    Stops when for each wanted Ritz value :math:`\theta` with residual r,

    .. math:: \|r\| + \text{rounding} \le \text{tol} \cdot |\theta|,

    or, where a value is zero to rounding, when the left side is at most 32 eps times the operator's norm. A
    ``tol`` below rounding is taken as rounding.

    Use it where products with many vectors at once are cheap, where many pairs are wanted, or where
    orthogonalisation is what costs: a filter needs none, and a fixed number of vectors. Otherwise
    :func:`hvpkit.lanczos` mostly takes fewer products.

    Args:
        op: symmetric operator.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the
            high end), by a filter that damps what lies between.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. The columns are dealt out to the vectors of the block,
            each with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        block_size: vectors to filter, at least ``k``; by default one more for each end where several are wanted,
            without which one of them may be missed where many lie close together.
        max_matvecs: full-data products, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a
        limit or a product that is not finite is a status too, with what was found until then: fewer than
        ``k`` pairs if that was so early.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as ``num_matvecs`` says, ``k`` of them for the true residuals; memory for 64 vectors and 8 for each
        of the block, for 16 of each where it is larger than 8.

    Source:
        Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006) 172-184, doi:10.1016/j.jcp.2006.03.017.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> chebyshev(op, 2, which="BE", tol=1e-6).values.round(decimals=4).tolist()
        [-1.0, 2.0]
    """
    begin = time.perf_counter()
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=WHICH,
    )
    num_low = num_at_low_end(k, asked.which)
    guards = sum(NUM_GUARDS for wanted in (num_low, k - num_low) if wanted > 1)
    width = k + guards if block_size is None else check_count("block_size", block_size, k, op.n)
    width = min(width, op.n, int(asked.left(0.0) / op.cost))
    goal = Goal(**vars(asked), width=width, max_rows=max(MAX_ROWS, 4 * width))
    ended = run_solver(
        init(op, goal),
        lambda state: step(op, goal, state),
        lambda state: assess(op, goal, state),
        step_cost=width * op.cost,
        limits=goal.limits,
        monitor=monitor,
    )
    found = finalize(op, goal, ended.state, ended.status)
    return concluded(op, found, ended.history, begin, ended.state.suspect)
