"""Functions whose second derivatives torch gets wrong or lacks, written out from their definitions.

They are called as ``torch.overrides`` hands calls on, where what is optional in torch's functions comes by name, or,
while torch compiles, as the module wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Table = dict[Callable[..., Any], Callable[..., Any]]


class WrittenOut(TorchFunctionMode):
    """Inside, functions are replaced by others, whoever calls them: modules and losses alike.

    Args:
        table: what each function is replaced by, which is called with the same arguments.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Rows of ``weight``, the one for padding a constant: torch's forward mode takes it for a variable."""
    check_max_norm(max_norm)
    rows = F.embedding(
        input, weight
    )  # not sparse, not scaled by frequency: the derivative of what it computes
    return rows if padding_idx is None else _padded(rows, rows.detach(), input, padding_idx % len(weight))


def _padded(rows: Tensor, padding: Tensor, input: Tensor, padding_idx: int) -> Tensor:
    return torch.where((input == padding_idx).unsqueeze(-1), padding, rows)


def check_max_norm(max_norm: float | None) -> None:
    """A ValueError for an embedding that changes its own weight."""
    if max_norm is not None:
        raise ValueError(
            "model: an embedding with max_norm rescales its weight whenever it is called, so the loss is no "
            "function of its parameters; rescale the weight once and set max_norm to None"
        )


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    *,
    mode: str,
    max_norm: float | None,
    per_sample_weights: Tensor | None,
    padding_idx: int | None,
    **_: Any,
) -> Tensor:
    """Sum, mean or maximum over rows of ``weight``, of which torch has no second derivative."""
    check_max_norm(max_norm)
    if input.ndim != 2:
        raise ValueError(
            "model: an EmbeddingBag with offsets has no second derivative in torch; pass a matrix of indices "
            "[B, L], filled up with padding_idx"
        )
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    kept = (input != padding).unsqueeze(-1)
    if mode == "max":
        highest = rows.masked_fill(~kept, -torch.inf).max(dim=1).values
        return torch.where(kept.any(dim=1), highest, 0.0)
    total = torch.where(kept, rows, 0.0).sum(dim=1)
    return total if mode == "sum" else total / kept.sum(dim=1).clamp(min=1)


def weight_norm(v: Tensor, g: Tensor, _: int) -> Tensor:
    """The weight of directions ``v`` and lengths ``g``, of which torch's second derivative is wrong."""
    return v * (g / v.square().sum_to_size(g.shape).sqrt())


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """A ramp from 0 at -3 to 1 at 3, of which torch has no second derivative."""
    ramp = F.relu6(input + 3) / 6
    return input.copy_(ramp) if inplace else ramp


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Quadratic up to ``delta`` and linear beyond, of which torch has no forward mode."""
    losses = delta * F.smooth_l1_loss(input, target, reduction="none", beta=delta)
    return _reduce(losses if weight is None else losses * weight, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor:
    """``log(1 + exp(-target * input))``, of which torch has no forward mode."""
    return _reduce(-F.logsigmoid(target * input), **reduction)


def multi_margin_loss(
    input: Tensor, target: Tensor, *, p: int, margin: float, weight: Tensor | None, **reduction: Any
) -> Tensor:
    """Mean of ``relu(margin - score of the class + other score) ** p``, without a second derivative in torch."""
    target = target.unsqueeze(-1)
    hinges = F.relu(margin - input.gather(-1, target) + input) ** p
    if weight is not None:
        hinges = hinges * weight[target]
    return _reduce(hinges.scatter(-1, target, 0.0).sum(dim=-1) / input.shape[-1], **reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor:
    """Hinges of each class of the target over each other class, without a second derivative in torch."""
    named = (target >= 0).cumprod(dim=-1).bool().unsqueeze(-1)  # the classes up to the first -1
    classes = target.clamp(min=0)
    matches = (classes.unsqueeze(-1) == torch.arange(input.shape[-1], device=input.device)) & named
    others = ~matches.any(dim=-2, keepdim=True)
    hinges = F.relu(1 - input.gather(-1, classes).unsqueeze(-1) + input.unsqueeze(-2))
    return _reduce((hinges * (named & others)).sum(dim=(-2, -1)) / input.shape[-1], **reduction)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    """Minus the log of the probability of all alignments, without a second derivative in torch.

    The forward recursion of Graves et al., ICML 2006, doi:10.1145/1143844.1143891, over labels between blanks.
    """
    if log_probs.ndim != 3 or targets.ndim != 2:
        raise ValueError(
            "criterion: in second derivatives ctc_loss needs log_probs [T, B, C] and targets [B, S], filled up"
        )
    spans, counts = (
        torch.as_tensor(n, device=log_probs.device).unsqueeze(1) for n in (input_lengths, target_lengths)
    )
    labels = torch.full((len(targets), 2 * targets.shape[1] + 1), blank, device=log_probs.device)
    labels[:, 1::2] = targets
    may_skip = F.pad((labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2]), (2, 0))
    scores = log_probs.gather(2, labels.expand(len(log_probs), -1, -1))
    never = torch.finfo(log_probs.dtype).min / 4  # infinity would have no derivative
    place = torch.arange(labels.shape[1], device=log_probs.device)
    paths = torch.where(place < 2, scores[0], never)
    for t in range(1, len(log_probs)):
        stepped = F.pad(paths, (1, 0), value=never)[:, :-1]
        skipped = torch.where(may_skip, F.pad(paths, (2, 0), value=never)[:, :-2], never)
        longer = torch.stack([paths, stepped, skipped]).logsumexp(dim=0) + scores[t]
        paths = torch.where(t < spans, longer, paths)
    losses = -torch.where((place == 2 * counts) | (place == 2 * counts - 1), paths, never).logsumexp(dim=1)
    losses = torch.where(losses < -never / 2, losses, 0.0 if zero_infinity else torch.inf)
    if reduction == "mean":
        losses = losses / counts.squeeze(1).clamp(min=1)
    return _reduce(losses, reduction)


def _reduce(
    losses: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return (losses, losses.mean(), losses.sum())[_reduction.get_enum(reduction)]


def without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The recurrent layer without cuDNN, which has no second derivative of it."""

    def definition(*args: Any) -> Any:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return function(*args)
        finally:
            torch.backends.cudnn.enabled = enabled

    return definition


DEFINITIONS: Table = {
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch._weight_norm: weight_norm,
    F.hardsigmoid: hardsigmoid,
    F.huber_loss: huber_loss,
    F.soft_margin_loss: soft_margin_loss,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
    F.ctc_loss: ctc_loss,
    **{f: without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}


def padding_held(moved: Sequence[Tensor], base: Sequence[Tensor]) -> WrittenOut:
    """Inside, where embeddings by the weights ``moved`` have padding rows, those are the rows of ``base``."""
    bases = {weight.data_ptr(): before for weight, before in zip(moved, base, strict=True)}

    def held(input: Tensor, weight: Tensor, *, padding_idx: int | None, **options: Any) -> Tensor:
        rows = embedding(input, weight, padding_idx=padding_idx, **options)
        before = bases.get(weight.data_ptr())
        if padding_idx is None or (before is None and not weight.requires_grad):
            return rows
        if before is None:
            raise ValueError(
                "model: mode='finite-difference' would move the padding row of an embedding, which is a constant, "
                "as its weight is made of other parameters; choose another mode"
            )
        return _padded(rows, before[padding_idx], input, padding_idx % len(weight))

    return WrittenOut({F.embedding: held})
