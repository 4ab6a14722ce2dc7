r"""Conjugate gradients, preconditioned, for positive definite matrices.

Method: :math:`x_{j+1} = x_j + \alpha_j p_j` minimises :math:`\|x - x_*\|_A` over the Krylov space, with A-orthogonal
directions p and :math:`\alpha_j = r_j' M^{-1} r_j / p_j' A p_j`. Where :math:`p_j' A p_j` is negative, A is not
positive definite, and no further step is taken.

Cost: a matvec a step, and an application of the preconditioner. Memory: four vectors for each right-hand side.
Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952) 409-436, doi:10.6028/jres.049.044.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit.solvers.linear.recurrence import (
    FLATNESS,
    NEGATIVE,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Iterates,
    Matrix,
    norm_seen,
    rows_where,
    stop,
)


@dataclass(frozen=True)
class Directions:
    """The vectors of conjugate gradients from one step to the next.

    Attributes:
        p: directions ``[k, n]``; where a row stopped, that of no positive curvature.
        rz: :math:`r'z` with the preconditioned residual z ``[k]``.
        curvature: :math:`p'Ap / p'p` of the last direction ``[k]``.
    """

    p: Tensor
    rz: Tensor
    curvature: Tensor


class ConjugateGradients:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor) -> Directions:
        """Return the first directions."""
        z = matrix.preconditioned(r)
        rz = matrix.dots(r, z)
        return Directions(z.clone(), rz, torch.zeros_like(rz))

    def advance(self, matrix: Matrix, iterates: Iterates, vectors: Directions) -> tuple[Iterates, Directions]:
        """Take one step."""
        p, before = vectors.p, iterates.stopped == RUNNING
        images = matrix.apply(p)
        size, pAp = matrix.dots(p, p), matrix.dots(p, images)
        one, finite = torch.ones_like(size), torch.isfinite(pAp)
        squared = torch.where(size > 0, size, one)
        curvature = torch.where(before, pAp / squared, vectors.curvature)
        norm = norm_seen(matrix, iterates, p, images)
        noise = FLATNESS * torch.finfo(p.dtype).eps * norm
        reasons = [(~finite, NON_FINITE), (curvature < -noise, NEGATIVE), (curvature <= noise, SINGULAR)]
        stopped = stop(iterates.stopped, reasons)
        going = stopped == RUNNING
        alpha = torch.where(going, vectors.rz / torch.where(going, pAp, one), 0.0)[:, None]
        x = torch.addcmul(iterates.x, alpha, p)
        r = rows_where(going, iterates.r - alpha * images, iterates.r)
        z = matrix.preconditioned(r)
        rz = matrix.dots(r, z)
        beta = rz / torch.where(vectors.rz > 0, vectors.rz, one)
        p = rows_where(going, torch.addcmul(z, beta[:, None], p), p)
        rz = torch.where(going, rz, vectors.rz)
        return Iterates(x, r, stopped, norm, iterates.least), Directions(p, rz, curvature)

    def multiplied(self, vectors: Directions) -> Tensor:
        """Return the directions."""
        return vectors.p
