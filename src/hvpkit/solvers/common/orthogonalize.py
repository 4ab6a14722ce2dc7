"""Growing an orthonormal basis, a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit.operators.space import Space

BREAKDOWN = 16.0
"""In units of eps * norm: what is left of a vector beside the basis, and counts as nothing."""


def orthonormalise_(
    space: Space, basis: Tensor, row: int, vector: Tensor, norm: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes what of ``vector`` ``[n]`` is orthogonal to the rows above ``row``, at unit length, to that row.

    Classical Gram-Schmidt, twice: orthogonal to rounding, by matrix-vector products, without waiting for
    the device.

    Args:
        space: inner products.
        basis: rows ``[capacity, n]``, orthonormal (or zero) above ``row``; written to.
        row: where the new vector goes.
        vector: ``[n]``.
        norm: 0-d; less than rounding of it counts as nothing.
        first: the vector is orthogonal to the rows above this one, but for rounding: one pass is enough for them.

    Returns:
        Coefficients ``[row]`` of ``vector`` on the rows above, length of the rest, and 1, or 0 where that rest
        counts as nothing; the row is then zero. NaN and infinity stay in the coefficients.
    """
    rows, near = basis[:row], basis[first:row]
    found = space.dots(near, vector)
    rest = torch.addmv(vector, near.mT, found, alpha=-1.0, out=basis[row])
    coefficients = space.dots(rows, rest)
    rest.addmv_(rows.mT, coefficients, alpha=-1.0)
    length = space.norm(rest)
    left = length > BREAKDOWN * torch.finfo(basis.dtype).eps * norm
    alive = left.to(basis.dtype)
    rest.mul_(alive / torch.where(left, length, torch.ones_like(length)))
    coefficients[first:] += found
    return coefficients, length, alive
