r"""Operators of which the largest eigenpairs are known, :math:`\sum_i (\theta_i - c) u_i u_i^\top + c I`.

As likenesses they cost no matvec.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.common.orthogonalize import power_of_two
from hvpkit.solvers.sample_space import SampleSpace


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(LinearOperator):
    """An operator known by its largest eigenpairs; all others are as large as the smallest of these, or zero.

    Those of the operator that it is like are smaller, or not known: errors are predicted with no larger gap than that.

    Attributes:
        rows: orthonormal eigenvectors ``[r, n]``.
        values: ascending ``[r]``, float64 on the CPU.
        num_steps: Lanczos steps that a rough answer about the operator that it is like took.
    """

    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    values: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    num_steps: int = 0


def low_rank(op: LinearOperator, rows: Tensor, values: Tensor, num_steps: int) -> LowRank:
    """Return the operator with these eigenpairs, in the space of ``op``."""
    rest = max(0.0, float(values[0]))
    factors = (values - rest).to(rows)[:, None]

    def product(vectors: Tensor) -> Tensor:
        return rows.mT @ (factors * op.space.dots(rows, vectors)) + rest * vectors

    name = f"likeness of {op.name}"
    return LowRank(product, op.n, op.dtype, op.device, name, None, 0.0, op.space, rows, values, num_steps)


def low_rank_space(op: LowRank, k: int) -> SampleSpace:
    """Return the k largest pairs as ends, and all of them as outliers, of a spectrum that is else near zero."""
    largest = max(-float(op.values[0]), float(op.values[-1]))
    scale = power_of_two(torch.tensor(largest, dtype=op.dtype, device=op.device))
    values = op.values / float(scale)
    norm, lowest = largest / float(scale), min(0.0, float(values[0]))
    return SampleSpace(op.rows[-k:], norm, lowest, op.rows, values, 0.0, 0.0, scale, op.num_steps, 0.0)
