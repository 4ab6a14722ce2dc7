"""Files that are written whole or not at all, and paths that are tried before any work.

A file is written as a draft beside it, which then takes its name. A symbolic link stays, and its target is replaced.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

PROBE_BYTES = 2**16
"""Size of the draft that tries a path: more than a full disk has left in its last block. Chosen by feel."""

STALE_SECONDS = 24 * 3600.0
"""Age at which the draft of a process that cannot be asked is swept: of another machine, container or boot. Chosen by
feel."""

MAX_STEM = 150
"""Bytes of a file's name that its draft repeats: names have 255 bytes at most."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` at the end; an error leaves ``path`` as it was.

    The content is on the disk before the name is: a power cut leaves the old file or the new one. Drafts that dead
    processes left are deleted.

    Raises:
        OSError: ``path`` is a folder or a device, or cannot be written.
    """
    target = _resolved(path)
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is not a regular file")
    _sweep(target)
    draft = _draft(target)
    try:
        yield draft
        flush(draft)
        os.replace(draft, target)
        with suppress(OSError):  # not every system lets a folder be flushed
            flush(target.parent)
    finally:
        draft.unlink(missing_ok=True)


def check_file(name: str, path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a path that can be written now, tried by a draft; ``name`` is the argument's.

    Raises:
        TypeError: it is no path.
        ValueError: it cannot be written: there is no folder, no room, no permission, or it is not a file.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path of a file, got {type(path).__name__}")
    try:
        target = _resolved(Path(path))
        if not target.parent.is_dir():
            raise ValueError(f"{name}: there is no folder {target.parent}; make it first")
        if target.exists() and not target.is_file():
            raise ValueError(f"{name}: {path} is not a regular file; name a file")
        draft = _draft(target)
        try:
            draft.write_bytes(bytes(PROBE_BYTES))
            flush(draft)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{name}: {path} cannot be written ({reason(error)}); name another place, or make room or permission there"
        ) from error
    return Path(path)


def beside(path: Path, name: str) -> Path:
    """Return the path of a further file of the same work."""
    return path.with_name(f"{path.name}.{name}")


def check_folder(name: str, path: Path) -> None:
    """Make a folder, with its parents.

    Raises:
        ValueError: it cannot be made; ``name`` is the argument's.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot make the folder {path} ({reason(error)}); name another") from error


def make_folder(parent: Path) -> Path:
    """Make a folder inside of another one, which is made too, under a name that no other process uses."""
    folder = _draft(parent / "save").with_suffix("")
    folder.mkdir(parents=True)
    return folder


def delete_folders(parent: Path, keep: str, former: str) -> None:
    """Delete, of what :func:`make_folder` made in a folder, the former one and those of dead processes.

    The folder around them goes with the last one. What cannot be deleted stays.
    """
    with suppress(OSError):
        for entry in [*os.scandir(parent)]:
            parts = entry.name.split(".")
            is_ours = len(parts) == 4 and parts[2].isdigit() and entry.name != keep
            if is_ours and (entry.name == former or _is_stale(entry, parts[1], int(parts[2]))):
                shutil.rmtree(entry.path, ignore_errors=True)
        parent.rmdir()


def reason(error: Exception) -> str:
    """Return why a file could not be written, in a few words."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def flush(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _stem(target: Path) -> str:
    return target.name.encode(errors="surrogateescape")[:MAX_STEM].decode(errors="ignore")


def _draft(target: Path) -> Path:
    """Return a name that no other draft has: of another thread, process or machine."""
    return target.with_name(f"{_stem(target)}.{_system()}.{os.getpid()}.{uuid.uuid4().hex[:12]}.part")


def _sweep(target: Path) -> None:
    """Delete the drafts of a file whose processes are dead."""
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f"{_stem(target)}.") and entry.name.endswith(".part"):
                parts = entry.name.removeprefix(f"{_stem(target)}.").split(".")
                if len(parts) == 4 and parts[1].isdigit() and _is_stale(entry, parts[0], int(parts[1])):
                    with suppress(OSError):
                        os.unlink(entry.path)


def _is_stale(entry: os.DirEntry[str], system: str, process: int) -> bool:
    if system == _system() and os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # alive, and somebody else's
            return False
        return False
    return time.time() - entry.stat().st_mtime > STALE_SECONDS


@cache
def _system() -> str:
    """Return a digest of where process numbers mean the same: the machine, its boot and its container."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
