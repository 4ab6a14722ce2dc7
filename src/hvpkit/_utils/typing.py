"""Type aliases that several modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = Any
"""A tensor, or a dict, list, tuple or named tuple of trees."""

Batch: TypeAlias = Any
"""A tree of tensors with a common leading dimension: the examples."""

LossFn: TypeAlias = Callable[[Tree, Batch], Tensor]
"""``loss_fn(params, batch)``: one loss per example ``[B]``, or the batch mean as a 0-d tensor."""

Seed: TypeAlias = int | torch.Generator
"""The only source of randomness: an integer, or a generator from which one integer is drawn."""
