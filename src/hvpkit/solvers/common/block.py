"""Blocks of orthonormal rows: how they start, grow and turn."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit._utils.random import normal_vector
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.solvers.common.orthogonalize import orthonormalise_

CHUNK = 2**22
"""Entries of a block that are turned at a time."""

RANDOM_SHARE = 0.1
"""Length of the random vector that goes with a start vector of the caller's."""


def row_norms(space: Space, rows: Tensor) -> Tensor:
    """Euclidean norms ``[m]`` of ``rows`` ``[m, n]``."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return space.reduce(lengths * lengths).sqrt()


def residuals_of(rows: Tensor, images: Tensor, values: Tensor) -> Tensor:
    """Residuals ``[m, n]`` of Ritz vectors in rows, from their products and values ``[m]``."""
    return torch.addcmul(images, rows, values.to(rows)[:, None], value=-1.0)


def turn_(matrix: Tensor, coefficients: Tensor) -> None:
    """Replaces the first rows of ``matrix`` ``[capacity, n]`` by combinations ``coefficients`` ``[m, j]`` of m.

    In place, a few columns at a time.
    """
    m, j = coefficients.shape
    turned = coefficients.mT.to(matrix)
    for columns in matrix.split(max(1, CHUNK // max(m, 1)), dim=1):
        columns[:j] = turned @ columns[:m]


def extend_(space: Space, rows: Tensor, first: int, vectors: Tensor) -> int:
    """Writes what is new in ``vectors`` ``[w, n]`` beside the rows above ``first``; how many rows that makes.

    The new rows are orthonormal and orthogonal to those above. There must be room for all. Waits for the device.
    """
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    alive = []
    for row, vector in enumerate(vectors, start=first):
        peak = vector.abs().max()
        unit = vector / torch.where(peak > 0, peak, one)
        length = space.norm(unit)
        unit = unit / torch.where(length > 0, length, one)
        alive.append(orthonormalise_(space, rows, row, unit, one)[2])
    kept = [first + place for place, left in enumerate(torch.stack(alive).tolist()) if left] if alive else []
    if len(kept) < len(alive):
        rows[first : first + len(kept)] = rows[kept]
    return len(kept)


def start_(op: LinearOperator, rows: Tensor, width: int, v0: Tensor | None, seed: int) -> int:
    """Fills ``width`` orthonormal rows, from ``v0`` ``[n, p]`` and then at random; the random vectors it took.

    The columns of v0 are dealt out and summed, each sum with a random vector of a tenth of a column's length: a
    start that lacks the wanted vectors altogether would converge to others without a sign of it.
    """
    first = 0 if v0 is None else extend_(op.space, rows, 0, mixed_start(v0, width, seed))
    return complete_(op, rows[:width], first, seed, 0)


def mixed_start(v0: Tensor, width: int, seed: int) -> Tensor:
    """At most ``width`` rows: sums of the unit columns of v0 ``[n, p]``, dealt out, each with its random vector."""
    columns = v0 / v0.abs().amax(dim=0)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    dealt = [columns[:, first::width].sum(dim=1) for first in range(min(width, columns.shape[1]))]
    sums = torch.stack(dealt)
    noise = normal_vector(sums.numel(), dtype=v0.dtype, device=v0.device, seed=seed).view_as(sums)
    lengths: Tensor = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    return sums + RANDOM_SHARE * noise / lengths


def complete_(op: LinearOperator, rows: Tensor, first: int, seed: int, stream: int) -> int:
    """Fills all ``rows`` from ``first`` on with random orthonormal ones; the last stream of the seed it took."""
    while first < len(rows):
        stream += 1
        vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=seed, stream=stream)
        first += extend_(op.space, rows, first, vector[None])
    return stream


def power_of_two(peak: Tensor) -> Tensor:
    """The power of two below ``peak``; 1 where it is zero or not finite. What products are divided by."""
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.exp2(torch.log2(torch.where(usable, peak, torch.ones_like(peak))).floor())
