"""Vectors as users have them: tensors, trees like the parameters, NumPy arrays; converted to columns and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.ranks import is_shards
from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_like
from hvpkit.autodiff.pytree import as_real

if TYPE_CHECKING:
    from hvpkit.operators.base import LinearOperator


def as_columns(op: LinearOperator, v: Tree, name: str = "v") -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return ``v`` as columns ``[n, k]``, as ``op.space`` holds them, and the function that gives these ``v``'s form.

    Args:
        op: the operator that ``v`` is for.
        v: a tensor or a NumPy array ``[n]`` or ``[n, k]``, or a tree like the parameters. Arrays are converted to the
            dtype of ``op``. Or a DTensor on the mesh of the data, ``Shard(0)``: then all ranks meet.
        name: of ``v``, for messages.

    Raises:
        TypeError: ``op`` knows no trees; an array that does not hold real numbers; a DTensor, and there is no mesh.
        ValueError: another shape, dtype or device; NaN or infinity; a DTensor of another mesh or placement.
    """
    if is_shards(v):
        return _from_shards(op, v, name)
    back: Callable[[Tensor], Any]
    if isinstance(v, np.ndarray):
        vectors, back = _from_array(op, v, name), lambda found: found.cpu().numpy()
    elif not isinstance(v, Tensor) or is_tree(op, v):
        vectors, back = _from_tree(op, v, name), op.unflatten
    else:
        vectors, back = v, lambda found: found
    shape = _check_shape(op, vectors, name)
    columns = check_like(vectors, op, name=name).reshape(op.n, -1)
    if not math.isfinite(columns.abs().amax()):
        raise ValueError(f"{name} contains NaN or infinity")
    return op.space.local(columns), lambda found: back(op.space.whole(found, op.n).reshape(shape))


def as_shards(op: LinearOperator, vectors: Tensor) -> Tensor:
    """Return whole vectors ``[n]`` or ``[n, k]`` as results over a mesh hold them: a DTensor, ``Shard(0)``.

    Themselves where there is no mesh, or where only a part is here.
    """
    ranks = None if op.space.sharded or is_shards(vectors) else op.space.ranks
    return vectors if ranks is None else ranks.shards(vectors[ranks.part(op.n)], op.n)


def _from_shards(op: LinearOperator, v: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    ranks, space = op.space.ranks, op.space
    if ranks is None:
        raise TypeError(
            f"{name} is a DTensor, and {op!r} is not over data of a mesh; pass {name}.full_tensor(), or make the "
            "operator of hvpkit.as_data(data, mesh=mesh)"
        )
    with ranks.together(name):
        shape, part = _check_shape(op, v, name), v.to_local()
        is_split = v.device_mesh == ranks.mesh and len(v.placements) == 1 and v.placements[0].is_shard(0)
        if not is_split or len(part) != len(range(op.n)[ranks.part(op.n)]):
            raise ValueError(
                f"{name} must be Shard(0) on the mesh of the data, {ranks.mesh}; got {v.placements} on "
                f"{v.device_mesh}: use {name}.redistribute(mesh, [Shard(0)])"
            )
        columns = check_like(part, op, name=name).reshape(len(part), math.prod(shape[1:]))
    split = space if space.sharded else type(space)(ranks, sharded=True)
    if not bool(split.finite(columns.mT).all()):
        raise ValueError(f"{name} contains NaN or infinity")

    def back(found: Tensor) -> Tensor:
        return ranks.shards((found if space.sharded else split.local(found)).reshape(-1, *shape[1:]), op.n)

    return columns if space.sharded else split.whole(columns, op.n), back


def _check_shape(op: LinearOperator, vectors: Tensor, name: str) -> torch.Size:
    if vectors.ndim not in (1, 2) or vectors.shape[0] != op.n or vectors.numel() == 0:
        raise ValueError(f"{name} must have shape [{op.n}] or [{op.n}, k], got {list(vectors.shape)}")
    return vectors.shape


def is_tree(op: LinearOperator, v: Tensor) -> bool:
    """Return True if the tensor ``v`` is a tree of one leaf: parameters that are one matrix, or complex."""
    is_vector = v.ndim == 1 and not v.is_complex()
    return op.layout is not None and not is_vector and op.layout.shapes == (as_real(v).shape,)


def is_one(op: LinearOperator, v: Tree) -> bool:
    """Return True if ``v`` is one vector ``[n]``, or a tree, and not a block of columns."""
    return not isinstance(v, Tensor | np.ndarray) or v.ndim == 1 or (isinstance(v, Tensor) and is_tree(op, v))


def _from_tree(op: LinearOperator, v: Tree, name: str) -> Tensor:
    if op.layout is None:
        raise TypeError(f"{name} must be a tensor: {op!r} knows no tree of parameters")
    leaves = [check_like(leaf, op, name=name) for leaf in op.layout.leaves(v, name=name)]
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _from_array(op: LinearOperator, v: np.ndarray[Any, Any], name: str) -> Tensor:
    if v.dtype.kind not in "fiu":
        raise TypeError(f"{name} is an array of dtype {v.dtype}; real numbers are expected")
    native = np.float64 if v.dtype == np.longdouble else v.dtype.newbyteorder("=")
    return torch.tensor(np.ascontiguousarray(v, dtype=native), device="cpu").to(op.device, op.dtype)
