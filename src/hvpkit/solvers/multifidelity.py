"""The ends of an operator from cheap levels of it: :mod:`hvpkit.solvers.certified_davidson`, and Lanczos after them.

Where no level serves, :func:`hvpkit.lanczos` starts again: from vectors that are partly right it takes more matvecs (22
for 17 on a bulk with outliers), as it has to exclude all the same what they may lack.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from hvpkit._utils.files import beside
from hvpkit._utils.ranks import agreed
from hvpkit._utils.signals import ending_after_cleanup
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_flag
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.offload import HOST, on_host
from hvpkit.operators.sharded import sharded
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers import saved_certificates
from hvpkit.solvers.certified_davidson import CertifiedDavidson, CertifiedDavidsonState
from hvpkit.solvers.checkpoint import Checkpoint, Saved, argument_of
from hvpkit.solvers.common.request import Start, check_arguments, check_certainty
from hvpkit.solvers.common.vector_memory import check_room, vectors_that_fit
from hvpkit.solvers.driver import Monitor, conclude, full_precision, iterate, with_vectors_of
from hvpkit.solvers.lanczos import lanczos

NCV, MIN_NCV = 60, 8
"""The default number of vectors of each set, and the least one. Chosen by feel."""

NUM_SETS, WORK = 6, 32
"""Sets of at most ``ncv`` vectors that are alive together, and vectors beside them: rows, their matvecs, outliers of
the sample, the rows of the metric, and a Krylov space of pairs, or what the metric is made of. Counted;
measured peaks are 0.97 to 1 of the sum on a spectrum of which the sample shows all."""


def multifidelity(
    levels: Sequence[LinearOperator],
    k: int | None = None,
    *,
    which: str = "BE",
    v0: Start | None = None,
    tol: float = 1e-2,
    atol: float | None = None,
    ncv: int | None = None,
    offload: bool = False,
    num_inner: int | None = None,
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EigenResult:
    r"""Compute the ends of the last of several levels, with most of the work on cheaper ones.

    **With probability** ``confidence`` **over random starts, a converged value is off by at most twice the error
    allowed** (once with ``certify``), as for :func:`hvpkit.lanczos`: no eigenvalue of the last level hides further out,
    however good the other levels are; with ``k`` of several at an end, no more than those found. The solve also wants
    that for each value ``error_bound <= tol * |value|``. That bound is the residual norm, its square over the gap, or
    1.5 to 9 times the error that a cheap level has just predicted, :math:`r' f(A_S)\, r`, which is an estimate.

    Use it for a Hessian over many examples: levels are ``H.coarsen(...)`` and H itself. For operators without a cheap
    approximation use :func:`hvpkit.lanczos`.

    Args:
        levels: operators of the same size and of rising ``cost``; the last is the one asked about. One alone is
            solved by :func:`hvpkit.lanczos`, as is the rest of the solve once no cheap level helps, with its promise.
            The cost of making them, as of scores, is not counted.
        k: number of pairs; by default one at each end asked for.
        which: ``"BE"`` half from each end (the odd one from the high end), ``"LA"`` the largest, ``"SA"`` the smallest.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result, for the steps on the first level: the sum of the unit
            columns and a tenth of a random vector.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        ncv: the most vectors of each set that is kept: of the basis, before half of it is dropped, and of the Krylov
            spaces of the sample and of a certificate. By default 60, unless that would take more than half of the free
            memory: then as many as half of it holds; name ``ncv`` for the same bits there.
        offload: keep all vectors in host memory, and work there: see :func:`hvpkit.lanczos`.
        num_inner: the most Lanczos steps on a cheap level for each direction; by default as many as cost one matvec,
            but from 6 to 15. They end when their prediction has settled.
        confidence: of values and intervals, over random starts.
        certify: continue until each interval is at most as wide as the error allowed.
        max_matvecs: matvecs of the last level, the others counted at their cost; by default 1,000.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of the start vector.
        monitor: called with a :class:`hvpkit.Progress` after each assessment; its bounds are the error bounds.
        checkpoint: a file to continue from, as for :func:`hvpkit.lanczos`; the levels have to be the same.

    Returns:
        Values ascending, with orthonormal vectors, true residuals and intervals. ``num_matvecs`` is in matvecs of an
        operator of cost 1; ``history`` also says which level was worked on.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named.
        NotSymmetricError: the last level is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        ``6 ncv + 32`` vectors of memory, at most: rows and their matvecs, and the sample's outliers, the metric made of
        them, and a certificate's Krylov space of pairs.

    Example:
        >>> import torch, hvpkit as hk
        >>> from dataclasses import replace
        >>> values = torch.cat([torch.tensor([-1.0, 30.0]), torch.linspace(-0.5, 1, 500)]).double()
        >>> op = hk.aslinearoperator(torch.diag(values))
        >>> like = replace(hk.aslinearoperator(torch.diag(1.1 * values)), cost=0.05)
        >>> found = multifidelity([like, op])
        >>> found.values.round(decimals=2).tolist(), found.num_matvecs < 20
        ([-1.0, 30.0], True)
    """
    return solve_levels(
        levels,
        k,
        which=which,
        v0=v0,
        tol=tol,
        atol=atol,
        ncv=ncv,
        offload=offload,
        num_inner=num_inner,
        confidence=confidence,
        certify=certify,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
    )


def solve_levels(
    levels: Sequence[LinearOperator],
    k: int | None = None,
    *,
    which: str = "BE",
    v0: Start | None = None,
    tol: float = 1e-2,
    atol: float | None = None,
    ncv: int | None = None,
    offload: bool = False,
    num_inner: int | None = None,
    confidence: float = 0.99,
    certify: bool = False,
    spent: float = 0.0,
    large_end: float = math.inf,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EigenResult:
    """Solve as :func:`multifidelity`, with the cost of making the levels counted in.

    ``spent`` are the full-data matvecs that they have cost already, as a pass for scores; ``large_end``: by Lanczos,
    where the low end of the first level is larger than this, in units of the norm.
    """
    levels = _check_levels(levels)
    op = levels[-1]
    check_certainty(confidence, certify)
    check_flag("offload", offload)
    if num_inner is not None:
        check_count("num_inner", num_inner, 1)
    request = check_arguments(
        op,
        (min(2, op.n) if which == "BE" else 1) if k is None else k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=("BE", "SA", "LA"),
        num_checks=0,
    )
    least = max(MIN_NCV, 2 * request.k + 4)
    if ncv is not None:
        check_count("ncv", ncv, least)
    if len(levels) == 1:
        return lanczos_after(
            op,
            request.k,
            spent,
            0.0,
            which=request.which,
            v0=request.start,
            tol=request.tol,
            atol=request.atol,
            ncv=ncv,
            offload=offload,
            confidence=confidence,
            certify=certify,
            max_matvecs=request.limits.max_matvecs - spent,
            time_limit=time_limit,
            seed=request.seed,
            monitor=monitor,
            checkpoint=checkpoint,
        )
    if offload:
        levels = tuple(on_host(level) for level in levels)
        request = request.on_host()
    levels = tuple(sharded(level) for level in levels)
    ranks = levels[-1].space.ranks
    saved = None if checkpoint is None else argument_of(checkpoint, "ncv", ranks)  # of a solve that continues
    kept = ncv or max(least, saved or default_ncv(vectors_that_fit(levels[-1])))
    remedy = f"take a smaller ncv (at least {least}), " if kept > least else "take "
    remedy += "" if levels[-1].device == HOST else "offload=True for vectors in host memory, "
    check_room(
        levels[-1], num_vectors(min(kept, op.n)), remedy + "hvpkit.lanczos, which keeps fewer, or wrt="
    )
    solver = CertifiedDavidson(request, levels, kept, num_inner, confidence, certify, spent, large_end)
    return _solve(op, solver, ncv, offload, checkpoint, monitor=monitor)


def default_ncv(fitting: float) -> int:
    """Return the default number of vectors of each set: 60, or less if only ``fitting`` in all fit into memory."""
    return int(max(MIN_NCV, min(NCV, (fitting - WORK) / NUM_SETS)))


def num_vectors(ncv: int) -> int:
    """Return the most vectors that a solve takes memory for."""
    return NUM_SETS * ncv + WORK


def _check_levels(levels: Sequence[LinearOperator]) -> tuple[LinearOperator, ...]:
    """Check the levels and return them, the last one in exact arithmetic: less is for cheap levels."""
    if (
        not isinstance(levels, Sequence)
        or not levels
        or not all(isinstance(x, LinearOperator) for x in levels)
    ):
        found = type(levels).__name__
        if isinstance(levels, Sequence):
            found += f" of {', '.join(dict.fromkeys(type(level).__name__ for level in levels)) or 'nothing'}"
        raise TypeError(
            f"levels must be a list of hvpkit.LinearOperator, the one asked about last; got a {found}"
        )
    last = levels[-1]
    for level in levels[:-1]:
        if (level.n, level.dtype, level.device) != (last.n, last.dtype, last.device):
            raise ValueError(f"levels must agree in size, dtype and device: {level!r} and {last!r}")
    costs = [level.cost for level in levels]
    if sorted(costs) != costs:
        raise ValueError(f"levels must be of rising cost, got {costs}")
    return (*levels[:-1], last.exact or last)


@full_precision
def _solve(
    op: LinearOperator,
    solver: CertifiedDavidson,
    ncv: int | None,
    offload: bool,
    path: str | os.PathLike[str] | None,
    *,
    monitor: Monitor | None,
) -> EigenResult:
    """Run the solver on the cheap levels, and Lanczos, on ``op`` with ``ncv`` and ``offload``, if it hands over.

    While Lanczos runs, its checkpoint lies beside that of the levels, in a file of its own.
    """
    file, of_lanczos = None, None
    if path is not None:
        file = Checkpoint[CertifiedDavidsonState](
            path,
            solver.identity(),
            solver.op,
            trim=saved_certificates.pack,
            verify=lambda state: saved_certificates.verify(solver, state),
            unpack=lambda saved: saved_certificates.unpack(solver, saved),
        )
        of_lanczos = beside(file.path, "lanczos")
    with nullcontext() if file is None else ending_after_cleanup():
        ended = iterate(solver, monitor=monitor, checkpoint=file)
    if ended.status is not None:
        found = with_vectors_of(conclude(solver, ended), solver.op, op)
        if file is not None and found.converged:
            file.clear()
        return found
    if file is not None:
        seconds = time.perf_counter() - ended.began
        file.save(Saved(ended.state, 0, ended.history, seconds, ended.verified))
    request, limits, time_left = solver.request, solver.limits, None
    remaining = limits.remaining(ended.state.num_matvecs)
    if limits.time_limit is not None:
        time_left = agreed(op.space.ranks, limits.time_limit - (time.perf_counter() - ended.began))
    if remaining < (2 * request.k + 1) * op.cost:
        return with_vectors_of(conclude(solver, ended, Status.MAX_MATVECS), solver.op, op)
    if time_left is not None and time_left <= 0:
        return with_vectors_of(conclude(solver, ended, Status.TIME_LIMIT), solver.op, op)
    cheap, level = conclude(solver, ended, Status.MAX_MATVECS), ended.state.level
    del ended  # its vectors make room for the basis

    found = lanczos_after(
        op,
        request.k,
        cheap.num_matvecs,
        cheap.seconds,
        which=request.which,
        tol=request.tol,
        atol=request.atol,
        ncv=ncv,
        offload=offload,
        confidence=solver.confidence,
        certify=solver.certify,
        max_matvecs=remaining,
        time_limit=time_left,
        seed=request.seed,
        monitor=monitor,
        checkpoint=of_lanczos,
        level=level,
    )
    if file is not None and found.converged:
        file.clear()
    return replace(found, history=(*cheap.history, *found.history))


@full_precision
def lanczos_after(
    op: LinearOperator,
    /,
    k: int,
    num_matvecs: float,
    seconds: float,
    *,
    level: int = 0,
    monitor: Monitor | None = None,
    **options: Any,
) -> EigenResult:
    """Solve by :func:`hvpkit.lanczos`, with what was spent before counted in; ``options`` are its own."""

    def after(entry: Progress) -> Progress:
        spent, passed = entry.num_matvecs + num_matvecs, entry.seconds + seconds
        return replace(entry, num_matvecs=spent, seconds=passed, level=level)

    found = lanczos(op, k, monitor=monitor and (lambda entry: monitor(after(entry))), **options)
    return replace(
        found,
        num_matvecs=found.num_matvecs + num_matvecs,
        seconds=found.seconds + seconds,
        history=tuple(map(after, found.history)),
    )
