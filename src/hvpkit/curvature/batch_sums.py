"""Sums over batches, of all ranks where several share the data, and the first batch at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hvpkit._utils.ranks import Ranks

T = TypeVar("T")


def sum_over(
    batches: Iterable[T], function: Callable[[T], list[Tensor]], like: Sequence[Tensor], ranks: Ranks | None
) -> list[Tensor]:
    """Return the sum of ``function(batch)`` over the batches, leaf by leaf, and over the ranks.

    Args:
        batches: this rank's.
        function: gives leaves shaped ``like`` these.
        like: of the shapes and dtypes of the leaves, for a rank without a batch.
        ranks: that share the data, or None.
    """
    if ranks is None:
        return _sum(batches, function, like)
    with ranks.together("a sum over batches"):
        total = _sum(batches, function, like)
    return [ranks.sum(leaf) for leaf in total]


def _sum(batches: Iterable[T], function: Callable[[T], list[Tensor]], like: Sequence[Tensor]) -> list[Tensor]:
    total: list[Tensor] = []
    for batch in batches:
        leaves = function(batch)
        if not total:
            total = [leaf.detach().clone() for leaf in leaves]
        else:
            for accumulated, leaf in zip(total, leaves, strict=True):
                accumulated += leaf.detach()
    return total or [torch.zeros_like(leaf) for leaf in like]


def all_finite(leaves: Sequence[Tensor]) -> bool:
    """Return True if no entry is NaN or infinite; waits for the device."""
    return bool(torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all())


def blame_batch(
    quantity: str, batches: Iterable[T], function: Callable[[T], list[Tensor]], ranks: Ranks | None = None
) -> str:
    """Return a message that names the first batch for which ``function`` is not finite, by another pass."""
    total: list[Tensor] = []
    place: tuple[int, int] | None = None
    for index, batch in enumerate(batches):
        leaves = function(batch)
        total = leaves if index == 0 else [a + b for a, b in zip(total, leaves, strict=True)]
        if not all_finite(leaves):
            place = (index, 0 if ranks is None else ranks.rank)
            break
    where, again = "", bool(total) and all_finite(total)
    if ranks is not None:
        places, again = ranks.gather(place), all(ranks.gather(again or not total))
        place = min((other for other in places if other is not None), default=None)
        where = "" if place is None else f" of rank {place[1]}"
    if place is not None:
        return (
            f"the {quantity} is not finite (NaN or infinity), first from batch {place[0]}{where} of the data (counted "
            "from 0); look there for such inputs, a logarithm or square root at 0, or an overflow"
        )
    if again:
        return (
            f"the {quantity} was not finite (NaN or infinity), and is in another pass over the same batches: the data "
            "or the loss give other numbers in each pass; fix them, as by list(...) of the batches, one draw in memory"
        )
    return f"the {quantity} is not finite (NaN or infinity), though no batch alone is, as an overflow of their sum"
