"""Digests of data: the same for the same examples and weights, however they are split into batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.checkpoints import Hasher, digest
from hvpkit.data.examples import Data


def digest_of(data: Data) -> str:
    """Return a digest of the examples and their weights, in one pass over the data.

    Of a leaf that is neither a tensor nor plain (only batches that are read whole may have one), the type alone counts.
    """
    hashers: dict[Any, Hasher] = {}
    for batch, size, weights, _, _ in data.parts():
        for place, leaf in enumerate([*_pytree.tree_leaves(batch), weights]):
            if isinstance(leaf, Tensor) and leaf.ndim:
                hashers.setdefault((place, str(leaf.dtype), *leaf.shape[1:]), Hasher()).add_entries(leaf)
            elif leaf is not None:
                hashers.setdefault(place, Hasher()).add(_plain(leaf))
        if data.whole:
            hashers.setdefault("sizes", Hasher()).add(size)
    found = digest([[str(place), hasher.result()] for place, hasher in hashers.items()])
    if data.ranks is None or data.units_of_ranks is None:
        return found
    return digest(data.ranks.gather(found))


def _plain(leaf: Any) -> Any:
    known = isinstance(leaf, torch.Tensor | bool | int | float | str)
    return leaf if known else type(leaf).__qualname__
