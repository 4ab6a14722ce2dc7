"""Passes to expect before a solve, from those that were measured, and those that are left during one.

Lanczos for both ends at ``tol=1e-2``: 570 solves of 190 perceptrons along their training took 10 to 83 passes, half of
them 20 to 40 (`benchmarks/results/accuracy.json`); seven larger networks 18 to 65 (`fidelity.json`). An end that is
zero, as of Gauss-Newton and Fisher matrices, took 115 to 170. The default method took 19 to 61 on three networks with
20,000 examples and more, and 112 in one of twelve solves of another study (docs/multifidelity.md). Solves at other
``tol`` of ten perceptrons took, for each power of ten, 1.1 to 1.7 times as many passes, and 1.2 to 2.2 times fewer.
"""

from __future__ import annotations

import math

import numpy as np

from hvpkit.results.cost_plan import Range
from hvpkit.solvers.common.request import MAX_ATOL

MEASURED = {"lanczos": (10, 30, 85), "multifidelity": (15, 30, 112), "zero end": (100, 135, 180)}
"""Passes for both ends at ``tol=1e-2``: the fewest, the middle and the most that were measured."""

TIGHTER, LOOSER = (0.08, 0.2, 0.65), (0.55, 0.35, 0.15)
"""Relative change of these for each power of ten that ``tol`` is smaller, or larger, up to one."""

ZERO_END = (0.7, 0.9, 1.2)
"""The same for each power of ten that ``atol`` is smaller, where an end is zero: 130 passes become 255."""

CERTIFIED = (1.0, 1.07, 1.25)
"""Factors of ``certify=True``."""


RESTARTED = {7: 8.3, 9: 5.8, 12: 2.9, 16: 1.9, 25: 1.3, 40: 1.15, 60: 1.0}
"""Factors of the passes of Lanczos with so many basis vectors, measured on the dense network of docs/multifidelity.md:
65 passes without a restart."""


def slowed_by_restarts(ncv: int) -> float:
    """Return the factor of the passes of Lanczos with a basis of ``ncv`` vectors.

    Example:
        >>> [slowed_by_restarts(ncv) for ncv in (300, 60, 25)]
        [1.0, 1.0, 1.3]
    """
    return float(np.interp(ncv, [*RESTARTED], [*RESTARTED.values()]))


def expected_passes(
    method: str, *, tol: float, atol: float, certify: bool, n: int, zero_end: bool = False
) -> Range:
    """Return the passes to expect of a solve for both ends.

    Args:
        method: ``"lanczos"`` or ``"multifidelity"``.
        tol: relative error of the eigenvalues.
        atol: size up to which a value cannot be told from zero, in units of the norm.
        certify: as of :func:`hvpkit.extreme_eigenvalues`.
        n: dimension: a Krylov space is complete after n passes, and one more verifies residuals.
        zero_end: True if the operator is semidefinite, so that one end is nearly zero.

    Example:
        >>> expected_passes("lanczos", tol=1e-2, atol=1e-5, certify=False, n=10**6)
        Range(low=10.0, expected=30.0, high=85.0)
    """
    found = Range(*map(float, MEASURED["zero end" if zero_end else method]))
    decades = math.log10((MAX_ATOL / max(atol, 1e-300)) if zero_end else 1e-2 / tol)
    if decades > 0:
        found = found.scaled(*(1 + decades * step for step in (ZERO_END if zero_end else TIGHTER)))
    elif not zero_end:
        found = found.scaled(*(1 + max(decades, -1.0) * step for step in LOOSER))
    if certify:
        found = found.scaled(*CERTIFIED)
    return found.at_most(n + 1.0) if method == "lanczos" else found


def matvecs_left(expected: Range, spent: float) -> float:
    """Return an estimate of what is left after ``spent`` full-data matvecs; infinite past all that was measured.

    Example:
        >>> [matvecs_left(Range(10, 30, 80), spent) for spent in (0, 10, 28, 40, 90)]
        [30, 20, 15.0, 15.0, inf]
    """
    if spent >= expected.high:
        return math.inf
    # a solve that has taken as many as most takes half of that more, as far as was measured
    return max(expected.expected - spent, expected.expected / 2)
