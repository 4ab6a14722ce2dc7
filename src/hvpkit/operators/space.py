"""Inner products: the one seam between a solver and where its vectors live.

A vector that is sharded over ranks has its inner products summed over them: a space with
``reduce=all_reduce`` makes every solver run on such a basis, nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _local(partial: Tensor) -> Tensor:
    return partial


@dataclass(frozen=True)
class Space:
    """The space of vectors ``[n]``, with ``reduce`` applied to each sum over their entries."""

    reduce: Callable[[Tensor], Tensor] = _local

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products of ``rows [m, n]`` with ``vector`` ``[n]`` or ``[n, k]``: ``[m]`` or ``[m, k]``."""
        return self.reduce(rows @ vector)

    def norm(self, vector: Tensor) -> Tensor:
        """Euclidean norm, 0-d, on the vector's device."""
        return self.reduce(torch.dot(vector, vector)).sqrt()


LOCAL = Space()
"""Whole vectors on one device."""
