"""Rough extreme vectors of a cheap operator, to start a solver of a dearer one from."""

from __future__ import annotations

import math

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.solvers import krylov
from hvpkit.solvers.common.rayleigh_ritz import select
from hvpkit.solvers.common.request import Request, default_atol
from hvpkit.solvers.driver import Limits, iterate
from hvpkit.solvers.lanczos import Lanczos, LanczosState

ROUGH_TOL = 0.05
"""Relative error of the values of :func:`rough_vectors`. Chosen by feel."""

ROUGH_CONFIDENCE = 0.95
"""Probability over random starts that no eigenvalue hides from :func:`rough_vectors`. Chosen by feel."""


def rough_vectors(
    op: LinearOperator, k: int, which: str, *, v0: Tensor | None, num_steps: int, seed: int
) -> tuple[LanczosState, Tensor]:
    """Return a state after a rough solve, and rough Ritz vectors as rows ``[k, n]``, to start another solver from.

    They are as accurate as :func:`hvpkit.lanczos` with ``tol=ROUGH_TOL, confidence=ROUGH_CONFIDENCE`` has them, unless
    ``num_steps`` end it before. No matvec verifies them; NaN if a matvec was not finite.
    """
    num_steps = max(num_steps, k)
    limits = Limits(num_steps * op.cost, None, reserve=0.0, minimum=k * op.cost)
    request = Request(k, which, ROUGH_TOL, default_atol(ROUGH_TOL), v0, limits, seed)
    # a basis that is never full
    solver = Lanczos(op, request, num_steps + 1, confidence=ROUGH_CONFIDENCE)
    ended = iterate(solver)
    state, (pairs, _) = ended.state, krylov.project(op, ended.state)
    coefficients = pairs.vectors[:, select(pairs.values, k, which)]
    rows = coefficients.mT.to(state.basis) @ state.basis[: state.num_multiplied]
    return state, rows * math.nan if ended.status is Status.NON_FINITE else rows
