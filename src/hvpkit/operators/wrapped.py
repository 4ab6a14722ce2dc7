"""Operators that are made of one other operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hvpkit.operators.base import LinearOperator


@dataclass(frozen=True, eq=False, repr=False)
class Wrapped(LinearOperator):
    """An operator made of another one, which knows its precision, its identity and the origin of NaN.

    Attributes:
        inner: the operator.
    """

    inner: LinearOperator | None = None

    @property
    def operand(self) -> LinearOperator:
        """The operator, which is never None: ``inner`` has that default as it follows fields with defaults."""
        assert self.inner is not None
        return self.inner

    @property
    def precision(self) -> float:
        """Relative error of the operator's matvecs."""
        return self.operand.precision

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec."""
        return self.operand.identity()

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator."""
        return self.operand.blame(vectors)
