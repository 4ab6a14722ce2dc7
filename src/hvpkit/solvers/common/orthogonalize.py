"""Orthonormal rows: Gram-Schmidt, start blocks, rotation in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpkit._utils.random import normal_vector
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space

BREAKDOWN = 16.0
"""In units of eps * norm: the remainder of a vector after orthogonalisation that counts as zero."""

CHUNK = 2**22
"""Entries of a block that are rotated at a time: 32 MiB in float64. Chosen by feel."""

RANDOM_SHARE = 0.1
"""Norm of the random vector that is added to a start vector of the caller's, of unit norm. Chosen by feel."""


def orthonormalise_(
    space: Space, basis: Tensor, row: int, vector: Tensor, norm: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonalise ``vector`` ``[n]`` against the rows above ``row``, and write it to that row with unit norm.

    Classical Gram-Schmidt, twice: orthogonal to rounding, by matrix-vector products, without host synchronisation.

    Args:
        space: inner products.
        basis: rows ``[capacity, n]``, orthonormal (or zero) above ``row``; written to.
        row: where the new vector goes.
        vector: ``[n]``.
        norm: 0-d; a remainder below the rounding of it counts as zero.
        first: the vector is orthogonal to the rows above this one, but for rounding: one pass is enough for them.

    Returns:
        Coefficients ``[row]`` of ``vector`` on the rows above, norm of the remainder, and 1, or 0 where the remainder
        counts as zero; the row is then zero. NaN and infinity stay in the coefficients.
    """
    rows, near = basis[:row], basis[first:row]
    found = space.dots(near, vector)
    rest = torch.addmv(vector, near.mT, found, alpha=-1.0, out=basis[row])
    coefficients = space.dots(rows, rest)
    rest.addmv_(rows.mT, coefficients, alpha=-1.0)
    rest_norm = space.norm(rest)
    left = rest_norm > BREAKDOWN * torch.finfo(basis.dtype).eps * norm
    alive = left.to(basis.dtype)
    rest.mul_(alive / torch.where(left, rest_norm, torch.ones_like(rest_norm)))
    coefficients[first:] += found
    return coefficients, rest_norm, alive


def row_norms(space: Space, rows: Tensor) -> Tensor:
    """Return the Euclidean norms ``[m]`` of ``rows`` ``[m, n]``."""
    return space.row_norms(rows)


def residuals_of(rows: Tensor, images: Tensor, values: Tensor) -> Tensor:
    """Return the residuals ``[m, n]`` of Ritz vectors in rows, from their matvecs and values ``[m]``."""
    return torch.addcmul(images, rows, values.to(rows)[:, None], value=-1.0)


def rotate_(matrix: Tensor, coefficients: Tensor) -> None:
    """Replace the first j rows of ``matrix`` ``[capacity, n]`` by combinations ``coefficients`` ``[m, j]`` of m rows.

    In place, a few columns at a time.
    """
    m, j = coefficients.shape
    rotation = coefficients.mT.to(matrix)
    for columns in matrix.split(max(1, CHUNK // max(m, 1)), dim=1):
        columns[:j] = rotation @ columns[:m]


def extend_(space: Space, rows: Tensor, first: int, vectors: Tensor) -> int:
    """Orthonormalise ``vectors`` ``[w, n]`` against the rows above ``first`` and append them; return their number.

    Vectors that depend on rows above are dropped. There must be room for all. Waits for the device.
    """
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    alive = []
    for row, vector in enumerate(vectors, start=first):
        peak = space.peak(vector)
        unit = vector / torch.where(peak > 0, peak, one)
        norm = space.norm(unit)
        unit = unit / torch.where(norm > 0, norm, one)
        alive.append(orthonormalise_(space, rows, row, unit, one)[2])
    kept = [first + place for place, left in enumerate(torch.stack(alive).tolist()) if left] if alive else []
    if len(kept) < len(alive):
        rows[first : first + len(kept)] = rows[kept]
    return len(kept)


def start_(op: LinearOperator, rows: Tensor, width: int, v0: Tensor | None, seed: int) -> int:
    """Fill ``width`` orthonormal rows, from ``v0`` ``[n, p]`` and then at random; return the random vectors drawn.

    Of v0 as :func:`mixed_start`: a start without any part in the wanted vectors would converge to others, and nothing
    would show it.
    """
    first = (
        0 if v0 is None else extend_(op.space, rows, 0, op.space.local(mixed_start(v0, width, seed).mT).mT)
    )
    return complete_(op, rows[:width], first, seed, 0)


def mixed_start(v0: Tensor, width: int, seed: int) -> Tensor:
    """Return at most ``width`` start rows from the columns of v0 ``[n, p]``.

    Unit columns are assigned round-robin to rows and summed, each sum with a random vector of norm ``RANDOM_SHARE``.
    """
    columns = v0 / v0.abs().amax(dim=0)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    sums = torch.stack([columns[:, first::width].sum(dim=1) for first in range(min(width, columns.shape[1]))])
    noise = normal_vector(sums.numel(), dtype=v0.dtype, device=v0.device, seed=seed).view_as(sums)
    norms: Tensor = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    return sums + RANDOM_SHARE * noise / norms


def complete_(op: LinearOperator, rows: Tensor, first: int, seed: int, stream: int) -> int:
    """Fill ``rows`` from ``first`` on with random orthonormal ones; return the last stream of the seed used."""
    while first < len(rows):
        stream += 1
        vector = op.space.random(op.n, like=rows, seed=seed, stream=stream)
        first += extend_(op.space, rows, first, vector[None])
    return stream


def power_of_two(peak: Tensor) -> Tensor:
    """Return the power of two below ``peak``, to divide matvecs by; 1 where it is zero or not finite."""
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.exp2(torch.log2(torch.where(usable, peak, torch.ones_like(peak))).floor())


def unit_of(peak: float) -> float:
    """Return the power of two below a number, as :func:`power_of_two`."""
    return math.ldexp(0.5, math.frexp(peak)[1]) if 0 < peak < math.inf else 1.0
