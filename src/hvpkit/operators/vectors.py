"""Vectors as users have them: tensors, trees like the parameters, NumPy arrays; converted to columns and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_like
from hvpkit.autodiff.pytree import as_real

if TYPE_CHECKING:
    from hvpkit.operators.base import LinearOperator


def as_columns(op: LinearOperator, v: Tree, name: str = "v") -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return ``v`` as columns ``[n, k]``, and the function that gives columns the form of ``v``.

    Args:
        op: the operator that ``v`` is for.
        v: a tensor or a NumPy array ``[n]`` or ``[n, k]``, or a tree like the parameters. Arrays are converted to the
            dtype of ``op``.
        name: of ``v``, for messages.

    Raises:
        TypeError: ``op`` knows no trees; an array that does not hold real numbers.
        ValueError: another shape, dtype or device; NaN or infinity.
    """
    back: Callable[[Tensor], Any]
    if isinstance(v, np.ndarray):
        vectors, back = _from_array(op, v, name), lambda found: found.cpu().numpy()
    elif not isinstance(v, Tensor) or is_tree(op, v):
        vectors, back = _from_tree(op, v, name), op.unflatten
    else:
        vectors, back = v, lambda found: found
    if vectors.ndim not in (1, 2) or vectors.shape[0] != op.n or vectors.numel() == 0:
        raise ValueError(f"{name} must have shape [{op.n}] or [{op.n}, k], got {list(vectors.shape)}")
    columns = check_like(vectors, _like(op), name=name).reshape(op.n, -1)
    if not bool(torch.isfinite(columns).all()):
        raise ValueError(f"{name} contains NaN or infinity")
    shape = vectors.shape
    return columns, lambda found: back(found.reshape(shape))


def is_tree(op: LinearOperator, v: Tensor) -> bool:
    """Return True if the tensor ``v`` is a tree of one leaf: parameters that are one matrix, or complex."""
    is_vector = v.ndim == 1 and not v.is_complex()
    return op.layout is not None and not is_vector and op.layout.shapes == (as_real(v).shape,)


def is_one(op: LinearOperator, v: Tree) -> bool:
    """Return True if ``v`` is one vector ``[n]``, or a tree, and not a block of columns."""
    return not isinstance(v, Tensor | np.ndarray) or v.ndim == 1 or (isinstance(v, Tensor) and is_tree(op, v))


def _like(op: LinearOperator) -> Tensor:
    return torch.empty(0, dtype=op.dtype, device=op.device)


def _from_tree(op: LinearOperator, v: Tree, name: str) -> Tensor:
    if op.layout is None:
        raise TypeError(f"{name} must be a tensor: {op!r} knows no tree of parameters")
    leaves = [check_like(leaf, _like(op), name=name) for leaf in op.layout.leaves(v, name=name)]
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _from_array(op: LinearOperator, v: np.ndarray[Any, Any], name: str) -> Tensor:
    if v.dtype.kind not in "fiu":
        raise TypeError(f"{name} is an array of dtype {v.dtype}; real numbers are expected")
    return torch.tensor(np.ascontiguousarray(v)).to(op.device, op.dtype)
