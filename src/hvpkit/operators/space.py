"""Inner products and norms of vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.random import normal_vector
from hvpkit._utils.ranks import Ranks

CHUNK = 2**14
"""Entries that inner products in float32 add up at a time on a CPU. BLAS there adds all of them in one go: for 5
million equal entries it is off by 1.4e-2 at one thread, with chunks of 2^14 by 7e-6, for 1.3 to 1.5 times the time."""


@dataclass(frozen=True)
class Space:
    """Euclidean geometry of vectors ``[n]``, of which a process holds all entries, or each rank a part.

    Sizes, inner products, norms, maxima and random vectors of solvers come from here, so that they need not know which.

    Attributes:
        ranks: that multiply together; None: this process alone.
        sharded: True if each rank holds a part of every vector: n / p consecutive entries, rounded up, the last ranks
            fewer. False: each has all of them.
    """

    ranks: Ranks | None = None
    sharded: bool = False

    @property
    def _shards(self) -> Ranks | None:
        return self.ranks if self.sharded else None

    def size(self, n: int) -> int:
        """Return how many of the n entries of a vector are here."""
        return len(range(n)[self.part(n)])

    def local(self, whole: Tensor) -> Tensor:
        """Return the entries of a vector ``[n]``, or of columns ``[n, k]``, that are here."""
        return whole if self._shards is None else whole[self.part(len(whole))].contiguous()

    def local_rows(self, whole: Tensor) -> Tensor:
        """Return the entries of a vector ``[n]``, or of rows ``[m, n]``, that are here."""
        return whole if self._shards is None else whole[..., self.part(whole.shape[-1])].contiguous()

    def whole(self, local: Tensor, n: int) -> Tensor:
        """Return a vector ``[n]``, or columns ``[n, k]``, of what each rank holds of it."""
        ranks = self._shards
        if ranks is None:
            return local
        if local.ndim == 1:
            return ranks.gather_parts(local[None], n)[0]
        return ranks.gather_parts(local.mT, n).mT

    def local_sum(self, shares: Tensor) -> Tensor:
        """Return the columns ``[n, k]``, as far as they are here, of the sum of what ranks have as rows ``[k, n]``."""
        return (shares if self._shards is None else self._shards.sum_parts(shares)).mT

    def part(self, n: int, rank: int | None = None) -> slice:
        """Return which of the n entries of a vector are here, or on another rank."""
        return slice(0, n) if self._shards is None else self._shards.part(n, rank)

    def reduce(self, share: Tensor) -> Tensor:
        """Return the sum over all entries, of the sums over those that are here."""
        return share if self._shards is None else self._shards.sum(share)

    def peak(self, entries: Tensor) -> Tensor:
        """Return the largest magnitude of the entries, 0-d; NaN if there is one."""
        ranks = self._shards
        if ranks is None:
            return entries.abs().amax()
        here = entries.abs().amax() if entries.numel() else entries.new_zeros(())
        return torch.stack(list(ranks.concatenate(here[None]))).max()  # a reduction by max may lose NaN

    def peaks(self, rows: Tensor) -> Tensor:
        """Return the largest magnitudes of entries of each of the rows ``[m, n]``, which are finite."""
        ranks = self._shards
        if ranks is None:
            return rows.abs().amax(dim=1)
        here = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
        return ranks.concatenate(here[None]).amax(dim=0)

    def finite(self, rows: Tensor) -> Tensor:
        """Return, for each of the rows ``[m, n]``, whether all entries are finite."""
        found = torch.isfinite(rows).all(dim=1)
        return found if self._shards is None else self._shards.sum((~found).int()) == 0

    def random(self, n: int, *, like: Tensor, seed: int, stream: int = 0) -> Tensor:
        """Draw a standard normal vector of n entries, and return those that are here: the same whatever the ranks."""
        part = None if self._shards is None else self.part(n)
        return normal_vector(n, dtype=like.dtype, device=like.device, seed=seed, stream=stream, part=part)

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
        size = _chunk(rows.mT)
        if size >= rows.shape[1]:
            norms = torch.linalg.vector_norm(rows, dim=1)
        else:
            parts = [torch.linalg.vector_norm(part, dim=1) for part in rows.split(size, dim=1)]
            norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return self.reduce(norms * norms).sqrt()


def inner_product_of(
    dtype: torch.dtype, device: torch.device, size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the inner product, 0-d, of two vectors ``[size]``: of a part, its share, for :meth:`Space.reduce`."""
    loses_digits = device.type == "cpu" and dtype != torch.float64 and size > CHUNK
    return _pairwise_inner if loses_digits else torch.dot


def _pairwise_inner(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()


def _chunk(vector: Tensor) -> int:
    """Return how many entries of such a vector ``[n]`` or ``[n, k]`` may be added up at a time."""
    loses_digits = vector.device.type == "cpu" and vector.dtype != torch.float64
    return min(CHUNK, len(vector)) if loses_digits else len(vector)


LOCAL = Space()
"""Whole vectors on one device."""
