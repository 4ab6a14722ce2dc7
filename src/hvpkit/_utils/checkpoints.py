"""The one format of checkpoints: content with a checksum, a format version, and the identity of the question.

A file holds tensors and plain data in the form of ``torch.save``; nothing in it is ever run. :func:`digest` is over
values and not over bytes of a file, so that the lines of a tracker's text file have the same checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.files import atomic_write

FORMAT = 8
"""Version of the files' content: names of the fields of states among them."""

DIGITS = 32
"""Hexadecimal digits of a digest: 128 bits."""

Identity = Mapping[str, Any]
"""What must be the same for a checkpoint to be continued, part by part; large parts as a :func:`digest`."""


class Hasher:
    """A digest that grows: of tensors, numbers, strings, None, and lists and dicts of these."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Add a value.

        Raises:
            TypeError: it is of a type that has no digest.
        """
        if isinstance(value, Tensor):
            self._hash.update(f"tensor {value.dtype} {list(value.shape)}".encode())
            self.add_entries(value)
        elif isinstance(value, Mapping):
            self._hash.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif isinstance(value, list | tuple):
            self._hash.update(f"list {len(value)}".encode())
            for item in value:
                self.add(item)
        elif value is None or isinstance(value, bool | int | float | str):
            text = repr(value)
            self._hash.update(f"{type(value).__name__} {len(text)} {text}".encode())
        else:
            raise TypeError(f"a {type(value).__name__} has no digest")

    def add_entries(self, tensor: Tensor) -> None:
        """Add a tensor's entries alone, so that pieces of a tensor have the digest of the whole."""
        entries = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._hash.update(entries.view(torch.uint8).numpy().data)

    def result(self) -> str:
        """Return the digest of what was added."""
        return self._hash.hexdigest()[:DIGITS]


def digest(value: Any) -> str:
    """Return the digest of tensors, numbers, strings, None, and lists and dicts of these.

    Example:
        >>> digest({"a": [1, 2.0]}) == digest({"a": (1, 2.0)}) != digest({"a": [1, 2]})
        True
    """
    hasher = Hasher()
    hasher.add(value)
    return hasher.result()


def write(path: Path, identity: Identity, content: dict[str, Any]) -> None:
    """Replace a checkpoint, whole or not at all.

    Raises:
        OSError, RuntimeError: it cannot be written; torch raises the second.
    """
    body = {"identity": _plain(identity), "content": content}
    with atomic_write(path) as draft:
        torch.save({"format": FORMAT, "checksum": digest(body), **body}, draft)


def read(
    path: Path, identity: Identity, *, name: str = "checkpoint", mmap: bool = False
) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if there is no file. With ``mmap`` its tensors stay in the file.

    Raises:
        ValueError: the file is damaged, is no checkpoint, is of another version, or of another question; ``name`` is
            the argument's.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(_unreadable(name, path, type(error).__name__)) from error
    if not isinstance(found, dict) or "format" not in found:
        raise ValueError(f"{name}: {path} is not a checkpoint of hvpkit; name another file")
    if found["format"] != FORMAT:
        raise ValueError(
            f"{name}: {path} is of another version of hvpkit (format {found['format']!r}; this one has {FORMAT}); "
            "continue it with that version, or delete it to start again"
        )
    body = {key: found.get(key) for key in ("identity", "content")}
    if found.get("checksum") != digest(body) or not all(isinstance(part, dict) for part in body.values()):
        raise ValueError(_unreadable(name, path, "its checksum does not fit"))
    check_identity(name, path, found["identity"], _plain(identity))
    content: dict[str, Any] = found["content"]
    return content


def _plain(value: Any) -> Any:
    """Convert numbers and strings of any kind, as NumPy's and a StrEnum's, to Python's own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def check_identity(name: str, path: str | os.PathLike[str], theirs: Identity, ours: Identity) -> None:
    """Raise ValueError, which names what differs, unless both identities are the same."""
    differences = [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        if _is_short(theirs, ours, key)
        else f"{key} differs"
        for key in dict.fromkeys([*ours, *theirs])
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError(
            f"{name}: {path} holds another solve ({', '.join(differences)}); pass the same arguments to continue it, "
            "or name another file to start again"
        )


def _is_short(theirs: Identity, ours: Identity, key: str) -> bool:
    digits = [
        value for value in (theirs.get(key), ours.get(key)) if isinstance(value, str) and len(value) == DIGITS
    ]
    return not digits


def _unreadable(name: str, path: Path, why: str) -> str:
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"  # as torch.save writes it
    if is_archive:
        return f"{name}: {path} is damaged ({why}); restore it from a copy, or delete it to start again"
    return (
        f"{name}: {path} is not a checkpoint of hvpkit ({why}), or is damaged; delete it or name another file"
    )
