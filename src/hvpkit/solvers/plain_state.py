"""States of solvers as plain data, and back: what checkpoints hold.

Fields of metadata ``LONG`` are vectors of the operator's size along their last dimension. They are kept apart, by their
dotted names, as each rank may hold a part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vectors:
    """Vectors of the operator's size in plain data: ``[n]``, or rows ``[k, n]``, or a part of each."""

    entries: Tensor


def plain(value: Any) -> Any:
    """Convert dataclasses to dicts; tensors to copies on the CPU, but vectors, which are marked as they are."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if is_dataclass(value):
        return plain_fields(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def plain_fields(owner: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Convert a dataclass as :func:`plain` does, without some of its fields."""
    found = {}
    for field in fields(owner):
        if field.name not in without:
            value = getattr(owner, field.name)
            is_vectors = field.metadata.get("long") and isinstance(value, Tensor)
            found[field.name] = Vectors(value.detach()) if is_vectors else plain(value)
    return found


def without_vectors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return plain data with None in the place of vectors, and these by their dotted names."""
    found: dict[str, Tensor] = {}

    def take(leaf: Any, name: str) -> Any:
        if not isinstance(leaf, Vectors):
            return leaf
        found[name] = leaf.entries
        return None

    return _mapped(tree, take), found


def with_vectors(tree: Any, vectors: Mapping[str, Tensor]) -> Any:
    """Return plain data with vectors in their places: the inverse of :func:`without_vectors`."""
    return _mapped(tree, lambda leaf, name: vectors.get(name, leaf))


def with_parts(tree: Any, names: Collection[str], part: Callable[[Tensor], Tensor]) -> Any:
    """Return plain data with copies of all tensors; of those with these names, of a part."""

    def copied(leaf: Any, name: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (part(leaf) if name in names else leaf).clone()

    return _mapped(tree, copied)


def _mapped(tree: Any, change: Callable[[Any, str], Any], at: str = "") -> Any:
    """Return a tree of dicts and lists with changed leaves, by their dotted names."""
    if isinstance(tree, dict):
        return {key: _mapped(item, change, f"{at}.{key}" if at else str(key)) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_mapped(item, change, f"{at}.{place}") for place, item in enumerate(tree)]
    return change(tree, at)


def restored(like: Any, plain: Any) -> Any:
    """Rebuild the dataclasses of ``like`` from ``plain``, in the buffers of ``like`` where these are larger."""
    if isinstance(like, Tensor):
        tensor: Tensor = plain.to(like.device, like.dtype)
        is_larger = all(room >= size for room, size in zip(like.shape, tensor.shape, strict=True))
        if is_larger and like.shape != tensor.shape:
            like[tuple(map(slice, tensor.shape))] = tensor
            return like
        return tensor
    if is_dataclass(like) and not isinstance(like, type):
        hints, device, found = get_type_hints(type(like)), _device(like), {}
        for field in fields(like):
            own, item = getattr(like, field.name), plain[field.name]
            is_tuple = isinstance(own, tuple)
            found[field.name] = _items(hints[field.name], item, device) if is_tuple else restored(own, item)
        return type(like)(**found)
    return plain


def _items(hint: Any, plain: list[Any], device: torch.device | None) -> tuple[Any, ...]:
    """Rebuild a tuple of dataclasses without others inside, of tensors, or of numbers."""
    kind: Any = get_args(hint)[0]
    holds_dataclasses = is_dataclass(kind)  # a name of its own keeps mypy from narrowing
    if holds_dataclasses:
        return tuple(kind(**item) for item in plain)
    return tuple(item.to(device) if isinstance(item, Tensor) else item for item in plain)


def _device(like: Any) -> torch.device | None:
    tensors = (getattr(like, field.name) for field in fields(like))
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
