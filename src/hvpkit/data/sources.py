"""Sources of batches: slices of tensors, a map-style dataset, a re-iterable of batches, batches that stay whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
)

from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count
from hvpkit.autodiff.pytree import batch_size as leading_dimension
from hvpkit.autodiff.pytree import flatten, unflatten, versions
from hvpkit.data.augmentation import OTHER_SEED, check_examples, check_stream, summarize
from hvpkit.data.loaders import draws_in_workers, loader_options
from hvpkit.data.random_state import (
    Draws,
    SeededExamples,
    can_fork,
    is_alone,
    isolated,
    isolated_apart,
    loader_generator,
    warn_shared,
)
from hvpkit.errors import UnstableDataError

R = TypeVar("R")


def count_examples(batch: Batch) -> int:
    """Return the common first dimension of the tensors of a batch.

    Raises:
        TypeError, ValueError: a leaf is not a tensor, or there is no common first dimension.
    """
    try:
        return leading_dimension(batch)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error}. Batches of any other form are read whole by "
            "hvpkit.as_data(data, num_examples=lambda batch: ...), which says how many examples each holds"
        ) from None


@dataclass(frozen=True)
class TensorBatches:
    """Slices of one tree of tensors, which holds all examples.

    Attributes:
        examples: the tensors.
        batch_size: of all slices but the last one.
        versions: how often the tensors had been written to; None: take what it is now.
    """

    examples: Batch
    batch_size: int
    versions: list[int] | None = None

    def __post_init__(self) -> None:
        if self.versions is None:
            object.__setattr__(self, "versions", versions(self.examples))

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return count_examples(self.examples)

    @property
    def smallest_batch(self) -> int:
        return _last_slice(len(self), self.batch_size)

    @property
    def name(self) -> str:
        return "tensors"

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_at(range(-(-len(self) // self.batch_size)))

    def batches_at(self, positions: Iterable[int]) -> Iterator[Batch]:
        """Yield the batches at these positions only.

        Raises:
            UnstableDataError: the tensors have been written to since they were passed in.
        """
        if versions(self.examples) != self.versions:
            raise UnstableDataError(
                "data has been written to, in place, since it was passed in; a mean over examples needs the same ones "
                "in every pass: make another operator of what it is now, or pass a copy"
            )
        for start in (position * self.batch_size for position in positions):
            yield take(self.examples, slice(start, start + self.batch_size))

    def select(self, indices: Tensor) -> TensorBatches:
        return TensorBatches(take(self.examples, indices), self.batch_size)

    def resized(self, batch_size: int) -> TensorBatches:
        return replace(self, batch_size=batch_size)


@dataclass(frozen=True)
class DatasetBatches:
    """Batches of a map-style dataset, each example once and in order, read by a loader with these options."""

    examples: SeededExamples
    batch_size: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, dataset: Any, batch_size: int, like: DataLoader[Any] | None = None) -> DatasetBatches:
        """Return batches of ``dataset``, collated and fetched as by the loader ``like``.

        Raises:
            UnstableDataError: examples or batches are random, and seeds cannot fix them.
        """
        examples, options = SeededExamples(dataset), loader_options(like)
        check_examples(examples, batch_size, options)
        return cls(examples, batch_size, options)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def smallest_batch(self) -> int:
        return _last_slice(len(self), self.batch_size)

    @property
    def name(self) -> str:
        return type(self.examples.dataset).__name__

    def __iter__(self) -> Iterator[Batch]:
        examples: Any = self.examples
        return iter(DataLoader(examples, self.batch_size, generator=loader_generator(), **self._options))

    def batches_at(self, positions: Iterable[int]) -> Iterator[Batch]:
        """Yield the batches at these positions only."""
        starts = (position * self.batch_size for position in positions)
        chosen = [[*range(start, min(start + self.batch_size, len(self)))] for start in starts]
        examples: Any = self.examples
        return iter(DataLoader(examples, batch_sampler=chosen, generator=loader_generator(), **self._options))

    @property
    def _options(self) -> dict[str, Any]:
        own_process = self.options.get("num_workers", 0) or not self.examples.needs_process
        return {
            **self.options,
            **({} if own_process else {"num_workers": 1, "multiprocessing_context": "fork"}),
        }

    def select(self, indices: Tensor) -> DatasetBatches:
        return replace(self, examples=self.examples.select(indices.tolist()))

    def resized(self, batch_size: int) -> DatasetBatches:
        return replace(self, batch_size=batch_size)


@dataclass(frozen=True)
class Stream:
    """A re-iterable of batches, read under fixed seeds if reading it draws random numbers.

    Attributes:
        batches: the batches.
        given: the object that the caller passed, by which two streams are known to be the same.
        draws: what a pass draws from.
        movable: whether batches can come from another process.
        contents: sums over all examples of the pass that counted them; empty for a list.
    """

    batches: Iterable[Batch]
    given: object
    draws: Draws = Draws.NONE
    movable: bool = True
    contents: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return type(self.given).__name__

    def __iter__(self) -> Iterator[Batch]:
        examples = getattr(self.batches, "dataset", None)
        if self.draws == Draws.NONE and not getattr(examples, "needs_process", False):
            return iter(self.batches)
        return (batch for batch, _ in self.read())

    def read(self, seed: int = 0) -> Iterator[tuple[Batch, Draws]]:
        """Iterate over the batches under a seed of the pass, and over what was drawn so far.

        By another process while other threads are alive; where that cannot be, with a warning, if the global
        generators are drawn from.
        """
        if is_alone() or self.draws == Draws.OWN:
            return isolated(self.batches, seed, quiet=self.draws == Draws.OWN)
        if self.movable:
            return isolated_apart(self.batches, seed)
        if self.draws == Draws.GLOBAL:
            warn_shared()
        return isolated(self.batches, seed, quiet=self.draws < Draws.GLOBAL)


def count_stream(
    batches: Iterable[Batch], size_of: Callable[[Batch], int], *, reseed: bool, given: object
) -> tuple[Stream, list[int]]:
    """Read a stream once; return it with the sizes of its batches.

    Args:
        batches: the stream.
        size_of: the number of examples in a batch.
        reseed: as in :func:`hvpkit.data.augmentation.check_stream`.
        given: as in :class:`Stream`.

    Raises:
        ValueError: an iterator, which one pass uses up.
        UnstableDataError: a second read gives other examples.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"data is a one-shot iterator ({type(batches).__name__}): a second pass would be empty; "
            "pass a list of batches, a DataLoader, or an object whose __iter__ starts afresh"
        )
    if isinstance(batches, list):
        return Stream(batches, given), [size_of(batch) for batch in name_batch(batches)]
    draws = Draws.OWN if draws_in_workers(batches) else Draws.NONE
    stream = Stream(batches, given, draws, movable=can_fork() and not getattr(batches, "num_workers", 0))
    if stream.movable and not is_alone():
        with suppress(Exception):  # as of tensors on a GPU; a fault of the data comes up again below
            return _count(stream, size_of, reseed=reseed)
        stream = replace(stream, movable=False)
    counted, sizes = _count(stream, size_of, reseed=reseed)
    if counted.draws == Draws.GLOBAL and not (counted.movable or is_alone()):  # nothing was seeded
        return _count(counted, size_of, reseed=reseed)
    return counted, sizes


def _count(stream: Stream, size_of: Callable[[Batch], int], *, reseed: bool) -> tuple[Stream, list[int]]:
    sizes: list[int] = []
    first, draws, contents = None, stream.draws, torch.zeros(2, dtype=torch.float64, device="cpu")
    for batch, drew in name_batch(stream.read()):
        first = batch if not sizes else first
        sizes.append(size_of(batch))
        contents += summarize(batch)
        draws = draws if draws == Draws.OWN else max(draws, drew)  # known beforehand: another thread drew
    if sizes:
        again = stream.read(OTHER_SEED if reseed else 0)
        check_stream((batch for batch, _ in again), first, contents)
    return replace(stream, draws=draws, contents=tuple(contents.tolist())), sizes


@dataclass(frozen=True)
class IterableBatches:
    """Batches of a stream; ``batch_size`` splits larger ones."""

    batches: Stream
    num_examples: int
    batch_size: int | None = None
    indices: Tensor | None = None

    def __len__(self) -> int:
        return self.num_examples if self.indices is None else len(self.indices)

    @property
    def smallest_batch(self) -> None:
        return None

    @property
    def name(self) -> str:
        return self.batches.name

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for batch in self.batches:
            size = count_examples(batch)
            kept = batch if self.indices is None else take(batch, self._within(start, size))
            start += size
            yield from TensorBatches(kept, self.batch_size or max(size, 1))
        if start != self.num_examples:
            raise unstable(start, self.num_examples)

    def _within(self, start: int, size: int) -> Tensor:
        """Return the (sorted) indices that lie in a batch, relative to its start."""
        assert self.indices is not None
        low, high = torch.searchsorted(
            self.indices, torch.tensor([start, start + size], device="cpu")
        ).tolist()
        return self.indices[low:high] - start

    def select(self, indices: Tensor) -> IterableBatches:
        return replace(self, indices=indices if self.indices is None else self.indices[indices])

    def resized(self, batch_size: int) -> IterableBatches:
        return replace(self, batch_size=batch_size)


@dataclass(frozen=True)
class WholeBatches:
    """Batches of any form, which are never split; each counts for as many examples as ``count`` says.

    Attributes:
        batches: all of them.
        sizes: how many examples each of the selected ones holds.
        count: the number of examples in a batch.
        positions: of the selected batches among all, in order; None: all are.
    """

    batches: list[Batch] | DatasetBatches | Stream
    sizes: tuple[int, ...]
    count: Callable[[Batch], Any]
    positions: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def smallest_batch(self) -> int:
        return min(self.sizes)

    @property
    def batch_size(self) -> None:
        return None

    @property
    def name(self) -> str:
        return "list" if isinstance(self.batches, list) else self.batches.name

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for number, batch in enumerate(self._read(), 1):
            size = count_by(self.count, batch)
            if number > len(self) or size != self.sizes[number - 1]:
                raise unstable(
                    size, self.sizes[number - 1] if number <= len(self) else 0, f"batch {number - 1}"
                )
            yield batch
        if number != len(self):
            raise unstable(sum(self.sizes[:number]), sum(self.sizes))

    def _read(self) -> Iterable[Batch]:
        if self.positions is None:
            return self.batches
        if isinstance(self.batches, list):
            return (self.batches[position] for position in self.positions)
        if isinstance(self.batches, DatasetBatches):
            return self.batches.batches_at(self.positions)
        return _at(self.batches, self.positions)

    def select(self, indices: Tensor) -> WholeBatches:
        chosen = indices.tolist()
        positions = tuple(chosen if self.positions is None else (self.positions[index] for index in chosen))
        return replace(self, sizes=tuple(self.sizes[index] for index in chosen), positions=positions)

    def resized(self, batch_size: int) -> WholeBatches:
        raise ValueError(
            f"batch_size={batch_size}: batches whose examples num_examples counts are read whole, and never split; "
            "make them of that size in the loader"
        )


def count_by(count: Callable[[Batch], Any], batch: Batch) -> int:
    """Return ``count(batch)``; raise TypeError or ValueError unless it is a number of examples."""
    size = count(batch)
    if isinstance(size, Tensor):
        size = size.item()
    return check_count("num_examples of a batch", size, 0)


def _at(batches: Iterable[Batch], positions: Sequence[int]) -> Iterator[Batch]:
    """Yield the batches at these positions, in order and with repeats, and read no further."""
    wanted = Counter(positions)
    for position, batch in enumerate(batches):
        for _ in range(wanted[position]):
            yield batch
        if position == positions[-1]:
            return


Source: TypeAlias = TensorBatches | DatasetBatches | IterableBatches | WholeBatches


def every(source: Source, step: int, first: int) -> Iterator[tuple[int, int, Batch]]:
    """Yield the batches number ``first``, ``first + step`` and so on: number, start, batch; others are not read.

    The start is the number of examples before the batch. Of a stream all batches are read.
    """
    if isinstance(source, TensorBatches) or (step > 1 and isinstance(source, DatasetBatches)):
        numbers = range(first, -(-len(source) // source.batch_size), step)
        for number, batch in zip(numbers, source.batches_at(numbers), strict=True):
            yield number, number * source.batch_size, batch
    elif step > 1 and isinstance(source, WholeBatches) and len(source):
        numbers = range(first, len(source), step)
        if numbers:
            starts = [0, *accumulate(source.sizes)]
            for number, batch in zip(
                numbers, source.select(torch.tensor(numbers, device="cpu")), strict=True
            ):
                yield number, starts[number], batch
    else:
        start = 0
        for number, batch in enumerate(source):
            if number % step == first:
                yield number, start, batch
            if isinstance(source, WholeBatches):
                start += source.sizes[number]
            else:
                start += count_examples(batch)


def evenly(source: TensorBatches | DatasetBatches, ranks: Ranks) -> Iterator[tuple[int, int, Batch]]:
    """Yield a rank's batches as :func:`every` does, with no more examples than 1 / p of them, rounded up.

    Batches are dealt in turn while there is one for every rank; the examples after them are cut into a part for each.
    """
    size = source.batch_size
    num_dealt = len(source) // size // ranks.size * ranks.size
    rest = ranks.part(len(source) - num_dealt * size)
    low, high = (num_dealt * size + place for place in (rest.start, rest.stop))
    cut = range(low // size, -(-high // size)) if low < high else range(0)
    numbers = [*range(ranks.rank, num_dealt, ranks.size), *cut]
    for number, batch in zip(numbers, source.batches_at(numbers), strict=True):
        start = number * size
        if number < num_dealt:
            yield number, start, batch
        else:
            yield number, max(start, low), take(batch, slice(max(low - start, 0), high - start))


def name_batch(batches: Iterable[R]) -> Iterator[R]:
    """Yield the batches; errors while one is read get a note that names it and the usual remedies."""
    number = 0
    try:
        for batch in batches:
            yield batch
            number += 1
    except UnstableDataError:
        raise
    except Exception as error:
        error.add_note(f"hvpkit: while reading batch {number} of data (counted from 0){_remedy(error)}")
        raise


def _remedy(error: Exception) -> str:
    text = str(error)
    if "stack expects each tensor to be equal size" in text or "default_collate" in text:
        return (
            ": the default collate_fn cannot make a batch of these examples; pass a DataLoader with one that can, and "
            "num_examples= to hvpkit.as_data if its batches have no common first dimension"
        )
    return ""


def take(batch: Batch, index: slice | Tensor) -> Batch:
    """Return the examples of the batch at ``index``."""
    leaves, spec = flatten(batch)
    if isinstance(index, slice):
        return unflatten([leaf[index] for leaf in leaves], spec)
    return unflatten([leaf[index.to(leaf.device)] for leaf in leaves], spec)


def unstable(found: int, expected: int, where: str = "this pass") -> UnstableDataError:
    """Return the error for a pass, or a batch of it, that gave another number of examples."""
    return UnstableDataError(
        f"data gave {found} examples in {where}, not the {expected} counted at first; a mean over "
        "examples needs the same ones in every pass"
    )


def _last_slice(num_examples: int, batch_size: int) -> int:
    """Return the size of the last slice of ``num_examples`` examples."""
    return (num_examples - 1) % batch_size + 1
