"""Random numbers that are drawn while data is read: fixed by a seed, and without a trace outside.

The CPU's global generators of torch, NumPy and ``random`` are meant. They belong to the process: other threads
see them seeded for as long as a read takes, so that nothing is seeded around reads that draw nothing.
"""

from __future__ import annotations

import itertools
import operator
import random
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hvpkit._utils.typing import Batch

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


class SeededExamples:
    """A map-style dataset in which each example draws its random numbers under a seed of its own: its index.

    So augmentation is one fixed draw, whatever the batch, the worker, the order, or the subset. A dataset that draws
    nothing is read without a change to any generator.

    Attributes:
        dataset: of the caller's; under a ``Subset`` that it is of.
        indices: the examples to read, or None: all.
        draws: whether a read has been seen to draw; from then on, seeds are set before each.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None, draws: bool = False) -> None:
        while type(dataset) is Subset:  # a part of a dataset has the examples of the whole
            indices = dataset.indices if indices is None else [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        self.dataset, self.indices, self.draws = dataset, indices, draws

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
        try:
            return [self._read_seeded(index) for index in indices]
        finally:
            outside.restore()

    def select(self, indices: Sequence[int]) -> SeededExamples:
        """Return the examples at ``indices`` of these."""
        if self.indices is not None:
            indices = [self.indices[index] for index in indices]
        return SeededExamples(self.dataset, indices, self.draws)

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


def isolated(batches: Iterable[Batch], seed: int = 0) -> Generator[tuple[Batch, bool]]:
    """Yield the batches, read under fixed seeds, and whether each drew; restore the random state after each.

    Args:
        batches: a re-iterable. Generators that a loader or its samplers were given are seeded too.
        seed: of the pass.
    """
    generators = list(_generators(batches))
    states = [generator.get_state() for generator in generators]
    starts = [generator.manual_seed(seed).get_state() for generator in generators]
    try:
        with fixed_randomness(seed):
            seeded = GlobalState.now()
            iterator = iter(batches)
            drew = seeded.changed()
        for step in itertools.count(seed):
            with fixed_randomness(step):
                seeded = GlobalState.now()
                batch = next(iterator, _END)
                drew = drew or seeded.changed()
            if batch is _END:
                return
            drew = drew or any(
                not torch.equal(generator.get_state(), start)
                for generator, start in zip(generators, starts, strict=True)
            )
            yield batch, drew
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


_END = object()


def _generators(source: object) -> Iterator[torch.Generator]:
    """Yield the generators that a loader or sampler, or a sampler inside it, was given."""
    own = getattr(source, "generator", None)
    if isinstance(own, torch.Generator):
        yield own
    for part in ("sampler", "batch_sampler"):
        if hasattr(source, part):
            yield from _generators(getattr(source, part))
