"""Both extreme eigenvalues: the front door."""

from __future__ import annotations

import math
import os

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Eigenpair, EigenResult, ExtremeResult, Interval
from hvpkit.solvers.common.request import Start
from hvpkit.solvers.driver import Monitor, full_precision
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.multifidelity import multifidelity

METHODS = ("auto", "lanczos", "multifidelity")

SMALLEST_DATA = 10_000
"""Examples: a tenth of fewer does not contain the extreme eigenvectors well enough to find the extreme eigenvalues."""

SMALLEST_SIZE = 1000
"""Parameters: with fewer, Lanczos is soon through."""

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
    v0: Start | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ExtremeResult:
    r"""The smallest and the largest eigenvalue, with vectors, residuals and intervals.

    The solve stops when for both ends ``error_bound <= tol * |value|``. By ``"lanczos"`` both come from one Krylov
    space, the bound is the residual's norm or its square over the gap, and it has to be unlikely (probability 0.3) that
    an eigenvalue hides further out than ``2 tol * |value|``. By ``"multifidelity"`` most of the work is done on samples
    of the data, usually for a quarter to two thirds of the passes; the bound is an estimate of the error by a sample.
    Each interval's ``kind`` says what it rests on. An end that is zero to rounding has no relative digits: see
    :func:`hvpkit.lanczos`.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        tol: relative error of each eigenvalue.
        method: ``"multifidelity"``, which turns to Lanczos where samples do not help; its intervals rest on residuals
            alone, without a confidence, and where the next eigenvalue is only a few tol away it may have that one:
            see :func:`hvpkit.multifidelity`. ``"lanczos"``: all of the work on all of the data. ``"auto"``: the first
            for the Hessian of an :class:`hvpkit.Objective` with at least 1,000 parameters over at least 10,000
            examples, if neither ``certify`` nor ``checkpoint`` is asked for; else the second.
        confidence: of each interval by Lanczos, over random starts.
        certify: by Lanczos, and on until each interval is at most ``tol * |value|`` wide; about a third more passes.
        max_matvecs: full-data products, at most; 1,000 by default.
        time_limit: seconds.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each look, as :func:`hvpkit.progress_bar` is.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted, and the
            same call goes on from it; deleted once the solve has converged. See :func:`hvpkit.lanczos`.

    Returns:
        The two pairs, and how it went. The interval of an end reaches from the Ritz value, which never lies outside of
        the spectrum, out to where, of kind ``"random-start"``, with probability ``confidence`` no eigenvalue is: see
        :mod:`hvpkit.solvers.common.bounds`; of kind ``"residual"``, as far as the residual's norm. Without ``certify``
        it may be wider than ``tol``. A limit that is reached, or a product that is not finite, is a status, with what
        was found until then.

    Raises:
        ValueError: an argument out of its range, named; a checkpoint of another solve.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.

    Cost:
        Passes over the data as ``num_matvecs`` says; by Lanczos, one of them to verify the residuals.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.tensor([-0.5, *torch.linspace(0, 1, 50), 100.0], dtype=torch.float64))
        >>> ex = extreme_eigenvalues(hk.aslinearoperator(A))
        >>> round(ex.smallest.value, 2), round(ex.largest.value, 2), ex.converged
        (-0.5, 100.0, True)
    """
    check_choice("method", method, METHODS)
    plain = not certify and checkpoint is None
    if method == "multifidelity" and not plain:
        raise ValueError('certify and checkpoint are for method="lanczos"; leave them out')
    if method == "multifidelity" or (method == "auto" and plain and worth_sampling(H)):
        number = resolve_seed(seed)
        try:
            levels, spent = sample_levels(H, number)
        except (TypeError, ValueError):
            if method == "multifidelity":
                raise
        else:
            found = multifidelity(
                levels,
                v0=v0,
                tol=tol,
                confidence=confidence,
                spent=spent,
                max_matvecs=max_matvecs,
                time_limit=time_limit,
                seed=number,
                monitor=monitor,
            )
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


def worth_sampling(H: LinearOperator) -> bool:
    """Whether samples of the data are likely to save passes: a large Hessian over many examples that have outputs."""
    return (
        isinstance(H, CurvatureOperator)
        and H.samples_pay
        and H.n >= SMALLEST_SIZE
        and H.num_examples >= SMALLEST_DATA
    )


def sample_levels(H: LinearOperator, seed: int) -> tuple[list[LinearOperator], float]:
    """Two nested samples and the operator itself, for :func:`hvpkit.multifidelity`, and the passes for their scores.

    The small sample is a tenth of the data, up to 4,000 examples; the other is three times that.

    Raises:
        TypeError, ValueError: ``H`` is not over examples that can be weighted.
    """
    if not isinstance(H, CurvatureOperator):
        raise TypeError(
            f'method="multifidelity" samples the data, but {H!r} is not over examples; take "lanczos"'
        )
    whole = H.num_examples
    importance = "residual" if H.has_outputs else "loss"
    small = min(max(whole // 10, min(whole, 200)), LARGEST_SAMPLE)
    middle = min(3 * small, whole)
    coarse = H.coarsen(middle, importance=importance, seed=seed)
    small_one = coarse.coarsen(small, importance=importance, seed=seed)
    levels: list[LinearOperator] = [small_one, *([coarse] if 2 * middle < whole else []), H]
    return levels, FORWARD_PASS * (H.cost + coarse.cost)


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
