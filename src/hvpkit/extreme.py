"""Both extreme eigenvalues: the front door."""

from __future__ import annotations

import math

from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import check_choice
from hvpkit.iterate import Monitor, full_precision
from hvpkit.operators import LinearOperator
from hvpkit.results import Eigenpair, ExtremeResult, Interval
from hvpkit.solvers.lanczos import lanczos

METHODS = ("auto", "lanczos")


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
) -> ExtremeResult:
    r"""The smallest and the largest eigenvalue, with vectors, residuals and intervals.

    Both ends come from one Krylov space. The solve stops when for both
    ``error_bound <= tol * |value|``, with the residual's norm or its square over the gap as the bound, and
    when it is unlikely (probability 0.1) that an eigenvalue hides further out than ``2 tol * |value|``. An end
    that is zero to rounding has no relative digits: see :func:`hvpkit.lanczos`.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        tol: relative error of each eigenvalue.
        method: ``"auto"`` or ``"lanczos"``.
        confidence: of each interval, over random starts.
        certify: go on until each interval is at most ``tol * |value|`` wide; about a third more passes.
        max_matvecs: full-data products, at most; 1,000 by default.
        time_limit: seconds.
        v0: start ``[n]`` or ``[n, p]``, as vectors of an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each look, as :func:`hvpkit.progress_bar` is.

    Returns:
        The two pairs, and how it went. The interval of an end reaches from the Ritz value, which never lies
        outside of the spectrum, out to where with probability ``confidence`` no eigenvalue is: see
        :mod:`hvpkit.solvers.bounds`. Without ``certify`` it may be wider than ``tol``. A limit that is reached,
        or a product that is not finite, is a status, with what was found until then.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.

    Cost:
        Passes over the data as ``num_matvecs`` says, two of them for the true residuals.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.tensor([-0.5, *torch.linspace(0, 1, 50), 100.0], dtype=torch.float64))
        >>> ex = extreme_eigenvalues(hk.aslinearoperator(A))
        >>> round(ex.smallest.value, 2), round(ex.largest.value, 2), ex.converged
        (-0.5, 100.0, True)
    """
    check_choice("method", method, METHODS)
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
    )
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
