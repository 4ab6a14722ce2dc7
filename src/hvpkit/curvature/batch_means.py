"""0-d losses: refused unless they are means over the examples of whatever batch they get."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.data import Data
from hvpkit.data.sources import IterableBatches
from hvpkit.objective import goes_by_batches

NUM_EXAMPLES = 32
"""Examples of the first batch, at most, on which a 0-d loss is compared with those of its halves. By feel."""


def check_batch_mean(
    loss_fn: LossFn, params: Tree, data: Data, first: Data, *, resized: bool = False
) -> bool:
    """Raise ValueError if a 0-d loss is a sum over its batch, or no mean over examples that batches can be cut from.

    Return True for losses of examples, and several ranks, if those of the halves of a batch are those of the batch:
    then ranks may cut batches. Of a 0-d loss the first examples do not show it, if all of them have as many tokens.

    Batches that come as the caller made them, are read whole, or are declared as fixed (``batchnorm="batch"``) are
    not cut: their losses may be of any form but a sum.

    Args:
        loss_fn: the loss.
        params: at which to evaluate it.
        data: all examples.
        first: the first batch.
        resized: batches of another size will be cut from the data.

    Cost:
        Three forward passes with 32 examples; one for losses of examples where a process is alone.
    """
    few = first.first(NUM_EXAMPLES)
    size = few.num_examples
    if size < 2 or data.whole or goes_by_batches(loss_fn):
        return False
    parts = [few.subset(torch.arange(start, stop)) for start, stop in ((0, size // 2), (size // 2, size))]
    with torch.enable_grad():  # a loss may differentiate by its inputs
        whole = loss_fn(params, _batch(few)).detach()
        if whole.ndim > 0 and data.ranks is None:
            return False
        halves = [loss_fn(params, _batch(part)).detach() for part in parts]
    if whole.ndim > 0:
        joined = torch.cat(halves)
        return joined.shape == whole.shape and _close(whole, joined, [joined])
    mean = sum(
        (half * (part.num_examples / size) for half, part in zip(halves, parts, strict=True)), 0 * whole
    )
    if _close(whole, mean, halves):
        return False
    if _close(whole, halves[0] + halves[1], halves):
        raise ValueError(
            "loss_fn returns a sum over its batch, and a 0-d loss is taken for the mean, so that the Hessian would be "
            "too large by the number of examples; return the mean, or one loss for each example, shape "
            f"[{first.num_examples}], and multiply by the number of examples for the Hessian of the sum"
        )
    if resized or _is_cut(data, first):
        raise ValueError(
            f"loss_fn returned a 0-d loss that is no mean over examples: {float(whole):.6g} for {size} of them, and "
            f"{float(mean):.6g} as the mean over two halves, as of contrastive and ranking losses, batch statistics, "
            f"and means over the tokens of padded batches. data is cut into batches of {first.num_examples} here, so "
            "that it would be another function: pass all of it at once (batch_size=len(data)), a list of the batches "
            "that are meant (which are kept as they are), losses of examples [B], or for a weighted mean "
            "hvpkit.Objective(forward, output_loss, example_weight)"
        )
    return False


def _batch(data: Data) -> Batch:
    return next(iter(data))


def _close(found: Tensor, expected: Tensor, parts: list[Tensor]) -> bool:
    """Return True if two values agree to half of the digits of what they were added up from; NaN agrees."""
    scale = torch.stack([found.abs(), *(part.abs() for part in parts)])
    apart = (found - expected).abs()
    return not bool((apart > torch.finfo(found.dtype).eps ** 0.5 * scale.max()).any())


def _is_cut(data: Data, first: Data) -> bool:
    """Return True if batches are cut from the examples, and not what the caller gave as batches."""
    given = isinstance(data.source, IterableBatches) and data.source.batch_size is None
    return not given and data.num_examples > first.num_examples
