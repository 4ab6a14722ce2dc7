"""Checkpoints of a solve on disk: saved now and then and when it is interrupted, continued to the bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.files import atomic_write
from hvpkit.results.eigen import Progress

FORMAT = 2
"""Version of the file's content: names of the fields of states among them."""

SAVE_INTERVAL = 60.0
"""Seconds between two saves, at least. Chosen by feel."""

SAVE_COST_FACTOR = 20.0
"""Time between two saves, at least, in units of the time that a save takes: saves cost 5 % at most."""

S = TypeVar("S")


@dataclass(frozen=True)
class Saved(Generic[S]):
    """Content of a checkpoint: a solve between two steps.

    Attributes:
        state: of the solver.
        num_steps: steps until the next assessment.
        history: so far.
        seconds: so far.
    """

    state: S
    num_steps: int
    history: tuple[Any, ...]
    seconds: float


def _unchanged(state: S) -> S:
    return state


class Checkpoint(Generic[S]):
    """A file that holds a solve.

    Args:
        path: of the file; its folder must exist.
        solve: what has to be the same when it is continued: the solver, the operator's size, the arguments.
        trim: drops the parts of a state that need not be saved.
        verify: checks that a loaded state belongs to the operator, and returns the state to continue from.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: its folder does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        solve: dict[str, Any],
        trim: Callable[[S], S] = _unchanged,
        verify: Callable[[S], S] = _unchanged,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"checkpoint must be a path of a file, got {type(path).__name__}")
        self.path, self.solve, self.trim, self.verify = Path(path), solve, trim, verify
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {self.path.parent}; make it first")
        self._next = time.monotonic() + SAVE_INTERVAL

    def due(self) -> bool:
        """Return True if it is time to save."""
        return time.monotonic() >= self._next

    def save(self, saved: Saved[S]) -> None:
        """Replace the file; a failure leaves the old file as it was."""
        begin = time.monotonic()
        content = {
            "format": FORMAT,
            "solve": self.solve,
            "state": _plain(self.trim(saved.state)),
            "num_steps": saved.num_steps,
            "history": [asdict(entry) for entry in saved.history],
            "seconds": saved.seconds,
        }
        with atomic_write(self.path) as draft:
            torch.save(content, draft)
        now = time.monotonic()
        self._next = now + max(SAVE_INTERVAL, SAVE_COST_FACTOR * (now - begin))

    def load(self, like: S) -> Saved[S] | None:
        """Load the solve into the buffers of the fresh state ``like``; None if there is no file.

        Raises:
            ValueError: the file is no checkpoint, or one of another solve or operator.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            known = content["format"] == FORMAT
        except Exception as error:
            raise ValueError(
                f"checkpoint: {self.path} is not a checkpoint of hvpkit ({type(error).__name__}); delete it or name "
                "another file"
            ) from error
        if not known:
            raise ValueError(f"checkpoint: {self.path} is of another version of hvpkit; delete it")
        theirs = content["solve"]
        differences = [
            f"{key} was {theirs.get(key)!r} and is {value!r}"
            for key, value in self.solve.items()
            if theirs.get(key) != value
        ]
        if differences:
            raise ValueError(
                f"checkpoint: {self.path} holds another solve ({', '.join(differences)}); pass the same arguments to "
                "continue it, or delete it to start again"
            )
        history = tuple(Progress(**entry) for entry in content["history"])
        state = self.verify(_restored(like, content["state"]))
        return Saved(state, content["num_steps"], history, content["seconds"])

    def clear(self) -> None:
        """Delete the file, if there is one, after convergence."""
        self.path.unlink(missing_ok=True)


def argument_of(path: str | os.PathLike[str], name: str) -> Any:
    """Return an argument of the solve that a file holds, without reading its tensors; None if it holds none.

    For arguments whose default depends on the machine: a solve that continues elsewhere keeps its own.
    """
    try:
        content = torch.load(Path(path), map_location="cpu", weights_only=True, mmap=True)
        return content["solve"].get(name)
    except Exception:  # not a file, or of any other content: loading it says so
        return None


def _plain(value: Any) -> Any:
    """Convert dataclasses to dicts, and tensors to copies on the CPU without the rest of their storage."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _restored(like: Any, plain: Any) -> Any:
    """Rebuild the dataclasses of ``like`` from ``plain``, in the buffers of ``like`` where these are longer."""
    if isinstance(like, Tensor):
        tensor: Tensor = plain.to(like.device, like.dtype)
        if like.ndim and like.shape[1:] == tensor.shape[1:] and len(like) > len(tensor):
            like[: len(tensor)] = tensor
            return like
        return tensor
    if is_dataclass(like) and not isinstance(like, type):
        return type(like)(
            **{field.name: _restored(getattr(like, field.name), plain[field.name]) for field in fields(like)}
        )
    return plain
