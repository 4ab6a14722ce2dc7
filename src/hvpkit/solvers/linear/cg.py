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
from typing import Any

import torch
from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.solvers.linear.recurrence import (
    FLATNESS,
    NEGATIVE,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Matrix,
    Row,
    Steps,
    norm_seen,
)


@dataclass(frozen=True)
class DirectionRow(Row):
    """A row of conjugate gradients.

    Attributes:
        residual: by the recurrence ``[n]``.
        p: direction ``[n]``; where the row stopped, that of no positive curvature.
        rz: :math:`r'z` with the preconditioned residual z.
        curvature: :math:`p'Ap / p'p` of the last direction.
    """

    residual: Tensor = field(metadata=LONG)
    p: Tensor = field(metadata=LONG)
    rz: float
    curvature: float

    @property
    def r(self) -> Tensor:
        """The residual by the recurrence ``[n]``."""
        return self.residual

    @property
    def multiplied(self) -> Tensor:
        """The direction."""
        return self.p


class ConjugateGradients:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor, size: float) -> DirectionRow:
        """Return a row before its first step."""
        z, rz = r, size * size
        if matrix.precondition is not None:
            z = matrix.precondition(r)
            rz = matrix.arithmetic.inner_product(r, z)
        return DirectionRow(torch.zeros_like(r), size, RUNNING, 0.0, 0, r, z, rz, 0.0)

    def steps(self, matrix: Matrix, row: DirectionRow, goal: float) -> Steps:
        """Take steps until the row ends."""
        arithmetic, precondition = matrix.arithmetic, matrix.precondition
        add, add_, dot, waits = arithmetic.add, arithmetic.add_, arithmetic.dot, arithmetic.waits
        x, r = arithmetic.copies((row.x, row.residual))
        (p,) = arithmetic.vectors((row.p,))
        rz, size, norm, curvature, stopped = row.rz, row.size, row.norm, row.curvature, row.stopped
        noise = FLATNESS * arithmetic.eps
        image = yield p
        while image is not None:
            sums = dot(p, image), dot(p, p), dot(image, image)
            pAp, square, image_square = (yield sums) if waits else sums
            curvature = pAp / (square or 1.0)
            if image_square > norm * norm * square:
                norm = norm_seen(norm, square, image_square)
            if not (curvature > noise * norm and math.isfinite(pAp)):
                negative = NEGATIVE if curvature < -noise * norm else SINGULAR
                stopped = negative if math.isfinite(pAp) else NON_FINITE
                break
            length = rz / pAp
            x, r = add_(x, p, length), add_(r, image, -length)
            z = r if precondition is None else matrix.preconditioned(r)
            rr = dot(r, r)
            ends = rr, rr if z is r else dot(r, z)
            rr, rz_next = (yield ends) if waits else ends
            # not in place: a matvec may keep its argument
            size, p, rz = math.sqrt(rr), add(z, p, rz_next / (rz or 1.0)), rz_next
            if size <= goal:
                break
            image = yield p
        x, r, p = arithmetic.tensors((x, r, p))
        yield DirectionRow(x, size, stopped, norm, row.least, r, p, rz, curvature)

    def unpack(self, plain: dict[str, Any]) -> DirectionRow:
        """Return a row of its plain data."""
        return DirectionRow(**plain)
