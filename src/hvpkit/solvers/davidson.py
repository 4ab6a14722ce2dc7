r"""Davidson's method: Rayleigh-Ritz on a subspace, with directions from a cheap likeness of the operator.

A subspace with known matvecs is expanded, for an end with Ritz value :math:`\theta` and residual r, by

.. math:: t = f(S)\, r, \qquad f(x) = \frac{1}{\max(d(x), \delta)},

with S the likeness and d(x) the distance from :math:`\theta` inwards, negative beyond the end. The preconditioner is
the inverse of the whole likeness, clamped: it is positive definite, so that it scales parts in eigenvalues of S beyond
the end, and does not move towards them. A few Lanczos steps on S from r give :math:`f(S)\, r`, and with it
:math:`r' f(S)\, r`: by second-order perturbation theory, the remaining error of :math:`\theta`, before the next matvec
is spent. The ratio of the gain of a direction to its predicted gain shows how good the likeness is.

Source: Davidson, J. Comput. Phys. 17 (1975) 87-94, doi:10.1016/0021-9991(75)90065-0; Morgan and Scott, SIAM J. Sci.
Stat. Comput. 7 (1986) 817-825, doi:10.1137/0907054. The clamped function of a sample is hvpkit's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.krylov import krylov_space

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
        num_steps: Lanczos steps on the likeness that it took.
    """

    vector: Tensor = field(metadata=LONG)
    gain: float
    num_steps: int


def find_direction(
    likeness: LinearOperator,
    residual: Tensor,
    theta: float,
    inwards: float,
    spread: float,
    least_clamp: float,
    *,
    num_steps: int,
    scale: Tensor,
) -> Direction:
    r"""Return :math:`f(S)\, r` for a residual ``[n]`` over ``scale``.

    The clamp is the size of :math:`\theta`, at most a share of the ``spread`` of the spectrum, and at least
    ``least_clamp``. ``num_steps`` are the most Lanczos steps on the likeness.
    """
    clamp = max(min(abs(theta), CLAMP * spread), least_clamp)
    squared, gains = float(likeness.space.norm(residual)) ** 2, [0.0]

    def weights(pairs: RitzPairs) -> Tensor:
        return pairs.vectors[0] / (inwards * (pairs.values - theta)).clamp(min=clamp)

    def settled(pairs: RitzPairs) -> bool:
        gains.append(float(pairs.vectors[0] @ weights(pairs)))
        return abs(gains[-1] - gains[-2]) <= SETTLED * gains[-1]

    space = krylov_space(likeness, residual, num_steps, scale, settled)
    weighted = weights(space.pairs)
    vector = (space.pairs.vectors @ weighted).to(space.rows) @ space.rows
    return Direction(vector, squared * float(space.pairs.vectors[0] @ weighted), len(space.rows))
