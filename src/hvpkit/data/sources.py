"""Sources of batches: slices of tensors, a map-style dataset, a re-iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.pytree import batch_size as count_examples
from hvpkit.autodiff.pytree import flatten, unflatten
from hvpkit.data.augmentation import check_examples, check_stream, summarize
from hvpkit.data.random_state import SeededExamples, isolated
from hvpkit.errors import UnstableDataError


@dataclass(frozen=True)
class TensorBatches:
    """Slices of one tree of tensors, which holds all examples."""

    examples: Batch
    batch_size: int

    def __len__(self) -> int:
        return count_examples(self.examples)

    @property
    def smallest_batch(self) -> int:
        return _last_slice(len(self), self.batch_size)

    @property
    def name(self) -> str:
        return "tensors"

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            yield take(self.examples, slice(start, start + self.batch_size))

    def select(self, indices: Tensor) -> TensorBatches:
        return replace(self, examples=take(self.examples, indices))

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
        generator = torch.Generator().manual_seed(0)  # of workers; else a loader draws from the global one
        examples: Any = self.examples
        return iter(DataLoader(examples, self.batch_size, generator=generator, **self.options))

    def select(self, indices: Tensor) -> DatasetBatches:
        return replace(self, examples=self.examples.select(indices.tolist()))

    def resized(self, batch_size: int) -> DatasetBatches:
        return replace(self, batch_size=batch_size)


def loader_options(like: DataLoader[Any] | None) -> dict[str, Any]:
    """Return how a loader collates and fetches, without how it chooses and orders examples."""
    if like is None:
        return {}
    names = (
        "collate_fn",
        "num_workers",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
    )
    # without persistent_workers: their random state would carry over from pass to pass
    return {name: getattr(like, name) for name in (*names, "prefetch_factor")}


def with_seeded_examples(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader with samplers of its own over examples whose random numbers are fixed by their indices.

    Raises:
        UnstableDataError: examples or batches are random, and seeds cannot fix them.
    """
    examples, options = SeededExamples(loader.dataset), loader_options(loader)
    if loader.batch_sampler is None:  # the dataset holds batches
        check_examples(examples, 1, options | {"collate_fn": None})
        order: dict[str, Any] = {"batch_size": None, "sampler": loader.sampler}
    else:
        check_examples(examples, getattr(loader.batch_sampler, "batch_size", None) or 1, options)
        order = {"batch_sampler": loader.batch_sampler}
    seeded: Any = examples
    return DataLoader(seeded, generator=loader.generator, **order, **options)


@dataclass(frozen=True)
class Stream:
    """A re-iterable of batches, read under fixed seeds if reading it draws random numbers."""

    batches: Iterable[Batch]
    draws: bool

    @property
    def name(self) -> str:
        return type(self.batches).__name__

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in isolated(self.batches)) if self.draws else iter(self.batches)


def count_stream(
    batches: Iterable[Batch], size_of: Callable[[Batch], int], *, reseed: bool
) -> tuple[Stream, list[int]]:
    """Read a stream once; return it with the sizes of its batches.

    Args:
        batches: the stream.
        size_of: the number of examples in a batch.
        reseed: as in :func:`hvpkit.data.augmentation.check_stream`.

    Raises:
        ValueError: an iterator, which one pass uses up.
        UnstableDataError: a second read gives other examples.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"data is a one-shot iterator ({type(batches).__name__}): a second pass would be empty; "
            "pass a list of batches, a DataLoader, or an object whose __iter__ starts afresh"
        )
    sizes: list[int] = []
    first, draws, contents = None, False, torch.zeros(2, dtype=torch.float64)
    moves = not isinstance(batches, list)
    for batch, drew in isolated(batches):
        first = batch if not sizes else first
        sizes.append(size_of(batch))
        contents += summarize(batch) if moves else 0
        draws = draws or drew
    if sizes and moves:
        check_stream(batches, first, contents, reseed=reseed)
    return Stream(batches, draws), sizes


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
        low, high = torch.searchsorted(self.indices, torch.tensor([start, start + size])).tolist()
        return self.indices[low:high] - start

    def select(self, indices: Tensor) -> IterableBatches:
        return replace(self, indices=indices if self.indices is None else self.indices[indices])

    def resized(self, batch_size: int) -> IterableBatches:
        return replace(self, batch_size=batch_size)


Source: TypeAlias = TensorBatches | DatasetBatches | IterableBatches


def covers_dataset(loader: DataLoader[Any]) -> bool:
    """Return True if the loader yields each example of a map-style dataset once, in some order."""
    if own_iteration(loader) or type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler = loader.batch_sampler.sampler  # loader.sampler is another one where batch_sampler was given
    return type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )


def own_iteration(loader: DataLoader[Any]) -> bool:
    """Return True if the loader's class overrides how it is iterated."""
    return type(loader).__iter__ is not DataLoader.__iter__


def take(batch: Batch, index: slice | Tensor) -> Batch:
    """Return the examples of the batch at ``index``."""
    leaves, spec = flatten(batch)
    if isinstance(index, slice):
        return unflatten([leaf[index] for leaf in leaves], spec)
    return unflatten([leaf[index.to(leaf.device)] for leaf in leaves], spec)


def unstable(found: int, expected: int) -> UnstableDataError:
    """Return the error for a pass that gave another number of examples."""
    return UnstableDataError(
        f"data gave {found} examples in this pass, not the {expected} counted at first; a mean over "
        "examples needs the same ones in every pass"
    )


def _last_slice(num_examples: int, batch_size: int) -> int:
    """Return the size of the last slice of ``num_examples`` examples."""
    return (num_examples - 1) % batch_size + 1
