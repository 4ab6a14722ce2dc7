r"""Davidson's method: Rayleigh-Ritz on a subspace, with directions from a cheap likeness of the operator.

A subspace with known matvecs is expanded, for an end with Ritz value :math:`\theta` and residual r, by

.. math:: t = f(S)\, r, \qquad f(x) = \frac{1}{\max(d(x), \delta)},

with S the likeness and d(x) the distance from :math:`\theta` inwards, negative beyond the end. The preconditioner is
the inverse of the whole likeness, clamped: it is positive definite, so that it scales parts in eigenvalues of S beyond
the end, and does not move towards them. With the outliers U of S, whose values :math:`\vartheta` are known,
:math:`f(S) \approx U f(\vartheta)\, U^\top + P f(P S P) P` for :math:`P = I - U U^\top`; a few Lanczos steps from Pr
give the second part. With it comes :math:`r' f(S)\, r`: by second-order perturbation theory, the remaining error of
:math:`\theta`, before the next matvec is spent; too small where S has eigenvalues nearer than the clamp. The ratio of
the gain of a direction to its predicted gain shows how good the likeness is.

Source: Davidson, J. Comput. Phys. 17 (1975) 87-94, doi:10.1016/0021-9991(75)90065-0; Morgan and Scott, SIAM J. Sci.
Stat. Comput. 7 (1986) 817-825, doi:10.1137/0907054. The clamped function of a sample is hvpkit's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.krylov import krylov_space
from hvpkit.solvers.sample_space import SampleSpace

SETTLED = 0.1
"""Relative change of the predicted gain at which Lanczos steps on the likeness end early. Chosen by feel."""

CLAMP = 0.05
"""The clamp, at most, as a share of the spread of the spectrum. Chosen by feel."""


@dataclass(frozen=True)
class Direction:
    """A direction to expand a subspace by.

    Attributes:
        vector: ``[n]``, of any norm; not finite if a matvec was not.
        gain: the predicted gain of the Ritz value, over scale.
        clamped: what of it is from eigenvalues of the likeness that are nearer than the clamp, where it is less than
            their distances would make it.
        num_steps: Lanczos steps on the likeness that it took.
    """

    vector: Tensor = field(metadata=LONG)
    gain: float
    clamped: float
    num_steps: int


def find_direction(
    likeness: LinearOperator,
    sample: SampleSpace,
    residual: Tensor,
    theta: float,
    inwards: float,
    spread: float,
    least_clamp: float,
    *,
    num_steps: int,
) -> Direction:
    r"""Return :math:`f(S)\, r` for a residual ``[n]`` over the scale of the sample, of which outliers are known.

    The clamp is the size of :math:`\theta`, at most a share of the ``spread`` of the spectrum, and at least
    ``least_clamp``. ``num_steps`` are the most Lanczos steps on the likeness.
    """
    space, outliers = likeness.space, sample.outliers
    clamp = max(min(abs(theta), CLAMP * spread), least_clamp)

    def inverse(values: Tensor) -> Tensor:
        return 1 / (inwards * (values - theta)).clamp(min=clamp)

    def project(columns: Tensor) -> Tensor:
        return columns - outliers.mT @ space.dots(outliers, columns)

    inner, rest = space.dots(outliers, residual[:, None])[:, 0], project(residual[:, None])[:, 0]
    size, weights = float(space.norm(rest)), inverse(sample.values)
    vector = outliers.mT @ (weights.to(inner) * inner)
    terms, values = weights * inner.to("cpu", torch.float64).square(), sample.values
    num_steps = num_steps if size else 0
    gains = [float(terms.sum())]

    def settled(pairs: RitzPairs) -> bool:
        gains.append(gains[0] + size**2 * float(inverse(pairs.values) @ pairs.vectors[0].square()))
        return abs(gains[-1] - gains[-2]) <= SETTLED * gains[-1]

    if num_steps:
        outside = replace(likeness, product=lambda columns: project(likeness.product(columns)))
        found = krylov_space(outside, rest, num_steps, sample.scale, settled, interval=1)
        pairs, num_steps = found.pairs, len(found.rows)
        components = inverse(pairs.values) * pairs.vectors[0]
        vector = vector + (pairs.vectors @ (size * components)).to(found.rows) @ found.rows
        terms = torch.cat([terms, size**2 * components * pairs.vectors[0]])
        values = torch.cat([values, pairs.values])
    near = inwards * (values - theta) < clamp
    return Direction(vector, float(terms.sum()), float(terms[near].sum()), num_steps)
