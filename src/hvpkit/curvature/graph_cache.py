"""What products share, kept between them: the graphs of the first batches' gradients, as far as memory allows.

A product by reverse over reverse is a gradient whose graph is recorded, about 3 forward passes' work, and a pass back
through it, about 6. At a fixed point the first is the same for all products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias

from hvpkit._utils.memory import Allocations
from hvpkit.curvature.products import Linear, Term


class Budget:
    """Bytes that an operator and its samples may hold together.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._holders: weakref.WeakSet[Kept] = weakref.WeakSet()

    def holder(self) -> Kept:
        """Something that holds graphs, whose memory counts as long as it lives."""
        holder = Kept(self)
        self._holders.add(holder)
        return holder

    @property
    def left(self) -> float:
        """What may still be held."""
        return self.limit - sum(holder.num_bytes for holder in self._holders)


Batches: TypeAlias = Callable[[], Iterator[Term]]


class Kept:
    """The batches of one operator, the first of them linearised for good from its second product on."""

    def __init__(self, budget: Budget) -> None:
        self.num_bytes = 0
        self._budget = budget
        self._linears: list[Linear] = []
        self._used = self._full = False
        self._num_batches: int | None = None

    def linears(self, batches: Batches, mode: str) -> Iterator[tuple[Linear, bool]]:
        """Each batch, linearised, and whether it is kept for another product."""
        found = len(self._linears)
        yield from ((linear, True) for linear in self._linears)
        if found != self._num_batches:
            total = 0
            for term in batches():
                total += 1
                if total > found:
                    yield self._linearised(term, mode)
            self._num_batches, self._used = total, True

    def _linearised(self, term: Term, mode: str) -> tuple[Linear, bool]:
        # An operator that is used once keeps nothing; by finite or forward differences nothing can be kept.
        if not self._used or self._full or mode != "reverse-over-reverse":
            return term(mode), False
        with Allocations() as held:
            linear = term(mode)
        self._full = held.now > self._budget.left
        if not self._full:
            self._linears.append(linear)
            self.num_bytes += held.now
        return linear, not self._full
