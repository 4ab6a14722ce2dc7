"""Detection, when data is passed in, of random examples that seeds cannot fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.pytree import plain
from hvpkit.data.random_state import (
    GlobalState,
    SeededExamples,
    can_fork,
    check_transfer,
    is_alone,
    loader_generator,
    read_apart,
)
from hvpkit.errors import UnstableDataError

PROBED_EXAMPLES = 2
"""Examples that are read twice; mixing needs two. Chosen by feel."""

REPEATS = 4
"""Repeats of a collate function that must all draw: another thread may seem to in one."""

OTHER_SEED = 2**31
"""Seed of a second read of a stream, far from the steps of the first."""

EVERY_PASS = "a mean over the data needs the same examples in every pass"
REMEDIES = {
    "dataset": "the dataset gives another example when it is read again, by random numbers of its own generator; "
    f"{EVERY_PASS}: draw from the global generators (random, numpy.random, torch), which are seeded for each example "
    "by its index, derive the numbers from the index, or turn the augmentation off",
    "collate_fn": "collate_fn draws random numbers (mixup, cutmix or the like), so that an example depends on the "
    f"batch that it is in; {EVERY_PASS}: pass a loader without, or list(loader), one fixed draw in memory",
    "stream": "the examples are others when they are read again; "
    f"{EVERY_PASS}: pass list(...) of the batches, one fixed draw in memory, or a map-style Dataset, whose random "
    "numbers are seeded for each example by its index",
}


def check_examples(dataset: SeededExamples, batch_size: int, options: Mapping[str, Any]) -> None:
    """Raise UnstableDataError if examples, or batches of them, are not fixed by the indices of the examples.

    Sets ``dataset.draws``, and ``dataset.movable`` while other threads are alive: then it is a worker that tells, in
    whose process nothing else draws. Examples are read where the loader reads them: in a worker, if it has some, as
    files that are opened here would be shared with workers.
    """
    indices = [*range(min(len(dataset), batch_size, PROBED_EXAMPLES))]
    if not indices:
        return
    workers = min(options.get("num_workers", 0), 1)
    changes = {"batch_sampler": [indices * 2], "num_workers": workers, "pin_memory": False}
    probe = _Probe(dataset, options["collate_fn"])
    reading = {**options, **changes, "collate_fn": probe}
    examples: Any = dataset
    found = None
    if not (workers or is_alone()) and can_fork():
        with suppress(Exception):  # as of tensors on a GPU; a fault of the examples comes up again below
            (found,) = read_apart(examples, **reading | {"collate_fn": replace(probe, transfer=True)})
        dataset.movable = found is not None
    if found is None:
        (found,) = DataLoader(examples, generator=loader_generator(), **reading)
    fault, dataset.draws = found
    if fault:
        raise UnstableDataError(f"data: {REMEDIES[fault]}")


@dataclass(frozen=True)
class _Probe:
    """A collate function that compares examples, each read twice, instead of making a batch of them.

    ``transfer``: raise an error if a batch of them cannot be sent from a process to another.
    """

    dataset: SeededExamples
    collate: Callable[[list[Any]], Any] | None
    transfer: bool = False

    def __call__(self, examples: list[Any]) -> tuple[str, bool]:
        """Return the part at fault, or ``""``; and whether the dataset draws."""
        half = len(examples) // 2
        first, again = examples[:half], examples[half:]
        fault = ""
        if not all(map(same, first, again)):
            fault = "dataset"
        elif self.collate is not None and _is_random(self.collate, first, again):
            fault = "collate_fn"
        if self.transfer and not fault:
            check_transfer(first if self.collate is None else self.collate(first))
        return fault, self.dataset.draws


def _is_random(collate: Callable[[list[Any]], Any], first: list[Any], again: list[Any]) -> bool:
    """Return True if ``collate`` draws from global generators, or makes other batches of the same examples."""
    outside = GlobalState.now()
    try:
        batch = collate(first)
        if not outside.changed():
            return not same(batch, collate(again))
        return all(_draws(collate, again) for _ in range(REPEATS))
    except Exception:  # it takes no batch this small, or none twice: passes will tell
        return False
    finally:
        outside.restore()


def _draws(collate: Callable[[list[Any]], Any], examples: list[Any]) -> bool:
    before = GlobalState.now()
    collate(examples)
    return before.changed()


def check_stream(again: Iterable[Batch], first: Batch, contents: Tensor) -> None:
    """Raise UnstableDataError if a second read of a stream gives other examples; another order passes.

    Args:
        again: the stream under :data:`OTHER_SEED`, so that all that draws is found; or under the seed 0: then what
            draws from the global generators, as samplers do, passes.
        first: its first batch under the seed 0. A second read that begins with it too ends there.
        contents: the sum of :func:`summarize` over its batches under the seed 0.
    """
    total = torch.zeros_like(contents)
    for number, batch in enumerate(again):
        if number == 0 and same(first, batch):
            return
        total += summarize(batch)
    if not torch.allclose(total, contents, rtol=1e-9, atol=0.0, equal_nan=True):
        raise UnstableDataError(f"data: {REMEDIES['stream']}")


def summarize(batch: Batch) -> Tensor:
    """Return two sums ``[2]`` over the examples of a batch that tell other examples from another order of the same."""
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for leaf in _pytree.tree_leaves(plain(batch)):
        if isinstance(leaf, Tensor) and _is_dense(leaf) and not leaf.is_complex() and leaf.numel():
            rows = leaf.detach().reshape(len(leaf) if leaf.ndim else 1, -1).to("cpu", torch.float64)
            # a flip moves them
            places = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device="cpu").sin()
            marks = rows @ places
            sums += torch.stack([marks.abs().sum(), marks.square().sum()])
    return sums


def same(a: Any, b: Any) -> bool:
    """Return False if two reads clearly differ; objects of unknown types count as the same."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if hasattr(a, f.name))
    if isinstance(a, Tensor):
        return _same_tensor(a, b)
    if isinstance(a, np.ndarray):
        same_array = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return bool(a.dtype == object or same_array)
    if isinstance(a, str | bytes | Number):
        return bool(a == b) or (a != a and b != b)
    return not hasattr(a, "tobytes") or bool(a.tobytes() == b.tobytes())  # images of PIL


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if not (_is_dense(a) and _is_dense(b)):
        return True
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _is_dense(leaf: Tensor) -> bool:
    return leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_meta
