"""Replacements, written from the definitions, of functions whose second derivatives torch lacks or gets wrong.

Optional arguments come by name, as ``torch.overrides`` passes calls on; while torch compiles, they come as the caller
wrote them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Table = dict[Callable[..., Any], Callable[..., Any]]


class FunctionOverrides(TorchFunctionMode):
    """Context in which functions are replaced by others, in modules and losses alike.

    Args:
        table: from each function to its replacement, which is called with the same arguments.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module or a class, where the override of calls does not reach, and restore it.

    In this thread: others go on calling the original. One thread at a time may do so.
    """
    original, own = getattr(owner, name), vars(owner).get(name)  # a class may inherit it
    here = threading.local()
    here.active = True

    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if getattr(here, "active", False) else original)(*args, **kwargs)

    setattr(owner, name, staticmethod(either) if isinstance(original, MethodType) else either)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Return rows of ``weight``, with the padding row a constant: in torch's forward mode it is a variable."""
    check_max_norm(max_norm)
    rows = F.embedding(
        input, weight
    )  # sparse and scale_grad_by_freq change the gradient only: leave them out
    return rows if padding_idx is None else padded(rows, rows.detach(), input, padding_idx % len(weight))


def padded(rows: Tensor, padding: Tensor, input: Tensor, padding_idx: int) -> Tensor:
    """Return rows of an embedding with another row where the index is that of the padding."""
    return torch.where((input == padding_idx).unsqueeze(-1), padding, rows)


def check_max_norm(max_norm: float | None) -> None:
    """Raise ValueError for an embedding that rescales its own weight."""
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
    """Reduce rows of ``weight`` by sum, mean or maximum; torch has no second derivative of it."""
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


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Compute a convolution; one of single pixels with a stride from those pixels alone.

    Its gradient by the weights, of less than eight channels in channels-last layout, writes past its memory on
    processors with AVX2 and not AVX-512 (oneDNN 3.12): wrong numbers or a crash.
    """
    strides = [stride, stride] if isinstance(stride, int) else [*stride] * (2 // len(stride))
    unpadded = padding == "valid" or (not isinstance(padding, str) and not _any_nonzero(padding))
    if tuple(weight.shape[2:]) == (1, 1) and max(strides) > 1 and unpadded and not input.is_cuda:
        input, stride = input[..., :: strides[0], :: strides[1]], 1
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _any_nonzero(sizes: int | Sequence[int]) -> bool:
    return bool(sizes) if isinstance(sizes, int) else any(sizes)


def weight_norm(v: Tensor, g: Tensor, _: int) -> Tensor:
    """Compute ``g v / |v|``, of which torch's second derivative is wrong."""
    return v * (g / v.square().sum_to_size(g.shape).sqrt())


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``relu6(x + 3) / 6``, of which torch has no second derivative."""
    ramp = F.relu6(input + 3) / 6
    return input.copy_(ramp) if inplace else ramp


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the Huber loss, of which torch has no forward-mode derivative."""
    losses = delta * F.smooth_l1_loss(input, target, reduction="none", beta=delta)
    return _reduce(losses if weight is None else losses * weight, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor:
    """Compute ``log(1 + exp(-target * input))``, of which torch has no forward-mode derivative."""
    return _reduce(-F.logsigmoid(target * input), **reduction)


def multi_margin_loss(
    input: Tensor, target: Tensor, *, p: int, margin: float, weight: Tensor | None, **reduction: Any
) -> Tensor:
    """Compute the mean of ``relu(margin - input[target] + input[other]) ** p``; torch has no second derivative."""
    target = target.unsqueeze(-1)
    hinges = F.relu(margin - input.gather(-1, target) + input) ** p
    if weight is not None:
        hinges = hinges * weight[target]
    return _reduce(hinges.scatter(-1, target, 0.0).sum(dim=-1) / input.shape[-1], **reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor:
    """Compute the mean of ``relu(1 - input[target] + input[other])``; torch has no second derivative."""
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
    """Compute minus the log probability of all alignments; torch has no second derivative.

    By the forward recursion of Graves et al., ICML 2006, doi:10.1145/1143844.1143891, over labels between blanks.
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
    """Make a recurrent layer run without cuDNN, which has no second derivative."""

    def definition(*args: Any) -> Any:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return function(*args)
        finally:
            torch.backends.cudnn.enabled = enabled

    return definition


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute attention from its definition, torch's MATH backend: the fused kernels have no second derivative.

    Here and not by ``torch.nn.attention.sdpa_kernel``, which sets the backend of all threads.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    result, _ = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )
    return result


multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "scaled_dot_product_attention": attention},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's function, which calls :func:`attention`: calls inside an overridden function are not overridden."""


def requires_grad_(input: Tensor, requires_grad: bool = True) -> Tensor:
    """Call ``input.requires_grad_``, except where torch.func refuses it: inside a transform, which does not need it."""
    functorch = torch._C._functorch
    refused = (
        functorch.maybe_current_level() is not None and not functorch.get_inplace_requires_grad_allowed()
    )
    return input if requires_grad and refused else input.requires_grad_(requires_grad)


OVERRIDES: Table = {
    Tensor.requires_grad_: requires_grad_,
    **dict.fromkeys(
        (
            F.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention.default,
        ),
        attention,
    ),
    F.multi_head_attention_forward: multi_head_attention,
    F.conv2d: conv2d,
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


def fixed_padding(moved: Sequence[Tensor], base: Sequence[Tensor]) -> FunctionOverrides:
    """Give embeddings with weights in ``moved`` the padding rows of the corresponding weights in ``base``."""
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
        return padded(rows, before[padding_idx], input, padding_idx % len(weight))

    return FunctionOverrides({F.embedding: held})
