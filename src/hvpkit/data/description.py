"""Description of a batch for error messages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.pytree import leaf_names, plain

MOST_LEAVES = 8
"""Leaves of a batch that a message describes."""


def describe(batch: Batch, dtype: torch.dtype, start: int = 0) -> str:
    """Return the names, dtypes and shapes in a batch, the range of its integers, and how it differs from ``dtype``.

    ``start`` is the number of the first example, by which those of the least and the largest integer are named.

    Example:
        >>> import torch
        >>> describe({"x": torch.ones(2)}, torch.float64)
        'x: float32 [2]. The parameters are float64: convert one, as by model.to(torch.float32)'
        >>> describe(torch.tensor([3, 0, 4]), torch.float32, start=6)
        'int64 [3], from 0 (example 7) to 4 (example 8)'
    """
    leaves = _pytree.tree_leaves(plain(batch))
    told = "; ".join(_describe_leaves(leaf_names(batch), leaves, start))
    if any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.int8, torch.int16, torch.int32) for leaf in leaves
    ):
        told += ". Classes must be int64: convert them, as by y.long()"
    others = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not others or dtype in others:
        return told
    return f"{told}. The parameters are {_short(dtype)}: convert one, as by model.to({others[0]})"


def _describe_leaves(names: list[str], leaves: list[object], start: int) -> Iterator[str]:
    for name, leaf in list(zip(names, leaves, strict=True))[:MOST_LEAVES]:
        kind = f"{_short(leaf.dtype)} {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        yield (f"{name}: " if name else "") + kind + _range(leaf, start)
    if len(leaves) > MOST_LEAVES:
        yield f"and {len(leaves) - MOST_LEAVES} more"


def _range(leaf: object, start: int) -> str:
    if (
        not isinstance(leaf, Tensor)
        or leaf.dtype.is_floating_point
        or leaf.dtype.is_complex
        or not leaf.numel()
    ):
        return ""
    try:
        low, high = int(leaf.min()), int(leaf.max())
        if leaf.ndim != 1:
            return f", {low} to {high}"
        places = (start + int(leaf.argmin()), start + int(leaf.argmax()))
        return f", from {low} (example {places[0]}) to {high} (example {places[1]})"
    except (RuntimeError, NotImplementedError):  # a device that an error has stopped
        return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
