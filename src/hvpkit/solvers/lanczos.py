r"""Lanczos with thick restart and full reorthogonalisation.

Method: an orthonormal basis V of a Krylov space grows by products with the vectors at its frontier F, so
that :math:`A V = V T + F B` always holds; Ritz pairs of T approximate eigenpairs from the ends of the
spectrum inwards. When the basis is full it is replaced by some of its Ritz vectors, the frontier stays, and
the relation holds as before. One start vector gives the classical method; several, a block method; a random
vector added to the frontier later finds further copies of a multiple eigenvalue.

Cost: one product a step for each vector of a block; beside it, orthogonalisation reads the basis twice where
one start vector is all there is, else four times (passes of classical Gram-Schmidt, two reads each).
Memory: ``ncv + block_size`` vectors and two to work with.
Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

Departures from the paper:
1. T is kept whole and not as an arrowhead: full reorthogonalisation gives all its entries, and what should
   be zero or symmetric among them shows an operator that is not.
2. The frontier may hold several vectors: each product's residual joins it, so that blocks of any size
   (also changing) are one algorithm, and a vector that vanishes simply does not join.
3. The operator is divided by a power of two near its first product, so that no inner product overflows or
   underflows.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.checkpoint import Checkpoint
from hvpkit.solvers.common import convergence
from hvpkit.solvers.common.bounds import kato_temple, uniform_distance
from hvpkit.solvers.common.rayleigh_ritz import Ritz, most_at_one_end, select
from hvpkit.solvers.common.request import Start, check_arguments, check_confidence
from hvpkit.solvers.driver import Assessment, Limits, Monitor, full_precision, run_solver
from hvpkit.solvers.krylov import (
    State,
    append_random,
    compact,
    project,
    restart,
    start,
    step,
    trimmed,
    verified,
)

BASIS_BYTES = 4 * 2**30
"""What the default ``ncv`` lets the basis take."""

DEPTH, SMALL = 12, 500
"""Steps without which a small residual says nothing, as a start may happen to be near other eigenvectors; and the size
up to which nothing takes their place, for there they cost next to nothing."""

HIDDEN_BEYOND, HIDDEN_PROBABILITY, HIDDEN_EARLY = 2.0, 0.3, 0.05
"""Not over while it is more likely than this that an eigenvalue hides further out than 2 tol * |value|; the last one
before ``DEPTH`` steps, for n beyond ``SMALL``."""


ROUGH_TOL = 0.05
"""Relative error of the values that rough vectors belong to."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: the arguments of :func:`lanczos` that the steps need."""

    k: int
    which: str
    tol: float
    block_size: int
    seed: int
    check_copies: bool
    confidence: float
    certify: bool
    hidden_probability: float = HIDDEN_PROBABILITY

    @property
    def least_products(self) -> int:
        """Products before which values are trusted less, or, for want of a probability, not at all."""
        return self.k + DEPTH * self.block_size


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """The ends so far, whether they are good enough, and the state to go on from."""
    state, poisoned = compact(state)
    pairs, lengths = project(op, state)
    m, scale, noise = state.num_multiplied, float(state.scale), _noise(op, state, pairs)
    status, wants_random = (Status.NON_FINITE, False) if poisoned else (None, False)
    if m and not poisoned:
        status, wants_random, state = _judge(op, goal, state, pairs, lengths)
    if status is None:
        whole = len(state.basis) == op.n
        if not whole and state.num_rows + wants_random + goal.block_size > len(state.basis):
            state = restart(state, pairs, lengths, _kept(goal, state, pairs))
        if wants_random and state.num_rows < op.n:
            state = append_random(op, state, goal.seed)
    room = (len(state.basis) - state.num_rows) // goal.block_size
    pace = m // (32 if op.device.type == "cpu" else 8)  # steps past the end cost at most so much
    return Assessment(
        state,
        smallest=float(pairs.values[0]) * scale if m else math.nan,
        largest=float(pairs.values[-1]) * scale if m else math.nan,
        smallest_bound=(float(pairs.residual_norms[0]) + noise) * scale if m else math.inf,
        largest_bound=(float(pairs.residual_norms[-1]) + noise) * scale if m else math.inf,
        status=status,
        num_steps=max(1, min(room, pace)),
    )


def _kept(goal: Goal, state: State, pairs: Ritz) -> list[int]:
    """Which Ritz vectors a restart keeps: the wanted ones and half of the others, from the same ends."""
    room = len(state.basis) - state.num_frontier - goal.block_size - 1
    num_kept = min(goal.k + (state.num_multiplied - goal.k) // 2, room)
    return select(pairs.values, num_kept, goal.which)


def _judge(
    op: LinearOperator, goal: Goal, state: State, pairs: Ritz, lengths: Tensor
) -> tuple[Status | None, bool, State]:
    """Whether it is over, and if not whether a random vector is wanted."""
    m, exhausted, by_filter = state.num_multiplied, state.num_frontier == 0, _by_filter(goal, state)
    early = state.num_products < goal.least_products and not (by_filter and op.n > SMALL)
    if m < goal.k or (early and not exhausted):
        return None, exhausted, state
    wanted, floor = select(pairs.values, goal.k, goal.which), _floor(op, state, pairs)
    values, bounds = (
        pairs.values[wanted],
        _error_bounds(goal, state, pairs)[wanted] + _noise(op, state, pairs),
    )
    digits = (bounds <= goal.tol * values.abs()) & (values != 0)
    if not exhausted:
        if not bool((digits | (bounds <= floor)).all()):
            return None, False, state
        if by_filter and _hidden(goal, state, pairs, lengths, wanted, floor):
            return None, False, state
    if m < op.n and goal.check_copies and most_at_one_end(goal.k, goal.which) > 1:
        searching, state = _search_copies(goal, state, values, bounds)
        if searching:
            return None, state.search_until == state.num_products + state.search_length, state
    best = Status.INVARIANT_SUBSPACE if exhausted else Status.CONVERGED
    return convergence.final_status(best, goal.tol, floor, values, bounds), False, state


def _by_filter(goal: Goal, state: State) -> bool:
    """Whether the polynomial of the start tells how likely it is that the end is another one."""
    return bool(state.filter.share) and most_at_one_end(goal.k, goal.which) == 1


def _error_bounds(goal: Goal, state: State, pairs: Ritz) -> Tensor:
    """Error bounds ``[m]``: the gap counts where it is known how likely it is that nothing hides in it."""
    if not _by_filter(goal, state):
        return pairs.residual_norms
    return kato_temple(pairs.values, pairs.residual_norms)


def _hidden(goal: Goal, state: State, pairs: Ritz, lengths: Tensor, wanted: list[int], floor: float) -> bool:
    """Whether an eigenvalue may well lie beyond a wanted end, by more than the error bound allows for."""
    ends = {place: float(pairs.values[place]) for place in wanted}
    if goal.which == "LM":  # it may hide at the other end
        ends = {0: -abs(next(iter(ends.values()))), -1: abs(next(iter(ends.values())))}
    early = state.num_products < goal.least_products
    multiple, most = HIDDEN_BEYOND, HIDDEN_EARLY if early else goal.hidden_probability
    if goal.certify:
        multiple, most = 1.0, 1 - goal.confidence
    for place, value in ends.items():
        beyond = max(multiple * goal.tol * abs(value), floor)
        at = value - beyond if place == 0 else value + beyond
        component = state.filter.log_component(at, pairs.values, pairs.residual_norms, lengths)
        if state.filter.probability(component) > most:
            return True
    return False


def _search_copies(goal: Goal, state: State, values: Tensor, bounds: Tensor) -> tuple[bool, State]:
    """Whether to go on looking for further copies of the wanted values, and the state that says so.

    A Krylov space holds one vector of a multiple eigenvalue. A copy appears when a new random vector has had
    as many products as the first one took; where one does, another may follow.
    """
    if state.num_products < state.search_until and state.num_frontier:
        return True, state
    before = torch.tensor(state.search_from, dtype=torch.float64)
    if len(before) and not bool(((values - before).abs() > bounds + goal.tol * values.abs()).any()):
        return False, state
    if state.num_frontier >= goal.block_size + goal.k:  # so many copies are not wanted, nor have room
        return False, state
    length = state.search_length or max(state.num_products, goal.least_products)
    return True, replace(
        state,
        search_length=length,
        search_until=state.num_products + length,
        search_from=tuple(values.tolist()),
    )


def _noise(op: LinearOperator, state: State, pairs: Ritz) -> float:
    """What rounding may add to an error bound: by the dtype, or as far as it was seen."""
    return max(convergence.rounding(op, pairs.norm), pairs.asymmetry, float(state.dropped))


def _floor(op: LinearOperator, state: State, pairs: Ritz) -> float:
    """The error bound that counts as none: it does not fall with further products."""
    return max(convergence.floor(op, pairs.norm), 2 * _noise(op, state, pairs))


def finalize(op: LinearOperator, goal: Goal, state: State, status: Status) -> EigenResult:
    """The wanted pairs, their residuals verified by a product with the sum of their vectors.

    Full reorthogonalisation keeps the residuals of the recurrence true to rounding. By how much the sum of the true
    ones differs from theirs shows how large that is, or that the operator does not repeat itself.
    """
    pairs, lengths = project(op, state)
    convergence.warn_asymmetric(op, pairs.asymmetry, max(pairs.norm, float(state.norm)))
    m, f = state.num_multiplied, state.num_frontier
    wanted = select(pairs.values, goal.k, goal.which)
    coefficients = pairs.coefficients[:, wanted].to(state.basis)
    vectors = (coefficients.mT @ state.basis[:m]).mT
    values, norms, noise = pairs.values[wanted], pairs.residual_norms[wanted], _noise(op, state, pairs)
    bounds, num_matvecs = _error_bounds(goal, state, pairs)[wanted], state.num_matvecs
    if op.exact is not None:
        return convergence.check_pairs(
            op,
            convergence.Checked(values, vectors, norms),
            state.scale,
            pairs.norm,
            k=goal.k,
            which=goal.which,
            tol=goal.tol,
            status=status,
            num_matvecs=num_matvecs,
        )
    if wanted and status is not Status.NON_FINITE:
        residuals = state.basis[m : m + f].mT @ (state.projected[m : m + f, :m] @ coefficients)
        image = op.product(vectors.sum(dim=1, keepdim=True)) / state.scale
        expected = (vectors * values.to(vectors) + residuals).sum(dim=1, keepdim=True)
        difference = float(torch.linalg.vector_norm(image - expected))
        num_matvecs += op.cost
        if not math.isfinite(difference):
            status = Status.NON_FINITE
        else:
            norms = norms.hypot(torch.tensor(difference, dtype=torch.float64))
            bounds, noise = bounds + difference, max(noise, difference)
            if status not in (Status.MAX_MATVECS, Status.TIME_LIMIT):
                floor = max(_floor(op, state, pairs), 4 * difference)
                status = convergence.final_status(status, goal.tol, floor, values, bounds)
    scale = float(state.scale)
    found = convergence.Checked(
        values * scale, vectors / torch.linalg.vector_norm(vectors, dim=0), norms * scale
    )
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    outer = None if kind == "exact" else _outer(goal, state, pairs, lengths)
    slack = max(noise, convergence.floor(op, pairs.norm)) * scale  # a statement wants more room than a stop
    where = convergence.intervals(found, goal.which, goal.k, slack, kind, outer)
    return convergence.eigen_result(
        found, where, status, num_matvecs=num_matvecs, seconds=0.0, history=(), error_bounds=bounds * scale
    )


def _outer(goal: Goal, state: State, pairs: Ritz, lengths: Tensor) -> convergence.Outer | None:
    """How far beyond the Ritz values the spectrum may reach."""
    if not len(pairs.values):
        return None
    scale, arguments = float(state.scale), (pairs.values, pairs.residual_norms, lengths)
    if state.filter.share:
        bounds = _error_bounds(goal, state, pairs)  # an unlucky start must not hide what is known anyway
        low, high = (
            max(state.filter.distance(end, goal.confidence, *arguments), float(bounds[end])) * scale
            for end in (0, -1)
        )
        return convergence.Outer(low, high, "random-start", goal.confidence)
    num_steps = state.num_products // goal.block_size
    if state.num_random == goal.block_size and not state.num_kept and num_steps:  # random, not restarted
        spread = float(pairs.values[-1] - pairs.values[0])
        reach = uniform_distance(spread, state.filter.n, num_steps, goal.confidence) * scale
        return convergence.Outer(reach, reach, "random-block", goal.confidence)
    return None


@full_precision
def lanczos(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    ncv: int | None = None,
    block_size: int = 1,
    check_copies: bool = True,
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EigenResult:
    r"""A few eigenpairs at the ends of the spectrum, by thick-restart Lanczos.

    Stops when for each wanted value ``error_bound <= tol * |value|``, or, where a value is zero to rounding,
    when the bound is at most 32 eps times the operator's norm. The bound is the residual's norm, with rounding.
    For one pair at an end, from one start vector, it is the residual squared over the gap where that is
    smaller, on two more conditions: the gap is bounded by the other Ritz pairs' residuals, and it is unlikely
    (probability 0.3 over random starts) that an eigenvalue hides further out than ``2 tol * |value|``. A
    ``tol`` below rounding is taken as rounding.

    Args:
        op: symmetric operator.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` the largest in magnitude, ``"BE"`` half
            from each end (the odd one from the high end), all from one Krylov space.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. The columns are dealt out to the vectors of the block
            (all to the one vector of a block of one), each with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        ncv: the most basis vectors before a restart, by default what fits into 4 GiB, at most 300 or 4 k.
        block_size: vectors in one product. Operators share work among them; the count of products grows.
        check_copies: for two or more pairs at one end, make sure by a further random vector that no copy of
            a multiple eigenvalue is missed; doubles the products.
        confidence: of intervals, over random starts.
        certify: go on until the interval itself has a width of at most ``tol * |value|`` at this confidence,
            for one pair at an end; about a third more products.
        max_matvecs: full-data products, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted, and the
            same call goes on from it, for one product that verifies the operator, to the same bits; ``tol`` and
            limits may be changed. Deleted once the solve has converged.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a
        limit or a product that is not finite is a status too, with what was found until then: fewer than
        ``k`` pairs if that was so early.

    Raises:
        ValueError: an argument out of its range, named; a checkpoint of another solve.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as ``num_matvecs`` says, the last of them to verify the residuals; ``ncv + block_size + 2`` vectors
        of memory.

    Source:
        Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> lanczos(op, 2, which="BE", tol=1e-6).values
        tensor([-1.0000,  2.0000], dtype=torch.float64)
    """
    begin = time.perf_counter()
    check_count("block_size", block_size, 1, op.n)
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        block_size=block_size,
        num_checks=1 if op.exact is None else k,
    )
    check_confidence(confidence)
    goal = Goal(k, asked.which, asked.tol, block_size, asked.seed, check_copies, confidence, certify)
    least = 2 * k + block_size + 2
    if ncv is None:
        fitting = BASIS_BYTES // (op.n * op.dtype.itemsize)
        ncv = max(least + 18, min(fitting, max(300, 4 * k)))
    elif check_count("ncv", ncv, 1) < min(least, op.n):
        raise ValueError(f"ncv must be at least 2 k + block_size + 2 = {least} or n, got {ncv}")
    file = None if checkpoint is None else Checkpoint(checkpoint, _solve(op, goal, ncv), trimmed)
    ended = run_solver(
        start(op, ncv + block_size, min(block_size, op.n), goal.seed, asked.start),
        lambda state: step(op, state, block_size),
        lambda state: assess(op, goal, state),
        step_cost=block_size * op.cost,
        limits=asked.limits,
        monitor=monitor,
        checkpoint=file,
        verified=lambda state: verified(op, state),
    )
    found = finalize(op, goal, ended.state, ended.status)
    if file is not None and found.converged:
        file.clear()
    message = found.status.advice
    if ended.status is Status.NON_FINITE:
        message += "; " + op.blame(ended.state.basis[ended.state.num_multiplied].unsqueeze(1))
    seconds = ended.seconds_before + time.perf_counter() - begin
    return replace(found, history=ended.history, message=message, seconds=seconds)


def rough_vectors(
    op: LinearOperator, k: int, which: str, *, v0: Tensor | None, num_steps: int, seed: int
) -> tuple[State, Tensor]:
    """Rough Ritz vectors as rows ``[k, n]``, to start another solver from, and the state that they come from.

    The error bounds are at most ``ROUGH_TOL * |value|`` and the probability that an eigenvalue hides is at most
    ``HIDDEN_EARLY``, unless ``num_steps`` end it before. No matvec verifies them; NaN if a product was not finite.
    """
    goal = Goal(k, which, ROUGH_TOL, 1, seed, False, 0.99, False, HIDDEN_EARLY)
    most = max(num_steps, k) * op.cost
    ended = run_solver(
        start(op, max(num_steps, k) + 2, 1, seed, v0),  # never full
        lambda state: step(op, state),
        lambda state: assess(op, goal, state),
        step_cost=op.cost,
        limits=Limits(most, None, reserve=0.0, minimum=k * op.cost),
    )
    pairs, _ = project(op, ended.state)
    wanted = select(pairs.values, k, which)
    rows = (
        pairs.coefficients[:, wanted].mT.to(ended.state.basis)
        @ ended.state.basis[: ended.state.num_multiplied]
    )
    return ended.state, rows if ended.status is not Status.NON_FINITE else rows * math.nan


def _solve(op: LinearOperator, goal: Goal, ncv: int) -> dict[str, Any]:
    """What must be the same when a solve is continued; ``tol`` and limits may change."""
    asked = {name: getattr(goal, name) for name in ("k", "which", "block_size", "seed", "check_copies")}
    return {"solver": "lanczos", "n": op.n, "dtype": str(op.dtype), "ncv": ncv, **asked}
