"""Inner products and norms of vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _identity(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Space:
    """Euclidean inner products of whole vectors ``[n]`` on one device.

    Attributes:
        reduce: applied to each inner product and squared norm. Not every solver takes all of its sums from here: a
            basis that is split over processes is not supported.
    """

    reduce: Callable[[Tensor], Tensor] = _identity

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Return the inner products of ``rows [m, n]`` with ``vector`` ``[n]`` or ``[n, k]``: ``[m]`` or ``[m, k]``."""
        return self.reduce(rows @ vector)

    def norm(self, vector: Tensor) -> Tensor:
        """Return the Euclidean norm, 0-d, on the vector's device."""
        return self.reduce(torch.dot(vector, vector)).sqrt()


LOCAL = Space()
"""Whole vectors on one device."""
