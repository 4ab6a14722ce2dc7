"""Conversion of whatever a user brings to :class:`hvpkit.Data`: :func:`as_data`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset

from hvpkit._utils.ranks import Ranks, watching
from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count, check_device, check_flag
from hvpkit.data.examples import Data
from hvpkit.data.loaders import covers_dataset, own_iteration, with_own_random_numbers
from hvpkit.data.rank_shares import check_complete, complete, is_share, shared
from hvpkit.data.sources import (
    DatasetBatches,
    IterableBatches,
    Source,
    TensorBatches,
    WholeBatches,
    count_by,
    count_examples,
    count_stream,
    name_batch,
)

DEFAULT_BATCH_SIZE = 256
"""Examples in a batch, unless the caller or the caller's loader gives a number; chosen by feel."""


def as_data(
    data: object,
    *,
    batch_size: int | None = None,
    num_examples: Callable[[Batch], int] | None = None,
    device: torch.device | str | None = None,
    mesh: DeviceMesh | None = None,
    split: bool = True,
) -> Data:
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
    the same in every pass, batch, worker and sample; for the data as they are, turn augmentation off. While other
    threads are alive, which would see those seeds, such examples are read by a worker process. What seeds
    cannot fix is refused: generators of the dataset's own, a ``collate_fn`` that draws (mixup), streams
    (``IterableDataset``, own re-iterables) that give other examples under other seeds. ``list(loader)`` is one
    fixed draw of anything. Loaders of an own class are read under a fixed seed, and what they draw depends on
    their batches. A sampler that draws examples, with replacement or by weights, gives those of one draw: the mean
    is over them.

    Args:
        data: one of the above. A batch is any tree of tensors with a common first dimension; a mapping of
            a class that torch does not know, as a tokenizer's, becomes a dict.
        batch_size: the most examples in a batch; by default the loader's own, else 256.
        num_examples: ``num_examples(batch)``: how many examples a batch holds. Then a batch may be anything that
            the loss takes: lists of tensors of different shapes, packed sequences, graphs, point sets of different
            sizes, text. It is read whole, and never split: its losses, one for each of these examples or their 0-d
            mean, have its share of the examples as weight, and samples are of whole batches. A tensor, a tuple or a
            mapping is one batch then. The sizes are found in one pass now.
        device: where batches are moved to; by default they stay.
        mesh: of the processes (ranks) that share the work, as of ``torch.distributed.device_mesh.init_device_mesh``:
            what is made of the data then is asked by all ranks together, and each gets the same numbers. Of a loader
            with a ``DistributedSampler`` the dataset is taken, without the sampler.
        split: with ``mesh``: every rank has all the data, and hvpkit gives each rank whole batches of them in turn,
            and of the last ones parts, where the losses of examples do not depend on their batch (docs/distributed.md);
            False: each rank brings a part of its own, of any size, and the mean is over all parts.

    Raises:
        TypeError: ``data`` is something else, or a batch holds what is no tensor; ``mesh`` is no DeviceMesh.
        ValueError: no examples; an iterator that a first pass uses up; first dimensions that disagree; a loader with a
            ``DistributedSampler``, or a stream in one of several processes, without ``mesh``, which would be taken for
            all data; data that is not the same on all ranks, with ``split``.
        RemoteError: another rank failed here.
        UnstableDataError: examples that differ when they are read again; a ``collate_fn`` that draws.

    Cost:
        A dataset: its first two examples, read twice. A re-iterable of batches: a pass over the data.

    Example:
        >>> import torch
        >>> graphs = [{"x": torch.ones(7, 2), "batch": torch.tensor([0, 0, 0, 1, 1, 2, 2])}]
        >>> as_data(graphs, num_examples=lambda graphs: int(graphs["batch"].max()) + 1)
        <Data: 3 examples of list in 1 whole batches>
        >>> data = as_data((torch.ones(10, 3), torch.zeros(10)), batch_size=4)
        >>> data.num_examples, [len(x) for x, _ in data]
        (10, [4, 4, 2])
    """
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, 1)
    if num_examples is not None:
        _check_num_examples(num_examples, batch_size, data)
    target = None if device is None else check_device("device", device)
    check_flag("split", split)
    if isinstance(data, Data):
        if mesh is not None:
            raise ValueError("mesh goes with the data as you have them, and data has been through as_data")
        resized = data.source if batch_size is None else data.source.resized(batch_size)
        return replace(data, source=resized, device=target or data.device)
    if mesh is None:
        check_complete(data)
        return _read(data, batch_size, num_examples, target)
    ranks = Ranks(mesh)
    with watching(ranks):
        if split and isinstance(data, DataLoader):
            data = complete(data)
        check_complete(data if is_share(data) else None)
        return shared(_read(data, batch_size, num_examples, target), ranks, split=split)


def _read(
    data: object,
    batch_size: int | None,
    num_examples: Callable[[Batch], int] | None,
    device: torch.device | None,
) -> Data:
    source = _source(data, batch_size, num_examples)
    total = sum(source.sizes) if isinstance(source, WholeBatches) else len(source)
    if total == 0:
        raise ValueError("data is empty: it holds no examples, and a mean over none is undefined")
    return Data(source, total, device=device)


def _check_num_examples(num_examples: object, batch_size: int | None, data: object) -> None:
    if not callable(num_examples):
        raise TypeError(
            f"num_examples must be a function of a batch, as lambda batch: len(batch[0]); got {num_examples!r}"
        )
    if batch_size is not None:
        raise ValueError(
            "batch_size and num_examples exclude each other: with num_examples batches are read whole, as they come"
        )
    if isinstance(data, Data):
        raise ValueError(
            "num_examples goes with the data as you have them, and data has been through as_data"
        )


def _source(data: Any, batch_size: int | None, num_examples: Callable[[Batch], int] | None) -> Source:
    if isinstance(data, Tensor | tuple | Mapping):
        if num_examples is not None:
            return _stream([data], None, num_examples)
        with _hinting(_SEVERAL if _is_nested(data) else ""):
            count_examples(data)
        return TensorBatches(data, batch_size or DEFAULT_BATCH_SIZE)
    if isinstance(data, DataLoader):
        if covers_dataset(data):
            size = batch_size or data.batch_sampler.batch_size  # type: ignore[union-attr]
            return _in_batches(DatasetBatches.of(data.dataset, size, data), num_examples)
        return _stream(data, batch_size, num_examples)
    if isinstance(data, IterableDataset):
        raise TypeError(
            "data is an IterableDataset, which gives examples and not batches; wrap it in a DataLoader"
        )
    if isinstance(data, type):
        raise TypeError(f"data is the class {data.__name__}; pass an instance, {data.__name__}(...)")
    if isinstance(data, np.ndarray):
        raise TypeError("data is a NumPy array; pass tensors (torch.from_numpy)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | str | bytes):
        return _in_batches(DatasetBatches.of(data, batch_size or DEFAULT_BATCH_SIZE), num_examples)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return _stream(data, batch_size, num_examples)
    without = ", which has no __len__" if hasattr(data, "__getitem__") else ""
    raise TypeError(
        "data must be tensors, a Dataset, a DataLoader or a re-iterable of batches, "
        f"got {type(data).__name__}{without}"
    )


def _in_batches(source: DatasetBatches, num_examples: Callable[[Batch], int] | None) -> Source:
    if num_examples is None:
        return source
    sizes = tuple(count_by(num_examples, batch) for batch in name_batch(source))
    return WholeBatches(source, sizes, num_examples)


def _stream(batches: Any, batch_size: int | None, num_examples: Callable[[Batch], int] | None) -> Source:
    """Return the batches of a list, of a loader with an order or class of its own, or of another re-iterable."""
    map_style = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    given = batches
    if isinstance(batches, DataLoader) and not own_iteration(batches):
        batches = with_own_random_numbers(batches)
    size_of = _size_in_stream(batches) if num_examples is None else partial(count_by, num_examples)
    stream, sizes = count_stream(batches, size_of, reseed=not map_style, given=given)
    if num_examples is None:
        return IterableBatches(stream, sum(sizes), batch_size)
    return WholeBatches(batches if isinstance(batches, list) else stream, tuple(sizes), num_examples)


def _size_in_stream(batches: object) -> Callable[[Batch], int]:
    def size(batch: Batch) -> int:
        if isinstance(batch, Tensor) and isinstance(batches, list):
            raise ValueError(
                "data is a list of tensors, which could be all examples or one batch each; pass the tuple "
                "(x, y) for all examples, or a list of tuples, one for each batch"
            )
        with _hinting(hint):
            return count_examples(batch)

    hint = _OF_LISTS if isinstance(batches, list) else ""
    if isinstance(batches, DataLoader) and batches.batch_sampler is None:
        hint = _OF_LOADERS
    return size


_SEVERAL = "A tuple is one batch; several go in a list"
_OF_LISTS = (
    "A list is one of batches; of single examples pass torch.utils.data.DataLoader(data, batch_size=256)"
)
_OF_LOADERS = (
    "The loader has batch_size=None, and gives what the dataset holds: give it one if these are examples"
)


def _is_nested(data: object) -> bool:
    return isinstance(data, tuple) and any(isinstance(part, tuple | list | Mapping) for part in data)


@contextmanager
def _hinting(hint: str) -> Iterator[None]:
    """Add a hint to an error of what a batch is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not hint:
            raise
        raise type(error)(f"{error}. {hint}") from None
