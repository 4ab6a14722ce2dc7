"""Both extreme eigenvalues: the front door."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import check_choice
from hvpkit.iterate import Monitor, full_precision
from hvpkit.operators import LinearOperator
from hvpkit.probes import resolve_seed
from hvpkit.results import Eigenpair, EigenResult, ExtremeResult, Interval
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.multifidelity import multifidelity

METHODS = ("auto", "lanczos", "multifidelity")

LARGEST_SAMPLE = 4000
"""Examples: what a sample is good for depends on their number, what it costs on their share."""

FORWARD_PASS = 1 / 9
"""Of a product: what scores for a sample cost."""


@full_precision
def extreme_eigenvalues(
    H: LinearOperator,
    *,
    tol: float = 1e-2,
    method: str = "auto",
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    v0: Tensor | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ExtremeResult:
    r"""The smallest and the largest eigenvalue, with vectors, residuals and intervals.

    Both ends come from one Krylov space. The solve stops when for both
    ``error_bound <= tol * |value|``, with the residual's norm or its square over the gap as the bound, and
    when it is unlikely (probability 0.3) that an eigenvalue hides further out than ``2 tol * |value|``. An end
    that is zero to rounding has no relative digits: see :func:`hvpkit.lanczos`.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        tol: relative error of each eigenvalue.
        method: ``"lanczos"``, which ``"auto"`` is; or ``"multifidelity"``: most of the work on weighted samples of the
            data, for a Hessian over tens of thousands of examples (over a thousand it saves nothing), and intervals
            that rest on residuals alone, without a confidence. See :func:`hvpkit.multifidelity`.
        confidence: of each interval, over random starts.
        certify: go on until each interval is at most ``tol * |value|`` wide; about a third more passes.
        max_matvecs: full-data products, at most; 1,000 by default.
        time_limit: seconds.
        v0: start ``[n]`` or ``[n, p]``, as vectors of an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each look, as :func:`hvpkit.progress_bar` is.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted, and the
            same call goes on from it; deleted once the solve has converged. See :func:`hvpkit.lanczos`.

    Returns:
        The two pairs, and how it went. The interval of an end reaches from the Ritz value, which never lies
        outside of the spectrum, out to where with probability ``confidence`` no eigenvalue is: see
        :mod:`hvpkit.solvers.bounds`. Without ``certify`` it may be wider than ``tol``. A limit that is reached,
        or a product that is not finite, is a status, with what was found until then.

    Raises:
        ValueError: an argument out of its range, named; a checkpoint of another solve.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.

    Cost:
        Passes over the data as ``num_matvecs`` says, one of them to verify the residuals.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.tensor([-0.5, *torch.linspace(0, 1, 50), 100.0], dtype=torch.float64))
        >>> ex = extreme_eigenvalues(hk.aslinearoperator(A))
        >>> round(ex.smallest.value, 2), round(ex.largest.value, 2), ex.converged
        (-0.5, 100.0, True)
    """
    check_choice("method", method, METHODS)
    if method == "multifidelity":
        if certify or checkpoint is not None:
            raise ValueError('certify and checkpoint are for method="lanczos"; leave them out')
        found = _by_samples(H, tol, max_matvecs, time_limit, v0, seed, monitor)
        return _result(H, found, tol)
    found = lanczos(
        H,
        min(2, H.n),
        which="BE",
        v0=v0,
        tol=tol,
        confidence=confidence,
        certify=certify,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
    )
    return _result(H, found, tol)


def _by_samples(
    H: LinearOperator,
    tol: float,
    max_matvecs: float | None,
    time_limit: float | None,
    v0: Tensor | None,
    seed: Seed,
    monitor: Monitor | None,
) -> EigenResult:
    """Both ends by two nested samples and all of the data, the passes for scores counted."""
    whole, number = H.num_examples or 1, resolve_seed(seed)
    small = min(max(whole // 10, min(whole, 200)), LARGEST_SAMPLE)
    middle = min(3 * small, whole)
    coarse = H.coarsen(middle, seed=number)
    levels = [coarse.coarsen(small, seed=number), *([coarse] if 2 * middle < whole else []), H]
    scoring = FORWARD_PASS * (H.cost + coarse.cost)
    found = multifidelity(
        levels,
        v0=v0,
        tol=tol,
        max_matvecs=None if max_matvecs is None else max_matvecs - scoring,
        time_limit=time_limit,
        seed=number,
        monitor=monitor,
    )
    return replace(found, num_matvecs=found.num_matvecs + scoring)


def _result(H: LinearOperator, found: EigenResult, tol: float) -> ExtremeResult:
    if len(found.values):
        smallest, largest = found.pair(0), found.pair(len(found.values) - 1)
    else:
        nothing = Interval(-math.inf, math.inf, "none")
        vector = found.vectors.new_full((H.n,), math.nan)
        smallest = largest = Eigenpair(math.nan, vector, math.nan, math.inf, nothing)
    return ExtremeResult(
        smallest,
        largest,
        found.num_matvecs,
        found.seconds,
        found.status,
        found.message,
        found.history,
        tol,
        repr(H)[1:-1],
    )
