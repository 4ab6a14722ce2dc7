r"""Conjugate gradients, preconditioned, for positive definite matrices.

Method: :math:`x_{j+1} = x_j + \alpha_j p_j` minimises :math:`\|x - x_*\|_A` over the Krylov space, with A-orthogonal
directions p and :math:`\alpha_j = r_j' M^{-1} r_j / p_j' A p_j`. Where :math:`p_j' A p_j` is negative, A is not
positive definite, and no further step is taken.

Cost: a matvec a step, and an application of the preconditioner. Memory: four vectors for each right-hand side.
Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952) 409-436, doi:10.6028/jres.049.044.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
    Numbers,
    combined,
    norm_seen,
    rows_where,
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
    rz: Numbers
    curvature: Numbers


def _step_length(
    eps: float, pAp: float, square: float, image_square: float, rz: float, known: tuple[float, int, float]
) -> tuple[float, float, int, float]:
    """Return the step along a row's direction, its curvature, why the row has stopped, and the norm seen.

    Args:
        eps: of the dtype.
        pAp: inner product of the direction and its image.
        square: of the norm of the direction.
        image_square: of that of the image.
        rz: inner product of the residual and the preconditioned one.
        known: curvature, reason to stop and norm of the step before.
    """
    curvature, stopped, norm = known
    if stopped != RUNNING:
        return 0.0, curvature, stopped, norm
    curvature, norm = pAp / (square or 1.0), norm_seen(norm, square, image_square)
    noise = FLATNESS * eps * norm
    if curvature > noise and math.isfinite(pAp):
        return rz / pAp, curvature, RUNNING, norm
    reason = NON_FINITE if not math.isfinite(pAp) else NEGATIVE if curvature < -noise else SINGULAR
    return 0.0, curvature, reason, norm


class ConjugateGradients:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor) -> Directions:
        """Return the first directions."""
        z = matrix.preconditioned(r)
        (rz,) = matrix.dots((r, z))
        return Directions(z.clone(), tuple(rz), (0.0,) * len(rz))

    def advance(self, matrix: Matrix, iterates: Iterates, vectors: Directions) -> tuple[Iterates, Directions]:
        """Take one step."""
        p, images = vectors.p, matrix.apply(vectors.p)
        sums = matrix.dots((p, images), (p, p), (images, images))
        eps = torch.finfo(p.dtype).eps
        known = zip(vectors.curvature, iterates.stopped, iterates.norms, strict=True)
        steps = [_step_length(eps, *row) for row in zip(*sums, vectors.rz, known, strict=True)]
        lengths, curvature, stopped, norms = zip(*steps, strict=True)
        x = combined(iterates.x, lengths, p)
        r = combined(iterates.r, [-length for length in lengths], images)
        going = [reason == RUNNING for reason in stopped]
        if not all(going):
            r = rows_where(going, r, iterates.r)
        z = matrix.preconditioned(r)
        rz, *squares = matrix.dots((r, z)) if z is r else matrix.dots((r, z), (r, r))
        sizes = tuple(math.sqrt(square) for square in (squares[0] if squares else rz))
        p_next = combined(z, [new / (old or 1.0) for new, old in zip(rz, vectors.rz, strict=True)], p)
        if not all(going):
            p_next = rows_where(going, p_next, p)
        return Iterates(x, r, sizes, stopped, norms, iterates.least), Directions(p_next, tuple(rz), curvature)

    def multiplied(self, vectors: Directions) -> Tensor:
        """Return the directions."""
        return vectors.p
