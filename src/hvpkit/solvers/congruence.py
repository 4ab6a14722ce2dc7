r"""Congruences: an operator in the geometry of a cheap likeness of it.

For an operator H, a shift :math:`\sigma` near an end of its spectrum, s = 1 for the low end and -1 for the high one,
and a metric P, symmetric positive definite,

.. math:: B = s\, P^{1/2} (H - \sigma I)\, P^{1/2}, \qquad
          P = \sum_i d_i^{-1} u_i u_i^\top + (I - U U^\top)\, p(S)\, (I - U U^\top),

with orthonormal :math:`u_i`, :math:`d_i = \max(s (\theta_i - \sigma), c)` for what the likeness S shows of the
spectrum, and a polynomial :math:`p(x) \approx 1 / \max(s (x - \sigma), c)` of even degree that is positive everywhere.
By Sylvester's law of inertia B has as many negative eigenvalues as H has beyond :math:`\sigma`, whatever P is. With a
good likeness the spectrum of B is near 1 but for the end, where the clamp c makes P nearly :math:`c^{-1} I`:
eigenvalues of H that are near :math:`\sigma` are near :math:`s (\lambda - \sigma) / c` in B. Vectors whose products
with H are known may be lifted: their :math:`d_i` is without the clamp, and their quotient in B is 1.

The root of P is never needed: see :mod:`hvpkit.solvers.pairs`.

Cost of a matvec: one of H, and one of S for each degree of p. Memory: the rows U.
Source: Sylvester's law: Horn and Johnson, Matrix Analysis, 2nd edition (2013), theorem 4.5.8. As a certificate for
Lanczos from a sample it is hvpkit's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers import pairs
from hvpkit.solvers.common.bounds import TINY
from hvpkit.solvers.common.orthogonalize import extend_, row_norms
from hvpkit.solvers.sample_space import SampleSpace

CLAMP_KNOWN, CLAMP_SEARCH, CLAMP_HIGH = 0.25, 1.0, 0.1
"""The clamp c in units of the shift, at the low end for a known value and for a search, and at the high end. Evidence
for the first: docs/multifidelity.md. Search: with 1 the metric of vectors near the end is 1.0 to 1.7 c in 8 solves of
the dense network, with 0.5 it is 1.1 to 2.6 c. High: outliers of a sample are those of all data."""

OVERSHOOT = 2.0
"""The same clamp of a known value, at least, in units of the distance by which the likeness has eigenvalues beyond the
shift: of those that nearer ones of H become in it, it says nothing."""

MAX_DEGREE, DEAR_DEGREE = 4, 2
"""Degree of p, at most, and the same for a dear likeness. Evidence: docs/multifidelity.md."""

FIT = 0.3
"""Relative error of p with which a lower degree is enough. Evidence: docs/multifidelity.md."""

DEAR = 0.1
"""Cost of a matvec of a dear likeness, at least, in those of H: a degree costs one more of them in each step of a
certificate. Chosen by feel."""

NUM_SWEEPS, REAL = 8, 1e-9
"""Of Lawson's algorithm for p; and the largest imaginary part of a root that counts as real, and relative value that
counts as zero. Chosen by feel."""

FLOOR, NUM_ROOTS = 2.0, 16
"""Imaginary part of the roots of r in units of their distance from the shift, and how many distances are tried. Least
values of p r are 0.7 to 1 of that at zero, on trained networks."""

ROUNDING_FLOOR = 1000.0
"""In units of eps * norm: distances are at least this, so that the rounding of H in B is at most a thousandth of it."""

MIN_REMAINDER = 0.5
"""Norm of an outlier of the likeness outside of the exact vectors, at least: one that is among them is dropped. Chosen
by feel."""


@dataclass(frozen=True)
class Metric:
    """The symmetric positive definite P.

    Attributes:
        likeness: S, over scale.
        rows: U ``[m, n]``.
        factors: :math:`d_i^{-1}` ``[m]``.
        coefficients: of p in Chebyshev polynomials on ``[low, high]``.
        low, high: bounds of the spectrum of S outside of U.
        norm: the largest eigenvalue of P, if the spectrum is within these bounds.
        start: r, of a random start of the second.
    """

    likeness: LinearOperator
    rows: Tensor = field(metadata=LONG)
    factors: Tensor
    coefficients: tuple[float, ...]
    low: float
    high: float
    norm: float
    start: Start

    @property
    def cost(self) -> float:
        """Full-data matvecs of an application."""
        return (len(self.coefficients) - 1) * self.likeness.cost

    @property
    def start_cost(self) -> float:
        """Full-data matvecs of a random start."""
        return self.cost + self.likeness.cost if self.cost else 0.0

    def __call__(self, vectors: Tensor) -> Tensor:
        """Apply P to columns ``[n, k]``."""
        inner = self.likeness.space.dots(self.rows, vectors)
        before, now = torch.zeros_like(vectors), self._outside(vectors)
        total = self.coefficients[0] * now
        for degree, coefficient in enumerate(self.coefficients[1:], start=1):
            before, now = now, self._term(now) if degree == 1 else 2 * self._term(now) - before
            total = total + coefficient * now
        return self.rows.mT @ (self.factors[:, None] * inner) + self._outside(total)

    def _outside(self, columns: Tensor) -> Tensor:
        """Project U out."""
        return columns - self.rows.mT @ self.likeness.space.dots(self.rows, columns)

    def _term(self, columns: Tensor) -> Tensor:
        """Apply S, mapped to [-1, 1], outside of U at each step: rounding along U would grow with its eigenvalues."""
        images = self._outside(self.likeness.product(columns))
        return (2 * images - (self.low + self.high) * columns) / (self.high - self.low)

    def random_pair(self, seed: int) -> tuple[Tensor, float]:
        """Return a random y as a pair ``[2 n]``, and the share of it that is as if uniform on the sphere.

        y is normal with the covariance K = P r(S), which has no eigenvalue below ``start.least``, whatever S is. So its
        component on any unit vector is at least that of a vector with the covariance ``start.least`` I.
        """
        space, n, start = self.likeness.space, self.likeness.n, self.start
        first, second = (
            space.random(n, like=self.rows, seed=seed, stream=stream)[:, None] for stream in (1, 2)
        )
        inside = (start.level / self.factors).sqrt()[:, None] * space.dots(self.rows, first)
        outside = self._outside(first)
        if start.slope:
            outside = start.slope * self._term(outside) + start.constant * outside
            outside = outside + start.floor * self._outside(second)
        w = self.rows.mT @ inside + outside
        pair = torch.cat([self(w), w])[:, 0]
        return pair, min(1.0, math.sqrt(start.least * n) / float(pairs.length(space, pair)))


@dataclass(frozen=True)
class Start:
    r"""A polynomial r, positive everywhere, that a random vector of the covariance r(S) is easy to draw for.

    With z = x mapped from ``[low, high]`` to [-1, 1], :math:`r = (\text{slope}\, z + \text{constant})^2 +
    \text{floor}^2`: of two independent normal vectors g and h, :math:`(\text{slope}\, Z + \text{constant}) g +
    \text{floor}\, h` has it. About 1 / p, up to a factor.

    Attributes:
        slope, constant, floor: of r.
        least: the least value of p r.
        level: value of p r at zero, or where S comes nearest to it: the covariance along U.
    """

    slope: float
    constant: float
    floor: float
    least: float
    level: float


def make_metric(
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
) -> Metric:
    """Return P for a shift, from rows ``exact`` ``[k, n]`` with their Rayleigh quotients, and a sample's outliers.

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
    factors = distances.clamp(min=floor).reciprocal()
    middle, half = (low + high) / 2, (high - low) / 2
    line = sign * (middle - sigma), sign * half
    with np.errstate(all="ignore"):  # whatever the caller's np.seterr says
        p, largest = _fit(line, clamp, max_degree)
        start = _start(p, line, clamp, -middle / half if half else 0.0)
    return Metric(
        likeness,
        rows[:num_rows],
        factors.to(rows),
        tuple(p.coef.tolist()),
        low,
        high,
        max(float(factors.max()), largest),
        start,
    )


def _fit(line: tuple[float, float], clamp: float, max_degree: int) -> tuple[np.polynomial.Chebyshev, float]:
    """Return p and its largest value, for the distance ``line[0] + line[1] z`` from the shift.

    Of the lowest even degree with a relative error of at most ``FIT``, or else of the least one.
    """
    nodes = np.cos(np.pi * np.arange(200) / 199)
    distances = np.maximum(line[0] + line[1] * nodes, clamp)
    found = []
    for degree in range(0, max_degree + 1, 2):
        found.append(_least_error(np.polynomial.chebyshev.chebvander(nodes, degree), distances))
        if found[-1][0] <= FIT:
            break
    p = min(found, key=lambda pair: pair[0])[1]
    return p, float(p(nodes).max())


def _least_error(terms: np.ndarray, distances: np.ndarray) -> tuple[float, np.polynomial.Chebyshev]:
    """Return a combination p of terms, positive everywhere, with p times the distances nearly 1, and its error.

    Lawson's algorithm: least squares whose weights are multiplied by the errors, a few times.
    """
    weights, best = np.ones(len(terms)), (math.inf, np.polynomial.Chebyshev([1.0]))
    for _ in range(NUM_SWEEPS):
        roots = np.sqrt(weights)
        p = np.polynomial.Chebyshev(
            np.linalg.lstsq(terms * (roots * distances)[:, None], roots, rcond=None)[0]
        )
        values = terms @ p.coef
        errors = np.abs(values * distances - 1)
        is_positive = values.min() > REAL * np.abs(p.coef).sum() and (np.abs(p.roots().imag) > REAL).all()
        if is_positive and errors.max() < best[0]:
            best = float(errors.max()), p
        weights = weights * (errors / max(errors.max(), TINY))
        if not weights.any():
            break
    return best


def _start(p: np.polynomial.Chebyshev, line: tuple[float, float], clamp: float, zero: float) -> Start:
    """Return r for p, with the largest least value of p r in units of that at ``zero``, the eigenvalue 0 of S."""
    zero = min(max(zero, -1.0), 1.0)
    if p.degree() == 0:
        return Start(0.0, 1.0, 0.0, float(p(zero)), float(p(zero)))
    farthest = max(abs(line[0]) + abs(line[1]), 2 * clamp)
    distances = np.geomspace(clamp, farthest, NUM_ROOTS).tolist()
    found = [_with_roots_at(distance, p, line, zero) for distance in distances]
    return max(found, key=lambda start: start.least / start.level)


def _with_roots_at(
    distance: float, p: np.polynomial.Chebyshev, line: tuple[float, float], zero: float
) -> Start:
    slope, constant, floor = line[1], line[0] + distance, FLOOR * distance
    turns = (p * (np.polynomial.Chebyshev([constant, slope]) ** 2 + floor**2)).deriv().roots()
    places = np.array([zero, -1.0, 1.0, *turns[np.abs(turns.imag) <= REAL].real])
    values = p(places) * ((slope * places + constant) ** 2 + floor**2)
    return Start(slope, constant, floor, max(float(values.min()), 0.0), float(values[0]))


@dataclass(frozen=True, eq=False, repr=False)
class CongruentOperator(LinearOperator):
    r"""The operator B on pairs ``[2 n]``, which magnifies the rounding of H.

    Attributes:
        image: maps columns ``[n, k]`` by :math:`s (H - \sigma I)`, which a step multiplies by.
        metric: P.
        precision_of_product: relative error of its matvecs.
    """

    image: Callable[[Tensor], Tensor] = field(kw_only=True)
    metric: Metric = field(kw_only=True)
    precision_of_product: float = 0.0

    @property
    def precision(self) -> float:
        """Relative error of matvecs: that of H, where P is largest."""
        return self.precision_of_product


def congruent_operator(
    op: LinearOperator, metric: Metric, sigma: float, sign: float, scale: Tensor, norm: float
) -> CongruentOperator:
    r"""Return B of H / ``scale``, which has this ``norm``, as an operator on pairs ``[2 n]``."""

    def image(vectors: Tensor) -> Tensor:
        return sign * (op.product(vectors) / scale - sigma * vectors)

    def product(columns: Tensor) -> Tensor:
        images = image(pairs.halves(columns.mT)[0].mT)
        return torch.cat([metric(images), images])

    return CongruentOperator(
        product,
        2 * op.n,
        op.dtype,
        op.device,
        name=f"congruence of {op.name}",
        cost=op.cost + metric.cost,
        space=op.space,
        image=image,
        metric=metric,
        precision_of_product=op.precision * norm * max(1.0, float(metric.factors.max())),
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
