r"""MINRES: minimal residuals for symmetric matrices, definite or not, with a positive definite preconditioner.

Method: the Lanczos process in the inner product of :math:`M^{-1}`, and a QR factorisation of its tridiagonal matrix by
one rotation a step, so that :math:`\|b - A x_j\|_{M^{-1}}` is the least over the Krylov space. The residual follows by
:math:`r_j = s_j^2 r_{j-1} - \bar\phi_j c_j v_{j+1}`, with the rotation (c, s) and :math:`\bar\phi_j` the norm.

Cost: a matvec a step, and an application of the preconditioner. Memory: seven vectors for each right-hand side.
Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617-629, doi:10.1137/0712047; the norm of A r: Choi, Paige
and Saunders, SIAM J. Sci. Comput. 33 (2011) 1810-1836, doi:10.1137/100787921.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.solvers.linear.recurrence import (
    FLATNESS,
    INVARIANT,
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

    v: Tensor = field(metadata=LONG)
    z: Tensor = field(metadata=LONG)
    v_before: Tensor = field(metadata=LONG)
    d: Tensor = field(metadata=LONG)
    d_before: Tensor = field(metadata=LONG)
    scalars: Tensor


def _inverse(xp: Any, values: Any) -> Any:
    """Return one over values; 1 where they are zero or not finite."""
    one = xp.ones_like(values)
    return one / xp.where((values != 0) & xp.isfinite(values), values, one)


def _rotation(xp: Any, eps: float, sums: Any, numbers: Any, scalars: Any) -> tuple[Any, Any, Any, Any]:
    """Compute the next column of the factorisation, for numbers ``[k]`` of each row.

    Args:
        xp: the module of :func:`hvpkit.solvers.linear.recurrence.arrays`.
        eps: of the dtype.
        sums: diagonal entry of the tridiagonal matrix, square of the next off-diagonal one, and squares of the norms of
            the vector that was multiplied and of its image ``[4, k]``.
        numbers: stopped, norm and least, of the iterates ``[3, k]``.
        scalars: of the vectors ``[7, k]``.

    Returns:
        Rows that take the step ``[k]``; numbers and scalars after it; and the coefficients of the updates ``[7, k]``:
        -epsilon, -delta, 1 / gamma, phi, 1 / beta, the square of the sine, and minus the factor of v in r.
    """
    (alpha, beta_square, square, image_square), (stopped, norm, waiting) = sums, numbers
    _, phibar, dbar, epsilon, cosine, sine, largest = scalars
    norm = norm_seen(xp, stopped, norm, square, image_square)
    beta = xp.sqrt(beta_square.clip(0))
    finite = xp.isfinite(alpha + beta)
    largest = xp.maximum(largest, xp.maximum(abs(alpha), beta))
    flat = FLATNESS * eps * largest
    broken = beta <= flat
    beta = xp.where(broken, xp.zeros_like(beta), beta)
    delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
    dbar_next, gamma = -cosine * beta, xp.hypot(gbar, beta)
    # norm of A r before this step, over those of A and r
    least = (xp.hypot(gbar, dbar_next) <= eps**NEARLY_LEAST * largest) & (phibar > 0)
    stopped = stop(xp, stopped, [(~finite, NON_FINITE), (gamma <= flat, SINGULAR)])
    pausing = (stopped == RUNNING) & least & (waiting < 2)
    going = (stopped == RUNNING) & ~pausing
    inverse = _inverse(xp, gamma)
    cosine_next, sine_next = gbar * inverse, beta * inverse
    phi, phibar_next = cosine_next * phibar, sine_next * phibar
    stopped = stop(xp, stopped, [(broken & going, INVARIANT)])
    waiting = xp.where(pausing, xp.ones_like(waiting), waiting)
    following = [beta, phibar_next, dbar_next, sine * beta, cosine_next, sine_next, largest]
    updates = [-epsilon, -delta, inverse, phi, _inverse(xp, beta), sine_next**2, -phibar_next * cosine_next]
    return going, xp.stack([stopped, norm, waiting]), xp.stack(following), xp.stack(updates)


class Minres:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor) -> LanczosVectors:
        """Return the first Lanczos vectors."""
        z = matrix.preconditioned(r)
        beta = matrix.dots(r, z).clamp(min=0).sqrt()
        unit = _inverse(torch, beta)[:, None]
        zero = torch.zeros_like(beta)
        scalars = torch.stack([zero, beta, zero, zero, zero - 1, zero, zero], dim=1)
        v_before, d, d_before = (torch.zeros_like(r) for _ in range(3))
        return LanczosVectors(r * unit, z * unit, v_before, d, d_before, scalars)

    def advance(
        self, matrix: Matrix, iterates: Iterates, vectors: LanczosVectors
    ) -> tuple[Iterates, LanczosVectors]:
        """Take one step."""
        v, z = vectors.v, vectors.z
        images = matrix.apply(z)
        image = images - vectors.v_before
        alpha = matrix.dots(z, image)
        image = torch.addcmul(image, alpha[:, None], v, value=-1.0)
        z_next = matrix.preconditioned(image)
        sums = torch.stack(
            [alpha, matrix.dots(image, z_next), matrix.dots(z, z), matrix.dots(images, images)]
        )
        numbers = torch.stack([iterates.stopped, iterates.norm, iterates.least])
        xp, known = arrays(sums, numbers, vectors.scalars.mT)
        with np.errstate(all="ignore"):
            going, *found = _rotation(xp, torch.finfo(v.dtype).eps, *known)
        going = mask(going)
        (stopped, norm, least), scalars, updates = tensors(*found)
        epsilon, delta, inverse, phi, unit, sine, factor = updates[:, :, None]
        d = torch.addcmul(torch.addcmul(z, epsilon, vectors.d_before), delta, vectors.d) * inverse
        x = rows_where(going, torch.addcmul(iterates.x, phi, d), iterates.x)
        v_next = image * unit
        z_next = v_next if matrix.precondition is None else z_next * unit
        r = rows_where(going, torch.addcmul(sine * iterates.r, factor, v_next), iterates.r)
        fresh = LanczosVectors(v_next, z_next, scalars[0][:, None] * v, d, vectors.d, scalars.mT)
        kept = {name: rows_where(going, value, getattr(vectors, name)) for name, value in vars(fresh).items()}
        return Iterates(x, r, stopped, norm, least), LanczosVectors(**kept)

    def multiplied(self, vectors: LanczosVectors) -> Tensor:
        """Return the preconditioned Lanczos vectors."""
        return vectors.z
