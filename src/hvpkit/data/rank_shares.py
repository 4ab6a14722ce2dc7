"""Data of several processes: the shares of ranks, and the refusal of a share that would be taken for all data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from hvpkit._utils.ranks import Ranks
from hvpkit.data.digest import digest_of
from hvpkit.data.examples import Data
from hvpkit.data.loaders import loader_options
from hvpkit.data.sources import TensorBatches


def shared(data: Data, ranks: Ranks, *, split: bool) -> Data:
    """Return this rank's data as part of what all ranks have.

    Raises:
        ValueError: the ranks have different data, with ``split``; without, batches that are read whole.
    """
    if split:
        in_memory = isinstance(data.source, TensorBatches)
        compared = data if in_memory else data.first()
        ranks.check_same(
            **{
                "the class of data": data.source.name,
                "the number of examples in data": data.num_examples,
                "the batch size of data": data.batch_size,
                # of tensors all, which takes little beside a pass; else as much as is read at once
                f"the digest of {'all' if in_memory else 'the first batch'} of data": digest_of(compared),
            }
        )
        return replace(data, ranks=ranks)
    if data.whole:
        raise ValueError(
            "split=False and num_examples exclude each other: give all ranks all batches, and hvpkit shares them"
        )
    units = ranks.gather(data.num_units)
    return replace(data, num_examples=sum(units), ranks=ranks, units_of_ranks=tuple(units))


def complete(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader without a DistributedSampler: over all of its dataset, in order."""
    if not is_share(loader):
        return loader
    return DataLoader(loader.dataset, loader.batch_size or 1, **loader_options(loader))


def is_share(data: object) -> bool:
    """Return True if ``data`` is a loader that gives each rank a part of the dataset, padded to parts of one size."""
    if not isinstance(data, DataLoader):
        return False
    return any(
        isinstance(sampler, DistributedSampler)
        for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None))
    )


def check_complete(data: object) -> None:
    """Raise ValueError if ``data`` is one rank's share, or may be, and would be taken for all data."""
    if is_share(data):
        raise ValueError(
            "data is a loader with a DistributedSampler, which gives this process a part of the dataset; pass "
            "hvpkit.as_data(loader, mesh=mesh) on every rank, and each is given its part of the work, or a loader "
            "without that sampler, and each process does all of it"
        )
    if _num_processes() > 1 and _is_stream(data):
        raise ValueError(
            f"data is a stream ({type(data).__name__}) in one of {_num_processes()} processes, and may be split among "
            "them: pass hvpkit.as_data(data, mesh=mesh, split=False) on every rank if each reads a part of its own, "
            "hvpkit.as_data(data, mesh=mesh) if each reads all of it"
        )


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_stream(data: object) -> bool:
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset)
    is_known = isinstance(data, Tensor | tuple | list | Mapping | Data) or hasattr(data, "__getitem__")
    return isinstance(data, Iterable) and not is_known
