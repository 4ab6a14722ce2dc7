r"""Conjugate gradients, preconditioned, for positive definite matrices.

Method: :math:`x_{j+1} = x_j + \alpha_j p_j` minimises :math:`\|x - x_*\|_A` over the Krylov space, with A-orthogonal
directions p and :math:`\alpha_j = r_j' M^{-1} r_j / p_j' A p_j`. Where :math:`p_j' A p_j` is negative, A is not
positive definite, and no further step is taken.

Cost: a matvec a step, and an application of the preconditioner. Memory: four vectors for each right-hand side.
Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952) 409-436, doi:10.6028/jres.049.044.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.solvers.linear.recurrence import (
    FLATNESS,
    NEGATIVE,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Iterates,
    Matrix,
    arrays,
    mask,
    norm_seen,
    rows_where,
    stop,
    tensors,
)


@dataclass(frozen=True)
class Directions:
    """The vectors of conjugate gradients from one step to the next.

    Attributes:
        p: directions ``[k, n]``; where a row stopped, that of no positive curvature.
        rz: :math:`r'z` with the preconditioned residual z ``[k]``.
        curvature: :math:`p'Ap / p'p` of the last direction ``[k]``.
    """

    p: Tensor = field(metadata=LONG)
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
        p, images = vectors.p, matrix.apply(vectors.p)
        xp, (size, square, pAp, rz, curvature, stopped, norm) = arrays(
            matrix.dots(p, p),
            matrix.dots(images, images),
            matrix.dots(p, images),
            *(vectors.rz, vectors.curvature, iterates.stopped, iterates.norm),
        )
        one = xp.ones_like(rz)
        with np.errstate(all="ignore"):
            curvature = xp.where(stopped == RUNNING, pAp / xp.where(size > 0, size, one), curvature)
            norm = norm_seen(xp, stopped, norm, size, square)
            noise = FLATNESS * torch.finfo(p.dtype).eps * norm
            reasons = [
                (~xp.isfinite(pAp), NON_FINITE),
                (curvature < -noise, NEGATIVE),
                (curvature <= noise, SINGULAR),
            ]
            stopped = stop(xp, stopped, reasons)
            going = stopped == RUNNING
            alpha = xp.where(going, rz / xp.where(going, pAp, one), xp.zeros_like(rz))
        going = mask(going)
        step, curvature, stopped, norm = tensors(alpha, curvature, stopped, norm)
        x = torch.addcmul(iterates.x, step[:, None], p)
        r = rows_where(going, torch.addcmul(iterates.r, step[:, None], images, value=-1.0), iterates.r)
        z = matrix.preconditioned(r)
        rz_next = rows_where(going, matrix.dots(r, z), vectors.rz)
        beta = rz_next / torch.where(vectors.rz > 0, vectors.rz, 1.0)
        p = rows_where(going, torch.addcmul(z, beta[:, None], p), p)
        return Iterates(x, r, stopped, norm, iterates.least), Directions(p, rz_next, curvature)

    def multiplied(self, vectors: Directions) -> Tensor:
        """Return the directions."""
        return vectors.p
