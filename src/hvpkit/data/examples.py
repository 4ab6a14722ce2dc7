"""Data as a re-iterable sequence of batches whose examples can be counted, weighted and selected.

Every pass gives the same examples, however the caller's loader orders them, and leaves the global random
state unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count
from hvpkit.autodiff.pytree import batch_size as count_examples
from hvpkit.autodiff.pytree import flatten, unflatten, usable
from hvpkit.data.sources import (
    DatasetBatches,
    IterableBatches,
    Source,
    TensorBatches,
    count_stream,
    covers_dataset,
    own_iteration,
    unstable,
    with_seeded_examples,
)

DEFAULT_BATCH_SIZE = 256
"""Examples in a batch, unless the caller or the caller's loader gives a number; chosen by feel."""


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
            raise unstable(start, self.num_examples)

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

    **Augmentation is one fixed draw.** Where a map-style dataset draws random numbers, the global generators
    (``random``, ``numpy.random``, ``torch``) are seeded by the index of each example while it is read, so that it is
    the same in every pass, batch, worker and sample; for the data as they are, turn augmentation off. What seeds
    cannot fix is refused: generators of the dataset's own, a ``collate_fn`` that draws (mixup), streams
    (``IterableDataset``, own re-iterables) that give other examples under other seeds. ``list(loader)`` is one
    fixed draw of anything. Loaders of an own class are read under a fixed seed, and what they draw depends on
    their batches. A sampler with replacement or weights is read once, under a fixed seed: the mean is over the examples
    that it gives then.

    Args:
        data: one of the above. A batch is any tree of tensors with a common first dimension; a mapping of
            a class that torch does not know, as a tokenizer's, becomes a dict.
        batch_size: the most examples in a batch; by default the loader's own, else 256.
        device: where batches are moved to; by default they stay.

    Raises:
        TypeError: ``data`` is something else, or a batch holds what is no tensor.
        ValueError: no examples; an iterator that a first pass uses up; first dimensions that disagree.
        UnstableDataError: examples that differ when they are read again; a ``collate_fn`` that draws.

    Cost:
        A dataset: its first two examples, read twice. A re-iterable of batches: a pass over the data.

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
        if covers_dataset(data):
            size = batch_size or data.batch_sampler.batch_size  # type: ignore[union-attr]
            return DatasetBatches.of(data.dataset, size, data)
        return _stream(data, batch_size)
    if isinstance(data, IterableDataset):
        raise TypeError(
            "data is an IterableDataset, which gives examples and not batches; wrap it in a DataLoader"
        )
    if isinstance(data, np.ndarray):
        raise TypeError("data is a NumPy array; pass tensors (torch.from_numpy)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | str):
        return DatasetBatches.of(data, batch_size or DEFAULT_BATCH_SIZE)
    if isinstance(data, Iterable) and not isinstance(data, str):
        return _stream(data, batch_size)
    raise TypeError(
        "data must be tensors, a Dataset, a DataLoader or a re-iterable of batches, "
        f"got {type(data).__name__}"
    )


def _stream(batches: Any, batch_size: int | None) -> IterableBatches:
    """Return the batches of a loader with an order or class of its own, or of another re-iterable."""
    map_style = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    if map_style and not own_iteration(batches):
        batches = with_seeded_examples(batches)
    stream, sizes = count_stream(batches, _size_in_stream(batches), reseed=not map_style)
    return IterableBatches(stream, sum(sizes), batch_size)


def _size_in_stream(batches: object) -> Callable[[Batch], int]:
    def size(batch: Batch) -> int:
        if isinstance(batch, Tensor) and isinstance(batches, list):
            raise ValueError(
                "data is a list of tensors, which could be all examples or one batch each; pass the tuple "
                "(x, y) for all examples, or a list of tuples, one for each batch"
            )
        return count_examples(batch)

    return size


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
