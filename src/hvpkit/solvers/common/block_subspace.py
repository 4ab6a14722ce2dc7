"""The subspace that a block solver works on: rows with their matvecs, and Rayleigh-Ritz on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.convergence import (
    ROUNDING,
    attainable_accuracy,
    check_pairs,
    check_symmetric,
    final_status,
    rounding,
    warn_asymmetric,
)
from hvpkit.solvers.common.orthogonalize import complete_, extend_, power_of_two, rotate_, row_norms, start_
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, no_pairs
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.common.vector_memory import FEWER, check_room

NEW_SHARE = 0.1
"""Norm of the new direction in a vector with a known matvec, at least, in units of the vector's. Chosen by feel."""

MAX_WHOLE_SPACE = 1000
"""The largest n for which a subspace may become the whole space. Chosen by feel: two matrices of 8 MB in float64."""


@dataclass(frozen=True)
class BlockSubspace:
    """Orthonormal rows: those with known matvecs, and then new ones still to be multiplied.

    The functions of this file, and the methods of solvers, donate (reuse) the buffers.

    Attributes:
        rows: ``[capacity, n]``.
        images: matvecs with them over ``scale`` ``[capacity, n]``.
        best: the best wanted pairs so far, over ``scale``.
        scale: what matvecs are divided by, 0-d.
        suspect: a column ``[n, 1]`` whose matvec was not finite.
        norm: the largest norm of a matvec with a unit vector, over ``scale``.
        asymmetry: the largest ``|v'(Aw) - w'(Av)|`` of unit vectors, over the norm.
        num_rows: rows with known matvecs.
        num_fresh: the last of these, which are not assessed yet.
        num_new: rows after them, still to be multiplied.
        num_matvecs: full-data matvecs so far.
        num_random: random vectors drawn so far.
    """

    rows: Tensor = field(metadata=LONG)
    images: Tensor = field(metadata=LONG)
    best: RitzPairs
    scale: Tensor
    suspect: Tensor | None = None
    norm: float = 0.0
    asymmetry: float = 0.0
    num_rows: int = 0
    num_fresh: int = 0
    num_new: int = 0
    num_matvecs: float = 0.0
    num_random: int = 0


S = TypeVar("S", bound=BlockSubspace)


def start(op: LinearOperator, request: Request, width: int, capacity: int) -> BlockSubspace:
    """Return new rows from the caller's start and random vectors; a small space has room for all of it.

    Raises:
        MemoryError: they do not fit into the memory that is free.
    """
    capacity = op.n if op.n <= MAX_WHOLE_SPACE else min(capacity, op.n)
    check_room(op, 2 * capacity + 4 * width, FEWER)  # rows, images, and work on a block
    rows = torch.empty(capacity, op.space.size(op.n), dtype=op.dtype, device=op.device)
    num_random = start_(op, rows, width, request.start, request.seed)
    images, scale = torch.empty_like(rows), rows.new_ones(())
    return BlockSubspace(rows, images, no_pairs(rows.mT), scale, num_new=width, num_random=num_random)


def multiply(op: LinearOperator, state: S, width: int, *, is_scaled: bool = False) -> S:
    """Multiply new rows, at most ``width`` of them. No host synchronisation.

    The first matvecs set the scale, unless it ``is_scaled``.
    """
    width = min(width, state.num_new)
    new = slice(state.num_rows, state.num_rows + width)
    images = op.product(state.rows[new].mT).mT
    if state.num_matvecs == 0 and not is_scaled:
        state = replace(state, scale=power_of_two(op.space.peak(images)))
    torch.div(images, state.scale, out=state.images[new])
    return replace(
        state,
        num_rows=new.stop,
        num_fresh=state.num_fresh + width,
        num_new=state.num_new - width,
        num_matvecs=state.num_matvecs + width * op.cost,
    )


def extend(op: LinearOperator, request: Request, state: S, vectors: Tensor) -> S:
    """Append the new directions in ``vectors`` ``[w, n]`` as rows, or a random one if there is none.

    In a small space, once n matvecs are spent, all missing directions are appended, if the budget allows for them.
    """
    m, missing, spent = state.num_rows, op.n - state.num_rows, state.num_matvecs
    affordable = request.limits.remaining(spent) >= missing * op.cost
    whole = op.n <= MAX_WHOLE_SPACE and spent >= op.n * op.cost and affordable
    num_new = 0 if whole else extend_(op.space, state.rows, m, vectors[:missing])
    end = op.n if whole else m + max(num_new, 1)
    num_random = complete_(op, state.rows[:end], m + num_new, request.seed, state.num_random)
    return replace(state, num_new=end - m, num_random=num_random)


def extend_by_known(op: LinearOperator, state: S, vector: Tensor, image: Tensor) -> S | None:
    """Append the new direction in ``vector`` ``[n]``, of which the matvec over scale is ``image``, as a multiplied row.

    None if little of it is new, so that rounding of the image would be magnified.
    """
    m, size = state.num_rows, float(op.space.norm(vector))
    rest, moved = vector, image
    for _ in range(2):
        inner = op.space.dots(state.rows[:m], rest)
        rest, moved = rest - inner @ state.rows[:m], moved - inner @ state.images[:m]
    left = float(op.space.norm(rest))
    if not left > NEW_SHARE * size:
        return None
    state.rows[m], state.images[m] = rest / left, moved / left
    return replace(state, num_rows=m + 1, num_fresh=state.num_fresh + 1)


def drop_non_finite(op: LinearOperator, state: S) -> S:
    """Drop rows whose matvecs are not finite, and keep the first of them as suspect; no row stays fresh or new."""
    first, end = state.num_rows - state.num_fresh, state.num_rows
    finite = op.space.finite(state.images[first:end]).tolist()
    state = replace(state, num_fresh=0, num_new=0)
    if all(finite):
        return state
    suspect = state.rows[first + finite.index(False)].unsqueeze(1).clone()
    kept = [*range(first), *(first + place for place, good in enumerate(finite) if good)]
    for matrix in (state.rows, state.images):
        matrix[: len(kept)] = matrix[kept]
    return replace(state, num_rows=len(kept), suspect=suspect)


@dataclass(frozen=True)
class Projection:
    """The eigenproblem projected on rows that are orthonormal up to rounding; on the CPU in float64.

    Attributes:
        values: Ritz values, ascending ``[m]``.
        vectors: orthonormal columns ``[m, m]``: the eigenvectors, in the coordinates of the rows after Gram-Schmidt
            in their order, so that the first j coordinates are the span of the first j rows.
        to_rows: maps such coordinates to coefficients of the rows, ``[m, m]``.
        norm: the largest Ritz value in absolute value, or norm of a matvec with a row, if that is more; more still
            where matvecs are noisier than by rounding, as asymmetry shows: a norm whose rounding covers it.
        asymmetry: the largest ``|v'(Aw) - w'(Av)|`` of two rows, over the norm.
    """

    values: Tensor
    vectors: Tensor
    to_rows: Tensor
    norm: float
    asymmetry: float


def rayleigh_ritz(op: LinearOperator, rows: Tensor, images: Tensor) -> Projection:
    """Project the operator on ``rows`` ``[m, n]`` with matvecs ``images`` and solve for Ritz pairs; both are finite.

    The rows' own inner products enter, so that their loss of orthonormality does not build up.

    Raises:
        NotSymmetricError: the operator is not symmetric beyond rounding.
    """
    dots = [
        op.space.dots(rows, rows.mT),
        op.space.dots(rows, images.mT),
        row_norms(op.space, images)[:, None],
    ]
    gram, projected, norms = torch.cat(dots, 1).to("cpu", torch.float64).tensor_split([len(rows), -1], dim=1)
    factor = torch.linalg.cholesky((gram + gram.mT) / 2)
    to_rows = torch.linalg.inv(factor).mT
    values, vectors = torch.linalg.eigh(to_rows.mT @ ((projected + projected.mT) / 2) @ to_rows)
    norm = max(float(values.abs().max()), float(norms.max()))
    asymmetry = float((projected - projected.mT).abs().max())
    check_symmetric(op, asymmetry, norm)
    noisy_norm = asymmetry / (ROUNDING * torch.finfo(op.dtype).eps)
    return Projection(values, vectors, to_rows, max(norm, noisy_norm), asymmetry / norm if norm else 0.0)


def rotate(state: S, projection: Projection, coordinates: Tensor) -> S:
    """Rotate the rows to those with these coordinates ``[m, j]``, and take over norm and asymmetry."""
    for matrix in (state.rows, state.images):
        rotate_(matrix, projection.to_rows @ coordinates)
    return replace(
        state,
        norm=max(state.norm, projection.norm),
        asymmetry=max(state.asymmetry, projection.asymmetry),
        num_rows=coordinates.shape[1],
    )


def status_of(
    op: LinearOperator, request: Request, state: BlockSubspace, found: RitzPairs, done: Tensor, *, whole: bool
) -> Status | None:
    """Return the status if the solve is over with these wanted pairs.

    It is over if all are ``done`` ``[k]``, if they come from the ``whole`` space, or if a matvec was not finite.
    """
    if state.suspect is not None:
        return Status.NON_FINITE
    if len(done) < request.k or not (whole or bool(done.all())):
        return None
    best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
    bounds = found.residual_norms + rounding(op, state.norm)
    attainable = attainable_accuracy(op, state.norm)
    return final_status(best, request, state.norm, attainable, found.values, bounds)


def finalize(op: LinearOperator, request: Request, state: BlockSubspace, status: Status) -> EigenResult:
    """Return the best pairs with true residuals, for one more matvec each."""
    warn_asymmetric(op, state.asymmetry, 1.0)
    return check_pairs(
        op, request, state.best, state.scale, state.norm, status=status, num_matvecs=state.num_matvecs
    )
