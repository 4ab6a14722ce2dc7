"""What the matvecs with one operator tell of the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.results.saving import Result


@dataclass(frozen=True, repr=False)
class RecycledSpace(Result):
    """Ritz pairs of the matvecs that solves for the top of a changing operator took: see :func:`hvpkit.follow_top`.

    It can be saved and loaded, as a result.

    Attributes:
        values: ascending ``[r]``, float64, on the CPU. They are of several operators, one after the other: good for a
            metric, and no answer.
        vectors: orthonormal columns ``[n, r]``; of an operator over data of a mesh a DTensor, ``Shard(0)`` on it.
        num_cold: full-data matvecs of the last solve without a space.
        num_solves: solves that it is from.
    """

    values: Tensor
    vectors: Tensor = field(metadata=LONG)
    num_cold: float
    num_solves: int

    def __repr__(self) -> str:
        return f"<RecycledSpace: {len(self.values)} vectors of {self.num_solves} solves>"
