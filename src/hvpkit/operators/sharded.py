"""Operators whose vectors are split over ranks: a solver keeps a part of its basis on each, and works on it there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.operators.wrapped import Wrapped


@dataclass(frozen=True, eq=False, repr=False)
class ShardedOperator(Wrapped):
    """An operator on whole vectors, seen by a solver that holds a part of each: its columns are ``[n / p, k]``."""

    @property
    def exact(self) -> LinearOperator | None:
        """The operator in native arithmetic, in the same parts; None if this one is."""
        exact = self.operand.exact
        return None if exact is None else sharded(exact)

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator, with whole vectors."""
        return super().blame(self.space.whole(vectors, self.n))


def sharded(op: LinearOperator) -> LinearOperator:
    """Return the operator with vectors that are split over its ranks; itself where a process is alone.

    A matvec of a curvature gathers its vectors from all ranks and leaves each its part of the sum: as many bytes as a
    sum of whole vectors on every rank.
    """
    ranks = op.space.ranks
    if ranks is None or op.space.sharded:
        return op
    space = Space(ranks, sharded=True)

    product = op.split_product(space)

    def met(vectors: Tensor) -> Tensor:
        ranks.meet(("parts of vectors", vectors.shape[1]))
        return product(vectors)

    return ShardedOperator(
        met, op.n, op.dtype, op.device, op.name, cost=op.cost, layout=op.layout, space=space, inner=op
    )
