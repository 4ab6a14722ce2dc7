r"""The top of the spectrum of an operator that changes step by step, as a Hessian does in training.

The matvecs of a solve are recycled for the next one: Rayleigh-Ritz on them, and on the space that is recycled so far,
gives a likeness of low rank, :math:`S = \sum_i \theta_i u_i u_i^\top`, of the next operator, for no matvec.
:mod:`hvpkit.solvers.certified_davidson` finds the top of that with S as its cheap level: the largest vectors of S are
multiplied, and corrected, and a certificate from a random start, in the metric of S, excludes that anything lies
further out. Old vectors make the metric and are never part of the start: what they lack takes steps, and is not missed.
Where S is poor, Lanczos follows, whose matvecs are recycled as well.

For vectors X with known images H X, an orthonormal basis Q of X, and Z of what of the rows of U is outside of it, the
Ritz pairs are those of

.. math:: \begin{pmatrix} Q^\top H Q & Q^\top H Z \\ Z^\top H Q & Z^\top S Z \end{pmatrix}.

Memory: r vectors of the space, 2 r of matvecs that are not merged yet, and 3 r while they are.
Source: hvpkit's own. For sequences of linear systems: Parks, de Sturler, Mackey, Johnson and Maiti, SIAM J. Sci.
Comput. 28 (2006) 1651-1674, doi:10.1137/040607277.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_flag, check_type
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.offload import on_host
from hvpkit.operators.recorded import recorded
from hvpkit.operators.sharded import sharded
from hvpkit.operators.vectors import as_columns
from hvpkit.results.eigen import EigenResult
from hvpkit.results.recycled import RecycledSpace
from hvpkit.solvers.common.orthogonalize import extend_
from hvpkit.solvers.common.vector_memory import vectors_that_fit
from hvpkit.solvers.driver import Monitor, full_precision, with_vectors_of
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.low_rank import low_rank
from hvpkit.solvers.multifidelity import default_ncv, multifidelity

RANK, MIN_RANK = 40, 8
"""The default number of vectors of a recycled space, and the least one where memory is short. Evidence:
docs/performance.md."""

COPIES = 6
"""Vectors for each one of a space that are alive together, at most, while matvecs are merged: the space, matvecs with
their images, the basis of both, and what becomes of it."""

GENERATION = 2**48
"""Distance of the seeds of consecutive solves: a start must not be one that the space is made of."""

NEARLY_DEPENDENT = 1e-4
"""Eigenvalue of the Gram matrix of unit vectors under which a combination of them is left out. Chosen by feel."""


@dataclass
class Recycled:
    """Ritz pairs, that matvecs are merged into as they come.

    Attributes:
        op: the operator of the matvecs.
        rows: Ritz vectors ``[r, n]``.
        values: Ritz values ``[r]``, float64 on the CPU.
        rank: the most pairs that are kept, and the most matvecs that wait.
    """

    op: LinearOperator
    rows: Tensor
    values: Tensor
    rank: int
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, vectors: Tensor, images: Tensor) -> None:
        """Take over the matvec with columns ``[n, k]``."""
        for pair in zip(vectors.unbind(1), images.unbind(1), strict=True):
            self.waiting.append((pair[0].clone(), pair[1].clone()))
            if len(self.waiting) == self.rank:
                self.merge()

    def merge(self) -> None:
        """Merge the matvecs that wait."""
        if not self.waiting:
            return
        rows, images = (torch.stack(each) for each in zip(*self.waiting, strict=True))
        self.waiting = []
        finite = self.op.space.finite(rows) & self.op.space.finite(images)
        if not bool(finite.all()):
            rows, images = rows[finite], images[finite]
        self.rows, self.values = merged(self.op, rows, images, self.rows, self.values, self.rank)


def merged(
    op: LinearOperator, rows: Tensor, images: Tensor, known: Tensor, values: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` largest Ritz pairs, as rows and values, of matvecs and of what was known before.

    Args:
        op: the operator of the matvecs, for its space.
        rows: vectors ``[m, n]``.
        images: their matvecs ``[m, n]``.
        known: orthonormal rows ``[r, n]``.
        values: their Ritz values ``[r]``.
        rank: the most pairs.
    """
    space = op.space
    gram = space.dots(rows, rows.mT).to("cpu", torch.float64)
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    sizes, combinations = torch.linalg.eigh((gram + gram.mT) / (2 * norms[:, None] * norms))
    independent = sizes > NEARLY_DEPENDENT
    coefficients = (combinations[:, independent] * sizes[independent].rsqrt() / norms[:, None]).mT
    num_new = len(coefficients)
    basis = rows.new_empty(num_new + len(known), rows.shape[1])
    torch.mm(coefficients.to(rows), rows, out=basis[:num_new])
    basis = basis[: num_new + extend_(space, basis, num_new, known)]
    projected = torch.zeros(len(basis), len(basis), dtype=torch.float64, device="cpu")
    coupling = space.dots(basis, images.mT).to("cpu", torch.float64) @ coefficients.mT
    projected[:, :num_new], projected[:num_new] = coupling, coupling.mT
    projected[:num_new, :num_new] = (coupling[:num_new] + coupling[:num_new].mT) / 2
    if len(known):
        parts = space.dots(basis[num_new:], known.mT).to("cpu", torch.float64)
        projected[num_new:, num_new:] = parts @ (values[:, None] * parts.mT)
    found, vectors = torch.linalg.eigh(projected)
    return vectors[:, -rank:].mT.to(basis) @ basis, found[-rank:]


@full_precision
def follow_top(
    H: LinearOperator,
    k: int = 1,
    space: RecycledSpace | None = None,
    *,
    rank: int | None = None,
    tol: float = 1e-2,
    atol: float | None = None,
    ncv: int | None = None,
    offload: bool = False,
    confidence: float = 0.99,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> tuple[EigenResult, RecycledSpace]:
    r"""Compute the k largest eigenvalues, and the space that makes this cheap at the next step of training.

    **With probability** ``confidence`` **over random starts, a converged value is off by at most the error allowed**,
    however the operator has changed: by :func:`hvpkit.multifidelity` with ``certify=True``, of which the space makes
    the cheap level. Without a space, and where it does not help, that is by :func:`hvpkit.lanczos`, and for k > 1 of
    the largest value alone. From what the space knows only the passes depend: where the operator has changed little, as
    in tens of steps of training, they are a half to a seventh of Lanczos's; where it has nothing to do with the space,
    up to twice as many (docs/performance.md).

    Args:
        H: symmetric operator, as from :func:`hvpkit.hessian`.
        k: number of pairs.
        space: as the call for an earlier operator returned it; None for the first.
        rank: the most vectors of the space; by default 40, or 2 k if that is more, and fewer where memory is short.
        tol: relative error of each eigenvalue.
        atol: as for :func:`hvpkit.extreme_eigenvalues`.
        ncv: as for :func:`hvpkit.multifidelity`, and :func:`hvpkit.lanczos` without a space.
        offload: keep all vectors in host memory, those of the space too; only matvecs are on the device.
        confidence: of values and intervals, over random starts.
        max_matvecs: full-data matvecs, at most.
        time_limit: seconds.
        seed: of random vectors; those of solves with one space after the other are independent for the same seed.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.

    Returns:
        The pairs, as of :func:`hvpkit.top_eigenvalues`, and the space for the next call. A space is not changed.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named; a space of another size.
        NotSymmetricError, MemoryError: as :func:`hvpkit.top_eigenvalues`.

    Cost:
        Passes over the data as ``num_matvecs`` says: from 3, where the top is an outlier that moves little; the first
        call as many as :func:`hvpkit.lanczos`. Memory as of :func:`hvpkit.multifidelity`, and ``6 rank`` vectors.

    Source:
        hvpkit's own: see :mod:`hvpkit.solvers.recycling`.

    Example:
        >>> import torch, hvpkit as hk
        >>> values = torch.cat([torch.linspace(0, 1, 500), torch.tensor([9.0, 10.0])]).double()
        >>> first, space = follow_top(hk.aslinearoperator(torch.diag(values)))
        >>> then, space = follow_top(hk.aslinearoperator(torch.diag(1.1 * values)), space=space)
        >>> then.values.round(decimals=2).tolist(), then.num_matvecs < first.num_matvecs
        ([11.0], True)
    """
    check_flag("offload", offload)
    k = check_count("k", k, 1, H.n)
    op = sharded(on_host(H) if offload else H)
    fitting = vectors_that_fit(op)
    if rank is None:
        rank = max(2 * k, int(min(RANK, max(MIN_RANK, fitting / (2 * COPIES)))))
    check_count("rank", rank, k)
    recycled = _unpacked(op, space, rank)
    options: dict[str, Any] = {"which": "LA", "tol": tol, "atol": atol, "confidence": confidence}
    options |= {"max_matvecs": max_matvecs, "time_limit": time_limit, "monitor": monitor}
    watched, seed = recorded(op, recycled.add), resolve_seed(seed)
    if space is None or len(recycled.values) < k:
        found = lanczos(watched, k, ncv=ncv, seed=seed, certify=k == 1, **options)
        num_cold = found.num_matvecs
    else:
        like = low_rank(op, recycled.rows, recycled.values, int(space.num_cold) // 2)
        found = multifidelity(
            [like, watched],
            k,
            certify=True,
            ncv=ncv or default_ncv(fitting - COPIES * rank),
            seed=seed + GENERATION * space.num_solves,
            **options,
        )
        num_cold = _num_cold(found) or space.num_cold
    recycled.merge()
    num_solves = 1 if space is None else space.num_solves + 1
    return with_vectors_of(found, op, H), _packed(recycled, H, num_cold, num_solves)


def _unpacked(op: LinearOperator, space: RecycledSpace | None, rank: int) -> Recycled:
    """Return the vectors of a space as ``op`` holds them, the largest values only."""
    if space is None:
        nothing = torch.empty(0, op.space.size(op.n), dtype=op.dtype, device=op.device)
        return Recycled(op, nothing, torch.empty(0, dtype=torch.float64, device="cpu"), rank)
    check_type("space", space, RecycledSpace)
    columns, _ = as_columns(op, space.vectors.to(op.device, op.dtype), "space.vectors")
    rows = columns.mT[-rank:].contiguous()  # the same bits for a loaded space
    return Recycled(op, rows, space.values[-rank:], rank)


def _packed(recycled: Recycled, asked: LinearOperator, num_cold: float, num_solves: int) -> RecycledSpace:
    """Return the space, with vectors as of the operator that was asked about."""
    vectors, op = recycled.rows.mT, recycled.op
    if op.space.ranks is not None and op.space.sharded and not asked.space.sharded:
        vectors = op.space.ranks.shards(vectors, op.n)
    return RecycledSpace(recycled.values, vectors, num_cold, num_solves)


def _num_cold(found: EigenResult) -> float:
    """Return the matvecs after the cheap level was left; 0 if it was not."""
    cheap = [entry.num_matvecs for entry in found.history if entry.level == 0]
    return found.num_matvecs - max(cheap, default=0.0) if len(cheap) < len(found.history) else 0.0
