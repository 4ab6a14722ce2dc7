"""Results in files, to the bit: JSON, and beside it, where there are tensors, a file of safetensors.

The JSON is strict; floats that are not finite are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``. It names
its class, the versions of hvpkit and torch, the date, and checksums of itself and of the tensors, so that a file that
was damaged, or belongs to another one, is refused. Both formats are data: loading runs no code in them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.files import atomic_write, check_file, reason
from hvpkit._utils.ranks import Ranks, is_shards, whole
from hvpkit._utils.validation import check_path
from hvpkit.results.plain_data import decode, encode, with_nonfinite, without_nonfinite
from hvpkit.results.tables import Columns, to_frame, to_html

FORMAT = 1
"""Version of the files."""

SUFFIX = ".safetensors"

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

DERIVED = ("converged", "ok", "fits")
"""Properties that :meth:`Result.to_dict` adds, where a result has them."""


@dataclass(frozen=True, repr=False)
class Result:
    """The base of results: they can be saved, loaded, and shown as plain data and as tables."""

    _classes: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # Generic's, for Estimate[float]
        if cls.__module__.startswith("hvpkit."):
            Result._classes[cls.__name__] = cls

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a JSON file, and its tensors to a file beside it, ``path`` with ``.safetensors``.

        A result with DTensors, as of an operator over a mesh, is saved by all ranks together: the first one writes
        whole tensors, which one process can load.

        Both files replace older ones, each whole or not at all. The tensors are in place before the JSON; files that
        do not belong together, as after a power cut in between, are refused when they are loaded.

        Args:
            path: the JSON file; any name.

        Raises:
            TypeError: the solution of a linear system is a tree of other than dicts, lists and tuples.
            ValueError: ``path`` or the file beside it cannot be written.
            OSError: the disk is full.
            RemoteError: a rank failed, or does something else.

        Cost:
            No pass; memory for a copy of the tensors.

        Example:
            >>> import tempfile, torch, hvpkit as hk
            >>> ex = hk.extreme_eigenvalues(hk.aslinearoperator(torch.diag(torch.tensor([-1.0, 2.0, 100.0]))))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ex.save(f"{folder}/ex.json")
            ...     again = hk.load(f"{folder}/ex.json")
            >>> again.largest.value == ex.largest.value, torch.equal(again.vectors, ex.vectors)
            (True, True)
        """
        ranks = _ranks_of(self)
        if ranks is not None:
            ranks.meet("saving a result")
            result = self.full_tensor()
            with ranks.together("saving a result"):
                if ranks.is_first:
                    result.save(path)
            return
        target = check_file("path", path)
        tensors: dict[str, Tensor] = {}
        body = {
            "format": FORMAT,
            "class": type(self).__name__,
            **_versions(),
            "summary": repr(self),
            "result": encode(self, lambda value, at: _store(value, at, tensors), with_long=True),
            "tensors": digest(dict(sorted(tensors.items()))) if tensors else None,
        }
        text = json.dumps({**body, "checksum": digest(body)}, indent=1, allow_nan=False, ensure_ascii=False)
        _write(target, text, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load the result that :meth:`save` wrote, with the same bits; tensors come to the CPU.

        Raises:
            ValueError: the file is damaged, not a result, of another class or of another version.
            FileNotFoundError: there is no such file.
        """
        found = _load(path, cls)
        assert isinstance(found, cls)
        return found

    def full_tensor(self) -> Self:
        """Return the result with whole tensors in the place of DTensors; all ranks call it together.

        Results without DTensors are returned as they are, without a word between ranks.
        """
        found: Self = _with_whole(self)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts for JSON, with None for numbers that are not finite.

        Vectors of the operator's size are left out: eigenvectors and solutions. Other tensors become nested lists.

        Raises:
            TypeError: one of these is a DTensor, as of :func:`hvpkit.diagonal` over a mesh.
        """
        plain: dict[str, Any] = encode(self, without_nonfinite, with_long=False)
        return plain | {name: getattr(self, name) for name in DERIVED if hasattr(self, name)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the result that :meth:`to_dict` converted; names that it does not have are ignored.

        Vectors that were left out are empty, other tensors are float64 on the CPU. None becomes infinite for bounds of
        errors, residuals and ends of intervals, and NaN for all other numbers. Files keep more: :meth:`save`.

        Raises:
            ValueError: ``plain`` is not of that form.
        """
        names = [field.name for field in fields(cls)]
        try:
            known = {name: plain[name] for name in names if name in plain}
            found: Self = decode(cls, known, with_nonfinite)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"plain is not what {cls.__name__}.to_dict makes: {error}") from error
        return found

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame``: a row for each eigenvalue, sample, node, block, check, solution or call.

        Of an estimate of a tensor, it is a row for each entry.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_frame(self._columns())

    def _columns(self) -> Columns:
        """Return the columns of :meth:`to_frame`."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return to_html(repr(self).strip("<>"), self._columns())


def load(path: str | os.PathLike[str]) -> Any:
    """Load a result of any class that its ``save`` wrote, with the same bits; tensors come to the CPU.

    No code in the files is run.

    Args:
        path: the JSON file; the file of tensors lies beside it.

    Returns:
        A result of the class that was saved.

    Raises:
        ValueError: the file is damaged, not a result, or of another version; its tensors are missing, damaged, or of
            another file.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile, torch, hvpkit as hk
        >>> report = hk.check(hk.aslinearoperator(torch.eye(3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.save(f"{folder}/report.json")
        ...     load(f"{folder}/report.json")
        <Report: ok>
    """
    return _load(path, Result)


def _with_whole(value: Any) -> Any:
    """Return dataclasses and tuples with whole tensors in the place of DTensors."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, tuple):
        return tuple(map(_with_whole, value))
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        changed = {name: _with_whole(item) for name, item in found.items()}
        return replace(value, **{name: item for name, item in changed.items() if item is not found[name]})
    return value


def _ranks_of(value: Any) -> Ranks | None:
    """Return the ranks of a DTensor that a result holds; None if it holds none."""
    if isinstance(value, Tensor):
        shards: Any = value
        return Ranks(shards.device_mesh) if is_shards(value) else None
    items = value if isinstance(value, tuple) else ()
    if is_dataclass(value):
        items = tuple(getattr(value, field.name) for field in fields(value))
    return next((ranks for ranks in map(_ranks_of, items) if ranks is not None), None)


def _versions() -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"hvpkit": import_module("hvpkit").__version__, "torch": str(torch.__version__), "date": now}


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _write(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Replace both files, once both are written."""
    from safetensors.torch import save_file

    with atomic_write(path) as draft:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # no lack of room is found after the tensors are in place
        if tensors:
            with atomic_write(check_file("path", _beside(path))) as beside:
                save_file(tensors, beside)


def _store(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a float; put a tensor or an array among ``tensors``, and return a reference to it."""
    if isinstance(value, float):
        names = [name for name, other in NONFINITE.items() if repr(other) == repr(value)]
        return names[0] if names else value
    tensor = torch.tensor(value, device="cpu") if isinstance(value, np.ndarray) else value.detach()
    about = {"numpy": isinstance(value, np.ndarray), "complex": tensor.is_complex()}
    tensor = torch.view_as_real(tensor.resolve_conj()) if about["complex"] else tensor
    name = f"{at}#{len(tensors)}" if at in tensors else at  # keys of trees may hold dots
    tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return {"tensor": name, **{kind: True for kind, holds in about.items() if holds}}


def _restore(kind: Any, plain: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_store`."""
    if kind is float:
        if isinstance(plain, str) and plain in NONFINITE:
            return NONFINITE[plain]
        if type(plain) in (int, float):
            return plain
        raise ValueError(f"{at} is {plain!r:.80}, not a number")
    if not isinstance(plain, dict) or plain.get("tensor") not in tensors:
        raise ValueError(f"{at} is {plain!r:.80}, not a tensor")
    tensor = tensors[plain["tensor"]]
    tensor = torch.view_as_complex(tensor) if plain.get("complex") else tensor
    return tensor.numpy() if plain.get("numpy") else tensor


def _load(path: str | os.PathLike[str], expected: type[Result]) -> Result:
    """Load a result of a class; of any, if that is :class:`Result` itself."""
    target = check_path("path", path)
    body = _read(target)
    kind = Result._classes.get(str(body.get("class")))
    if kind is None:
        raise ValueError(f"path: {path} holds a {body.get('class')!r:.80}, which is not a result of hvpkit")
    if not issubclass(kind, expected):
        name = kind.__name__
        raise ValueError(
            f"path: {path} holds {_a(name)}, not {_a(expected.__name__)}; load it by {name}.load or hvpkit.load"
        )
    tensors = {} if body.get("tensors") is None else _read_tensors(target, body["tensors"])
    try:
        found: Result = decode(
            kind, body.get("result"), lambda form, plain, at: _restore(form, plain, at, tensors)
        )
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"path: {path} does not hold what {_a(kind.__name__)} consists of ({error}); it was not made by save"
        ) from error
    return found


def _read(path: Path) -> dict[str, Any]:
    """Return what the JSON file holds, once its version and checksum are known to be right."""
    try:
        body = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse)
        checksum = digest({name: item for name, item in body.items() if name != "checksum"})
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"path: {path} is damaged, or is not a JSON file that a result's save wrote ({error!r:.120}); restore it "
            "from a copy, or name another file"
        ) from error
    if "format" not in body or "checksum" not in body:
        raise ValueError(f"path: {path} is not a file that a result's save wrote; name another file")
    if body["format"] != FORMAT:
        raise ValueError(
            f"path: {path} is of another version of hvpkit (format {body['format']!r}, by hvpkit "
            f"{body.get('hvpkit')!r}; this one has {FORMAT}), or damaged; load it with that version"
        )
    if body["checksum"] != checksum:
        raise ValueError(
            f"path: {path} is damaged or was edited (its checksum does not fit); restore it from a copy"
        )
    found: dict[str, Any] = body
    return found


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    beside = _beside(path)
    try:
        tensors = load_tensors(beside.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"path: {path} needs its tensors, {beside}, which is missing; copy it there"
        ) from error
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(
            f"path: {beside}, the tensors of {path}, is damaged ({reason(error)}); restore both from a copy"
        ) from error
    tensors = dict(sorted(tensors.items()))
    if digest(tensors) != checksum:
        raise ValueError(
            f"path: {beside} is damaged, or holds the tensors of another result than {path}; restore both from a copy"
        )
    return tensors


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not strict JSON")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
