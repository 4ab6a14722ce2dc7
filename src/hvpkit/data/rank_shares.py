"""Data of several processes: the shares of ranks, and the refusal of a share that would be taken for all data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.ranks import Ranks
from hvpkit.autodiff.pytree import flatten, leaf_names
from hvpkit.data.digest import digest_of
from hvpkit.data.examples import Data
from hvpkit.data.loaders import loader_options
from hvpkit.data.sources import DatasetBatches, Stream, TensorBatches, WholeBatches

NUM_COMPARED = 32
"""Examples of a dataset, spread over it, that ranks compare beside its first batch. Chosen by feel."""


def shared(data: Data, ranks: Ranks, *, split: bool) -> Data:
    """Return this rank's data as part of what all ranks have.

    Raises:
        ValueError: the ranks have different data, with ``split``; without, tensors of other names or dtypes, or batches
            that are read whole.
    """
    if split:
        ranks.check_same(
            **{
                "the class of data": data.source.name,
                "the number of examples in data": data.num_examples,
                "the batch size of data": data.batch_size,
                **_contents(data),
            }
        )
        return replace(data, ranks=ranks)
    if data.whole:
        raise ValueError(
            "split=False and num_examples exclude each other: give all ranks all batches, and hvpkit shares them"
        )
    first = next(iter(data))
    kinds = [
        f"{name} {leaf.dtype}".strip()
        for name, leaf in zip(leaf_names(first), flatten(first)[0], strict=True)
    ]
    ranks.check_same(**{"the tensors in a batch of data": ", ".join(kinds)})
    units = ranks.gather(data.num_units)
    return replace(data, num_examples=sum(units), ranks=ranks, units_of_ranks=tuple(units))


def _contents(data: Data) -> dict[str, object]:
    """Return digests of as much as costs little: of all that is in memory, of what a stream's count has seen."""
    source = data.source
    batches = getattr(source, "batches", None)
    stream = batches if isinstance(batches, Stream) else None
    if isinstance(source, TensorBatches) or isinstance(batches if stream is None else stream.given, list):
        return {"the digest of all of data": digest_of(data)}
    found: dict[str, object] = {"the digest of the first batch of data": digest_of(data.first())}
    if stream is not None:
        return {**found, "the sums over all of data": [f"{total:.9g}" for total in stream.contents]}
    if isinstance(source, WholeBatches):
        found["the sizes of the batches of data"] = digest(list(source.sizes))
    if isinstance(source, DatasetBatches):
        spread = torch.linspace(
            0, data.num_examples - 1, min(NUM_COMPARED, data.num_examples), device="cpu"
        ).round()
        found["the digest of examples all over the data"] = digest_of(data.subset(spread.long()))
    return found


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
