"""Checkpoints of a solve on disk: saved now and then and when it is interrupted, continued to the bit."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from hvpkit._utils import checkpoints
from hvpkit._utils.checkpoints import Identity
from hvpkit._utils.files import check_file, reason
from hvpkit._utils.random import generator
from hvpkit._utils.ranks import Ranks, agreed
from hvpkit.errors import UnsavedWarning
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.results.eigen import Progress

SAVE_INTERVAL = 60.0
"""Seconds between two saves, at least. Chosen by feel."""

SAVE_COST_FACTOR = 20.0
"""Time between two saves, at least, in units of the time that a save takes: saves cost 5 % at most."""

ROUNDING_FACTOR = 10.0
"""Relative error of a matvec that counts as the same operator's, in units of the precision of matvecs; the root of eps
if that is more. Chosen by feel."""


class Counted(Protocol):
    """The requirement on a state: the full-data matvecs spent so far, those that verified the operator included."""

    @property
    def num_matvecs(self) -> float: ...


S = TypeVar("S", bound=Counted)


@dataclass(frozen=True)
class Saved(Generic[S]):
    """Content of a checkpoint: a solve between two steps.

    Attributes:
        state: of the solver.
        num_steps: steps until the next assessment.
        history: so far.
        seconds: so far.
        verified: full-data matvecs that verified the operator, at every load so far: beyond the budget, so that a
            limit cuts where it would have.
    """

    state: S
    num_steps: int
    history: tuple[Any, ...]
    seconds: float
    verified: float = 0.0


def _unchanged(state: S) -> S:
    return state


class Checkpoint(Generic[S]):
    """A file that holds a solve.

    Args:
        path: of the file; its folder must exist.
        solve: what has to be the same when it is continued: the solver, the operator's identity, the arguments.
        trim: returns a state without the parts that need not be saved, or its plain data.
        verify: checks that a loaded state belongs to the operator, and returns the state to continue from.
        entry: the type of the history's entries.
        unpack: returns the state of its plain data, where the first state has no buffers for it.
        ranks: that solve together: the first one reads and writes the file.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        solve: Identity,
        trim: Callable[[S], Any] = _unchanged,
        verify: Callable[[S], S] = _unchanged,
        entry: Callable[..., Any] = Progress,
        unpack: Callable[[dict[str, Any]], S] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.path = (check_file("checkpoint", path) if self._is_writer else Path(path)).absolute()
        self.solve, self.trim, self.verify = solve, trim, verify
        self.entry, self.unpack = entry, unpack
        self._next = time.monotonic() + SAVE_INTERVAL
        self._seen = self._stamp()

    @property
    def _is_writer(self) -> bool:
        return self.ranks is None or self.ranks.is_first

    def _stamp(self) -> tuple[int, int] | None:
        """Return what changes whenever the file is replaced; None if there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @property
    def _is_of_another(self) -> bool:
        """True if another process has written the file since this solve began, or wrote it last."""
        return self._stamp() not in (None, self._seen)

    def due(self) -> bool:
        """Return True if it is time to save."""
        return agreed(self.ranks, time.monotonic() >= self._next)

    def save(self, saved: Saved[S]) -> None:
        """Replace the file. A failure is a warning, and leaves the old file as it was: the solve goes on.

        So is a file that another process has written meanwhile, as ranks without a mesh and jobs that ran twice do.
        """
        begin = time.monotonic()
        state = self.trim(saved.state)  # which may take all ranks
        if not self._is_writer:
            return
        content = {
            "state": plain(state),
            "num_steps": saved.num_steps,
            "history": [asdict(entry) for entry in saved.history],
            "seconds": saved.seconds,
            "verified": saved.verified,
        }
        if self._is_of_another:
            warnings.warn(
                f"checkpoint: another process writes {self.path} too, and its work is kept; give each process a file "
                "of its own, or, where ranks of torch.distributed ask one question, pass data as "
                "hvpkit.as_data(data, mesh=mesh). This solve goes on without being saved",
                UnsavedWarning,
                stacklevel=2,
            )
            self._next = math.inf
            return
        try:
            checkpoints.write(self.path, self.solve, content)
            self._seen = self._stamp()
        except (OSError, RuntimeError) as error:  # torch raises the second where a disk is full
            warnings.warn(
                f"checkpoint: {self.path} could not be written ({reason(error)}); the solve goes on, and can be "
                f"continued from {'its last save' if self.path.exists() else 'nothing yet'}",
                UnsavedWarning,
                stacklevel=2,
            )
        now = time.monotonic()
        self._next = now + max(SAVE_INTERVAL, SAVE_COST_FACTOR * (now - begin))

    def read(self) -> dict[str, Any] | None:
        """Return the content as it is saved, or None if there is no file.

        Raises:
            ValueError: the file is damaged, of another version, or of another solve.
        """
        self._seen = self._stamp()
        return agreed(self.ranks, checkpoints.read(self.path, self.solve) if self._is_writer else None)

    def load(self, like: S) -> Saved[S] | None:
        """Load the solve into the buffers of the fresh state ``like``; None if there is no file.

        Raises:
            ValueError: as :meth:`read`; the solve is one of another operator.
        """
        content = self.read()
        if content is None:
            return None
        history = tuple(self.entry(**entry) for entry in content["history"])
        saved = content["state"]
        loaded: S = restored(like, saved) if self.unpack is None else self.unpack(saved)
        before = loaded.num_matvecs
        state = self.verify(loaded)
        verified = content["verified"] + state.num_matvecs - before
        return Saved(state, content["num_steps"], history, content["seconds"], verified)

    def clear(self) -> None:
        """Delete the file, if there is one, after convergence; of a link, the file that it leads to."""
        if self._is_writer and not self._is_of_another:
            self.path.resolve().unlink(missing_ok=True)


@dataclass(frozen=True)
class Witness:
    """A random combination of vectors and that of their matvecs: one matvec shows whether an operator is the same.

    An operator that differs anywhere in the span of the vectors gives another image, with probability one.

    Attributes:
        vector, image: ``[n]``.
        count: vectors so far.
    """

    vector: Tensor
    image: Tensor
    count: int = 0

    @classmethod
    def empty(cls, op: LinearOperator) -> Witness:
        """Return the combination of no vectors."""
        zero = torch.zeros(op.space.size(op.n), dtype=op.dtype, device=op.device)
        return cls(zero, zero)

    def including(self, space: Space, rows: Tensor, images: Tensor) -> Witness:
        """Return the combination with further vectors ``[k, n]``, unless one of their matvecs is not finite."""
        weights = coefficients(len(rows), self.count).to(rows)
        vector, image = self.vector + rows.mT @ weights, self.image + images.mT @ weights
        good = torch.isfinite(space.peak(image))
        return Witness(
            torch.where(good, vector, self.vector),
            torch.where(good, image, self.image),
            self.count + len(rows),
        )

    def check(self, op: LinearOperator, scale: Tensor | float = 1.0, norm: float = 0.0) -> float:
        """Verify by a matvec that the images, which are over ``scale``, are this operator's; return its cost.

        ``norm`` is the size that errors are relative to, if it is more than that of the image.

        Raises:
            ValueError: they are not.
        """
        if not self.count:
            return 0.0
        image = op.product(self.vector.unsqueeze(1))[:, 0] / scale
        allowed = max(torch.finfo(op.dtype).eps ** 0.5, ROUNDING_FACTOR * op.precision)
        size = max(norm, float(op.space.norm(self.image)))
        if not float(op.space.norm(image - self.image)) <= allowed * size:
            raise ValueError(
                f"checkpoint: it holds a solve of another operator, or of {op!r} at other parameters or data; delete "
                "it, or pass the operator that it began with"
            )
        return op.cost


def coefficients(count: int, first: int = 0) -> Tensor:
    """Return the random coefficients of ``count`` vectors from number ``first`` on, float64."""
    return torch.randn(count, generator=generator(count, first), dtype=torch.float64)


def argument_of(path: str | os.PathLike[str], name: str, ranks: Ranks | None) -> Any:
    """Return an argument of the solve that a file holds, without reading its tensors; None if it holds none.

    For arguments whose default depends on the machine: a solve that continues elsewhere keeps its own.
    """
    return agreed(ranks, _argument_of(path, name))


def _argument_of(path: str | os.PathLike[str], name: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"].get(name)
    except Exception:  # not a file, or of any other content: loading it says so
        return None


def plain(value: Any) -> Any:
    """Convert dataclasses to dicts, and tensors to copies on the CPU without the rest of their storage."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


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
