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


def describe(batch: Batch, dtype: torch.dtype) -> str:
    """Return the names, dtypes and shapes in a batch, the range of its integers, and how it differs from ``dtype``.

    Example:
        >>> import torch
        >>> describe({"x": torch.ones(2), "y": torch.tensor([0, 4])}, torch.float64)
        'x: float32 [2]; y: int64 [2], 0 to 4. The parameters are float64: convert one, as by model.to(torch.float32)'
    """
    leaves = _pytree.tree_leaves(plain(batch))
    told = "; ".join(_describe_leaves(leaf_names(batch), leaves))
    others = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not others or dtype in others:
        return told
    return f"{told}. The parameters are {_short(dtype)}: convert one, as by model.to({others[0]})"


def _describe_leaves(names: list[str], leaves: list[object]) -> Iterator[str]:
    for name, leaf in list(zip(names, leaves, strict=True))[:MOST_LEAVES]:
        kind = f"{_short(leaf.dtype)} {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        yield f"{name}: {kind}{_range(leaf)}" if name else f"{kind}{_range(leaf)}"
    if len(leaves) > MOST_LEAVES:
        yield f"and {len(leaves) - MOST_LEAVES} more"


def _range(leaf: object) -> str:
    if (
        not isinstance(leaf, Tensor)
        or leaf.dtype.is_floating_point
        or leaf.dtype.is_complex
        or not leaf.numel()
    ):
        return ""
    try:
        return f", {int(leaf.min())} to {int(leaf.max())}"
    except (RuntimeError, NotImplementedError):  # a device that an error has stopped
        return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
