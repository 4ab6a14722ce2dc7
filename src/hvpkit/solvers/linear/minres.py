r"""MINRES: minimal residuals for symmetric matrices, definite or not, with a positive definite preconditioner.

Method: the Lanczos process in the inner product of :math:`M^{-1}`, and a QR factorisation of its tridiagonal matrix by
one rotation a step, so that :math:`\|b - A x_j\|_{M^{-1}}` is the least over the Krylov space. The residual follows by
:math:`r_j = s_j^2 r_{j-1} - \bar\phi_j c_j v_{j+1}`, with the rotation (c, s) and :math:`\bar\phi_j` the norm; the
product of the :math:`s_j^2` is kept beside it, so that a step is one update.

Cost: a matvec a step, and an application of the preconditioner. Memory: seven vectors for each right-hand side.
Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617-629, doi:10.1137/0712047; the norm of A r: Choi, Paige
and Saunders, SIAM J. Sci. Comput. 33 (2011) 1810-1836, doi:10.1137/100787921.
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
    INVARIANT,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Matrix,
    Row,
    Steps,
    norm_seen,
)

NEARLY_LEAST = 0.5
"""Power of eps: where the norm of A r is at most this times those of A and r, r is nearly the least residual. In an
inconsistent system of 100 it falls to 4e-9 in float64 and 1e-4 in float32, before x begins to grow."""

SMALL_SHARE = 1e-12
"""Product of squares of sines at which the residual is multiplied by it: what is added to it in float32 stays far from
the largest number. Chosen by feel."""


@dataclass(frozen=True)
class LanczosRow(Row):
    r"""A row of MINRES: the vectors and numbers of the two last steps.

    Attributes:
        residual: by the recurrence, over ``share`` ``[n]``.
        v, z: the Lanczos vector and :math:`M^{-1}` times it, of unit inner product ``[n]``.
        v_before: the one before ``[n]``.
        d, d_before: directions of x times gamma ``[n]``.
        share: product of the squares of all sines.
        beta: norm of the last Lanczos vector before it was scaled.
        phibar: norm of the residual, that of :math:`M^{-1}`.
        dbar, epsilon: entries of the next columns of R, before their rotation.
        cosine, sine: of the last rotation.
        gamma, gamma_before: the last diagonal entries of R, which directions are still to be divided by.
        largest: entry of the tridiagonal matrix.
    """

    residual: Tensor = field(metadata=LONG)
    v: Tensor = field(metadata=LONG)
    z: Tensor = field(metadata=LONG)
    v_before: Tensor = field(metadata=LONG)
    d: Tensor = field(metadata=LONG)
    d_before: Tensor = field(metadata=LONG)
    share: float
    beta: float
    phibar: float
    dbar: float
    epsilon: float
    cosine: float
    sine: float
    gamma: float
    gamma_before: float
    largest: float

    @property
    def r(self) -> Tensor:
        """The residual by the recurrence ``[n]``."""
        return self.residual * self.share

    @property
    def multiplied(self) -> Tensor:
        """The preconditioned Lanczos vector."""
        return self.z


class Minres:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor, size: float) -> LanczosRow:
        """Return a row before its first step."""
        z, norm = r, size
        if matrix.precondition is not None:
            z = matrix.precondition(r)
            norm = math.sqrt(max(matrix.arithmetic.inner_product(r, z), 0.0))
        v, zero = r * _inverse(norm), torch.zeros_like(r)
        z = v if z is r else z * _inverse(norm)
        numbers = (1.0, 0.0, norm, 0.0, 0.0, -1.0, 0.0, 1.0, 1.0, 0.0)
        return LanczosRow(zero, size, RUNNING, 0.0, 0, r, v, z, zero, zero, zero, *numbers)

    def steps(self, matrix: Matrix, row: LanczosRow, goal: float) -> Steps:
        """Take steps until the row ends."""
        arithmetic, precondition = matrix.arithmetic, matrix.precondition
        add, add_, dot, waits = arithmetic.add, arithmetic.add_, arithmetic.dot, arithmetic.waits
        x, residual = arithmetic.copies((row.x, row.residual))
        v, z, v_before, d, d_before = arithmetic.vectors((row.v, row.z, row.v_before, row.d, row.d_before))
        share, beta, phibar, dbar, epsilon = row.share, row.beta, row.phibar, row.dbar, row.epsilon
        cosine, sine, gamma, gamma_before = row.cosine, row.sine, row.gamma, row.gamma_before
        size, stopped, norm, least, largest = row.size, row.stopped, row.norm, row.least, row.largest
        noise, nearly = FLATNESS * arithmetic.eps, arithmetic.eps**NEARLY_LEAST
        image = yield z
        while image is not None:
            rest = add(image, v_before, -beta)
            alpha = dot(z, rest)
            (alpha,) = (yield (alpha,)) if waits else (alpha,)
            rest = add_(rest, v, -alpha)
            z_next = rest if precondition is None else matrix.preconditioned(rest)
            if z_next is rest:  # the basis is orthonormal
                square = dot(rest, rest)
                (square,) = (yield (square,)) if waits else (square,)
                z_square, image_square = 1.0, alpha * alpha + square + beta * beta
            else:
                sums = dot(rest, z_next), dot(z, z), dot(image, image)
                square, z_square, image_square = (yield sums) if waits else sums
            if image_square > norm * norm * z_square:
                norm = norm_seen(norm, z_square, image_square)
            beta_next = math.sqrt(max(square, 0.0))
            if not math.isfinite(alpha + beta_next):
                stopped = NON_FINITE
                break
            peak = max(largest, abs(alpha), beta_next)
            is_broken = beta_next <= noise * peak
            beta_next = 0.0 if is_broken else beta_next
            delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
            dbar_next, gamma_next = -cosine * beta_next, math.hypot(gbar, beta_next)
            if gamma_next <= noise * peak:
                stopped = SINGULAR
                break
            # norm of A r before this step, over those of A and r
            if least < 2 and phibar > 0 and math.hypot(gbar, dbar_next) <= nearly * peak:
                least = 1
                break
            d_next = add_(add(z, d_before, -epsilon / gamma_before), d, -delta / gamma)
            d, d_before, dbar, epsilon = d_next, d, dbar_next, sine * beta_next
            beta, largest, gamma, gamma_before = beta_next, peak, gamma_next, gamma
            cosine, sine = gbar / gamma, beta / gamma
            x, phibar = add_(x, d, cosine * phibar / gamma), sine * phibar
            unit = _inverse(beta)
            is_basis = z_next is rest
            rest *= unit
            v, v_before = rest, v
            z = v if is_basis else z_next * unit
            if share < SMALL_SHARE:
                residual *= share
                share = 1.0
            share *= sine * sine
            if share:
                residual = add_(residual, v, -phibar * cosine / share)
            size = phibar
            if z is not v:
                square = dot(residual, residual)
                (square,) = (yield (square,)) if waits else (square,)
                size = share * math.sqrt(square)
            if is_broken:
                stopped = INVARIANT
            if is_broken or size <= goal:
                break
            image = yield z
        x, residual, v, z = arithmetic.tensors((x, residual, v, z))
        v_before, d, d_before = arithmetic.tensors((v_before, d, d_before))
        vectors = residual, v, z, v_before, d, d_before
        numbers = share, beta, phibar, dbar, epsilon, cosine, sine, gamma, gamma_before, largest
        yield LanczosRow(x, size, stopped, norm, least, *vectors, *numbers)

    def unpack(self, plain: dict[str, Any]) -> LanczosRow:
        """Return a row of its plain data."""
        return LanczosRow(**plain)


def _inverse(value: float) -> float:
    """Return one over value; 1 where it is zero or not finite."""
    return 1 / value if value and math.isfinite(value) else 1.0
