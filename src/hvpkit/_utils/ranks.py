"""The processes (ranks) of a device mesh that work on one question: what they add up, agree on, and tell each other.

Every rank runs the same program. They meet at each matvec: before anything is added up, each tells by one small
reduction whether its share is done, and which question it is of. So an error, an interruption or a deadline of one rank
reaches all of them, and sums of different questions cannot happen. torch.distributed carries everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from hvpkit._utils.deadline import DeadlineReached, check_deadline, has_deadline
from hvpkit._utils.signals import signals_deferred
from hvpkit.errors import RemoteError

T = TypeVar("T")

# by their names since torch 2.13, or those before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_to_all = dist.all_to_all_single


DIGESTED = 2**16
"""Entries of a vector that are digested at a time: of 10.6 million in float32 in 9 ms, all at once in 56 ms."""


class _State(IntEnum):
    """The state of a rank's share; the largest one holds for all."""

    DONE = 0
    DEADLINE = 1
    FAILED = 2


class Ranks:
    """The ranks of a one-dimensional mesh. All methods but the properties are called by all of them, in one order.

    Args:
        mesh: of ``torch.distributed.device_mesh.init_device_mesh``.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh.
        ValueError: it has more than one dimension, or this process is not in it.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                "mesh must be a DeviceMesh, as of torch.distributed.device_mesh.init_device_mesh('cpu', (num_ranks,)); "
                f"got {type(mesh).__name__}"
            )
        if mesh.ndim != 1 or mesh.get_coordinate() is None:
            raise ValueError(
                f"mesh must have one dimension, and this process in it; got {mesh}. Take mesh['dp']"
            )
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self._control = _control_of(self.group)
        self._count = 0

    def __repr__(self) -> str:
        return f"<Ranks: {self.rank} of {self.size}>"

    @property
    def is_first(self) -> bool:
        """True on the rank that decides, prints and writes files."""
        return self.rank == 0

    def part(self, n: int, rank: int | None = None) -> slice:
        """Return which of n entries a rank, by default this one, holds: n / p, rounded up, as Shard has it."""
        size, rank = -(-n // self.size), self.rank if rank is None else rank
        return slice(min(rank * size, n), min((rank + 1) * size, n))

    def shards(self, part: Tensor, n: int) -> Tensor:
        """Return the DTensor ``[n, ...]`` on the mesh of which this is the rank's part, along the first dimension."""
        return _shards(part, n, 0, self.mesh)

    def control_shards(self, part: Tensor, n: int) -> Tensor:
        """Return the DTensor ``[..., n]`` of the CPU of which this is the rank's part, along the last dimension."""
        mesh = DeviceMesh.from_group(self._control, "cpu")
        return _shards(part, n, part.ndim - 1, mesh)

    def call(self, function: Callable[[Any], object]) -> None:
        """Call a function of torch.distributed.checkpoint with a group of all ranks.

        Raises:
            OSError: it failed on a rank; on all.
            RemoteError: a rank does not answer.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        with answering():
            try:
                function(self._control)
            except CheckpointException as error:
                first = next(iter(error.failures.values()))[0]
                raise OSError(getattr(first, "strerror", None) or _text(first)) from None

    def meet(self, question: object, error: BaseException | None = None) -> None:
        """Wait for all ranks at the same question. ``error``: what ended this rank's share of it; it is raised next.

        Raises:
            RemoteError: another rank failed, is at another question, or does not answer within the group's timeout.
            DeadlineReached: the deadline of another rank has passed.
        """
        self._count += 1
        state = _State.DONE if error is None else _State.FAILED
        if isinstance(error, DeadlineReached):
            state = _State.DEADLINE
        tag = zlib.crc32(repr((self._count, question)).encode())
        told = torch.tensor([state, tag, -tag], dtype=torch.int64, device="cpu")
        with answering():
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._control)
        worst, highest, lowest = told.tolist()
        if worst == _State.FAILED:
            texts = self._gathered(None if state < _State.FAILED else _text(error))
            if error is not None and state == _State.FAILED:
                _note_told(error)
            else:
                failed = [
                    f"rank {rank} failed: {text}" for rank, text in enumerate(texts) if text is not None
                ]
                raise RemoteError("; ".join(failed))
        elif worst == _State.DEADLINE:
            if error is None:
                raise DeadlineReached
        elif highest != -lowest:
            raise RemoteError(
                f"ranks ask different questions: this one (rank {self.rank} of {self.size}) is at {question}. All "
                "ranks must make the same calls in the same order, with the same arguments"
            )

    @contextmanager
    def together(self, question: object) -> Iterator[None]:
        """Do this rank's share of a question inside ``with``; go on when all have done theirs.

        Raises:
            RemoteError, DeadlineReached: as :meth:`meet`.
        """
        try:
            yield
        except BaseException as error:
            if not _is_told(error):
                self.meet(question, error)
            raise
        self.meet(question)

    def fail(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that an error ends this rank's work; once for each error."""
        if _is_told(error):
            return
        try:
            self.meet("failure", error)
        except RemoteError:  # nobody answers: the error itself says more
            return

    def check_same(self, **values: object) -> None:
        """Raise ValueError on all ranks if one of these values, of which digests would do, is not that of all ranks."""
        everywhere = self.gather(values)
        for name, value in everywhere[0].items():
            others = [rank for rank, given in enumerate(everywhere) if given[name] != value]
            if others:
                raise ValueError(
                    f"{name} must be the same on all ranks: rank 0 has {value}, rank {others[0]} has "
                    f"{everywhere[others[0]][name]}"
                )

    def sum(self, share: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, the same bits on every rank; after a meeting."""
        with answering():
            total = share.contiguous()
            dist.all_reduce(total, group=self.group)
            return total

    def sum_parts(self, rows: Tensor) -> Tensor:
        """Return this rank's columns, as :meth:`part` has them, of the sum of rows ``[k, n]``; after a meeting."""
        n = rows.shape[1]
        sizes = [len(range(n)[self.part(n, rank)]) for rank in range(self.size)]
        part = rows.new_empty(len(rows), sizes[self.rank])
        sum_part = self._exchange_and_sum if rows.device.type == "cpu" else self._reduce_and_scatter
        with answering():
            # one by one, so that nothing is moved to lie together
            for row, own in zip(rows, part, strict=True):
                sum_part(row.contiguous(), own, sizes)
        return part

    def _exchange_and_sum(self, share: Tensor, own: Tensor, sizes: list[int]) -> None:
        # reduce_scatter of gloo sums all entries on every rank: twice the bytes
        received = share.new_empty(self.size, len(own))
        _all_to_all(received.view(-1), share, [len(own)] * self.size, sizes, group=self.group)
        torch.sum(received, dim=0, out=own)

    def _reduce_and_scatter(self, share: Tensor, own: Tensor, sizes: list[int]) -> None:
        summed = share.new_empty(sizes[0])
        _reduce_scatter(summed, _padded(share, self.size * sizes[0]), group=self.group)
        own.copy_(summed[: len(own)])

    def gather_parts(self, part: Tensor, n: int) -> Tensor:
        """Return the rows ``[k, n]`` of which each rank has its columns."""
        size = -(-n // self.size)
        rows = part.new_empty(len(part), self.size * size)
        with answering():
            for own, row in zip(_padded(part, size), rows, strict=True):
                _all_gather(row, own.contiguous(), group=self.group)
        return rows[:, :n]

    def concatenate(self, part: Tensor) -> Tensor:
        """Return the ranks' tensors, of one shape, one after the other along the first dimension."""
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        with answering():
            _all_gather(whole, part.contiguous(), group=self.group)
        return whole

    def send(self, tensor: Tensor, source: int) -> None:
        """Write one rank's values of a contiguous tensor into that of all; after a meeting."""
        with answering():
            dist.broadcast(tensor, group=self.group, group_src=source)

    def sum_on(self, tensor: Tensor, rank: int) -> None:
        """Write the sum of the ranks' contiguous tensors into that of one rank; others lose theirs. After a meeting."""
        with answering():
            dist.reduce(tensor, group=self.group, group_dst=rank)

    def agree(self, value: T) -> T:
        """Return what the first rank's ``value`` is.

        Raises:
            RemoteError: as :meth:`meet`.
        """
        self.meet("a decision")
        held: list[Any] = [value]
        with answering():
            dist.broadcast_object_list(held, group=self._control, group_src=0)
        return cast(T, held[0])

    def on_first(self, function: Callable[[], T]) -> T:
        """Return what a function returns on the first rank; an OSError or RuntimeError of it is raised on all.

        Raises:
            RemoteError: as :meth:`meet`.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except (OSError, RuntimeError) as error:
                failure = error
        result, failure = self.agree((result, failure))
        if failure is not None:
            raise failure
        return cast(T, result)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order.

        Raises:
            RemoteError: as :meth:`meet`.
        """
        self.meet("values")
        return self._gathered(value)

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""
        return any(self.gather(flag))

    def _gathered(self, value: T) -> list[T]:
        held: list[Any] = [None] * self.size
        with answering():
            dist.all_gather_object(held, value, group=self._control)
        return held


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Return the tensor with zeros behind it, so that its last dimension has this size."""
    missing = size - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor


def is_shards(value: object) -> bool:
    """Return True for a DTensor."""
    return type(value).__name__ == "DTensor"  # its class takes a second to import


def whole(tensor: Tensor) -> Tensor:
    """Return all entries of a DTensor, for which its ranks meet; any other tensor as it is.

    Raises:
        RemoteError: not all ranks ask for it.
    """
    if not is_shards(tensor):
        return tensor
    shards: Any = tensor
    Ranks(shards.device_mesh).meet(("full_tensor", tuple(shards.shape)))
    with answering():
        found: Tensor = shards.full_tensor()
        return found


def like_shards(part: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor, placed as ``like``, of which this is the rank's part."""
    from torch.distributed.tensor import DTensor

    shards: Any = like
    found: Tensor = DTensor.from_local(
        part,
        shards.device_mesh,
        shards.placements,
        run_check=False,
        shape=shards.shape,
        stride=shards.stride(),
    )
    return found


def _shards(part: Tensor, n: int, dim: int, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # a second to import

    shape = torch.Size([*part.shape[:dim], n, *part.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    found: Tensor = DTensor.from_local(
        part.contiguous(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride
    )
    return found


@contextmanager
def watching(ranks: Ranks | None) -> Iterator[None]:
    """Tell the other ranks of an error inside ``with``, wherever it comes from; see :meth:`Ranks.fail`."""
    try:
        yield
    except BaseException as error:
        if ranks is not None:
            ranks.fail(error)
        raise


def together(ranks: Ranks | None, question: object) -> AbstractContextManager[None]:
    """Return :meth:`Ranks.together`, or nothing where a process is alone."""
    return nullcontext() if ranks is None else ranks.together(question)


def call_on_first(ranks: Ranks | None, monitor: Callable[[Any], object], entry: object) -> None:
    """Call a monitor on the first rank; an error there reaches all."""
    with together(ranks, "a monitor"):
        if ranks is None or ranks.is_first:
            monitor(entry)


def agreed(ranks: Ranks | None, value: T) -> T:
    """Return what the first rank's value is, or the value itself where a process is alone."""
    return value if ranks is None else ranks.agree(value)


def check_deadline_of(ranks: Ranks | None) -> None:
    """Raise DeadlineReached if the deadline of the context has passed, on any rank."""
    with together(ranks if has_deadline() else None, "a deadline"):
        check_deadline()


def fingerprint(tensor: Tensor) -> int:
    """Return a sum of the tensor's bits: of equal tensors it is equal, whatever rank computes it."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    pieces = tensor.contiguous().view(words).view(-1).split(DIGESTED)  # torch converts all that it sums first
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())


@contextmanager
def answering() -> Iterator[None]:
    """Turn errors of the group into RemoteError; let signals wait, so that no rank leaves in the midst."""
    with signals_deferred():
        try:
            yield
        except RuntimeError as error:
            raise RemoteError(
                "another rank does not answer: it ended, stopped, or took longer than the group's timeout "
                f"({str(error).splitlines()[0]})"
            ) from error


def _note_told(error: BaseException) -> None:
    """Note on an error that all ranks know of it; a reference to it would keep the memory of its frames."""
    vars(error)["_is_told"] = True


def _is_told(error: BaseException) -> bool:
    return isinstance(error, RemoteError) or vars(error).get("_is_told", False)


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


_CONTROL: dict[Any, Any] = {}
"""Groups of gloo for flags and decisions, by the group that they are for: a group of its own, so that a rank that tells
of an error is not taken for one that adds up. A group cannot be made again and again."""


def _control_of(group: Any) -> Any:
    if group not in _CONTROL:
        ranks = dist.get_process_group_ranks(group)
        _CONTROL[group] = dist.new_group(ranks, timeout=_timeout(group), backend="gloo")
    return _CONTROL[group]


def _timeout(group: Any) -> Any:
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
