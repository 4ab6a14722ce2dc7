"""A subspace that a block solver works on: its rows and their products, Ritz pairs, and what is found in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers.common.block import complete_, extend_, power_of_two, row_norms, start_, turn_
from hvpkit.solvers.common.convergence import (
    NOISE,
    Checked,
    check_pairs,
    check_symmetric,
    final_status,
    floor,
    rounding,
    warn_asymmetric,
)
from hvpkit.solvers.common.request import Request

WHOLE = 1000
"""The largest n for which a subspace may come to be the whole space."""


@dataclass(frozen=True)
class Subspace:
    """Orthonormal rows: those with products, and then new ones still to be multiplied.

    The functions of this file, and the looks of solvers, take over the buffers.

    Attributes:
        rows: ``[capacity, n]``.
        images: products with them over ``scale`` ``[capacity, n]``.
        best: the best wanted pairs so far, over ``scale``.
        scale: what products are divided by, 0-d.
        suspect: a vector ``[n]`` whose product was not finite.
        norm: the largest norm of a product with a unit vector, over ``scale``.
        asymmetry: the largest ``|v'(Aw) - w'(Av)|`` of unit vectors, over the norm.
        num_rows: rows that are multiplied.
        num_fresh: the last of these, which no look has seen.
        num_new: rows after them, still to be multiplied.
        num_matvecs: full-data products so far.
        num_random: random vectors drawn so far.
    """

    rows: Tensor
    images: Tensor
    best: Checked
    scale: Tensor
    suspect: Tensor | None = None
    norm: float = 0.0
    asymmetry: float = 0.0
    num_rows: int = 0
    num_fresh: int = 0
    num_new: int = 0
    num_matvecs: float = 0.0
    num_random: int = 0


S = TypeVar("S", bound=Subspace)


def start(op: LinearOperator, asked: Request, width: int, capacity: int) -> Subspace:
    """New rows from the start of the caller's and random vectors; room for all of a small space."""
    capacity = op.n if op.n <= WHOLE else min(capacity, op.n)
    rows = torch.empty(capacity, op.n, dtype=op.dtype, device=op.device)
    num_random = start_(op, rows, width, asked.start, asked.seed)
    nothing = torch.zeros(0, dtype=torch.float64)
    best = Checked(nothing, rows[:0].mT, nothing)
    scale = rows.new_ones(())
    return Subspace(rows, torch.empty_like(rows), best, scale, num_new=width, num_random=num_random)


def multiply(op: LinearOperator, state: S, width: int) -> S:
    """The state with products of new rows, at most ``width`` of them. Waits for nothing."""
    width = min(width, state.num_new)
    new = slice(state.num_rows, state.num_rows + width)
    images = op.product(state.rows[new].mT.contiguous()).mT
    if state.num_matvecs == 0:
        state = replace(state, scale=power_of_two(images.abs().max()))
    torch.div(images, state.scale, out=state.images[new])
    return replace(
        state,
        num_rows=new.stop,
        num_fresh=state.num_fresh + width,
        num_new=state.num_new - width,
        num_matvecs=state.num_matvecs + width * op.cost,
    )


def extend(op: LinearOperator, asked: Request, state: S, vectors: Tensor) -> S:
    """The state with what is new in ``vectors`` ``[w, n]`` as new rows, or with a random one if nothing is.

    In a small space all that is missing is new once as many products are spent, if there is a budget for it.
    """
    m, missing, spent = state.num_rows, op.n - state.num_rows, state.num_matvecs
    whole = op.n <= WHOLE and spent >= op.n * op.cost and asked.left(spent) >= missing * op.cost
    num_new = 0 if whole else extend_(op.space, state.rows, m, vectors[:missing])
    end = op.n if whole else m + max(num_new, 1)
    num_random = complete_(op, state.rows[:end], m + num_new, asked.seed, state.num_random)
    return replace(state, num_new=end - m, num_random=num_random)


def drop_non_finite(state: S) -> S:
    """The state without rows whose products are not finite, the first of them noted, and nothing fresh or new."""
    first, end = state.num_rows - state.num_fresh, state.num_rows
    finite = torch.isfinite(state.images[first:end]).all(dim=1).tolist()
    state = replace(state, num_fresh=0, num_new=0)
    if all(finite):
        return state
    suspect = state.rows[first + finite.index(False)].clone()
    kept = [*range(first), *(first + place for place, good in enumerate(finite) if good)]
    for matrix in (state.rows, state.images):
        matrix[: len(kept)] = matrix[kept]
    return replace(state, num_rows=len(kept), suspect=suspect)


@dataclass(frozen=True)
class RitzBlock:
    """Ritz pairs of an operator on rows that are orthonormal up to rounding, on the CPU in float64.

    Attributes:
        values: ascending ``[m]``.
        vectors: their orthonormal columns ``[m, m]``, in the coordinates of the rows after Gram-Schmidt in
            their order, so that the first j coordinates are the span of the first j rows.
        to_rows: what turns such coordinates into coefficients of the rows, ``[m, m]``.
        norm: the largest Ritz value in absolute value, or norm of a product with a row, if that is more; more still
            where products are noisier than by rounding, as asymmetry shows: a norm whose rounding covers it.
        asymmetry: the largest ``|v'(Aw) - w'(Av)|`` of two rows, over the norm.
    """

    values: Tensor
    vectors: Tensor
    to_rows: Tensor
    norm: float
    asymmetry: float


def rayleigh_ritz(op: LinearOperator, rows: Tensor, images: Tensor) -> RitzBlock:
    """Ritz pairs on ``rows`` ``[m, n]``, of which ``images`` are the products; both finite.

    The rows' own inner products enter, so that what they lack of orthonormality does not build up.

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
    noisy_norm = asymmetry / (NOISE * torch.finfo(op.dtype).eps)
    return RitzBlock(values, vectors, to_rows, max(norm, noisy_norm), asymmetry / norm if norm else 0.0)


def turn(state: S, pairs: RitzBlock, coordinates: Tensor) -> S:
    """The state with rows that have these coordinates ``[m, j]``, as in ``pairs``, and with what these tell of it."""
    for matrix in (state.rows, state.images):
        turn_(matrix, pairs.to_rows @ coordinates)
    return replace(
        state,
        norm=max(state.norm, pairs.norm),
        asymmetry=max(state.asymmetry, pairs.asymmetry),
        num_rows=coordinates.shape[1],
    )


def outcome(
    op: LinearOperator, asked: Request, state: Subspace, found: Checked, done: Tensor, *, whole: bool
) -> Status | None:
    """Why it is over with these wanted pairs, if it is: all done ``[k]``, from the ``whole`` space, or not finite."""
    if state.suspect is not None:
        return Status.NON_FINITE
    if len(done) < asked.k or not (whole or bool(done.all())):
        return None
    best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
    bounds = found.residual_norms + rounding(op, state.norm)
    return final_status(best, asked.tol, floor(op, state.norm), found.values, bounds)


def finalize(op: LinearOperator, asked: Request, state: Subspace, status: Status) -> EigenResult:
    """The best pairs with true residuals, for one more product each."""
    warn_asymmetric(op, state.asymmetry, 1.0)
    return check_pairs(
        op,
        state.best,
        state.scale,
        state.norm,
        k=asked.k,
        which=asked.which,
        tol=asked.tol,
        status=status,
        num_matvecs=state.num_matvecs,
    )
