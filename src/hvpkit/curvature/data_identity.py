"""The test of two data for the same examples: then their operators are sampled together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from hvpkit.autodiff.pytree import flatten
from hvpkit.data import Data, DatasetBatches, IterableBatches, Source, TensorBatches


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
        (dataset, indices), (other_dataset, other_indices) = map(_unwrapped, (one, other))
        same_collation = one.loader.collate_fn is other.loader.collate_fn
        return dataset is other_dataset and indices == other_indices and same_collation
    if isinstance(one, IterableBatches) and isinstance(other, IterableBatches):
        return one.batches is other.batches and _same_optional(one.indices, other.indices)
    return False


def _unwrapped(source: DatasetBatches) -> tuple[Any, list[int]]:
    """Return the dataset under nested subsets, and the indices of the examples in it."""
    dataset, indices = source.loader.dataset, list(range(len(source)))
    while isinstance(dataset, Subset):
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def _same_optional(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return _same_tensor(one, other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    like = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return like and torch.equal(one, other)
