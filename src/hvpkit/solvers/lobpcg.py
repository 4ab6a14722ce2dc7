r"""LOBPCG: locally optimal block preconditioned conjugate gradients.

Method: a block X of Ritz vectors is improved by Rayleigh-Ritz on the span of X, of its residuals W
(preconditioned if a preconditioner is given), and of the directions P of the last change of X: three terms, as in
conjugate gradients, with the best coefficients. Converged pairs stay in X, but have no row in W: soft
locking.

Cost: one matvec a step for each pair that has not converged, and for each guard; the last matvecs are for
the true residuals. Beside them, some twenty passes over the block.
Memory: six times the block (X, P, W and their matvecs), and the best ``k`` vectors so far.
Source: Knyazev, SIAM J. Sci. Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124; the basis of Duersch,
Shao, Yang and Gu, SIAM J. Sci. Comput. 40 (2018) C655-C676, doi:10.1137/17M1129830, with P made orthonormal in
coefficients as in Hetmaniuk and Lehoucq, J. Comput. Phys. 218 (2006) 324-332, doi:10.1016/j.jcp.2006.02.007.

Departures from the papers:
1. Both ends at once: X holds Ritz vectors of either end, and all directions serve both.
2. Directions that depend on others are dropped, W by Gram-Schmidt and P by singular values, and the basis'
   inner products enter the projected problem, so that it needs no second basis to fall back on.
3. The best block is kept: the one whose values lie furthest out, and among equals the one with the least
   residual. By the residual alone a start near an inner eigenvector would win.
4. Once n matvecs are spent, for n up to a thousand, W becomes all missing directions: hard small problems end
   exactly.
5. The operator is divided by a power of two near its first matvec.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers.common import block_subspace
from hvpkit.solvers.common.block_subspace import BlockSubspace, Projection
from hvpkit.solvers.common.convergence import is_converged, rounding
from hvpkit.solvers.common.orthogonalize import residuals_of, row_norms
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, num_at_low_end, select
from hvpkit.solvers.common.request import Request, Start, check_arguments
from hvpkit.solvers.driver import Assessment, Limits, Monitor, full_precision, run, with_vectors_of

WHICH = ("LA", "SA", "BE")

NUM_GUARDS = 1
"""Vectors in X beside the wanted ones, at each end that is wanted. Chosen by feel."""

DEPENDENT = 1e-13
"""Singular value, of 1, below which a direction P counts as zero. Chosen by feel, above float64's rounding."""

MIN_BLOCK_STEPS = 6
"""Steps before which a convergence test is not accepted. Chosen by feel: each searches three blocks."""

Preconditioner = Callable[[Tensor], Tensor]
"""``[n, p]`` to ``[n, p]``: residuals to directions nearer to the error."""


@dataclass(frozen=True)
class LobpcgState(BlockSubspace):
    """Rows X, P and W in this order; the first ``num_block`` of them are X."""

    num_block: int = 0


@dataclass(frozen=True)
class Lobpcg:
    """The solver of :func:`lobpcg`: see :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        request: what is asked for.
        width: vectors in X.
        preconditioner: or None.
    """

    op: LinearOperator
    request: Request
    width: int
    preconditioner: Preconditioner | None = None

    @property
    def limits(self) -> Limits:
        """Of the request."""
        return self.request.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.width * self.op.cost

    def init(self) -> LobpcgState:
        """Return a state with the start vectors in W."""
        return LobpcgState(**vars(block_subspace.start(self.op, self.request, self.width, 3 * self.width)))

    def step(self, state: LobpcgState) -> LobpcgState:
        """Multiply W, or as much of it as a block holds."""
        return block_subspace.multiply(self.op, state, self.width)

    def assess(self, state: LobpcgState) -> Assessment[LobpcgState]:
        """Find the best X in the span of X, P and W, test convergence, and choose the next P and W."""
        if not state.num_fresh:
            return Assessment(state, Progress(), 1)
        op, asked, state = self.op, self.request, block_subspace.drop_non_finite(self.op, state)
        m = state.num_rows
        if not m:
            return Assessment(state, Progress(), 1, Status.NON_FINITE, state.suspect)
        projection = block_subspace.rayleigh_ritz(op, state.rows[:m], state.images[:m])
        state, values = self._rotated(state, projection)
        rows, images = state.rows[: state.num_block], state.images[: state.num_block]
        residuals = residuals_of(rows, images, values)
        norms = row_norms(op.space, residuals).to("cpu", torch.float64)
        early = m < op.n and state.num_matvecs < MIN_BLOCK_STEPS * self.width * op.cost
        done = is_converged(op, 0.0 if early else asked.allowed(values, state.norm), state.norm, norms)
        wanted = select(values, asked.k, asked.which)
        found = RitzPairs(values[wanted], rows[wanted].mT, norms[wanted])
        status = block_subspace.status_of(op, asked, state, found, done[wanted], whole=m == op.n)
        state = self._keep_best(state, found)
        if status is None:
            directions = residuals[~done.to(op.device)]
            if self.preconditioner is not None and len(directions):
                directions = _preconditioned(self.op, self.preconditioner, directions)
            state = block_subspace.extend(op, asked, state, directions)
        scale = float(state.scale)
        progress = Progress(
            smallest=float(projection.values[0]) * scale,
            largest=float(projection.values[-1]) * scale,
            smallest_bound=float(norms[0]) * scale if asked.which != "LA" else math.inf,
            largest_bound=float(norms[-1]) * scale if asked.which != "SA" else math.inf,
        )
        return Assessment(state, progress, math.ceil(state.num_new / self.width), status, state.suspect)

    def _rotated(self, state: LobpcgState, projection: Projection) -> tuple[LobpcgState, Tensor]:
        r"""Rotate X, P and W to the new X and P; also return the values of X.

        P spans the part of the new X from outside of the old X, orthogonal to the new X: from orthonormal
        coordinates y of Ritz vectors, those of P are :math:`Y_\perp U`, with U the left singular vectors of the inner
        products of the old X's rows of :math:`Y_\perp` (pairs not taken) and Y (pairs taken).
        """
        num_old, taken = state.num_block, select(projection.values, self.width, self.request.which)
        rest = [index for index in range(len(projection.values)) if index not in set(taken)]
        overlaps = projection.vectors[:num_old, rest].mT @ projection.vectors[:num_old, taken]
        left, singular_values, _ = torch.linalg.svd(overlaps, full_matrices=False)
        left = left[:, singular_values > DEPENDENT]
        coordinates = torch.cat([projection.vectors[:, taken], projection.vectors[:, rest] @ left], dim=1)
        state = block_subspace.rotate(state, projection, coordinates)
        return replace(state, num_block=len(taken)), projection.values[taken]

    def _keep_best(self, state: LobpcgState, found: RitzPairs) -> LobpcgState:
        """Keep these wanted pairs as the best ones, unless they are no further out and less accurate."""
        best = state.best
        if len(best.values) == len(found.values):
            outward = torch.ones(len(best.values), dtype=torch.float64, device="cpu")
            outward[: num_at_low_end(len(best.values), self.request.which)] = -1.0
            gain = float(outward @ (found.values - best.values))
            worse = bool(found.residual_norms.max() > best.residual_norms.max())
            if gain <= rounding(self.op, state.norm) and worse:
                return state
        return replace(state, best=found)

    def finalize(self, state: LobpcgState, status: Status) -> EigenResult:
        """Return the best pairs with true residuals, for one more matvec each."""
        return block_subspace.finalize(self.op, self.request, state, status)


def _preconditioned(op: LinearOperator, preconditioner: Preconditioner, residuals: Tensor) -> Tensor:
    """Apply the caller's preconditioner to rows ``[m, n]``, whole, and check what it returns."""
    whole = op.space.whole(residuals.mT, op.n).contiguous()
    result, shape = preconditioner(whole), whole.shape
    if not isinstance(result, Tensor) or result.shape != shape or result.dtype != residuals.dtype:
        found = (
            f"{list(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        )
        raise ValueError(f"preconditioner must return a tensor {list(shape)} {residuals.dtype}, got {found}")
    if not bool(torch.isfinite(result).all()):
        raise ValueError("preconditioner returned NaN or infinity")
    return op.space.local(result.detach()).mT


@full_precision
def lobpcg(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    preconditioner: Preconditioner | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Compute a few eigenpairs at the ends of the spectrum, by LOBPCG.

    Stops as :func:`hvpkit.chebyshev` does.

    Use it where a preconditioner is known, where memory is for a few vectors only, or to improve several
    vectors of an earlier result. Without any of these :func:`hvpkit.lanczos` mostly takes fewer matvecs.

    Args:
        op: symmetric operator.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the
            high end), all in one block.
        v0: start vectors, used as by :func:`hvpkit.lanczos`.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        preconditioner: ``[n, p]`` to ``[n, p]``, applied to residuals: for the low end an approximate inverse of
            the operator, positive definite, less a shift near the end.
        max_matvecs: full-data matvecs, at most; the default is that of :func:`hvpkit.lanczos`.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.

    Returns:
        As :func:`hvpkit.lanczos`.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Matvecs as ``num_matvecs`` says, ``k`` of them for the true residuals; ``7 k + 6`` vectors of memory
        (``7 k + 12`` for both ends), and half as many for work.

    Source:
        Knyazev, SIAM J. Sci. Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124; Duersch, Shao, Yang, Gu,
        SIAM J. Sci. Comput. 40 (2018) C655-C676, doi:10.1137/17M1129830.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> lobpcg(op, 2, which="BE", tol=1e-6).values.round(decimals=4).tolist()
        [-1.0, 2.0]
    """
    request = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=WHICH,
    )
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"preconditioner must be a function or None, got {type(preconditioner).__name__}")
    num_ends = 1 if num_at_low_end(k, request.which) in (0, k) else 2
    width = min(k + num_ends * NUM_GUARDS, op.n, int(request.limits.remaining(0.0) / op.cost))
    split = sharded(op)
    found = run(Lobpcg(split, request, width, preconditioner), monitor=monitor)
    return with_vectors_of(found, split, op)
