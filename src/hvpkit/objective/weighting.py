"""Weighted means: the sum of all losses over the sum of all weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvpkit._utils.ranks import together
from hvpkit._utils.typing import Batch, LossFn
from hvpkit.data import Data, whole_batch
from hvpkit.objective.objective import Objective

_NORMALIZED: WeakValueDictionary[tuple[int, float], Objective] = WeakValueDictionary()
"""Normalized objectives that are in use, by the id of the original and the factor: one function, compiled once."""


def normalized(loss_fn: LossFn, data: Data) -> LossFn:
    """Return the loss whose mean over ``data`` is the weighted mean that an objective stands for.

    With weights w of the examples, losses are multiplied by N / sum(w). The factor is that of ``data``, also for
    samples of it, whose means are unbiased then. A loss without ``example_weight`` is returned as it is.

    Raises:
        TypeError, ValueError: weights that are not one for each example, negative, not finite, or all zero.

    Cost:
        One pass over the data without a forward pass.
    """
    if not isinstance(loss_fn, Objective) or loss_fn.example_weight is None:
        return loss_fn
    factor = 1.0 / _mean_weight(loss_fn.example_weight, data)
    found = _NORMALIZED.get((id(loss_fn), factor))
    if found is None:
        found = _NORMALIZED[id(loss_fn), factor] = _scaled(loss_fn, factor)
    return found


def normalized_in_batch(loss_fn: LossFn, batch: Batch) -> LossFn:
    """Return the loss whose mean over one batch is the weighted mean that an objective stands for."""
    if not isinstance(loss_fn, Objective) or loss_fn.example_weight is None:
        return loss_fn
    return normalized(loss_fn, whole_batch(batch))


def _scaled(objective: Objective, factor: float) -> Objective:
    def output_loss(outputs: Any, batch: Batch) -> Tensor:
        losses = objective.output_loss(outputs, batch)
        if isinstance(losses, Tensor) and losses.ndim == 0:
            raise ValueError(
                "objective has an example_weight, and output_loss returned a 0-d tensor; return the weighted sum of "
                "each example's terms, shape [B]"
            )
        return losses if factor == 1.0 else losses * factor

    return replace(objective, output_loss=output_loss, example_weight=None)


def _mean_weight(example_weight: Any, data: Data) -> float:
    """Return the mean of the weights over the data, each example as it counts there."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    with together(data.ranks, "weights"):
        for batch, size, shares, _, _ in data.share():
            weights = example_weight(batch)
            if not isinstance(weights, Tensor):
                raise TypeError(f"example_weight must return a tensor, got {type(weights).__name__}")
            if weights.shape != (size,):
                raise ValueError(
                    f"example_weight returned shape {list(weights.shape)} for a batch of {size} examples; expected one "
                    f"weight for each, [{size}]"
                )
            weights = weights.detach().double()
            if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
                raise ValueError("example_weight returned a weight that is negative, NaN or infinite")
            if shares is None:
                mean = weights.sum() / data.num_examples
            else:
                mean = weights.mean() * shares.double() if shares.ndim == 0 else weights @ shares.double()
            total += mean.cpu()
    if data.ranks is not None:
        total = torch.stack(data.ranks.gather(total)).sum()
    if not float(total) > 0:
        raise ValueError(
            "data: no example has any weight (are all targets ignored?), and a mean over none is undefined"
        )
    return float(total)
