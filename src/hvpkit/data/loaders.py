"""Loaders of torch: how they fetch and order examples, and copies that draw from generators of their own."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from hvpkit.data.augmentation import check_examples
from hvpkit.data.random_state import SeededExamples, loader_generator


def loader_options(like: DataLoader[Any] | None) -> dict[str, Any]:
    """Return how a loader collates and fetches, without how it chooses and orders examples."""
    if like is None:
        return {"collate_fn": default_collate}
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


def with_own_random_numbers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader that draws from no generator of the caller's, over examples that are fixed by their indices.

    Its samplers are the loader's, those of torch with generators of their own.

    Raises:
        UnstableDataError: examples or batches are random, and seeds cannot fix them.
    """
    generator = loader_generator()
    if isinstance(loader.dataset, IterableDataset):
        own = copy(loader)
        own.generator, own._iterator = generator, None
        return own
    examples, options = SeededExamples(loader.dataset), loader_options(loader)
    if loader.batch_sampler is None:  # the dataset holds batches
        size, probed = 1, options | {"collate_fn": None}
        order: dict[str, Any] = {"batch_size": None, "sampler": _with_own_generator(loader.sampler)}
    else:
        size, probed = getattr(loader.batch_sampler, "batch_size", None) or 1, options
        order = {"batch_sampler": _with_own_generator(loader.batch_sampler)}
    with suppress(LookupError, TypeError):  # examples 0 and 1 need not exist: keys are the sampler's own
        check_examples(examples, size, probed)
    seeded: Any = examples
    return DataLoader(seeded, generator=generator, **order, **options)


def _with_own_generator(sampler: Any) -> Any:
    """Return a sampler of torch with a generator of its own, and a copy of one that is told of epochs."""
    if not (_is_of_torch(sampler) or hasattr(sampler, "set_epoch")):
        return sampler
    own = copy(sampler)
    if _is_of_torch(sampler) and hasattr(own, "generator"):
        own.generator = loader_generator()
    if hasattr(own, "sampler"):
        own.sampler = _with_own_generator(own.sampler)
    return own


def _is_of_torch(sampler: object) -> bool:
    return type(sampler).__module__ == RandomSampler.__module__


def draws_in_workers(batches: object) -> bool:
    """Return True if nothing is drawn from this process's generators, by the parts that a loader has."""
    if not isinstance(batches, DataLoader) or own_iteration(batches) or not batches.num_workers:
        return False
    sampler = batches.sampler if batches.batch_sampler is None else batches.batch_sampler
    return isinstance(batches.dataset, IterableDataset) or (
        _is_of_torch(sampler) and _is_of_torch(getattr(sampler, "sampler", sampler))
    )


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
