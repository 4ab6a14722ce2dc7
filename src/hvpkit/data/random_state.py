"""Random numbers that are drawn while data is read: fixed by a seed, and without a trace outside.

The CPU's global generators of torch, NumPy and ``random`` are meant. They belong to the process: another thread would
draw the same numbers again and again while they are seeded. So nothing is seeded around reads that draw nothing, and
while other threads are alive, examples that draw are read in a process of their own, a worker of torch's loader.
"""

from __future__ import annotations

import itertools
import multiprocessing
import operator
import random
import threading
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, get_worker_info

from hvpkit._utils.typing import Batch
from hvpkit.errors import SharedGeneratorWarning

QUIET_MODULES = ("tqdm", "IPython", "ipykernel", "zmq", "multiprocessing.queues", "torch.utils.data")
"""Modules and packages whose threads draw no random numbers: a progress bar's monitor, which lives on after the first
bar, those of a notebook's kernel, and those that pass batches to and from a loader's workers."""

NUMPY_OFFSET = 0x9E3779B9
"""Added to seeds of NumPy, whose generator is torch's: the two would draw the same bits. 2^32 / golden ratio."""


@dataclass(frozen=True, eq=False)
class GlobalState:
    """State of the CPU's global generators."""

    torch: Tensor
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> GlobalState:
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())  # type: ignore[arg-type]

    def changed(self) -> bool:
        """Return True if a number has been drawn since."""
        now = GlobalState.now()
        return not (
            torch.equal(now.torch, self.torch)
            and now.python == self.python
            and now.numpy[2:] == self.numpy[2:]
            and np.array_equal(now.numpy[1], self.numpy[1])
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_global(seed: int) -> None:
    """Seed the CPU's global generators."""
    torch.default_generator.manual_seed(seed)
    np.random.seed((seed + NUMPY_OFFSET) % 2**32)
    random.seed(seed)


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators inside; restore them after."""
    outside = GlobalState.now()
    seed_global(seed)
    try:
        yield
    finally:
        outside.restore()


def is_alone() -> bool:
    """Return True if no other thread could draw from the global generators: there is none, or none of the user's."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return get_worker_info() is not None or all(map(_is_quiet, others))


def _is_quiet(thread: threading.Thread) -> bool:
    """Return True for a thread of ``QUIET_MODULES``."""
    owner = getattr(thread, "_target", None) if type(thread) is threading.Thread else type(thread)
    module = str(getattr(owner, "__module__", ""))
    return any(module == name or module.startswith(f"{name}.") for name in QUIET_MODULES)


def can_fork() -> bool:
    """Return True if a worker process can be forked: unlike others it needs no dataset that pickles."""
    return "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon


def read_apart(dataset: Any, **options: Any) -> DataLoader[Any]:
    """Return a loader that reads in one forked process, whose global generators are its own."""
    return DataLoader(
        dataset,
        generator=loader_generator(),
        **options | {"num_workers": 1, "multiprocessing_context": "fork"},
    )


def loader_generator() -> torch.Generator:
    """Return a generator for a loader, which else draws the seeds of its workers from the global one.

    Loaders of torch draw on the default device, which is another one after ``torch.set_default_device``.
    """
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def check_transfer(batch: object) -> None:
    """Raise what pickle raises if a worker could not send ``batch``: it would be waited for without end."""
    ForkingPickler.dumps(batch)


def warn_shared() -> None:
    """Warn that the global generators are seeded while other threads may draw from them."""
    warnings.warn(
        "data draws random numbers from the global generators, which are seeded around each read, in a process with "
        "other threads, which may draw the same numbers again: pass a DataLoader with num_workers=1, which reads in "
        "a process of its own, derive the numbers from the index, or turn augmentation off",
        SharedGeneratorWarning,
        stacklevel=2,
    )


class SeededExamples:
    """A map-style dataset in which each example draws its random numbers under a seed of its own: its index.

    So augmentation is one fixed draw, whatever the batch, the worker, the order, or the subset. A dataset that draws
    nothing is read without a change to any generator.

    Attributes:
        dataset: of the caller's; under a ``Subset`` that it is of.
        indices: the examples to read, or None: all.
        draws: whether a read has been seen to draw, or perhaps another thread; from then on, seeds are set before each.
        movable: whether examples can come from another process.
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int] | None = None, draws: bool = False, movable: bool = True
    ) -> None:
        while type(dataset) is Subset:  # a part of a dataset has the examples of the whole
            indices = dataset.indices if indices is None else [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        self.dataset, self.indices, self.draws, self.movable = dataset, indices, draws, movable

    def __len__(self) -> int:
        return len(self.dataset if self.indices is None else self.indices)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # pickle asks before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        if self.indices is not None:
            indices = [self.indices[index] for index in indices]
        outside = GlobalState.now()
        if not self.draws:
            examples = self._read(indices)
            if not outside.changed():
                return examples
            self.draws = True
        if self.needs_process:
            whole = SeededExamples(self.dataset, None, draws=True)
            return list(*read_apart(whole, batch_sampler=[indices], collate_fn=_as_they_are))
        if not is_alone():
            warn_shared()
        try:
            return [self._read_seeded(index) for index in indices]
        finally:
            outside.restore()

    @property
    def needs_process(self) -> bool:
        """Return True if examples are to be read in another process: they draw, and another thread may too."""
        return self.draws and self.movable and not is_alone() and can_fork()

    def select(self, indices: Sequence[int]) -> SeededExamples:
        """Return the examples at ``indices`` of these."""
        if self.indices is not None:
            indices = [self.indices[index] for index in indices]
        return SeededExamples(self.dataset, indices, self.draws, self.movable)

    def same_as(self, other: SeededExamples) -> bool:
        """Return True if both read the same examples of the same dataset."""
        if self.dataset is not other.dataset:
            return False
        mine, others = (range(len(self)) if x.indices is None else x.indices for x in (self, other))
        return list(mine) == list(others)

    def _read(self, indices: Sequence[Any]) -> list[Any]:
        several = getattr(self.dataset, "__getitems__", None)
        return list(several(indices)) if callable(several) else [self._read_one(index) for index in indices]

    def _read_seeded(self, index: Any) -> Any:
        seed_global(_seed_of(index))
        return self._read([index])[0]

    def _read_one(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            error.add_note(f"hvpkit: while reading example {index} of the dataset")
            raise


def _seed_of(index: Any) -> int:
    try:
        return operator.index(index)
    except TypeError:  # keys of another type, as a sampler may give
        return zlib.crc32(repr(index).encode())


def _as_they_are(examples: list[Any]) -> list[Any]:
    return examples


class Draws(IntEnum):
    """Where the random numbers of a read came from."""

    NONE = 0
    OWN = 1
    """Generators that a loader or its samplers were given."""
    GLOBAL = 2
    """The global generators too."""


def isolated(
    batches: Iterable[Batch], seed: int = 0, *, quiet: bool = False
) -> Generator[tuple[Batch, Draws]]:
    """Yield the batches, read under fixed seeds, and what was drawn so far; restore the random state after each.

    Args:
        batches: a re-iterable. Generators that a loader or its samplers were given are seeded too.
        seed: of the pass.
        quiet: leave the global generators alone.
    """
    generators = list(_generators(batches))
    states = [generator.get_state() for generator in generators]
    starts = [generator.manual_seed(seed).get_state() for generator in generators]
    around = (lambda _: nullcontext()) if quiet else fixed_randomness
    drew = Draws.NONE
    try:
        with around(seed):
            seeded = GlobalState.now()
            iterator = iter(batches)
            drew = Draws.GLOBAL if seeded.changed() else drew
        for step in itertools.count(seed):
            with around(step):
                seeded = GlobalState.now()
                batch = next(iterator, _END)
                drew = Draws.GLOBAL if seeded.changed() else drew
            if batch is _END:
                return
            if any(not g.get_state().equal(start) for g, start in zip(generators, starts, strict=True)):
                drew = max(drew, Draws.OWN)
            yield batch, drew
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def isolated_apart(batches: Iterable[Batch], seed: int = 0) -> Iterator[tuple[Batch, Draws]]:
    """Iterate over the same by a process of its own."""
    return iter(read_apart(_Isolated(batches, seed), batch_size=None))


class _Isolated(IterableDataset[Any]):
    """Batches under fixed seeds, for a worker."""

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[tuple[Batch, Draws]]:
        for number, item in enumerate(isolated(self.batches, self.seed)):
            if number == 0:
                check_transfer(item)
            yield item


_END = object()


def _generators(source: object) -> Iterator[torch.Generator]:
    """Yield the generators that a loader or sampler, or a sampler inside it, was given."""
    own = getattr(source, "generator", None)
    if isinstance(own, torch.Generator):
        yield own
    for part in ("sampler", "batch_sampler"):
        if hasattr(source, part):
            yield from _generators(getattr(source, part))
