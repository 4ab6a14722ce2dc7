r"""MINRES: minimal residuals for symmetric matrices, definite or not, with a positive definite preconditioner.

Method: the Lanczos process in the inner product of :math:`M^{-1}`, and a QR factorisation of its tridiagonal matrix by
one rotation a step, so that :math:`\|b - A x_j\|_{M^{-1}}` is the least over the Krylov space. The residual follows by
:math:`r_j = s_j^2 r_{j-1} - \bar\phi_j c_j v_{j+1}`, with the rotation (c, s) and :math:`\bar\phi_j` the norm.

Cost: a matvec a step, and an application of the preconditioner. Memory: seven vectors for each right-hand side.
Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617-629, doi:10.1137/0712047; the norm of A r: Choi, Paige
and Saunders, SIAM J. Sci. Comput. 33 (2011) 1810-1836, doi:10.1137/100787921.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit.solvers.linear.recurrence import (
    FLATNESS,
    INVARIANT,
    NON_FINITE,
    RUNNING,
    SINGULAR,
    Iterates,
    Matrix,
    norm_seen,
    rows_where,
    stop,
)

NEARLY_LEAST = 0.5
"""Power of eps: where the norm of A r is at most this times those of A and r, r is nearly the least residual. In an
inconsistent system of 100 it falls to 4e-9 in float64 and 1e-4 in float32, before x begins to grow."""


@dataclass(frozen=True)
class LanczosVectors:
    """The vectors of MINRES from one step to the next, of the two last steps.

    Attributes:
        v, z: the Lanczos vector and :math:`M^{-1}` times it, of unit inner product ``[k, n]``.
        v_before: the one before, times beta ``[k, n]``.
        d, d_before: directions of x ``[k, n]``.
        scalars: beta, phibar, dbar, epsilon, cosine, sine, largest entry of the tridiagonal matrix ``[k, 7]``.
    """

    v: Tensor
    z: Tensor
    v_before: Tensor
    d: Tensor
    d_before: Tensor
    scalars: Tensor


def _safe(values: Tensor) -> Tensor:
    """Return values to divide by: 1 where they are zero or not finite."""
    return torch.where((values != 0) & torch.isfinite(values), values, torch.ones_like(values))


class Minres:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor) -> LanczosVectors:
        """Return the first Lanczos vectors."""
        z = matrix.preconditioned(r)
        beta = matrix.dots(r, z).clamp(min=0).sqrt()
        unit = 1 / _safe(beta)[:, None]
        zero = torch.zeros_like(beta)
        scalars = torch.stack([zero, beta, zero, zero, zero - 1, zero, zero], dim=1)
        v_before, d, d_before = (torch.zeros_like(r) for _ in range(3))
        return LanczosVectors(r * unit, z * unit, v_before, d, d_before, scalars)

    def advance(
        self, matrix: Matrix, iterates: Iterates, vectors: LanczosVectors
    ) -> tuple[Iterates, LanczosVectors]:
        """Take one step."""
        v, z = vectors.v, vectors.z
        _, phibar, dbar, epsilon, cosine, sine, largest = vectors.scalars.unbind(1)
        eps = torch.finfo(v.dtype).eps
        images = matrix.apply(z)
        norm = norm_seen(matrix, iterates, z, images)
        image = images - vectors.v_before
        alpha = matrix.dots(z, image)
        image = torch.addcmul(image, alpha[:, None], v, value=-1.0)
        z_next = matrix.preconditioned(image)
        beta = matrix.dots(image, z_next).clamp(min=0).sqrt()
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        largest = torch.maximum(largest, torch.maximum(alpha.abs(), beta))
        broken = beta <= FLATNESS * eps * largest
        beta = torch.where(broken, 0.0, beta)

        delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
        epsilon_next, dbar_next = sine * beta, -cosine * beta
        # norm of A r before this step, over those of A and r
        slope = torch.hypot(gbar, dbar_next)
        least = (slope <= eps**NEARLY_LEAST * largest) & (phibar > 0)
        gamma = torch.hypot(gbar, beta)
        gone = gamma <= FLATNESS * eps * largest
        stopped = stop(iterates.stopped, [(~finite, NON_FINITE), (gone, SINGULAR)])
        pausing = (stopped == RUNNING) & least & (iterates.least < 2)
        going = (stopped == RUNNING) & ~pausing
        cosine_next, sine_next = gbar / _safe(gamma), beta / _safe(gamma)
        phi, phibar_next = cosine_next * phibar, sine_next * phibar
        d = (z - epsilon[:, None] * vectors.d_before - delta[:, None] * vectors.d) / _safe(gamma)[:, None]
        x = rows_where(going, torch.addcmul(iterates.x, phi[:, None], d), iterates.x)
        unit = 1 / _safe(beta)[:, None]
        v_next, z_next = image * unit, z_next * unit
        r = (sine_next**2)[:, None] * iterates.r - (phibar_next * cosine_next)[:, None] * v_next
        r = rows_where(going, r, iterates.r)
        stopped = stop(stopped, [(broken & going, INVARIANT)])
        scalars = torch.stack(
            [beta, phibar_next, dbar_next, epsilon_next, cosine_next, sine_next, largest], dim=1
        )
        fresh = LanczosVectors(v_next, z_next, beta[:, None] * v, d, vectors.d, scalars)
        kept = {name: rows_where(going, value, getattr(vectors, name)) for name, value in vars(fresh).items()}
        waiting = torch.where(pausing, 1.0, iterates.least)
        return Iterates(x, r, stopped, norm, waiting), LanczosVectors(**kept)

    def multiplied(self, vectors: LanczosVectors) -> Tensor:
        """Return the preconditioned Lanczos vectors."""
        return vectors.z
