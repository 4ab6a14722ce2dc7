"""0-d losses: refused unless they are means over the examples of whatever batch they get."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.data import Data
from hvpkit.data.sources import IterableBatches
from hvpkit.objective import goes_by_batches

NUM_EXAMPLES = 32
"""Examples, at most, on which a 0-d loss is compared with those of two parts of them. By feel."""


def check_batch_mean(
    loss_fn: LossFn, params: Tree, data: Data, first: Data, *, resized: bool = False
) -> bool:
    """Raise ValueError if a 0-d loss is a sum over its batch, or no mean over examples that batches can be cut from.

    Return True for losses of examples, and several ranks, if those of the halves of a batch are those of the batch:
    then ranks may cut batches. A 0-d loss is compared on examples from all over the data, where they can be read in any
    order: the first ones may be of one class, or have as many tokens. If all that are compared do, nothing shows it.

    Batches that come as the caller made them, are read whole, or are declared as fixed (``batchnorm="batch"``) are
    not cut: their losses may be of any form but a sum.

    Args:
        loss_fn: the loss.
        params: at which to evaluate it.
        data: all examples.
        first: the first batch.
        resized: batches of another size will be cut from the data.

    Cost:
        Six forward passes with 32 examples; one for losses of examples where a process is alone.
    """
    few = first.first(NUM_EXAMPLES)
    size = few.num_examples
    if size < 2 or data.whole or goes_by_batches(loss_fn):
        return False

    def losses(examples: Data) -> Tensor:
        with torch.enable_grad():  # a loss may differentiate by its inputs
            return loss_fn(params, next(iter(examples))).detach()

    whole = losses(few)
    if whole.ndim > 0:
        if data.ranks is None:
            return False
        joined = torch.cat([losses(part) for part in _parts(few, size // 2)])
        return joined.shape == whole.shape and _close(whole, joined, [joined])
    few = _spread(data, size) or few
    whole = losses(few)
    # of two sums of weights in proportion to the parts, one cut shows nothing
    for cut in (size // 2, size // 3):
        parts = _parts(few, cut)
        means = [losses(part) for part in parts]
        mean = sum((m * (part.num_examples / size) for m, part in zip(means, parts, strict=True)), 0 * whole)
        if _close(whole, mean, means):
            continue
        if _close(whole, sum(means, 0 * whole), means):
            raise ValueError(
                "loss_fn returns a sum over its batch, and a 0-d loss is taken for the mean, so that the Hessian "
                "would be too large by the number of examples; return the mean, or one loss for each example, shape "
                f"[{first.num_examples}], and multiply by the number of examples for the Hessian of the sum"
            )
        if resized or _is_cut(data, first):
            raise ValueError(
                f"loss_fn returned a 0-d loss that is no mean over examples: {float(whole):.6g} for {size} of them, "
                f"and {float(mean):.6g} as the mean over two parts of them, as of contrastive and ranking losses, "
                "batch statistics, class weights, and means over the tokens of padded batches. data is cut into "
                f"batches of {first.num_examples} here, so that it would be another function: pass all of it at once "
                "(batch_size=len(data)), a list of the batches that are meant (which are kept as they are), losses of "
                "examples [B], or for a weighted mean hvpkit.Objective(forward, output_loss, example_weight)"
            )
    return False


def means_checked(loss_fn: LossFn, data: Data) -> LossFn:
    """Wrap a loss function: its first loss, if it is 0-d, is checked as by :func:`check_batch_mean`."""
    unchecked = [True]

    def checked(params: Tree, batch: Batch) -> Tensor:
        losses = loss_fn(params, batch)
        if unchecked and unchecked.pop() and isinstance(losses, Tensor) and losses.ndim == 0:
            check_batch_mean(loss_fn, params, data, data.first())
        return losses

    return checked


def _parts(data: Data, cut: int) -> list[Data]:
    """Return the examples before ``cut`` and the others; those there are."""
    ends = [(0, cut), (cut, data.num_examples)]
    return [data.subset(torch.arange(start, stop, device="cpu")) for start, stop in ends if start < stop]


def _spread(data: Data, size: int) -> Data | None:
    """Return so many examples from all over the data as one batch; None if only a pass finds them."""
    if isinstance(data.source, IterableBatches):
        return None
    alone = data.alone
    places = torch.linspace(0, len(alone.source) - 1, size, dtype=torch.float64, device="cpu").round()
    return alone.subset(places.to(torch.int64)).first()


def _close(found: Tensor, expected: Tensor, parts: list[Tensor]) -> bool:
    """Return True if two values agree to half of the digits of what they were added up from, or ``found`` is NaN."""
    scale = torch.stack([found.abs(), *(part.abs() for part in parts)])
    close = (found - expected).abs() <= torch.finfo(found.dtype).eps ** 0.5 * scale.max()
    return bool((close | found.isnan()).all())


def _is_cut(data: Data, first: Data) -> bool:
    """Return True if batches are cut from the examples, and not what the caller gave as batches."""
    given = isinstance(data.source, IterableBatches) and data.source.batch_size is None
    return not given and data.num_examples > first.num_examples
