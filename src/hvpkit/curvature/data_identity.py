"""The test of two data for the same examples: then their operators are sampled together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvpkit.autodiff.pytree import flatten
from hvpkit.data import Data
from hvpkit.data.sources import (
    DatasetBatches,
    IterableBatches,
    Source,
    Stream,
    TensorBatches,
    WholeBatches,
)


def same_examples(one: Data, other: Data) -> bool:
    """Return True if both hold the same examples in the same order with the same weights, in any batches.

    Tensors are compared by value, datasets and iterables by identity.
    """
    if one is other:
        return True
    if one.num_examples != other.num_examples or not _same_optional(one.weights, other.weights):
        return False
    return _same_source(one.source, other.source)


def _same_source(one: Source, other: Source) -> bool:
    if isinstance(one, TensorBatches) and isinstance(other, TensorBatches):
        (leaves, spec), (other_leaves, other_spec) = flatten(one.examples), flatten(other.examples)
        return spec == other_spec and all(map(_same_tensor, leaves, other_leaves))
    if isinstance(one, DatasetBatches) and isinstance(other, DatasetBatches):
        same_collation = one.options["collate_fn"] is other.options["collate_fn"]
        return same_collation and one.examples.same_as(other.examples)
    if isinstance(one, IterableBatches) and isinstance(other, IterableBatches):
        return one.batches.given is other.batches.given and _same_optional(one.indices, other.indices)
    if isinstance(one, WholeBatches) and isinstance(other, WholeBatches):
        return (one.positions, one.sizes) == (other.positions, other.sizes) and _same_batches(
            one.batches, other.batches
        )
    return False


def _same_batches(one: Any, other: Any) -> bool:
    if isinstance(one, DatasetBatches) and isinstance(other, DatasetBatches):
        return one.batch_size == other.batch_size and _same_source(one, other)
    if isinstance(one, Stream) and isinstance(other, Stream):
        return one.given is other.given
    return one is other


def _same_optional(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return _same_tensor(one, other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    like = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return like and torch.equal(one, other)
