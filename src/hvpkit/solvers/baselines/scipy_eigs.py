r"""SciPy's ARPACK and LOBPCG on an operator: for comparison, and for code written for them.

Method: SciPy multiplies by a :class:`~hvpkit.solvers.baselines.recording_operator.Recorder`, which counts, ends the
solve by an exception at a limit, and has an answer where SciPy has none. The pairs that SciPy returns are multiplied
once more, for true residuals. SciPy works in the operator's own dtype: in float64, with matvecs in float32, it would
iterate on their rounding errors. The recorder ends that too, once its pairs are exact to rounding.

Departures from a plain call:
1. Matvecs are divided by a power of two near the first one: ARPACK treats values below eps^(2/3) as zero, and LOBPCG
   has absolute thresholds.
2. ARPACK's start vectors are not multiplied. SciPy >= 1.17 multiplies them by the operator first, which removes the
   null space: an end that is zero, as that of a convex loss, is then never found. Lanczos vectors have unit norm;
   start vectors get a larger one, by which they are recognised.
3. If the recorder shows that ARPACK missed an eigenvalue, or SciPy breaks down or gives up, it is called again.
4. An operator no larger than two bases is multiplied with the identity: ARPACK refuses k = n, LOBPCG n < 5 k.

Cost: SciPy's matvecs, and k for the check. Memory: SciPy's (a basis of ``ncv`` vectors for ARPACK, about twelve
blocks for LOBPCG), and two bases for the recorder.
Source: Lehoucq, Sorensen, Yang, ARPACK Users' Guide, SIAM (1998), doi:10.1137/1.9780898719628; Knyazev, SIAM J. Sci.
Comput. 23 (2001) 517-541, doi:10.1137/S1064827500366124.
"""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.deadline import deadline
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator, Product
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.baselines.recording_operator import Recorder, Stop
from hvpkit.solvers.common.convergence import MIN_STEPS, attainable_accuracy, check_pairs
from hvpkit.solvers.common.orthogonalize import start_
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, most_at_one_end
from hvpkit.solvers.common.request import Start, check_arguments
from hvpkit.solvers.driver import GRACE, Monitor, completed, full_precision

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse.linalg

    Array = np.ndarray[Any, Any]

LEAST_NCV = 20
"""SciPy's own minimum basis for ARPACK."""

START_NORM = 4.0
"""Norm of ARPACK's start vectors, to tell them from Lanczos vectors; those that it draws have about sqrt(n / 3)."""

WARM_UP = 5
"""Iterations of LOBPCG before it is given a tolerance, which needs values. Chosen by feel."""

NO_LIMIT = 10**5
"""Limit of iterations, never reached: the limit is that of matvecs."""

UNSURE = "; one of several close eigenvalues may still be missing: hvpkit.lanczos searches for them"
SKIPPED = "; SciPy had reported convergence with an eigenvalue left out that its own products show"

Call = Callable[[Recorder, Tensor], RitzPairs | None]
"""A call of SciPy from orthonormal columns ``[n, p]``: its pairs over scale, or None."""


def _solve(seen: Recorder, call: Call, width: int) -> EigenResult:
    """Call SciPy until there is an answer or the recorder ends it; check the pairs by one more matvec each."""
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
    limit = goal.limits.time_limit
    with deadline(math.inf if limit is None else seen.begin + GRACE * limit):
        result = check_pairs(
            op,
            goal,
            found or seen.pairs(),
            seen.scale,
            seen.norm,
            status=status,
            num_matvecs=seen.num_matvecs,
        )
    suspect = None if seen.suspect is None else seen.suspect[:, None]
    result = completed(result, op, tuple(seen.history), seen.begin, suspect)
    return replace(result, message=result.message + seen.remark)


def _to_scipy(op: LinearOperator, product: Product) -> scipy.sparse.linalg.LinearOperator:
    """Convert to a SciPy operator, in the operator's dtype, or in float32 where SciPy does not support it."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    own = op.dtype in (torch.float32, torch.float64)
    dtype = np.dtype(str(op.dtype).removeprefix("torch.") if own else "float32")

    def apply(array: Array) -> Array:
        vectors = torch.tensor(array.reshape(op.n, -1), device="cpu").to(op.device, op.dtype)
        images: Array = product(vectors).to("cpu", torch.float64).numpy()
        return images.reshape(array.shape).astype(dtype)

    return ScipyOperator(op.shape, matvec=apply, matmat=apply, dtype=dtype)


def _arpack(seen: Recorder, start: Tensor, *, ncv: int) -> RitzPairs | None:
    """Return ARPACK's pairs; None if it broke down or missed one."""
    from scipy.sparse.linalg import ArpackError, eigsh

    def product(vector: Tensor) -> Tensor:
        is_start = abs(float(torch.linalg.vector_norm(vector)) - 1) > 0.5
        return vector if is_start else seen.product(vector)

    op, goal = seen.op, seen.goal
    operator, tol = _to_scipy(op, product), max(goal.tol / 2, torch.finfo(op.dtype).eps)
    options: dict[str, Any] = {"rng": goal.seed} if "rng" in inspect.signature(eigsh).parameters else {}
    options |= {"which": goal.which, "ncv": ncv, "tol": tol, "maxiter": NO_LIMIT}
    v0 = (START_NORM * start[:, 0]).to("cpu", torch.float64).numpy().astype(operator.dtype)
    try:
        values, vectors = eigsh(operator, goal.k, v0=v0, **options)
    except ArpackError:
        return None
    sizes = torch.from_numpy(abs(values)).to(torch.float64).clamp(min=torch.finfo(op.dtype).eps ** (2 / 3))
    return None if len(values) < goal.k else _answer(seen, values, vectors, tol * sizes)


def _lobpcg(seen: Recorder, start: Tensor) -> RitzPairs | None:
    """Return LOBPCG's pairs; None if it broke down, gave up, or has no tolerance yet."""
    import numpy as np
    from scipy.sparse.linalg import lobpcg

    op, goal, known = seen.op, seen.goal, seen.pairs()
    operator, tol, maxiter = _to_scipy(op, seen.product), torch.finfo(torch.float32).tiny, WARM_UP
    if len(known.values) == goal.k:
        start, maxiter = known.vectors, NO_LIMIT
        allowed = float(goal.allowed(known.values, seen.norm).min())
        tol = max(allowed, attainable_accuracy(op, seen.norm), tol) / 2
    columns = start.to("cpu", torch.float64).numpy().astype(operator.dtype)
    options: dict[str, Any] = {"tol": tol, "maxiter": maxiter, "largest": goal.which == "LA"}
    try:
        with warnings.catch_warnings():  # their content is in the residuals
            warnings.filterwarnings("ignore", module=rf"scipy\.|{re.escape(__name__)}")
            values, vectors, norms = lobpcg(operator, columns, retResidualNormsHistory=True, **options)
    except ValueError as error:  # the projected problem failed; SciPy < 1.17 raises another type
        if not isinstance(error.__cause__ or error, np.linalg.LinAlgError):
            raise
        return None
    claimed = torch.full((goal.k,), float(np.max(norms[-1])), dtype=torch.float64, device="cpu")
    return None if float(claimed[0]) > tol else _answer(seen, values, vectors, claimed)


def _answer(seen: Recorder, values: Array, vectors: Array, claimed: Tensor) -> RitzPairs | None:
    """Return SciPy's pairs with its claimed residual norms ``[k]``; None if the recorder shows a missing one."""
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
    atol: float | None = None,
    ncv: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at the ends of the spectrum, by ARPACK through ``scipy.sparse.linalg.eigsh``.

    ``converged`` means that after a further matvec, for each value :math:`\theta` with residual r,

    .. math:: \|r\| \le \text{tol} \cdot |\theta|,

    or :math:`\text{atol} \cdot \|A\|` for a value of at most that, or that the left side is at most 32 eps times
    :math:`\|A\|`. ARPACK compares its own estimate of :math:`\|r\|` with its ``tol`` times :math:`|\theta|`, once per
    restart; it is given half of ``tol``, or eps if that is more.

    For comparison. There is no evidence that a value is the outermost one: ARPACK finds copies of a multiple
    eigenvalue late or not at all, and can miss one of several clustered eigenvalues and report convergence
    (scipy#26112), usually if ``tol`` is above their distance. If its own matvecs show that, it is called again and
    the message says so; mostly they do not. :func:`hvpkit.lanczos` searches for missing eigenvalues.

    Args:
        op: symmetric operator. SciPy works on the CPU: vectors are copied for each product.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` the largest in magnitude, ``"BE"`` half
            from each end (the odd one from the high end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result: the sum of the columns and a tenth of a random vector.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        ncv: basis vectors before a restart, by default ``max(2 k + 1, 20)``.
        max_matvecs: full-data matvecs, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each matvec: the ends on the span of the vectors
            multiplied last, as SciPy does not report its own.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. A limit, or a
        matvec that is not finite, is a status too, with the best pairs on the span of the vectors multiplied last.

    Raises:
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Matvecs as ``num_matvecs`` says, ``k`` of them for the check; ``n + k`` where n is at most ``2 ncv``.
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
        op, k, which, v0=v0, tol=tol, atol=atol, max_matvecs=max_matvecs, time_limit=time_limit, seed=seed
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
    atol: float | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at one end of the spectrum, by ``scipy.sparse.linalg.lobpcg``.

    ``converged`` means that after a further matvec, for each value :math:`\theta` with residual r,

    .. math:: \|r\| \le \text{tol} \cdot |\theta|,

    or :math:`\text{atol} \cdot \|A\|` for a value of at most that, or that the left side is at most 32 eps times
    :math:`\|A\|`. LOBPCG's own tolerance is absolute, and one for all pairs: after five iterations without any it is
    restarted from its vectors, with half of ``tol`` times the smallest :math:`|\theta|`, and again if it gives up
    early. It is stopped when the span of the vectors multiplied last contains pairs that satisfy the stop.

    For comparison: :func:`hvpkit.lobpcg` is the same method with a better basis, and both ends. There is no evidence
    that a value is the outermost one, and a dense end, relative to the spread, takes thousands of matvecs.

    Args:
        op: symmetric operator. SciPy works on the CPU: vectors are copied for each product.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. Columns are assigned round-robin to the vectors of the
            block and summed, each with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        max_matvecs: full-data matvecs, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each matvec: the ends on that span.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. A limit, or a
        matvec that is not finite, is a status too, with the best pairs so far.

    Raises:
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Matvecs as ``num_matvecs`` says, ``k`` of them for the check; ``n + k`` where n is at most ``max(10 k, 40)``.
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
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=("LA", "SA"),
    )
    seen = Recorder(
        op, goal, begin, monitor, capacity=max(5 * k, LEAST_NCV), depth=k + MIN_STEPS, tol=goal.tol
    )
    return _solve(seen, _lobpcg, k)
