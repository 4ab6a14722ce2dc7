r"""Power iteration on a block of k vectors, and the same with momentum.

Method: :mod:`hvpkit.solvers.baselines.momentum_block` on all data, or with variance reduction on minibatches.

Cost: k matvecs per step; beside it, Gram-Schmidt of k vectors.
Memory: ``5 k`` vectors, ``6 k`` with momentum, and ``3 k`` of workspace.
Source: Parlett, The Symmetric Eigenvalue Problem, SIAM (1998), chapters 4, 5 and 14, doi:10.1137/1.9781611971163;
momentum, and algorithm 3 for variance reduction: Xu, He, De Sa, Mitliagkas, Re, AISTATS 2018, PMLR 84:58-67,
arXiv:1707.02670; its choice: Austin, Pollock, Zhu, Numer. Linear Algebra Appl. 31 (2024) e2584,
doi:10.1002/nla.2584, arXiv:2403.09618.

Departures from the papers:
1. Momentum is on a block, with Rayleigh-Ritz at each assessment and a shift for an end that is not the dominant one.
   It is chosen by the residual of the last wanted pair over the steps between two assessments, not by that of each
   step.
2. The anchors of variance reduction are the best vectors so far; a new anchor does not reset momentum. Minibatches
   double whenever the residual did not fall from one assessment to the next.
3. The operator is divided by a power of two near its first matvec.
"""

from __future__ import annotations

from typing import Any

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_flag, check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult
from hvpkit.solvers.baselines.momentum_block import Goal, solve
from hvpkit.solvers.baselines.sampling import check_samples
from hvpkit.solvers.common.request import Start, check_arguments
from hvpkit.solvers.driver import Monitor, full_precision

NUM_BATCHES = 8
"""Default number of minibatches that the data is split into, with variance reduction. Chosen by feel."""


@full_precision
def power(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LM",
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at the ends of the spectrum, by power iteration.

    :math:`W \leftarrow \mathrm{orth}\big((A + \sigma I) W\big)`, each vector deflated by those before it. The shift
    :math:`\sigma` is zero while all Ritz values are on the wanted side and their residuals fall; else it shifts the
    other end to zero. Values and residuals are those of Rayleigh-Ritz with A. Stops when for each Ritz value
    :math:`\theta` with residual r

    .. math:: 2 \|r\| + \text{rounding} \le \text{tol} \cdot |\theta|,

    or :math:`\text{atol} \cdot \|A\|` for a value of at most that, after a dozen steps, or when the left side is at
    most 32 eps times :math:`\|A\|`, the largest norm of a matvec so far. (The factor 2: at the edge of a dense spectrum
    the error of a value is as large as its residual.) A ``tol`` below rounding is taken as rounding. A value that no
    longer changes is never a reason to stop.

    For comparison and teaching: :func:`hvpkit.lanczos` always takes fewer matvecs, in particular for an end that is
    not dominant, and bounds the probability that an eigenvalue is hidden further out. A residual does not: with two
    close eigenvalues and an unlucky start, the inner one of the two may be taken for the end.

    Args:
        op: symmetric operator.
        k: number of pairs. Two ends of the same size cannot be told apart under ``"LM"``.
        which: ``"LM"`` the largest in magnitude, ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from
            each end (the odd one from the high end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. Columns are assigned round-robin to the vectors of the
            block and summed, each with a tenth of a random vector.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        max_matvecs: full-data matvecs, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. An interval is no narrower
        than the error allowed, as closer eigenvalues cannot be distinguished. A limit, or a matvec that is not
        finite, is a status too, with the best pairs found until then.

    Raises:
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        ``k`` matvecs per step, and about :math:`\log(1/\text{tol}) / \log(|\lambda_k + \sigma| / |\lambda_{k+1} +
        \sigma|)` steps; ``k`` matvecs for the true residuals. ``8 k`` vectors of memory.

    Source:
        Parlett, The Symmetric Eigenvalue Problem, SIAM (1998), doi:10.1137/1.9781611971163.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.tensor([-8.0, 1, 2, 3, 4, 5], dtype=torch.float64)))
        >>> power(op, which="LM", tol=1e-6).values, power(op, which="LA", tol=1e-6).values
        (tensor([-8.0000], dtype=torch.float64), tensor([5.0000], dtype=torch.float64))
    """
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        block_size=k,
    )
    return solve(op, Goal(**vars(asked)), monitor)


@full_precision
def accelerated_power(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LM",
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    momentum: float | None = None,
    variance_reduced: bool = False,
    batch_size: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at the ends of the spectrum, by power iteration with momentum.

    :math:`w_{t+1} = (A + \sigma I)\, w_t - \beta\, w_{t-1}`, both normalised together, in a block as
    :func:`hvpkit.power`. Values and residuals are those of A and not of the recurrence.

    The best :math:`\beta` is a quarter of the square of the first unwanted eigenvalue of :math:`A + \sigma I`. Where
    it is not given it is chosen at each assessment: if the residual of the last wanted pair :math:`\theta` fell by a
    factor :math:`\rho` per step,

    .. math:: \beta = \frac{(r\, (\theta + \sigma))^2}{4}, \qquad r = \frac{2 \rho}{1 + \rho^2},

    which the best :math:`\beta` reproduces and a smaller one raises. A given :math:`\beta` of more than a quarter of
    the wanted (shifted) value squared makes the iterates rotate for ever: the solve then ends at a limit, and the
    message says so.

    With ``variance_reduced``, most steps use a minibatch's operator :math:`A_b` for the difference from the best
    vectors V with all data: :math:`A W \approx A_b (W - V V'W) + (A V) V'W`. A full-data matvec and an assessment
    follow whenever minibatches have cost as much. The noise vanishes as W approaches V.

    The best of the methods that keep a few vectors only, but not better than :func:`hvpkit.lobpcg`;
    :func:`hvpkit.lanczos` takes fewer matvecs if its basis fits into memory. Variance reduction often halves the
    matvecs or better, where the operator has minibatches.

    Args:
        op: symmetric operator; with ``variance_reduced`` one with ``op.sample``, as of :func:`hvpkit.hessian`.
        k: number of pairs.
        which: ``"LM"`` the largest in magnitude, ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from
            each end (the odd one from the high end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result, as of :func:`hvpkit.power`.
        tol: relative error of the eigenvalues: the stop is that of :func:`hvpkit.power`.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        momentum: :math:`\beta`, in units of eigenvalues squared; by default chosen.
        variance_reduced: use minibatches.
        batch_size: examples in a minibatch, with ``variance_reduced``; by default an eighth of all. Doubled
            whenever residuals did not fall from one assessment to the next.
        max_matvecs: full-data matvecs, at most, minibatches counted by their share; by default 1,000, or ten
            for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors and minibatches.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.

    Returns:
        As :func:`hvpkit.power`. ``converged`` rests on full-data residuals alone.

    Raises:
        TypeError: ``variance_reduced`` and ``op`` has no minibatches.
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        About the square root of the steps of :func:`hvpkit.power`. ``9 k`` vectors of memory.

    Source:
        Xu, He, De Sa, Mitliagkas, Re, AISTATS 2018, PMLR 84:58-67, arXiv:1707.02670; Austin, Pollock, Zhu, Numer.
        Linear Algebra Appl. 31 (2024) e2584, doi:10.1002/nla.2584.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.cat([torch.linspace(-0.9, 0.99, 99), torch.ones(1)]).double())
        >>> slow, fast = power(hk.aslinearoperator(A)), accelerated_power(hk.aslinearoperator(A))
        >>> bool(fast.converged and fast.num_matvecs < slow.num_matvecs / 4)
        True
    """
    if momentum:
        check_positive("momentum", momentum)
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        block_size=k,
    )
    check_flag("variance_reduced", variance_reduced)
    if not variance_reduced:
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size!r} is for variance_reduced=True; pass both or neither")
        return solve(op, Goal(**vars(asked), momentum=momentum), monitor)
    num_examples = check_samples(op, "variance_reduced=True")
    size = check_count(
        "batch_size",
        max(1, num_examples // NUM_BATCHES) if batch_size is None else batch_size,
        1,
        num_examples,
    )
    samples: Any = {"num_examples": num_examples, "schedule": lambda _: size, "anchored": True}
    return solve(op, Goal(**vars(asked), momentum=momentum, **samples), monitor)
