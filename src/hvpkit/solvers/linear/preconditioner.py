r"""A preconditioner for A = H + damping I by the Krylov space of a sample of it.

.. math:: M^{-1} = \frac1\rho (I - U^\top U) + \sum_i \frac{1}{d_i} u_i u_i^\top, \qquad d_i = \max(|\theta_i|, c)

with the Ritz vectors :math:`u_i` and values :math:`\theta_i` of the sample after m Lanczos steps, and a level
:math:`\rho` for what they leave out. M is symmetric positive definite for any sample, so that a bad one costs steps,
not digits: CG and MINRES with M are the same methods for the congruent system C A C y = C b, with C the square root of
:math:`M^{-1}`, whose inertia is that of A.

Cost: m matvecs of the sample, once. Memory: m vectors. An application: 4 m n operations, no pass.
Source: Nystrom preconditioning: Frangella, Tropp, Udell, SIAM J. Matrix Anal. Appl. 44 (2023) 718-752,
doi:10.1137/21M1466244, here with Ritz pairs of a sample of the data in the place of a sketch of all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.solvers import krylov
from hvpkit.solvers.common.orthogonalize import rotate_


@dataclass(frozen=True)
class SamplePreconditioner:
    r"""The inverse of the preconditioner, up to a factor.

    Attributes:
        rows: Ritz vectors ``[m, n]``.
        factors: :math:`\rho / d_i - 1` ``[m]``.
        spent: full-data matvecs that it took to make.
        space: inner products.
    """

    rows: Tensor
    factors: Tensor
    spent: float
    space: Space

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply it to a vector ``[n]``."""
        return vector + (self.space.dots(self.rows, vector) * self.factors) @ self.rows


def krylov_preconditioner(
    sample: LinearOperator, damping: float, num_steps: int, seed: int, spent: float
) -> SamplePreconditioner:
    """Return the preconditioner of ``num_steps`` Lanczos steps on ``sample``, which includes the damping."""
    counted = replace(sample, cost=1.0)
    state = krylov.start(counted, num_steps + 1, 1, seed)
    for _ in range(min(num_steps, sample.n)):
        state = krylov.step(counted, state)
    state, _ = krylov.compact(state)
    pairs, _ = krylov.project(counted, state)
    m, scale = state.num_multiplied, float(state.scale)
    rotate_(state.basis, pairs.vectors)
    sizes = (pairs.values.abs() * scale).clamp(min=damping)
    factors = damping / sizes - 1
    return SamplePreconditioner(
        state.basis[:m], factors.to(state.basis), spent + state.num_products * sample.cost, sample.space
    )
