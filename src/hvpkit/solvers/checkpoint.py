"""Checkpoints of a solve on disk: saved now and then and when it is interrupted, continued to the bit."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hvpkit._utils import checkpoint_parts, checkpoints
from hvpkit._utils.checkpoints import Identity, digest
from hvpkit._utils.files import beside, check_file, delete_folders, make_folder, reason
from hvpkit._utils.random import generator
from hvpkit._utils.ranks import Ranks, agreed
from hvpkit._utils.signals import signals_deferred
from hvpkit.errors import RemoteError, UnsavedWarning
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.space import Space
from hvpkit.results.eigen import Progress
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.plain_state import plain, restored, with_parts, with_vectors, without_vectors

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
    """A file that holds a solve; where ranks split its vectors, these lie in a folder beside it, each rank's part.

    The parts are written first, to a place of their own, and then the file is replaced, which names them with their
    digests: a kill at any time leaves the former checkpoint or the new one.

    Args:
        path: of the file; its folder must exist, and all ranks see it.
        solve: what has to be the same when it is continued: the solver, the operator's identity, the arguments.
        op: the operator, whose ranks solve together.
        trim: returns a state without the parts that need not be saved, or its plain data.
        verify: checks that a loaded state belongs to the operator, and returns the state to continue from.
        entry: the type of the history's entries.
        unpack: returns the state of its plain data, where the first state has no buffers for it.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        solve: Identity,
        op: LinearOperator,
        trim: Callable[[S], Any] = _unchanged,
        verify: Callable[[S], S] = _unchanged,
        entry: Callable[..., Any] = Progress,
        unpack: Callable[[dict[str, Any]], S] | None = None,
    ) -> None:
        self.op, self.ranks = op, op.space.ranks
        self.path = (check_file("checkpoint", path) if self._is_writer else Path(path)).absolute()
        self.solve, self.trim, self.verify = solve, trim, verify
        self.entry, self.unpack = entry, unpack
        self._next = time.monotonic() + SAVE_INTERVAL
        self._seen, self._folder = self._stamp(), ""

    @property
    def _is_writer(self) -> bool:
        return self.ranks is None or self.ranks.is_first

    @property
    def _shards(self) -> Ranks | None:
        """The ranks, if each holds a part of the vectors."""
        return self.ranks if self.op.space.sharded else None

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
        state, vectors = without_vectors(plain(self.trim(saved.state)))
        content = {
            "state": state,
            "num_steps": saved.num_steps,
            "history": [asdict(entry) for entry in saved.history],
            "seconds": saved.seconds,
            "verified": saved.verified,
        }
        try:
            with signals_deferred():  # no rank leaves in the midst
                self._replace(content, vectors)
        except RemoteError:
            raise
        except FileExistsError as error:
            self._warn(str(error))
            self._next = math.inf
            return
        except (OSError, RuntimeError) as error:  # torch raises the second where a disk is full
            found = "its last save" if self.path.exists() else "nothing yet"
            self._warn(
                f"{self.path} could not be written ({reason(error)}); the solve goes on, and can be continued from "
                f"{found}"
            )
        now = time.monotonic()
        self._next = now + max(SAVE_INTERVAL, SAVE_COST_FACTOR * (now - begin))

    def _warn(self, text: str) -> None:
        if self._is_writer:
            warnings.warn(f"checkpoint: {text}", UnsavedWarning, stacklevel=3)

    def _replace(self, content: dict[str, Any], vectors: dict[str, Tensor]) -> None:
        """Write vectors and content, whole or not at all; where they are split, all ranks together.

        Raises:
            FileExistsError: the file is another process's.
            OSError, RuntimeError: it cannot be written.
        """
        ranks = self._shards
        if ranks is None:
            if self._is_writer:
                whole = {name: plain(tensor) for name, tensor in vectors.items()}
                self._write(
                    {**content, "state": with_vectors(content["state"], whole), "vectors": [*whole]}, ""
                )
            return
        ranks.on_first(self._check_owner)
        folder = ranks.on_first(lambda: make_folder(_parts_of(self.path)))
        try:
            digests = checkpoint_parts.write(folder, vectors, self.op.n, ranks)
            shapes = checkpoint_parts.shapes_of(vectors, self.op.n)
            parts = {"folder": folder.name, "digests": digests, "shapes": shapes}
            ranks.on_first(lambda: self._write({**content, "parts": parts}, folder.name))
        except BaseException:
            if self._is_writer and self._folder != folder.name:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folder = folder.name

    def _check_owner(self) -> None:
        if self._is_of_another:
            raise FileExistsError(
                f"another process writes {self.path} too, and its work is kept; give each process a file of its own, "
                "or, where ranks of torch.distributed ask one question, pass data as hvpkit.as_data(data, mesh=mesh). "
                "This solve goes on without being saved"
            )

    def _write(self, content: dict[str, Any], folder: str) -> None:
        """Replace the file, and delete the former parts; ``folder`` are the new ones."""
        self._check_owner()
        checkpoints.write(self.path, self.solve, content)
        self._seen, former, self._folder = self._stamp(), self._folder, folder
        delete_folders(_parts_of(self.path), keep=folder, former=former)

    def read(self) -> dict[str, Any] | None:
        """Return the content as it is saved, with this rank's part of vectors; None if there is no file.

        Raises:
            ValueError: the file or a part is damaged or missing, of another version, or of another solve.
        """
        self._seen, ranks = self._stamp(), self._shards
        if ranks is None:
            content = agreed(self.ranks, checkpoints.read(self.path, self.solve) if self._is_writer else None)
            return None if content is None else self._with_vectors(content)
        with ranks.together("a checkpoint"):
            content = checkpoints.read(self.path, self.solve, mmap=True)
        identity = None if content is None else digest([content["seconds"], content.get("parts")])
        ranks.check_same(**{"checkpoint, in a folder that all ranks share,": identity})
        return None if content is None else self._with_vectors(content)

    def _with_vectors(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content with the vectors in its state, as far as this rank holds them."""
        state, ranks, parts = content["state"], self._shards, content.get("parts")
        if parts is not None:
            self._folder, folder = parts["folder"], _parts_of(self.path) / parts["folder"]
            try:
                found = checkpoint_parts.digests(folder, ranks)
            except OSError as error:
                raise ValueError(self._damaged(folder, reason(error))) from error
            if found != parts["digests"]:
                missing, theirs = [name for name in parts["digests"] if name not in found], parts["digests"]
                other = [name for name in found if found[name] != theirs.get(name)]
                what = f"{', '.join(missing)} missing" if missing else f"{', '.join(other)} not as saved"
                raise ValueError(self._damaged(folder, what))
            state = with_vectors(state, checkpoint_parts.read(folder, parts["shapes"], ranks))
        elif ranks is not None:
            if "vectors" not in content:
                raise ValueError(
                    f"checkpoint: {self.path} is of an earlier version; continue it with one process"
                )
            state = with_parts(state, content["vectors"], self.op.space.local_rows)
        return {**content, "state": state}

    def _damaged(self, folder: Path, why: str) -> str:
        return (
            f"checkpoint: {folder}, where the ranks' parts of {self.path} lie, is damaged ({why}); restore both from "
            "one copy, or delete both to start again"
        )

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
            delete(self.path.resolve())


def delete(path: Path) -> None:
    """Delete a checkpoint and its parts, if there are any."""
    path.unlink(missing_ok=True)
    shutil.rmtree(_parts_of(path), ignore_errors=True)


def _parts_of(path: Path) -> Path:
    """Return the folder of a checkpoint's parts."""
    return beside(path.resolve(), "parts")


@dataclass(frozen=True)
class Witness:
    """A random combination of vectors and that of their matvecs: one matvec shows whether an operator is the same.

    An operator that differs anywhere in the span of the vectors gives another image, with probability one.

    Attributes:
        vector, image: ``[n]``.
        count: vectors so far.
    """

    vector: Tensor = field(metadata=LONG)
    image: Tensor = field(metadata=LONG)
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
    return torch.randn(count, generator=generator(count, first), dtype=torch.float64, device="cpu")


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
