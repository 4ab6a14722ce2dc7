"""Gradient graphs of the first batches, kept between matvecs as far as memory allows.

A matvec by reverse over reverse records the graph of a gradient, about 3 forward passes' work, and differentiates
it, about 6. At fixed parameters the graph is the same in all matvecs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TypeAlias

import torch

from hvpkit._utils.memory import Allocations, free_memory
from hvpkit.curvature.batches import BatchCurvature, LinearMap
from hvpkit.data import Data

FREE_SHARE = 0.25
"""Share of the free memory that an operator may hold between matvecs by default; chosen by feel."""

Batches: TypeAlias = Callable[[], Iterator[BatchCurvature]]
"""A pass over the batches."""


class MemoryBudget:
    """Memory that an operator and its samples may hold together.

    Args:
        num_bytes: the limit.
    """

    def __init__(self, num_bytes: float) -> None:
        self.num_bytes = num_bytes
        self._caches: weakref.WeakSet[GraphCache] = weakref.WeakSet()

    @classmethod
    def of(cls, memory_limit: float | None, device: torch.device) -> MemoryBudget:
        """Return the budget of ``memory_limit`` bytes; None: a share of the memory that is free.

        Raises:
            ValueError: ``memory_limit`` is no number of bytes.
        """
        if memory_limit is None:
            memory_limit = FREE_SHARE * free_memory(device)
        elif isinstance(memory_limit, bool | str) or not memory_limit >= 0:
            raise ValueError(f"memory_limit must be a number of bytes, at least 0, got {memory_limit!r}")
        return cls(memory_limit)

    def new_cache(self) -> GraphCache:
        """Return an empty cache, whose memory counts as long as it lives."""
        cache = GraphCache(self)
        self._caches.add(cache)
        return cache

    @property
    def left(self) -> float:
        """Return how many more bytes may be held."""
        return self.num_bytes - sum(cache.num_bytes for cache in self._caches)


class GraphCache:
    """Linearizations of the first batches, kept from the second matvec on."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self.num_bytes = 0
        self._linear_maps: list[LinearMap] = []
        self._used, self._full = False, budget.num_bytes == 0
        self._num_batches: int | None = None

    def linearized(self, batches: Batches, mode: str) -> Generator[tuple[LinearMap, bool], None, None]:
        """Iterate over the linearized batches, and whether each is kept for another matvec.

        May be closed before its end: what is kept by then stays.
        """
        num_kept = len(self._linear_maps)
        yield from ((linear, True) for linear in self._linear_maps)
        if num_kept != self._num_batches:
            total = 0
            for batch in batches():
                total += 1
                if total > num_kept:
                    yield self._linearize(batch, mode)
            self._num_batches, self._used = total, True

    def count_batches(self, data: Data) -> float:
        """Return the number of batches in a pass; infinite where that is not known before the first one has ended."""
        return data.num_batches or self._num_batches or math.inf

    def _linearize(self, batch: BatchCurvature, mode: str) -> tuple[LinearMap, bool]:
        # An operator that is used once keeps nothing; by finite or forward differences nothing can be kept.
        if not self._used or self._full or mode != "reverse-over-reverse":
            return batch.linearize(mode), False
        with Allocations() as held:
            linear = batch.linearize(mode)
        self._full = held.now > self.budget.left
        if not self._full:
            self._linear_maps.append(linear)
            self.num_bytes += held.now
        return linear, not self._full
