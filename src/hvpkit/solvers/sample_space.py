"""The Krylov space of a cheap operator: rough extreme vectors, and outliers for a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.results.plain_data import LONG
from hvpkit.solvers import krylov
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, select
from hvpkit.solvers.common.request import Request, default_atol
from hvpkit.solvers.driver import Limits, iterate
from hvpkit.solvers.lanczos import Lanczos

ROUGH_TOL = 0.05
"""Relative error of the extreme values of a :class:`SampleSpace`. Chosen by feel."""

ROUGH_CONFIDENCE = 0.95
"""Probability over random starts that no eigenvalue hides from a :class:`SampleSpace`. Chosen by feel."""

TOP_TOL, TOP_CONFIDENCE = 1e-4, 0.999
"""The same where the largest eigenvalues alone are asked for: to find these takes few steps, and to know the outliers
below them for the metric some more."""

OUTLIER_RESIDUAL = 0.05
"""Residual of an outlier, at most, in units of its value. With 0.1 the operator that is left has eigenvalues outside of
the interval of its Ritz values, and steps of a certificate on the dense network rise from 10 to 40."""


@dataclass(frozen=True)
class SampleSpace:
    """The ends and outliers that Lanczos steps on a cheap operator show; numbers are over ``scale``.

    Attributes:
        ends: rough extreme Ritz vectors, rows ``[k, n]``; NaN if a matvec was not finite.
        norm: the largest Ritz value in absolute value.
        lowest: the smallest one; NaN if there is none.
        outliers: accurate Ritz vectors from either end inwards, rows ``[m, n]``.
        values: their values ``[m]``, float64 on the CPU.
        low, high: bounds of the rest of the spectrum, by the next Ritz value and its residual.
        scale: what matvecs are divided by, 0-d.
        num_steps: Lanczos steps, those that a coarse answer about the operator took.
        num_matvecs: full-data matvecs that they cost.
    """

    ends: Tensor = field(metadata=LONG)
    norm: float
    lowest: float
    outliers: Tensor = field(metadata=LONG)
    values: Tensor
    low: float
    high: float
    scale: Tensor
    num_steps: int
    num_matvecs: float


def sample_space(
    op: LinearOperator, k: int, which: str, *, v0: Tensor | None, num_steps: int, seed: int
) -> SampleSpace:
    """Return the space after a rough solve for ``k`` ends, or after ``num_steps`` Lanczos steps.

    The ends are as accurate as :func:`hvpkit.lanczos` with ``tol=ROUGH_TOL, confidence=ROUGH_CONFIDENCE`` has them,
    the largest alone with ``TOP_TOL`` and ``TOP_CONFIDENCE``, unless ``num_steps`` end it before. No matvec verifies
    them.
    """
    tol, confidence = (TOP_TOL, TOP_CONFIDENCE) if which == "LA" else (ROUGH_TOL, ROUGH_CONFIDENCE)
    num_steps = max(num_steps, k)
    limits = Limits(num_steps, None, reserve=0.0, minimum=k)
    request = Request(k, which, tol, default_atol(tol), v0, limits, seed)
    # a basis that is never full
    counted = replace(op, cost=1.0)  # one that costs nothing is counted by its steps too
    ended = iterate(Lanczos(counted, request, num_steps + 1, confidence=confidence))
    state, (pairs, _) = ended.state, krylov.project(op, ended.state)
    rows = state.basis[: state.num_multiplied]

    def vectors(places: list[int]) -> Tensor:
        return pairs.vectors[:, places].mT.to(rows) @ rows

    first, last = _outlier_range(pairs)
    accurate = [*range(first), *range(last + 1, len(pairs.values))]
    ends = vectors(select(pairs.values, k, which))
    left = slice(first, last + 1) if first <= last else slice(0, len(pairs.values))
    values, radii = pairs.values[left], pairs.residual_norms[left]
    return SampleSpace(
        ends * math.nan if ended.status is Status.NON_FINITE else ends,
        pairs.norm,
        float(pairs.values[0]) if len(pairs.values) else math.nan,
        vectors(accurate),
        pairs.values[accurate],
        float((values - radii).min()) if len(values) else 0.0,
        float((values + radii).max()) if len(values) else 0.0,
        state.scale,
        state.num_products,
        state.num_matvecs * op.cost,
    )


def _outlier_range(pairs: RitzPairs) -> tuple[int, int]:
    """Return the places of the first and the last Ritz pair that is inaccurate: those outside are outliers."""
    rest = ((pairs.residual_norms > OUTLIER_RESIDUAL * pairs.values.abs()).nonzero()).flatten().tolist()
    return (rest[0], rest[-1]) if rest else (len(pairs.values), -1)
