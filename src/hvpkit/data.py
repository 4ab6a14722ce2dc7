"""Data as a re-iterable sequence of batches whose examples can be counted, weighted and selected.

Every pass gives the same examples, however the caller's loader orders them, and leaves the global random
state unchanged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count
from hvpkit.autodiff.pytree import batch_size as count_examples
from hvpkit.autodiff.pytree import flatten, unflatten, usable
from hvpkit.errors import UnstableDataError

DEFAULT_BATCH_SIZE = 256
"""Examples in a batch, unless the caller or the caller's loader gives a number; chosen by feel."""


@dataclass(frozen=True)
class TensorBatches:
    """Slices of one tree of tensors, which holds all examples."""

    examples: Batch
    batch_size: int

    def __len__(self) -> int:
        return count_examples(self.examples)

    @property
    def smallest_batch(self) -> int:
        return _smallest_slice(len(self), self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            yield _take(self.examples, slice(start, start + self.batch_size))

    def select(self, indices: Tensor) -> TensorBatches:
        return replace(self, examples=_take(self.examples, indices))

    def resized(self, batch_size: int) -> TensorBatches:
        return replace(self, batch_size=batch_size)


@dataclass(frozen=True)
class DatasetBatches:
    """Batches of a map-style dataset, each example once and in order, read by a loader."""

    loader: DataLoader[Any]

    @classmethod
    def of(cls, dataset: Any, batch_size: int | None, like: DataLoader[Any] | None = None) -> DatasetBatches:
        """Return batches of ``dataset``, collated and fetched with the options of the loader ``like``."""
        options: dict[str, Any] = {"batch_size": batch_size or DEFAULT_BATCH_SIZE}
        if like is not None:
            options |= {
                "batch_size": batch_size or like.batch_sampler.batch_size,  # type: ignore[union-attr]
                "collate_fn": like.collate_fn,
                "num_workers": like.num_workers,
                "pin_memory": like.pin_memory,
                "timeout": like.timeout,
                "worker_init_fn": like.worker_init_fn,
                "multiprocessing_context": like.multiprocessing_context,
                "prefetch_factor": like.prefetch_factor,
            }  # without persistent_workers: their random state would carry over from pass to pass
        return cls(DataLoader(dataset, shuffle=False, generator=torch.Generator(), **options))

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    @property
    def smallest_batch(self) -> int:
        assert self.loader.batch_size is not None
        return _smallest_slice(len(self), self.loader.batch_size)

    @property
    def batch_size(self) -> int | None:
        return self.loader.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return _isolated(self.loader)

    def select(self, indices: Tensor) -> DatasetBatches:
        return self.of(Subset(self.loader.dataset, indices.tolist()), None, self.loader)

    def resized(self, batch_size: int) -> DatasetBatches:
        return self.of(self.loader.dataset, batch_size, self.loader)


@dataclass(frozen=True)
class IterableBatches:
    """Batches of a re-iterable object; ``batch_size`` splits larger ones."""

    batches: Iterable[Batch]
    num_examples: int
    batch_size: int | None = None
    indices: Tensor | None = None

    def __len__(self) -> int:
        return self.num_examples if self.indices is None else len(self.indices)

    @property
    def smallest_batch(self) -> None:
        return None

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for batch in _isolated(self.batches):
            size = count_examples(batch)
            kept = batch if self.indices is None else _take(batch, self._within(start, size))
            start += size
            yield from TensorBatches(kept, self.batch_size or max(size, 1))
        if start != self.num_examples:
            raise _unstable(start, self.num_examples)

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


@dataclass(frozen=True)
class Data:
    """Examples in batches, the same ones in every pass. Made by :func:`as_data`.

    Attributes:
        source: the batches.
        num_examples: number of examples in a pass.
        weights: one weight for each example ``[num_examples]``; None: each weighs ``1 / num_examples``.
        device: the device that batches are moved to; None: they stay where they are.
    """

    source: Source
    num_examples: int
    weights: Tensor | None = None
    device: torch.device | None = None

    @property
    def smallest_batch(self) -> int | None:
        """Return the number of examples in the smallest batch; None if only a pass could tell."""
        return self.source.smallest_batch

    @property
    def batch_size(self) -> int | None:
        """Return the maximum number of examples in a batch; None if the source decides."""
        return self.source.batch_size

    @property
    def longest_batch(self) -> int:
        """Return the largest possible batch size: ``num_examples``; for iterables, the size of the first batch."""
        if isinstance(self.source, IterableBatches):
            return count_examples(next(iter(replace(self.source, batch_size=None))))
        return self.num_examples

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in self.weighted())

    def weighted(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """Yield batches with the weights of their examples ``[B]`` (None: uniform ``1 / num_examples``)."""
        start = 0
        for batch in self.source:
            size = count_examples(batch)
            if size == 0:
                continue
            chosen = slice(start, start + size)
            weights = None if self.weights is None else prepare(self.weights[chosen], self.device)
            start += size
            yield prepare(batch, self.device), weights
        if start != self.num_examples:
            raise _unstable(start, self.num_examples)

    def subset(self, indices: Tensor | Sequence[int], weights: Tensor | None = None) -> Data:
        """Select the examples at ``indices`` ``[m]`` (a repeated index counts again), each with its weight.

        Weights multiply losses as they are: an unbiased sample of the mean over N examples, drawn with
        inclusion probabilities ``p``, has ``weights = 1 / (N p)``. By default each weighs ``1 / m``.
        The examples keep the order of the data.

        Raises:
            TypeError: indices that are not integers, such as a mask.
            ValueError: an index out of range, no indices, or another number of weights than indices.

        Example:
            >>> import torch
            >>> data = as_data((torch.arange(6.0), torch.arange(6)))
            >>> [batch[1].tolist() for batch in data.subset(torch.tensor([4, 1]))]
            [[1, 4]]
        """
        indices = torch.as_tensor(indices, device="cpu")
        if indices.dtype == torch.bool or indices.is_floating_point():
            raise TypeError(
                f"indices must be whole numbers, got {indices.dtype}; of a mask pass mask.nonzero().flatten()"
            )
        indices = indices.to(torch.int64)
        if indices.ndim != 1 or len(indices) == 0:
            raise ValueError(f"indices must be a non-empty vector, got shape {tuple(indices.shape)}")
        if int(indices.min()) < 0 or int(indices.max()) >= self.num_examples:
            raise ValueError(f"indices must be in [0, {self.num_examples}), the examples of the data")
        order = torch.argsort(indices, stable=True)
        if weights is not None:
            weights = torch.as_tensor(weights).detach()
            if weights.shape != indices.shape:
                raise ValueError(
                    f"weights must have one entry for each index: got shape {tuple(weights.shape)} "
                    f"for {len(indices)} indices"
                )
            weights = weights[order.to(weights.device)]
        source = self.source.select(indices[order])
        return replace(self, source=source, num_examples=len(indices), weights=weights)


def as_data(data: object, *, batch_size: int | None = None, device: torch.device | str | None = None) -> Data:
    """Convert ``data`` to examples in batches, the same ones in every pass.

    ====================================  =====================================================
    ``data``                              read as
    ====================================  =====================================================
    tensor, tuple or dict of tensors      all examples along the first dimension
    map-style ``Dataset``                 each example once, in order, default collate
    ``DataLoader`` of a map-style one     each example once, in order, by its collate and workers;
                                          ``shuffle`` and ``drop_last`` belong to training
    other ``DataLoader``                  as it comes, under a fixed seed (own sampler, own class)
    list, or another re-iterable          batches, as they come; counted in one pass now
    ====================================  =====================================================

    Args:
        data: one of the above. A batch is any tree of tensors with a common first dimension; a mapping of
            a class that torch does not know, as a tokenizer's, becomes a dict.
        batch_size: the most examples in a batch; by default the loader's own, else 256.
        device: where batches are moved to; by default they stay.

    Raises:
        TypeError: ``data`` is something else, or a batch holds what is no tensor.
        ValueError: no examples; an iterator that a first pass uses up; first dimensions that disagree.

    Example:
        >>> import torch
        >>> data = as_data((torch.ones(10, 3), torch.zeros(10)), batch_size=4)
        >>> data.num_examples, [len(x) for x, _ in data]
        (10, [4, 4, 2])
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    target = None if device is None else torch.device(device)
    if isinstance(data, Data):
        resized = data.source if batch_size is None else data.source.resized(batch_size)
        return replace(data, source=resized, device=target or data.device)
    source = _source(data, batch_size)
    num_examples = len(source)
    if num_examples == 0:
        raise ValueError("data is empty: it holds no examples, and a mean over none is undefined")
    return Data(source, num_examples, device=target)


def _source(data: Any, batch_size: int | None) -> Source:
    if isinstance(data, Tensor | tuple | Mapping):
        count_examples(data)
        return TensorBatches(data, batch_size or DEFAULT_BATCH_SIZE)
    if isinstance(data, DataLoader):
        if _covers_dataset(data):
            return DatasetBatches.of(data.dataset, batch_size, data)
        return _counted(data, batch_size)
    if isinstance(data, IterableDataset):
        raise TypeError(
            "data is an IterableDataset, which gives examples and not batches; wrap it in a DataLoader"
        )
    if isinstance(data, np.ndarray):
        raise TypeError("data is a NumPy array; pass tensors (torch.from_numpy)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | str):
        return DatasetBatches.of(data, batch_size)
    if isinstance(data, Iterable) and not isinstance(data, str):
        return _counted(data, batch_size)
    raise TypeError(
        "data must be tensors, a Dataset, a DataLoader or a re-iterable of batches, "
        f"got {type(data).__name__}"
    )


def _covers_dataset(loader: DataLoader[Any]) -> bool:
    """Return True if the loader yields each example of a map-style dataset once, in some order."""
    own_iteration = type(loader).__iter__ is not DataLoader.__iter__
    if own_iteration or type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler = loader.batch_sampler.sampler  # loader.sampler is another one where batch_sampler was given
    return type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )


def _counted(batches: Iterable[Batch], batch_size: int | None) -> IterableBatches:
    if isinstance(batches, Iterator):
        raise ValueError(
            f"data is a one-shot iterator ({type(batches).__name__}): a second pass would be empty; "
            "pass a list of batches, a DataLoader, or an object whose __iter__ starts afresh"
        )
    num_examples = 0
    for batch in _isolated(batches):
        if isinstance(batch, Tensor) and isinstance(batches, list):
            raise ValueError(
                "data is a list of tensors, which could be all examples or one batch each; pass the tuple "
                "(x, y) for all examples, or a list of tuples, one for each batch"
            )
        num_examples += count_examples(batch)
    return IterableBatches(batches, num_examples, batch_size)


def _isolated(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches, read under fixed seeds; restore the random state after each."""
    generators = list(_generators(batches))
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        with _fixed_randomness(0):
            iterator = iter(batches)
        for step in itertools.count():
            with _fixed_randomness(step):
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(source: object) -> Iterator[torch.Generator]:
    """Yield the generators that a loader or sampler, or a sampler inside it, was given."""
    own = getattr(source, "generator", None)
    if isinstance(own, torch.Generator):
        yield own
    for part in ("sampler", "batch_sampler"):
        if hasattr(source, part):
            yield from _generators(getattr(source, part))


_END = object()


@contextmanager
def _fixed_randomness(seed: int) -> Iterator[None]:
    """Seed the CPU's global generators (torch, NumPy, random) inside; restore them after."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _smallest_slice(num_examples: int, batch_size: int) -> int:
    """Return the size of the last slice of ``num_examples`` examples."""
    return (num_examples - 1) % batch_size + 1


def _take(batch: Batch, index: slice | Tensor) -> Batch:
    leaves, spec = flatten(batch)
    if isinstance(index, slice):
        return unflatten([leaf[index] for leaf in leaves], spec)
    return unflatten([leaf[index.to(leaf.device)] for leaf in leaves], spec)


def prepare(batch: Batch, device: torch.device | None = None) -> Batch:
    """Return the batch in containers that torch knows, with tensors that autograd can use, on ``device`` if given."""
    leaves, spec = flatten(batch, name="data")
    if device is not None:
        leaves = [leaf.to(device, non_blocking=True) for leaf in leaves]
    return unflatten([usable(leaf) for leaf in leaves], spec)


def whole_batch(batch: Batch, weights: Tensor | None = None) -> Data:
    """Return one batch as data.

    Raises:
        ValueError: the batch is empty.
    """
    size = check_count("data: the number of examples", count_examples(batch), 1)
    return Data(TensorBatches(batch, size), size, weights)


def _unstable(found: int, expected: int) -> UnstableDataError:
    return UnstableDataError(
        f"data gave {found} examples in this pass, not the {expected} counted at first; a mean over "
        "examples needs the same ones in every pass"
    )
