r"""Congruences: an operator in the geometry of a cheap likeness of it.

For an operator H, a shift :math:`\sigma` near an end of its spectrum, s = 1 for the low end and -1 for the high one,
and C symmetric positive definite,

.. math:: B = s\, C (H - \sigma I)\, C, \qquad
          C = \sum_i d_i^{-1/2} u_i u_i^\top + (I - U U^\top)\, q(S)\, (I - U U^\top),

with orthonormal :math:`u_i`, :math:`d_i = \max(s (\theta_i - \sigma), c)` for what the likeness S shows of the
spectrum, and a polynomial :math:`q(x) \approx \max(s (x - \sigma), c)^{-1/2}`. By Sylvester's law of inertia B has as
many negative eigenvalues as H has beyond :math:`\sigma`, whatever C is. With a good likeness the spectrum of B is near
1 but for the end, where the clamp c makes C nearly :math:`c^{-1/2} I`: eigenvalues of H that are near :math:`\sigma`
are near :math:`s (\lambda - \sigma) / c` in B. Vectors whose products with H are known may be lifted: their
:math:`d_i` is without the clamp, and their quotient in B is 1.

Cost of a matvec: one of H, and two of S for each degree of q. Memory: the rows U.
Source: Sylvester's law: Horn and Johnson, Matrix Analysis, 2nd edition (2013), theorem 4.5.8. As a certificate for
Lanczos from a sample it is hvpkit's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.orthogonalize import extend_, row_norms
from hvpkit.solvers.sample_space import SampleSpace

CLAMP_KNOWN, CLAMP_SEARCH, CLAMP_HIGH = 0.25, 1.0, 0.1
"""The clamp c in units of the shift, at the low end for a known value and for a search, and at the high end. Evidence
for the first: docs/multifidelity.md. Search: with 1 the metric of vectors near the end is 1.0 to 1.7 c in 8 solves of
the dense network, with 0.5 it is 1.1 to 2.6 c. High: outliers of a sample are those of all data."""

OVERSHOOT = 2.0
"""The same clamp of a known value, at least, in units of the distance by which the likeness has eigenvalues beyond the
shift: of those that nearer ones of H become in it, it says nothing."""

MAX_DEGREE, DEAR_DEGREE = 3, 2
"""Degree of q, at most, and the same for a dear likeness. Evidence: docs/multifidelity.md."""

FIT_LOW, FIT_HIGH = 0.3, 0.1
"""Relative error of q with which a lower degree is enough, at the low and at the high end, where the outliers, taken
apart, leave little else to make even. Evidence: docs/multifidelity.md."""

DEAR = 0.1
"""Cost of a matvec of a dear likeness, at least, in those of H: a degree costs two more of them in each step of a
certificate. Chosen by feel."""

ROUNDING_FLOOR = 1000.0
"""In units of eps * norm: distances are at least this, so that the rounding of H in B is at most a thousandth of it."""

MIN_REMAINDER = 0.5
"""Norm of an outlier of the likeness outside of the exact vectors, at least: one that is among them is dropped. Chosen
by feel."""


@dataclass(frozen=True)
class Congruence:
    """The symmetric positive definite C.

    Attributes:
        likeness: S, over scale.
        rows: U ``[m, n]``.
        factors: :math:`d_i^{-1/2}` ``[m]``.
        coefficients: of q in Chebyshev polynomials on ``[low, high]``.
        low, high: bounds of the spectrum of S outside of U.
        norm: the largest eigenvalue of C, if the spectrum is within these bounds.
    """

    likeness: LinearOperator
    rows: Tensor = field(metadata=LONG)
    factors: Tensor
    coefficients: tuple[float, ...]
    low: float
    high: float
    norm: float

    @property
    def cost(self) -> float:
        """Full-data matvecs of an application."""
        return (len(self.coefficients) - 1) * self.likeness.cost

    def __call__(self, vectors: Tensor) -> Tensor:
        """Apply C to columns ``[n, k]``."""
        space = self.likeness.space
        inner = space.dots(self.rows, vectors)
        return self.rows.mT @ (self.factors[:, None] * inner) + self._outside(space, vectors)

    def _outside(self, space: Space, vectors: Tensor) -> Tensor:
        """Apply q(S) outside of U, projected at each step: rounding along U would grow with its eigenvalues."""

        def project(columns: Tensor) -> Tensor:
            return columns - self.rows.mT @ space.dots(self.rows, columns)

        def term(columns: Tensor) -> Tensor:
            images = project(self.likeness.product(columns))
            return (2 * images - (self.low + self.high) * columns) / (self.high - self.low)

        before, now = torch.zeros_like(vectors), project(vectors)
        total = self.coefficients[0] * now
        for degree, coefficient in enumerate(self.coefficients[1:], start=1):
            before, now = now, term(now) if degree == 1 else 2 * term(now) - before
            total = total + coefficient * now
        return project(total)


def make_congruence(
    likeness: LinearOperator,
    sample: SampleSpace,
    exact: Tensor,
    values: Tensor,
    sigma: float,
    sign: float,
    norm: float,
    *,
    lifted: bool,
    max_degree: int = MAX_DEGREE,
) -> Congruence:
    """Return C for a shift, from rows ``exact`` ``[k, n]`` with their Rayleigh quotients, and a sample's outliers.

    ``exact`` are orthonormal, their ``values`` ``[k]`` float64 on the CPU.

    ``likeness`` and all numbers are over the scale of the sample; ``norm`` is that of H.
    """
    floor = ROUNDING_FLOOR * torch.finfo(exact.dtype).eps * norm
    low, high = sample.low, sample.high
    share = CLAMP_HIGH if sign < 0 else CLAMP_KNOWN if lifted else CLAMP_SEARCH
    clamp = max(share * abs(sigma), floor)
    if sign > 0:
        low = min(low, sigma)
        lowest = min([low, *sample.values.tolist()])
        clamp = max(clamp, OVERSHOOT * (sigma - lowest)) if lifted else clamp
    space = likeness.space
    outside = sample.outliers - space.dots(exact, sample.outliers.mT).mT @ exact
    kept = (row_norms(space, outside) > MIN_REMAINDER).nonzero().flatten()
    outside = outside[kept]
    rows = torch.cat([exact, outside])
    num_rows = len(exact) + extend_(space, rows, len(exact), outside)
    known = torch.cat([values, sample.values[kept.cpu()]])[:num_rows]
    distances = sign * (known - sigma)
    first = len(exact) if lifted else 0
    distances[first:] = distances[first:].clamp(min=clamp)
    factors = distances.clamp(min=floor).rsqrt()
    coefficients, largest = _fit(low, high, sigma, sign, clamp, max_degree, FIT_LOW if sign > 0 else FIT_HIGH)
    return Congruence(
        likeness,
        rows[:num_rows],
        factors.to(rows),
        coefficients,
        low,
        high,
        max(float(factors.max()), largest),
    )


def _fit(
    low: float, high: float, sigma: float, sign: float, clamp: float, max_degree: int, fit: float
) -> tuple[tuple[float, ...], float]:
    """Return coefficients of q, the least squares of its relative error at Chebyshev nodes, and its largest value.

    Of the lowest degree with a relative error of at most ``fit``.
    """
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    wanted = np.maximum(sign * ((low + high) / 2 + (high - low) / 2 * nodes - sigma), clamp) ** -0.5
    for degree in range(max_degree + 1):
        terms = np.polynomial.chebyshev.chebvander(nodes, degree) / wanted[:, None]
        coefficients = np.linalg.solve(terms.T @ terms, terms.sum(axis=0))
        if np.abs(terms @ coefficients - 1).max() <= fit:
            break
    return tuple(coefficients.tolist()), float((terms @ coefficients * wanted).max())


@dataclass(frozen=True, eq=False, repr=False)
class CongruentOperator(LinearOperator):
    """The operator B, which magnifies the rounding of H.

    Attributes:
        precision_of_product: relative error of its matvecs.
    """

    precision_of_product: float = 0.0

    @property
    def precision(self) -> float:
        """Relative error of matvecs: that of H, where C is largest."""
        return self.precision_of_product


def congruent_operator(
    op: LinearOperator, congruence: Congruence, sigma: float, sign: float, scale: Tensor, norm: float
) -> CongruentOperator:
    r"""Return :math:`s\, C (H / \text{scale} - \sigma) C`, for H of a ``norm`` over ``scale``, as an operator."""

    def product(vectors: Tensor) -> Tensor:
        inner = congruence(vectors)
        return congruence(sign * (op.product(inner) / scale - sigma * inner))

    return CongruentOperator(
        product,
        op.n,
        op.dtype,
        op.device,
        name=f"congruence of {op.name}",
        cost=op.cost + 2 * congruence.cost,
        space=op.space,
        precision_of_product=op.precision * norm * max(1.0, float(congruence.factors.square().max())),
    )


def deflated(op: LinearOperator, rows: Tensor, amounts: Tensor) -> LinearOperator:
    r"""Return :math:`H - \sum_i a_i x_i x_i^\top`, for orthonormal rows ``[m, n]``.

    By Weyl's inequalities, H has at most m eigenvalues more above (below) any number than this, if all amounts are
    positive (negative).
    """
    if not len(rows):
        return op
    shares = amounts.to(rows)[:, None]
    return replace(op, product=lambda v: op.product(v) - rows.mT @ (shares * op.space.dots(rows, v)))
