"""Sums, differences, multiples and shifts of operators: one linear combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit.operators.base import LinearOperator, Product


class HasProduct(Protocol):
    """Anything with a matvec on ``[n, k]``."""

    @property
    def product(self) -> Product: ...


def combined_product(operands: Sequence[tuple[float, HasProduct]], sigma: float = 0.0) -> Product:
    r"""Return the matvec of :math:`\sum_j c_j A_j + \sigma I` for ``operands`` :math:`(c_j, A_j)`."""
    (first, A), *rest = operands

    def product(vectors: Tensor) -> Tensor:
        total = A.product(vectors) if first == 1 else first * A.product(vectors)
        for coefficient, B in rest:
            total = torch.add(total, B.product(vectors), alpha=coefficient)
        return torch.add(total, vectors, alpha=sigma) if sigma else total

    return A.product if not rest and first == 1 and not sigma else product


def check_compatible(A: LinearOperator, B: LinearOperator) -> None:
    """Raise ValueError if the operators act on vectors of different shape, dtype or device."""
    for attribute in ("shape", "dtype", "device"):
        mine, theirs = getattr(A, attribute), getattr(B, attribute)
        if mine != theirs:
            raise ValueError(f"operators of different {attribute} cannot be combined: {mine} and {theirs}")


@dataclass(frozen=True, eq=False, repr=False)
class LinearCombination(LinearOperator):
    r"""The operator :math:`\sum_j c_j A_j + \sigma I`.

    Attributes:
        operands: pairs :math:`(c_j, A_j)`.
        sigma: the multiple of the identity.
    """

    operands: tuple[tuple[float, LinearOperator], ...] = ()
    sigma: float = 0.0

    @classmethod
    def of(
        cls, operands: Sequence[tuple[float, LinearOperator]], sigma: float, name: str
    ) -> LinearCombination:
        """Return the combination; its cost is the sum of the costs of its operands."""
        A = operands[0][1]
        fields: dict[str, Any] = {
            "layout": next((op.layout for _, op in operands if op.layout is not None), None),
            "cost": sum(op.cost for _, op in operands),
            "space": A.space,
        }
        product = combined_product(operands, sigma)
        return cls(product, A.n, A.dtype, A.device, name, operands=tuple(operands), sigma=sigma, **fields)

    @property
    def precision(self) -> float:
        """Return the largest relative error of the operands' matvecs."""
        return max(op.precision for _, op in self.operands)

    @property
    def exact(self) -> LinearOperator | None:
        """Return the combination of the operands in native arithmetic; None if they are."""
        if all(op.exact is None for _, op in self.operands):
            return None
        return self.of([(c, op.exact or op) for c, op in self.operands], self.sigma, self.name)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operands without a matvec."""
        operands = [[coefficient, op.identity()] for coefficient, op in self.operands]
        return {**super().identity(), "operands": digest([operands, self.sigma])}

    def blame(self, vectors: Tensor) -> str:
        """Ask the first operand whose matvec is not finite."""
        for _, op in self.operands:
            if not bool(torch.isfinite(op.product(vectors)).all()):
                return op.blame(vectors)
        return super().blame(vectors)
