"""Operators that show each of their matvecs to a listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.wrapped import Wrapped

Listener = Callable[[Tensor, Tensor], None]
"""Is called with the vectors ``[n, k]`` of a matvec and their images, as far as they are here; it must copy them."""


@dataclass(frozen=True, eq=False, repr=False)
class RecordedOperator(Wrapped):
    """An operator whose matvecs are listened to.

    Attributes:
        listener: hears of them.
    """

    listener: Listener | None = None

    @property
    def exact(self) -> LinearOperator | None:
        """The operator in native arithmetic, which is listened to as well; None if this one is."""
        exact = self.operand.exact
        assert self.listener is not None
        return None if exact is None else recorded(exact, self.listener)


def recorded(op: LinearOperator, listener: Listener) -> LinearOperator:
    """Return the operator, with a listener to its matvecs: after each, and not if one raises."""

    def product(vectors: Tensor) -> Tensor:
        images = op.product(vectors)
        listener(vectors, images)
        return images

    return RecordedOperator(
        product,
        op.n,
        op.dtype,
        op.device,
        op.name,
        cost=op.cost,
        layout=op.layout,
        space=op.space,
        inner=op,
        listener=listener,
    )
