r"""SciPy's ARPACK and LOBPCG on an operator: for comparison, and for code that is written for them.

Method: SciPy multiplies by a :class:`~hvpkit.solvers.baselines.recording_operator.Recorder`, which counts, ends the
solve by an exception at a limit, and has an answer where SciPy has none. What SciPy returns is multiplied once more.
SciPy sees the operator's own dtype: in float64, with products in float32, it would iterate on their rounding. The
recorder ends that too, for pairs that are exact to rounding do not become better.

Departures from a plain call:
1. Products are divided by a power of two near the first one: ARPACK takes values below eps^(2/3) for zero, and
   LOBPCG has thresholds that are not relative.
2. ARPACK's start vectors stay what they are. SciPy >= 1.17 multiplies them by the operator first, which removes the
   null space: an end that is zero, as that of a convex loss, is then never found. Lanczos vectors have unit length;
   start vectors are made longer, so that they are known from them.
3. Where the recorder shows that ARPACK left an eigenvalue out, or SciPy breaks down or gives up, it is called again.
4. An operator no larger than two bases is multiplied with the identity: ARPACK refuses k = n, LOBPCG n < 5 k.

Cost: SciPy's products, and k for the check. Memory: SciPy's (a basis of ``ncv`` vectors for ARPACK, about twelve
blocks for LOBPCG), and two bases for the recorder.
Source: Lehoucq, Sorensen, Yang, ARPACK Users' Guide, SIAM (1998), doi:10.1137/1.9780898719628; Knyazev, SIAM J. Sci.
Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator, Product
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.baselines.recording_operator import Recorder, Stop
from hvpkit.solvers.common.convergence import MIN_STEPS, attainable_accuracy, check_pairs
from hvpkit.solvers.common.orthogonalize import start_
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, most_at_one_end
from hvpkit.solvers.common.request import Start, check_arguments
from hvpkit.solvers.driver import Monitor, completed, full_precision

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse.linalg

    Array = np.ndarray[Any, Any]

LEAST_NCV = 20
"""SciPy's own least basis for ARPACK."""

START_LENGTH = 4.0
"""Of ARPACK's start vectors; random ones that it draws itself have about sqrt(n / 3)."""

WARM_UP = 5
"""Iterations of LOBPCG after which the values are known well enough to tell it a tolerance."""

NO_LIMIT = 10**5
"""Of iterations: the limit is that of products."""

UNSURE = "; one of several close eigenvalues may be left out all the same: hvpkit.lanczos looks for them"
SKIPPED = "; SciPy had reported convergence with an eigenvalue left out that its own products show"

Call = Callable[[Recorder, Tensor], RitzPairs | None]
"""SciPy from orthonormal columns ``[n, p]``: its pairs over scale, if they are an answer."""


def _solve(seen: Recorder, call: Call, width: int) -> EigenResult:
    """Calls SciPy until there is an answer or the recorder ends it; multiplies what was found once more."""
    op, goal, found, status, num_calls = seen.op, seen.goal, None, Status.CONVERGED, 0
    start, v0 = torch.empty(width, op.n, dtype=op.dtype, device=op.device), goal.start
    try:
        if seen.capacity == op.n:
            seen.product(torch.eye(op.n, dtype=op.dtype, device=op.device))
            status = Status.INVARIANT_SUBSPACE
        while found is None and status is Status.CONVERGED:
            start_(op, start, width, v0, goal.seed + num_calls)
            found, num_calls = call(seen, start.mT), num_calls + 1
            v0 = seen.pairs().vectors
    except Stop as stop:
        status = stop.status
    result = check_pairs(
        op, goal, found or seen.pairs(), seen.scale, seen.norm, status=status, num_matvecs=seen.num_matvecs
    )
    suspect = None if seen.suspect is None else seen.suspect[:, None]
    result = completed(result, op, tuple(seen.history), seen.begin, suspect)
    return replace(result, message=result.message + seen.remark)


def _to_scipy(op: LinearOperator, product: Product) -> scipy.sparse.linalg.LinearOperator:
    """For SciPy, in the operator's dtype, or in float32 where SciPy has none such."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    own = op.dtype in (torch.float32, torch.float64)
    dtype = np.dtype(str(op.dtype).removeprefix("torch.") if own else "float32")

    def apply(array: Array) -> Array:
        vectors = torch.tensor(array.reshape(op.n, -1)).to(op.device, op.dtype)
        images: Array = product(vectors).to("cpu", torch.float64).numpy()
        return images.reshape(array.shape).astype(dtype)

    return ScipyOperator(op.shape, matvec=apply, matmat=apply, dtype=dtype)


def _arpack(seen: Recorder, start: Tensor, *, ncv: int) -> RitzPairs | None:
    """ARPACK's pairs; None if it broke down or left one out."""
    from scipy.sparse.linalg import ArpackError, eigsh

    def product(vector: Tensor) -> Tensor:
        is_start = abs(float(torch.linalg.vector_norm(vector)) - 1) > 0.5
        return vector if is_start else seen.product(vector)

    op, goal = seen.op, seen.goal
    operator, tol = _to_scipy(op, product), max(goal.tol / 2, torch.finfo(op.dtype).eps)
    options: dict[str, Any] = {"rng": goal.seed} if "rng" in inspect.signature(eigsh).parameters else {}
    options |= {"which": goal.which, "ncv": ncv, "tol": tol, "maxiter": NO_LIMIT}
    v0 = (START_LENGTH * start[:, 0]).to("cpu", torch.float64).numpy().astype(operator.dtype)
    try:
        values, vectors = eigsh(operator, goal.k, v0=v0, **options)
    except ArpackError:
        return None
    sizes = torch.from_numpy(abs(values)).to(torch.float64).clamp(min=torch.finfo(op.dtype).eps ** (2 / 3))
    return None if len(values) < goal.k else _answer(seen, values, vectors, tol * sizes)


def _lobpcg(seen: Recorder, start: Tensor) -> RitzPairs | None:
    """LOBPCG's pairs; None if it broke down, gave up, or has no tolerance yet."""
    import numpy as np
    from scipy.sparse.linalg import lobpcg

    op, goal, known = seen.op, seen.goal, seen.pairs()
    operator, tol, maxiter = _to_scipy(op, seen.product), torch.finfo(torch.float32).tiny, WARM_UP
    if len(known.values) == goal.k:
        start, maxiter = known.vectors, NO_LIMIT
        tol = max(goal.tol * float(known.values.abs().min()), attainable_accuracy(op, seen.norm), tol) / 2
    columns = start.to("cpu", torch.float64).numpy().astype(operator.dtype)
    options: dict[str, Any] = {"tol": tol, "maxiter": maxiter, "largest": goal.which == "LA"}
    try:
        with warnings.catch_warnings():  # what they say shows in the residuals
            warnings.filterwarnings("ignore", module=r"scipy\.|hvpkit\.solvers\.baselines\.scipy_eigs")
            values, vectors, norms = lobpcg(operator, columns, retResidualNormsHistory=True, **options)
    except ValueError as error:  # a small problem without a solution; SciPy < 1.17 gives it another name
        if not isinstance(error.__cause__ or error, np.linalg.LinAlgError):
            raise
        return None
    claimed = torch.full((goal.k,), float(np.max(norms[-1])), dtype=torch.float64)
    return None if float(claimed[0]) > tol else _answer(seen, values, vectors, claimed)


def _answer(seen: Recorder, values: Array, vectors: Array, claimed: Tensor) -> RitzPairs | None:
    """SciPy's pairs with the residuals that it claims ``[k]``; None if the recorder shows that one is left out."""
    ascending, order = torch.from_numpy(values).to(torch.float64).sort()
    columns = torch.linalg.qr(torch.from_numpy(vectors).to(torch.float64)[:, order]).Q
    found = RitzPairs(ascending, columns.to(seen.rows), claimed[order])
    if not seen.shows_beyond(found):
        return found
    seen.remark = SKIPPED + UNSURE
    return None


@full_precision
def eigsh(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    ncv: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""A few eigenpairs at the ends of the spectrum, by ARPACK through ``scipy.sparse.linalg.eigsh``.

    ``converged`` says that after a further product, for each value :math:`\theta` with residual r,

    .. math:: \|r\| \le \text{tol} \cdot |\theta|,

    or, where a value is zero to rounding, that the left side is at most 32 eps times the operator's norm. ARPACK
    compares its own estimate of :math:`\|r\|` with its ``tol`` times :math:`|\theta|`, once in a restart; it is
    given half of ``tol``, or eps if that is more.

    For comparison. Nothing says that a value is the outermost one: ARPACK finds copies of a multiple eigenvalue late
    or not at all, and can leave out one of several clustered eigenvalues and report convergence (scipy#26112), more
    often than not at a ``tol`` above their distance. Where its own products show that, it is called again and the
    message says so; mostly they do not. :func:`hvpkit.lanczos` looks for what may be missing.

    Args:
        op: symmetric operator. SciPy works on the CPU: vectors are copied for each product.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` the largest in magnitude, ``"BE"`` half
            from each end (the odd one from the high end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result: the sum of the columns and a tenth of a random vector.
        tol: relative error of the eigenvalues.
        ncv: basis vectors before a restart, by default ``max(2 k + 1, 20)``.
        max_matvecs: full-data products, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each product: the ends on the span of what was
            multiplied last, as SciPy does not tell its own.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a limit or
        a product that is not finite is a status too, with the best pairs on the span of what was multiplied last.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as ``num_matvecs`` says, ``k`` of them for the check; ``n + k`` where n is at most ``2 ncv``.
        ``3 ncv + k + 5`` vectors of memory.

    Source:
        Lehoucq, Sorensen, Yang, ARPACK Users' Guide, SIAM (1998), doi:10.1137/1.9780898719628.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> eigsh(op, 2, which="BE", tol=1e-6).values
        tensor([-1.0000,  2.0000], dtype=torch.float64)
    """
    begin = time.perf_counter()
    goal = check_arguments(
        op, k, which, v0=v0, tol=tol, max_matvecs=max_matvecs, time_limit=time_limit, seed=seed
    )
    if ncv is None:
        ncv = max(2 * k + 1, LEAST_NCV)
    elif check_count("ncv", ncv, 1) <= k:
        raise ValueError(f"ncv must be more than k = {k}, got {ncv}")
    seen = Recorder(op, goal, begin, monitor, capacity=ncv, depth=3 * ncv, tol=0.0)
    if most_at_one_end(k, which) > 1 and op.n > seen.capacity:
        seen.remark = UNSURE
    return _solve(seen, partial(_arpack, ncv=ncv), 1)


@full_precision
def scipy_lobpcg(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""A few eigenpairs at one end of the spectrum, by ``scipy.sparse.linalg.lobpcg``.

    ``converged`` says that after a further product, for each value :math:`\theta` with residual r,

    .. math:: \|r\| \le \text{tol} \cdot |\theta|,

    or, where a value is zero to rounding, that the left side is at most 32 eps times the operator's norm. LOBPCG's own
    tolerance is absolute, and one for all pairs: after five iterations without any it is called anew from where it
    is, with half of ``tol`` times the smallest :math:`|\theta|`, and again if it gives up early. It is stopped when
    the span of what it multiplied last holds pairs that are good enough.

    For comparison: :func:`hvpkit.lobpcg` is the same method with a better basis, and both ends. Nothing says that a
    value is the outermost one, and ends that are dense for their distance to the other end take thousands of products.

    Args:
        op: symmetric operator. SciPy works on the CPU: vectors are copied for each product.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. The columns are dealt out to the vectors of the block,
            each with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        max_matvecs: full-data products, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each product: the ends on that span.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a limit or
        a product that is not finite is a status too, with the best pairs so far.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as ``num_matvecs`` says, ``k`` of them for the check; ``n + k`` where n is at most ``max(10 k, 40)``.
        About ``22 k`` vectors of memory, or ``12 k + 40`` if that is more.

    Source:
        Knyazev, SIAM J. Sci. Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> scipy_lobpcg(op, tol=1e-6).values
        tensor([2.0000], dtype=torch.float64)
    """
    begin = time.perf_counter()
    goal = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=("LA", "SA"),
    )
    seen = Recorder(
        op, goal, begin, monitor, capacity=max(5 * k, LEAST_NCV), depth=k + MIN_STEPS, tol=goal.tol
    )
    return _solve(seen, _lobpcg, k)
