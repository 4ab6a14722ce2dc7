r"""MINRES: minimal residuals for symmetric matrices, definite or not, with a positive definite preconditioner.

Method: the Lanczos process in the inner product of :math:`M^{-1}`, and a QR factorisation of its tridiagonal matrix by
one rotation a step, so that :math:`\|b - A x_j\|_{M^{-1}}` is the least over the Krylov space. The residual follows by
:math:`r_j = s_j^2 r_{j-1} - \bar\phi_j c_j v_{j+1}`, with the rotation (c, s) and :math:`\bar\phi_j` the norm.

Cost: a matvec a step, and an application of the preconditioner. Memory: seven vectors for each right-hand side.
Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617-629, doi:10.1137/0712047; the norm of A r: Choi, Paige
and Saunders, SIAM J. Sci. Comput. 33 (2011) 1810-1836, doi:10.1137/100787921.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

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
    combined,
    norm_seen,
    rows_where,
    scaled,
)

NEARLY_LEAST = 0.5
"""Power of eps: where the norm of A r is at most this times those of A and r, r is nearly the least residual. In an
inconsistent system of 100 it falls to 4e-9 in float64 and 1e-4 in float32, before x begins to grow."""


class Scalars(NamedTuple):
    r"""The numbers of a row from one step to the next.

    Attributes:
        beta: norm of the last Lanczos vector before it was scaled.
        phibar: norm of the residual, that of :math:`M^{-1}`.
        dbar, epsilon: entries of the next columns of R, before their rotation.
        cosine, sine: of the last rotation.
        gamma, gamma_before: the last diagonal entries of R, which directions are still to be divided by.
        largest: entry of the tridiagonal matrix.
    """

    beta: float
    phibar: float
    dbar: float = 0.0
    epsilon: float = 0.0
    cosine: float = -1.0
    sine: float = 0.0
    gamma: float = 1.0
    gamma_before: float = 1.0
    largest: float = 0.0


class Updates(NamedTuple):
    """The factors of a row's vectors in a step; none is used where the row does not take it."""

    epsilon: float = 0.0
    delta: float = 0.0
    x: float = 0.0
    v: float = 0.0
    r: float = 0.0
    r_by_v: float = 0.0


class Turned(NamedTuple):
    """A row after a step, or as it was if it did not take it."""

    going: bool
    stopped: int
    least: int
    scalars: Scalars
    updates: Updates


@dataclass(frozen=True)
class LanczosVectors:
    """The vectors of MINRES from one step to the next, of the two last steps.

    Attributes:
        v, z: the Lanczos vector and :math:`M^{-1}` times it, of unit inner product ``[k, n]``.
        v_before: the one before ``[k, n]``.
        d, d_before: directions of x times gamma ``[k, n]``.
        scalars: :class:`Scalars` of each row ``[k]``.
    """

    v: Tensor = field(metadata=LONG)
    z: Tensor = field(metadata=LONG)
    v_before: Tensor = field(metadata=LONG)
    d: Tensor = field(metadata=LONG)
    d_before: Tensor = field(metadata=LONG)
    scalars: tuple[tuple[float, ...], ...]


def _inverse(value: float) -> float:
    """Return one over value; 1 where it is zero or not finite."""
    return 1 / value if value and math.isfinite(value) else 1.0


def _rotated(
    eps: float, alpha: float, beta_square: float, before: Scalars, stopped: int, least: int
) -> Turned:
    """Compute the next column of a row's factorisation.

    Args:
        eps: of the dtype.
        alpha: diagonal entry of the tridiagonal matrix.
        beta_square: square of the next off-diagonal one.
        before: numbers of the row.
        stopped: why it has.
        least: of :class:`hvpkit.solvers.linear.recurrence.Iterates`.
    """
    if stopped != RUNNING:
        return Turned(False, stopped, least, before, Updates())
    _, phibar, dbar, epsilon, cosine, sine, gamma_last, gamma_before, largest = before
    beta = math.sqrt(max(beta_square, 0.0))
    if not math.isfinite(alpha + beta):
        return Turned(False, NON_FINITE, least, before, Updates())
    largest = max(largest, abs(alpha), beta)
    flat = FLATNESS * eps * largest
    is_broken = beta <= flat
    beta = 0.0 if is_broken else beta
    delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
    dbar_next, gamma = -cosine * beta, math.hypot(gbar, beta)
    if gamma <= flat:
        return Turned(False, SINGULAR, least, before, Updates())
    # norm of A r before this step, over those of A and r
    is_least = math.hypot(gbar, dbar_next) <= eps**NEARLY_LEAST * largest and phibar > 0
    if is_least and least < 2:
        return Turned(False, RUNNING, 1, before, Updates())
    cosine_next, sine_next = gbar / gamma, beta / gamma
    phi, phibar = cosine_next * phibar, sine_next * phibar
    scalars = Scalars(
        beta, phibar, dbar_next, sine * beta, cosine_next, sine_next, gamma, gamma_last, largest
    )
    updates = Updates(
        -epsilon / gamma_before,
        -delta / gamma_last,
        phi / gamma,
        _inverse(beta),
        sine_next * sine_next,
        -phibar * cosine_next,
    )
    return Turned(True, INVARIANT if is_broken else RUNNING, least, scalars, updates)


class Minres:
    """The recurrence."""

    def begin(self, matrix: Matrix, r: Tensor) -> LanczosVectors:
        """Return the first Lanczos vectors."""
        z = matrix.preconditioned(r)
        betas = [math.sqrt(max(square, 0.0)) for square in matrix.dots((r, z))[0]]
        units = [_inverse(beta) for beta in betas]
        v_before, d, d_before = (torch.zeros_like(r) for _ in range(3))
        scalars = tuple(Scalars(0.0, beta) for beta in betas)
        return LanczosVectors(scaled(r, units), scaled(z, units), v_before, d, d_before, scalars)

    def advance(
        self, matrix: Matrix, iterates: Iterates, vectors: LanczosVectors
    ) -> tuple[Iterates, LanczosVectors]:
        """Take one step."""
        v, z, before = vectors.v, vectors.z, [Scalars(*row) for row in vectors.scalars]
        images = matrix.apply(z)
        image = combined(images, [-row.beta for row in before], vectors.v_before)
        (alphas,) = matrix.dots((z, image))
        image = combined(image, [-alpha for alpha in alphas], v)
        z_next = matrix.preconditioned(image)
        if z_next is image:  # the basis is orthonormal
            (squares,) = matrix.dots((image, image))
            parts = zip(alphas, squares, before, strict=True)
            seen = [(1.0, alpha * alpha + square + row.beta * row.beta) for alpha, square, row in parts]
        else:
            squares, *known = matrix.dots((image, z_next), (z, z), (images, images))
            seen = list(zip(*known, strict=True))
        eps = torch.finfo(v.dtype).eps
        norms = tuple(norm_seen(norm, *one) for norm, one in zip(iterates.norms, seen, strict=True))
        rows = zip(alphas, squares, before, iterates.stopped, iterates.least, strict=True)
        turned = [_rotated(eps, *row) for row in rows]
        by = [row.updates for row in turned]
        d = combined(z, [row.epsilon for row in by], vectors.d_before)
        d = combined(d, [row.delta for row in by], vectors.d)
        x = combined(iterates.x, [row.x for row in by], d)
        v_next = scaled(image, [row.v for row in by])
        z_next = v_next if z_next is image else scaled(z_next, [row.v for row in by])
        r = scaled(iterates.r, [row.r for row in by])
        r = combined(r, [row.r_by_v for row in by], v_next)
        fresh = [v_next, z_next, v, d, vectors.d, x, r]
        going = [row.going for row in turned]
        if not all(going):
            old = [v, z, vectors.v_before, vectors.d, vectors.d_before, iterates.x, iterates.r]
            fresh = [rows_where(going, *pair) for pair in zip(fresh, old, strict=True)]
        v, z, v_before, d, d_before, x, r = fresh
        sizes = [row.scalars.phibar for row in turned]
        if matrix.precondition is not None:
            sizes = [math.sqrt(square) for square in matrix.dots((r, r))[0]]
        stopped, least = (row.stopped for row in turned), (row.least for row in turned)
        return (
            Iterates(x, r, tuple(sizes), tuple(stopped), norms, tuple(least)),
            LanczosVectors(v, z, v_before, d, d_before, tuple(row.scalars for row in turned)),
        )

    def multiplied(self, vectors: LanczosVectors) -> Tensor:
        """Return the preconditioned Lanczos vectors."""
        return vectors.z
