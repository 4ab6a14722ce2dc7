"""Inner products and norms of vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.ranks import Ranks

CHUNK = 2**14
"""Entries that inner products in float32 add up at a time on a CPU. BLAS there adds all of them in one go: for 5
million equal entries it is off by 1.4e-2 at one thread, with chunks of 2^14 by 7e-6, for 1.3 to 1.5 times the time."""


def _identity(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Space:
    """Euclidean inner products of whole vectors ``[n]`` on one device.

    Attributes:
        reduce: applied to each inner product and squared norm. Not every solver takes all of its sums from here: a
            basis that is split over processes is not supported.
        ranks: that multiply together, each with all numbers; None: this process alone.
    """

    reduce: Callable[[Tensor], Tensor] = _identity
    ranks: Ranks | None = None

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Return the inner products of ``rows [m, n]`` with ``vector`` ``[n]`` or ``[n, k]``: ``[m]`` or ``[m, k]``."""
        size = _chunk(vector)
        if size >= len(vector):
            return self.reduce(rows @ vector)
        parts = zip(rows.split(size, dim=1), vector.split(size), strict=True)
        return self.reduce(torch.stack([part @ other for part, other in parts]).sum(dim=0))

    def norm(self, vector: Tensor) -> Tensor:
        """Return the Euclidean norm, 0-d, on the vector's device."""
        parts = [torch.dot(part, part) for part in vector.split(_chunk(vector))]
        return self.reduce(parts[0] if len(parts) == 1 else torch.stack(parts).sum()).sqrt()

    def row_norms(self, rows: Tensor) -> Tensor:
        """Return the Euclidean norms ``[m]`` of ``rows`` ``[m, n]``."""
        parts = [torch.linalg.vector_norm(part, dim=1) for part in rows.split(_chunk(rows.mT), dim=1)]
        norms = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return self.reduce(norms * norms).sqrt()


def _chunk(vector: Tensor) -> int:
    """Return how many entries of such a vector ``[n]`` or ``[n, k]`` may be added up at a time."""
    loses_digits = vector.device.type == "cpu" and vector.dtype != torch.float64
    return min(CHUNK, len(vector)) if loses_digits else len(vector)


LOCAL = Space()
"""Whole vectors on one device."""
