"""Results as plain data: frozen dataclasses to dicts, lists, numbers and strings, and back by their fields' types.

What JSON has no form for, floats that are not finite, tensors and arrays, is left to a function ``leaf``, so that the
same two walks serve dicts for people and exact files. Only the classes named in annotations are ever made: nothing in
the data chooses code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_dense

LONG = {"long": True}
"""Metadata of a field whose vectors have the size of the operator: dicts for people leave it out."""

Leaf = Callable[[Any, str], Any]
"""Converts a float, a tensor or an array at a dotted place."""

Build = Callable[[Any, Any, str], Any]
"""Converts plain data at a dotted place to a type, float or Tensor; in a tree, for which the type is Any, to a leaf."""


def encode(value: Any, leaf: Leaf, *, with_long: bool, at: str = "") -> Any:
    """Convert a dataclass, with what it holds, to plain data.

    Raises:
        TypeError: it holds what has no plain form, named by its place.
    """
    if is_dataclass(value):
        kind: Any = type(value)
        hints = _hints(kind)
        plain = {}
        for field in fields(value):
            if with_long or not field.metadata.get("long"):
                item, place = getattr(value, field.name), _join(at, field.name)
                plain[field.name] = (
                    _encode_tree(item, leaf, place)
                    if Any in (hints[field.name], *get_args(hints[field.name]))
                    else encode(item, leaf, with_long=with_long, at=place)
                )
        return plain
    if isinstance(value, tuple | list):
        return [
            encode(item, leaf, with_long=with_long, at=_join(at, place)) for place, item in enumerate(value)
        ]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return leaf(float(value), at)
    if isinstance(value, Tensor):
        return leaf(value, at)
    raise TypeError(f"{at} holds a {type(value).__name__}, which cannot be converted to plain data")


def _encode_tree(tree: Tree, leaf: Leaf, at: str) -> Any:
    """Convert a tree of tensors: each container becomes a dict of one item, under the name of its kind."""
    if tree is None or isinstance(tree, Tensor | np.ndarray):
        return None if tree is None else leaf(tree, at)
    if isinstance(tree, Mapping):
        for key in tree:
            if type(key) not in (str, int):
                raise TypeError(f"{at} has the key {key!r}; only strings and integers can be saved")
        return {"dict": [[key, _encode_tree(item, leaf, _join(at, key))] for key, item in tree.items()]}
    if type(tree) in (list, tuple):
        items = [_encode_tree(item, leaf, _join(at, place)) for place, item in enumerate(tree)]
        return {type(tree).__name__: items}
    raise TypeError(
        f"{at} holds a {type(tree).__name__}; tensors in dicts, lists and tuples can be saved: convert it by "
        "dataclasses.replace(result, ...)"
    )


def decode(kind: Any, plain: Any, build: Build, *, at: str = "") -> Any:
    """Convert plain data to a type: the inverse of :func:`encode`.

    Raises:
        ValueError: the data are not of this type, named by their place.
    """
    choices = kind.__constraints__ if isinstance(kind, TypeVar) else get_args(kind)
    if isinstance(kind, TypeVar) or get_origin(kind) in (Union, UnionType):
        return _decode_first(choices, plain, build, at)
    if kind is Any:
        return _decode_tree(plain, build, at)
    generic = get_origin(kind) or kind  # Estimate of Estimate[float]
    if is_dataclass(generic):
        return _decode_dataclass(generic, plain, build, at)
    if get_origin(kind) is tuple:
        if isinstance(plain, list | tuple):
            items = enumerate(plain)
            return tuple(decode(choices[0], item, build, at=_join(at, place)) for place, item in items)
    elif kind in (float, Tensor):
        return build(kind, plain, at)
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(plain)
    elif type(plain) is kind:
        return plain
    raise ValueError(f"{at} is {plain!r:.80}, not {getattr(kind, '__name__', kind)}")


def _decode_first(kinds: tuple[Any, ...], plain: Any, build: Build, at: str) -> Any:
    """Return the data as the first of the types that they fit; None, where it is one of them, is None."""
    if plain is None and NoneType in kinds:
        return None
    error: ValueError | None = None
    for kind in kinds:
        try:
            return decode(kind, plain, build, at=at)
        except ValueError as raised:
            error = error or raised
    raise error or ValueError(f"{at} has no type")


def _decode_dataclass(kind: Any, plain: Any, build: Build, at: str) -> Any:
    """Return a dataclass; long fields that are left out are empty, others have their defaults."""
    known = {field.name: field for field in fields(kind)}
    if not isinstance(plain, Mapping) or set(plain) - set(known):
        raise ValueError(f"{at or 'it'} is not what a {kind.__name__} consists of")
    hints, values = _hints(kind), {}
    for name, field in known.items():
        if name in plain:
            values[name] = decode(hints[name], plain[name], build, at=_join(at, name))
        elif field.metadata.get("long"):
            values[name] = torch.empty(0, device="cpu")
        elif field.default is MISSING:
            raise ValueError(f"{_join(at, name)} is missing")
    return kind(**values)


def _decode_tree(plain: Any, build: Build, at: str) -> Tree:
    if plain is None:
        return None
    if isinstance(plain, Mapping) and len(plain) == 1:
        name, items = next(iter(plain.items()))
        if name == "dict" and isinstance(items, list):
            return {key: _decode_tree(item, build, _join(at, key)) for key, item in items}
        if name in ("list", "tuple") and isinstance(items, list):
            found = [_decode_tree(item, build, _join(at, place)) for place, item in enumerate(items)]
            return found if name == "list" else tuple(found)
    return build(Any, plain, at)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _join(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


INFINITE = {
    "residual_norm", "residual_norms", "relative_residual", "residual", "error_bound", "error_bounds",
    "smallest_bound", "largest_bound", "error_estimate", "stderr", "upper", "seconds_left",
}  # fmt: skip
"""Numbers that are infinite where they are not known; the lower end of an interval is minus that, all others NaN."""


def without_nonfinite(value: Any, at: str = "") -> Any:
    """Convert a float, or a tensor to nested lists, with None for what is not finite."""
    if isinstance(value, Tensor):
        return without_nonfinite(check_dense(at, value).tolist())
    if isinstance(value, list):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nonfinite(kind: Any, plain: Any, at: str) -> Any:
    """Convert what :func:`without_nonfinite` gave to a float or a float64 tensor; the name says what None is."""
    name = at.rsplit(".", maxsplit=1)[-1]
    unknown = math.inf if name in INFINITE else -math.inf if name == "lower" else math.nan
    if kind is Tensor and isinstance(plain, list):
        return torch.tensor(_replaced(plain, unknown), dtype=torch.float64, device="cpu")
    if kind is float and (plain is None or (isinstance(plain, Real) and not isinstance(plain, bool))):
        return unknown if plain is None else plain
    raise ValueError(f"{at} is {plain!r:.80}, not a {'list' if kind is Tensor else 'number'}")


def _replaced(plain: Any, unknown: float) -> Any:
    if isinstance(plain, list):
        return [_replaced(item, unknown) for item in plain]
    return unknown if plain is None else plain
