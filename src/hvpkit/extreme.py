"""Both extreme eigenvalues: the front door."""

from __future__ import annotations

from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import check_choice
from hvpkit.iterate import Monitor
from hvpkit.operators import LinearOperator
from hvpkit.results import Eigenpair, ExtremeResult, Interval
from hvpkit.solvers.lanczos import lanczos

METHODS = ("auto", "lanczos")


def extreme_eigenvalues(
    H: LinearOperator,
    *,
    tol: float = 1e-2,
    method: str = "auto",
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    v0: Tensor | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> ExtremeResult:
    r"""The smallest and the largest eigenvalue, with vectors, residuals and intervals.

    Both ends come from one Krylov space, and the solve stops when for both
    :math:`\|r\| + \text{rounding} \le \text{tol} \cdot |\theta|`; see :func:`hvpkit.lanczos` for an end that is
    zero.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        tol: relative error of each eigenvalue.
        method: ``"auto"`` or ``"lanczos"``.
        max_matvecs: full-data products, at most; 1,000 by default.
        time_limit: seconds.
        v0: start ``[n]`` or ``[n, p]``, as vectors of an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each look, as :func:`hvpkit.progress_bar` is.

    Returns:
        The two pairs, and how it went. The interval of an end reaches from the Ritz value, which the end is
        not inside of, out to the norm of the true residual: an eigenvalue lies there. That it is the extreme
        one is likely from a random start, and no confidence is stated. A limit that is reached, or a product
        that is not finite, is a status, with what was found until then.

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
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
    )
    if len(found.values):
        smallest, largest = found.pair(0), found.pair(len(found.values) - 1)
    else:
        nothing = Interval(float("-inf"), float("inf"), "none")
        vector = found.vectors.new_full((H.n,), float("nan"))
        smallest = largest = Eigenpair(float("nan"), vector, float("nan"), nothing)
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
