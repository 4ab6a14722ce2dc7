"""Both extreme eigenvalues, or more of either end: the choice of the solver."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch

from hvpkit._utils.deadline import DeadlineReached, deadline
from hvpkit._utils.random import resolve_seed
from hvpkit._utils.ranks import agreed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_flag, check_positive
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.offload import on_host
from hvpkit.operators.vectors import as_shards
from hvpkit.results.eigen import Eigenpair, EigenResult, ExtremeResult, Interval
from hvpkit.solvers.common.request import Start, check_sigma
from hvpkit.solvers.common.vector_memory import vectors_that_fit
from hvpkit.solvers.driver import Monitor, full_precision
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.likeness import LARGE_END, may_save_passes
from hvpkit.solvers.multifidelity import default_ncv, solve_levels

METHODS = ("auto", "lanczos", "multifidelity")

MIN_EXAMPLES, MANY_EXAMPLES, SEVERAL_EXAMPLES = 5000, 20_000, 10_000
"""Examples from which on samples may save passes to both ends, and from which on they are used without a comparison of
two (:mod:`hvpkit.solvers.likeness`); the same, without one, for one end and for several values. Evidence:
docs/multifidelity.md."""

LEAST_BUDGET = 30
"""Full-data matvecs that may be spent, at least, for samples to be compared. Chosen by feel."""

MIN_PARAMETERS = 1000
"""Parameters from which on samples are used: for fewer, Lanczos completes in few passes. Chosen by feel."""

SAMPLE_RATIO, MIN_SAMPLE, MAX_SAMPLE = 20, 200, 2000
"""All examples over those of the sample, and its size at least and at most: the accuracy of a sample depends on its
number of examples, its cost on their share. Evidence: docs/multifidelity.md."""

LEAST_LEVEL_NCV = 30
"""Vectors of each set that must fit into half of the free memory for samples to be used; else Lanczos, which takes
fewer. On the dense network of docs/multifidelity.md, four seeds take 33 to 53 passes with 60 or 40, 38 to 51 with 30,
and 129 to 142 with 20, where certificates end too early and Lanczos follows; Lanczos alone takes 65."""

SCORE_COST = 1 / 9
"""Cost of the scores for a sample, a forward pass, in full-data matvecs. By operations: docs/performance.md."""


@full_precision
def extreme_eigenvalues(
    H: LinearOperator,
    *,
    tol: float = 1e-2,
    atol: float | None = None,
    method: str = "auto",
    ncv: int | None = None,
    offload: bool = False,
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    v0: Start | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ExtremeResult:
    r"""Compute the smallest and the largest eigenvalue, with vectors, residuals and intervals.

    **With probability** ``confidence`` **over random starts, a converged value is off by at most twice the error
    allowed** (once with ``certify``), which is ``tol * |value|``. By ``"lanczos"`` both ends come from one Krylov space
    on all data. By ``"multifidelity"`` a sample of the data gives rough vectors and a metric, in which Lanczos takes
    fewer steps on all data: for the same promise, about half of the passes.

    An end that is zero, as the smallest one of a convex loss, has no relative digits: for a value of at most
    ``atol * norm`` the error allowed is ``atol * norm``, and the status is ``"zero-within-atol"``.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        tol: relative error of each eigenvalue.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        method: ``"multifidelity"``, which continues by Lanczos where samples do not help: see
            :func:`hvpkit.multifidelity`. ``"lanczos"``: all of the work on all of the data. ``"auto"``: the first for
            the Hessian of an :class:`hvpkit.Objective` with at least 1,000 parameters over at least 20,000 examples, or
            over 5,000 if two samples agree about the low end, unless that is large, or ``ncv`` or the free memory is
            too small for it; else the second.
        ncv: the most basis vectors before a restart; see :func:`hvpkit.lanczos` and :func:`hvpkit.multifidelity`. The
            default depends on n alone, unless memory is short: name it for the same bits on any machine.
        offload: keep the vectors in host memory, and work there; only matvecs are on the device.
        confidence: of each value and interval, over random starts.
        certify: continue until each interval is at most as wide as the error allowed; about a tenth more passes.
        max_matvecs: full-data matvecs, at most; 1,000 by default.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each assessment, as :func:`hvpkit.progress_bar` is.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted, and the
            same call continues from it; deleted on convergence. See :func:`hvpkit.lanczos`.

    Returns:
        The two pairs, and how the solve went. The interval of an end reaches inwards to the Ritz value, which never
        lies outside of the spectrum. Outwards, of kind ``"random-start"``, no eigenvalue lies beyond it with
        probability ``confidence``: see :mod:`hvpkit.solvers.common.bounds` and :mod:`hvpkit.solvers.certificate`. At a
        limit, or if a matvec is not finite, the status says so, and the result holds the best pairs so far, with
        intervals of kind ``"residual"`` where no more is known: these reach as far as the residual norm.

    Raises:
        ValueError: an argument out of its range, named; a checkpoint that is damaged, of another version or solve, or
            whose path cannot be written.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free: with the number of
            vectors, their bytes, and what to change. :func:`hvpkit.plan` says so beforehand.

    Cost:
        Passes over the data as ``num_matvecs`` says; by Lanczos, one of them to verify the residuals.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.tensor([-0.5, *torch.linspace(0, 1, 50), 100.0], dtype=torch.float64))
        >>> ex = extreme_eigenvalues(hk.aslinearoperator(A))
        >>> round(ex.smallest.value, 2), round(ex.largest.value, 2), ex.converged
        (-0.5, 100.0, True)
    """
    options: dict[str, Any] = {"tol": tol, "atol": atol, "confidence": confidence, "certify": certify}
    options |= {"ncv": ncv, "offload": offload, "max_matvecs": max_matvecs, "v0": v0, "monitor": monitor}
    return extreme_result(H, _solve(H, min(2, H.n), "BE", method, time_limit, seed, checkpoint, options), tol)


@full_precision
def top_eigenvalues(
    H: LinearOperator,
    k: int = 5,
    *,
    which: str = "LA",
    sigma: float | None = None,
    tol: float = 1e-2,
    atol: float | None = None,
    method: str = "auto",
    ncv: int | None = None,
    offload: bool = False,
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    v0: Start | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EigenResult:
    r"""Compute k eigenvalues at an end of the spectrum, at both, or closest to a point, with vectors and intervals.

    By ``"multifidelity"`` **the promise of** :func:`extreme_eigenvalues` **holds for each of them**, multiple ones
    included: one certificate an end says, with probability ``confidence`` over random starts, that no more than those
    found lie beyond the innermost one. By ``"lanczos"`` it holds for the outermost values only; a search for copies,
    which doubles the passes, makes it unlikely that one among the others is missed, without a figure: see
    :func:`hvpkit.lanczos`.

    Inside of the spectrum, ``which="CLOSEST"``, by Lanczos alone, an eigenvalue lies in each interval, as far from its
    value as the residual norm. The solve goes on while it is too likely that one hides closer to ``sigma``, by more
    than ``2 tol |value|``, but no interval claims that none does: :func:`hvpkit.count_eigenvalues` is a check. Values
    that are separated from their neighbours, as outliers, take few passes; in a bulk about as many as it has
    eigenvalues, with more basis vectors (``ncv``) fewer.

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the high end),
            ``"CLOSEST"`` those closest to ``sigma``.
        sigma: the point for ``"CLOSEST"``.
        tol: relative error of each eigenvalue.
        atol: as for :func:`extreme_eigenvalues`.
        method: as for :func:`extreme_eigenvalues`; ``"auto"`` takes samples over at least 10,000 examples, without
            a second one, but for two of ``which="BE"``, which are both ends.
        ncv: as for :func:`extreme_eigenvalues`.
        offload: keep the vectors in host memory, and work there; only matvecs are on the device.
        confidence: of values and intervals, over random starts.
        certify: continue until each certified interval is at most as wide as the error allowed.
        max_matvecs: full-data matvecs, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file, as for :func:`extreme_eigenvalues`.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status.

    Raises:
        ValueError, NotSymmetricError, MemoryError: as :func:`extreme_eigenvalues`.

    Cost:
        Passes over the data as ``num_matvecs`` says. With samples about half of those of Lanczos:
        docs/multifidelity.md.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = torch.diag(torch.tensor([-0.5, *torch.linspace(0, 1, 50), 60.0, 60.0, 100.0], dtype=torch.float64))
        >>> top_eigenvalues(hk.aslinearoperator(A), 3).values.round(decimals=2).tolist()
        [60.0, 60.0, 100.0]
        >>> top_eigenvalues(hk.aslinearoperator(A), 1, which="CLOSEST", sigma=90.0).pair(0)
        100 in [100, 100]
    """
    check_choice("which", which, ("LA", "SA", "BE", "CLOSEST"))
    check_sigma(which, sigma)
    options: dict[str, Any] = {"tol": tol, "atol": atol, "confidence": confidence, "certify": certify}
    options |= {"ncv": ncv, "offload": offload, "max_matvecs": max_matvecs, "v0": v0, "monitor": monitor}
    if which == "CLOSEST":
        if check_choice("method", method, METHODS) == "multifidelity":
            raise ValueError('which="CLOSEST" is by Lanczos; leave method="multifidelity" out')
        method, options["sigma"] = "lanczos", sigma
    return _solve(H, k, which, method, time_limit, seed, checkpoint, options)


def _solve(
    H: LinearOperator,
    k: int,
    which: str,
    method: str,
    time_limit: float | None,
    seed: Seed,
    checkpoint: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> EigenResult:
    """Solve by the method asked for; ``options`` are those that both methods take."""
    check_choice("method", method, METHODS)
    check_flag("offload", options["offload"])
    fitting = vectors_that_fit(on_host(H) if options["offload"] else H)
    both = which == "BE" and k == 2
    taken = method_for(H, method, fitting=fitting, ncv=options["ncv"], both=both)
    unsure, budget = (
        method == "auto" and both and not worth_sampling(H, MANY_EXAMPLES),
        options["max_matvecs"],
    )
    if unsure and isinstance(budget, int | float) and budget < LEAST_BUDGET:
        taken = "lanczos"
    if taken == "multifidelity":
        number, began = resolve_seed(seed), time.perf_counter()
        end = math.inf if time_limit is None else began + check_positive("time_limit", time_limit)
        levels: list[LinearOperator] | None = None
        try:
            with deadline(end):
                levels, spent = sample_levels(H, number, compare=unsure)
        except DeadlineReached:
            pass
        except (TypeError, ValueError):
            if method == "multifidelity":
                raise
        if time_limit is not None:
            time_limit = agreed(H.space.ranks, max(end - time.perf_counter(), 1e-9))
        if levels is not None:
            options |= {"spent": spent, "time_limit": time_limit, "checkpoint": checkpoint}
            options["large_end"] = LARGE_END if method == "auto" else math.inf
            return solve_levels(levels, k, which=which, seed=number, **options)
    return lanczos(H, k, which=which, time_limit=time_limit, seed=seed, checkpoint=checkpoint, **options)


def method_for(
    H: LinearOperator,
    method: str,
    *,
    fitting: float,
    ncv: int | None = None,
    both: bool = True,
) -> str:
    """Return the method that :func:`extreme_eigenvalues` takes: ``"lanczos"`` or ``"multifidelity"``.

    The second may end as the first, once samples are compared. ``fitting`` vectors fit into memory; ``both``: for both
    ends, and not for others of :func:`top_eigenvalues`.
    """
    if method != "auto":
        return method
    if not worth_sampling(H, MIN_EXAMPLES if both else SEVERAL_EXAMPLES):
        return "lanczos"
    return "multifidelity" if (ncv or default_ncv(fitting)) >= LEAST_LEVEL_NCV else "lanczos"


def worth_sampling(H: LinearOperator, min_examples: int = MIN_EXAMPLES) -> bool:
    """Return True if samples may save passes: for a large Hessian over many examples that have outputs."""
    return (
        isinstance(H, CurvatureOperator)
        and H.samples_pay
        and H.n >= MIN_PARAMETERS
        and H.num_examples >= min_examples
    )


def sample_levels(
    H: LinearOperator, seed: int, *, compare: bool = False
) -> tuple[list[LinearOperator], float]:
    """Return a sample and the operator, for :func:`hvpkit.multifidelity`, and what it cost, in full-data matvecs.

    The sample is a twentieth of the data, from 200 to 2,000 examples. With ``compare``, the operator alone where it is
    not likely to save passes: see :mod:`hvpkit.solvers.likeness`.

    Raises:
        TypeError, ValueError: ``H`` is not over examples that can be weighted.
    """
    if not isinstance(H, CurvatureOperator):
        raise TypeError(
            f'method="multifidelity" samples the data, but {H!r} is not over examples; take "lanczos"'
        )
    whole, spent = H.num_examples, SCORE_COST * H.cost
    size = min(max(whole // SAMPLE_RATIO, min(whole, MIN_SAMPLE)), MAX_SAMPLE)
    importance = "residual" if H.has_outputs else "loss"
    if not compare:
        return [H.coarsen(size, importance=importance, seed=seed), H], spent
    sample, other = H.two_samples(size, importance=importance, seed=seed)
    likely, cost = may_save_passes(sample, other, seed)
    return [sample, H] if agreed(H.space.ranks, likely) else [H], spent + cost


def extreme_result(H: LinearOperator, found: EigenResult, tol: float) -> ExtremeResult:
    """Return the outermost pairs of a result as both ends of the spectrum of ``H``."""
    if len(found.values):
        smallest, largest = found.pair(0), found.pair(len(found.values) - 1)
    else:
        nothing = Interval(-math.inf, math.inf, "none")
        vector = as_shards(H, torch.full((H.n,), math.nan, dtype=H.dtype, device=H.device))
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
