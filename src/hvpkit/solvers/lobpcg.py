r"""LOBPCG: locally optimal block preconditioned conjugate gradients.

Method: a block X of Ritz vectors is improved by Rayleigh-Ritz on the span of X, of its residuals W
(preconditioned if one knows how), and of the directions P of the last change of X: three terms, as in
conjugate gradients, with the best coefficients. Pairs that are good enough stay in X, but have no row in W:
soft locking.

Cost: one product a step for each pair that is not yet good enough, and for each guard; the last products are
the true residuals. Beside them, some twenty passes over the block.
Memory: six times the block (X, P, W and their products), and the best ``k`` vectors so far.
Source: Knyazev, SIAM J. Sci. Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124; the basis of Duersch,
Shao, Yang and Gu, SIAM J. Sci. Comput. 40 (2018) C655-C676, doi:10.1137/17M1129830, with P made orthonormal in
coefficients as in Hetmaniuk and Lehoucq, J. Comput. Phys. 218 (2006) 324-332, doi:10.1016/j.jcp.2006.02.007.

Departures from the papers:
1. Both ends at once: X holds Ritz vectors of either end, and all directions serve both.
2. Directions that depend on others are dropped, W by Gram-Schmidt and P by singular values, and the basis'
   inner products enter the projected problem, so that it needs no second basis to fall back on.
3. The best block is kept: the one whose values lie furthest out, and among equals the one with the least
   residual. The residual alone would prefer a start near an inner eigenvector.
4. Once as many products are spent as the space has dimensions, up to a thousand, W is all that is missing: hard
   small problems end exactly.
5. The operator is divided by a power of two near its first product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.common.block import residuals_of, row_norms
from hvpkit.solvers.common.block_subspace import (
    RitzBlock,
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
from hvpkit.solvers.common.convergence import Checked, concluded, is_converged, rounding
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end, select
from hvpkit.solvers.common.request import Request, Start, check_arguments
from hvpkit.solvers.driver import Assessment, Monitor, full_precision, run_solver

WHICH = ("LA", "SA", "BE")

NUM_GUARDS = 1
"""Vectors beside the wanted ones, at each end that is wanted."""

DEPENDENT = 1e-13
"""Singular value, of 1, below which a direction P counts as none."""

DEPTH = 6
"""Steps without which a small residual says nothing: a start may happen to be near any eigenvector."""

Preconditioner = Callable[[Tensor], Tensor]
"""``[n, p]`` to ``[n, p]``: residuals to directions nearer to the error."""


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for, with the number of vectors in X."""

    width: int
    preconditioner: Preconditioner | None


@dataclass(frozen=True)
class State(Subspace):
    """Rows X, P and W in this order; the first ``num_block`` of them are X."""

    num_block: int = 0


def init(op: LinearOperator, goal: Goal) -> State:
    """A state with the start in W."""
    return State(**vars(start(op, goal, goal.width, 3 * goal.width)))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Multiplies W, or as much of it as a block holds."""
    return multiply(op, state, goal.width)


def assess(op: LinearOperator, goal: Goal, state: State) -> Assessment[State]:
    """The best X in the span of X, P and W, whether it is good enough, and the P and W to go on with."""
    nothing = math.nan, math.nan, math.inf, math.inf
    if not state.num_fresh:
        return Assessment(state, *nothing, status=None, num_steps=1)
    state = drop_non_finite(state)
    m = state.num_rows
    if not m:
        return Assessment(state, *nothing, status=Status.NON_FINITE, num_steps=1)
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    state, values = _turned(goal, state, pairs)
    rows, images = state.rows[: state.num_block], state.images[: state.num_block]
    residuals = residuals_of(rows, images, values)
    norms = row_norms(op.space, residuals).to("cpu", torch.float64)
    wanted = select(values, goal.k, goal.which)
    early = m < op.n and state.num_matvecs < DEPTH * goal.width * op.cost
    done = is_converged(op, 0.0 if early else goal.tol, state.norm, values, norms)
    found = Checked(values[wanted], rows[wanted].mT, norms[wanted])
    status = outcome(op, goal, state, found, done[wanted], whole=m == op.n)
    state = _keep_best(op, goal, state, found)
    if status is None:
        directions = residuals[~done.to(op.device)]
        if goal.preconditioner is not None and len(directions):
            directions = _preconditioned(goal.preconditioner, directions)
        state = extend(op, goal, state, directions)
    scale = float(state.scale)
    return Assessment(
        state,
        smallest=float(pairs.values[0]) * scale,
        largest=float(pairs.values[-1]) * scale,
        smallest_bound=float(norms[0]) * scale if goal.which != "LA" else math.inf,
        largest_bound=float(norms[-1]) * scale if goal.which != "SA" else math.inf,
        status=status,
        num_steps=math.ceil(state.num_new / goal.width),
    )


def _turned(goal: Goal, state: State, pairs: RitzBlock) -> tuple[State, Tensor]:
    r"""The state with new X and P in place of X, P and W, and the values of X.

    P spans what X gained from outside of the old X, less the new X: from orthonormal coordinates y of Ritz
    vectors, those of P are :math:`Y_\perp U`, with U the left singular vectors of the products of the old X's
    rows of :math:`Y_\perp` (pairs not taken) and Y (pairs taken).
    """
    num_old, taken = state.num_block, select(pairs.values, goal.width, goal.which)
    rest = [index for index in range(len(pairs.values)) if index not in set(taken)]
    overlaps = pairs.vectors[:num_old, rest].mT @ pairs.vectors[:num_old, taken]
    left, lengths, _ = torch.linalg.svd(overlaps, full_matrices=False)
    left = left[:, lengths > DEPENDENT]
    coordinates = torch.cat([pairs.vectors[:, taken], pairs.vectors[:, rest] @ left], dim=1)
    return replace(turn(state, pairs, coordinates), num_block=len(taken)), pairs.values[taken]


def _keep_best(op: LinearOperator, goal: Goal, state: State, found: Checked) -> State:
    """The state with these wanted pairs as the best ones, unless they are no further out and less accurate."""
    best = state.best
    if len(best.values) == len(found.values):
        outward = torch.ones(len(best.values), dtype=torch.float64)
        outward[: num_at_low_end(len(best.values), goal.which)] = -1.0
        gain = float(outward @ (found.values - best.values))
        worse = bool(found.residual_norms.max() > best.residual_norms.max())
        if gain <= rounding(op, state.norm) and worse:
            return state
    return replace(state, best=found)


def _preconditioned(preconditioner: Preconditioner, residuals: Tensor) -> Tensor:
    result, shape = preconditioner(residuals.mT.contiguous()), residuals.shape[::-1]
    if not isinstance(result, Tensor) or result.shape != shape or result.dtype != residuals.dtype:
        found = (
            f"{list(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        )
        raise ValueError(f"preconditioner must return a tensor {list(shape)} {residuals.dtype}, got {found}")
    if not bool(torch.isfinite(result).all()):
        raise ValueError("preconditioner returned NaN or infinity")
    return result.detach().mT


@full_precision
def lobpcg(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    preconditioner: Preconditioner | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""A few eigenpairs at the ends of the spectrum, by LOBPCG.

    Stops when for each wanted Ritz value :math:`\theta` with residual r,

    .. math:: \|r\| + \text{rounding} \le \text{tol} \cdot |\theta|,

    or, where a value is zero to rounding, when the left side is at most 32 eps times the operator's norm. A
    ``tol`` below rounding is taken as rounding.

    Use it where a preconditioner is known, where memory is for a few vectors only, or to improve several
    vectors of an earlier result. Without any of these :func:`hvpkit.lanczos` mostly takes fewer products.

    Args:
        op: symmetric operator.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the
            high end), all in one block.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. The columns are dealt out to the vectors of the block,
            each with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        preconditioner: ``[n, p]`` to ``[n, p]``, applied to residuals: for the low end an approximate inverse of
            the operator, positive definite, less a shift near the end.
        max_matvecs: full-data products, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a
        limit or a product that is not finite is a status too, with the best that was found until then.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as ``num_matvecs`` says, ``k`` of them for the true residuals; ``7 k + 6`` vectors of memory
        (``7 k + 12`` for both ends), and half as many to work with.

    Source:
        Knyazev, SIAM J. Sci. Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124; Duersch, Shao, Yang, Gu,
        SIAM J. Sci. Comput. 40 (2018) C655-C676, doi:10.1137/17M1129830.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> lobpcg(op, 2, which="BE", tol=1e-6).values.round(decimals=4).tolist()
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
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"preconditioner must be a function or None, got {type(preconditioner).__name__}")
    num_ends = 1 if num_at_low_end(k, asked.which) in (0, k) else 2
    width = min(k + num_ends * NUM_GUARDS, op.n, int(asked.left(0.0) / op.cost))
    goal = Goal(**vars(asked), width=width, preconditioner=preconditioner)
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
