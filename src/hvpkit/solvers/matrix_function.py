r"""A function of an operator times a vector, :math:`f(A)\, b`, by a few Lanczos steps from b.

With orthonormal rows V, Ritz values :math:`\theta_i` and coefficients :math:`s_i` of their vectors,
:math:`f(A)\, b \approx \|b\| \sum_i f(\theta_i)\, s_{1i}\, V^\top s_i` and
:math:`b' f(A)\, b \approx \|b\|^2 \sum_i f(\theta_i)\, s_{1i}^2`, of which the latter is Gauss quadrature.

Cost: a product a step, and full reorthogonalisation. Memory: a vector a step.
Source: Golub and Meurant, Matrices, Moments and Quadrature with Applications, 2010, doi:10.1515/9781400833887.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.common.block import power_of_two
from hvpkit.solvers.common.orthogonalize import orthonormalise_

STRIDE = 3
"""Steps from one look at them to the next."""


@dataclass(frozen=True)
class Krylov:
    """The Krylov space of an operator and a vector b.

    Attributes:
        rows: its orthonormal basis ``[m, n]``.
        values: Ritz values over scale ``[m]``, on the CPU in float64; NaN if a product was not finite.
        coefficients: of Ritz vectors, in columns ``[m, m]``, likewise.
        tail: length, over scale, of what the last product adds to the basis; 0 at the end.
        scale: what products are divided by, 0-d.
    """

    rows: Tensor
    values: Tensor
    coefficients: Tensor
    tail: float
    scale: Tensor


def krylov_space(
    op: LinearOperator,
    vector: Tensor,
    num_steps: int,
    scale: Tensor | None,
    enough: Callable[[Krylov], bool],
) -> Krylov:
    """The space after ``num_steps`` Lanczos steps from ``vector`` ``[n]``, or as soon as it is ``enough``.

    ``scale`` is what products are divided by; None: a power of two near the first one.
    """
    rows = torch.empty(num_steps, op.n, dtype=op.dtype, device=op.device)
    projected = rows.new_zeros(num_steps + 1, num_steps)
    alive, norm = rows.new_zeros(num_steps), rows.new_zeros(())
    alive[0] = orthonormalise_(op.space, rows, 0, vector / vector.abs().max(), norm)[2]
    for row in range(num_steps):
        image = op.product(rows[row].unsqueeze(1))[:, 0]
        if scale is None:
            scale = power_of_two(image.abs().max())
        image, norm = image / scale, torch.maximum(norm, op.space.norm(image / scale))
        count = row + 1
        if count == num_steps:
            projected[:count, row] = op.space.dots(rows, image)
        else:
            projected[:count, row], projected[count, row], alive[count] = orthonormalise_(
                op.space, rows, count, image, norm
            )
        if count % STRIDE == 0 or count == num_steps:
            found = _ritz(rows[:count], projected[: count + 1, :count], alive[:count], scale)
            if count < num_steps and (not math.isfinite(found.tail) or enough(found)):
                break
    return found


def _ritz(rows: Tensor, projected: Tensor, alive: Tensor, scale: Tensor) -> Krylov:
    """Ritz pairs on those rows that are not zero."""
    kept = alive.cpu().nonzero().flatten()
    small = projected.to("cpu", torch.float64)
    tail, small = float(small[-1, -1]), small[kept][:, kept]
    if not bool(torch.isfinite(small).all()):
        nothing = torch.full_like(small, math.nan)
        return Krylov(rows[kept], nothing.diagonal(), nothing, math.nan, scale)
    values, coefficients = torch.linalg.eigh((small + small.mT) / 2)
    return Krylov(rows[kept], values, coefficients, tail, scale)
