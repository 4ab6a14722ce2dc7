"""Cross entropy whose second derivative needs little memory, for outputs as wide as a vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 2**20
"""How many logits are worked on at once."""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``, differentiated twice backward in two copies of ``input`` and not in seven.

    That is for class indices; weights of classes, smoothed labels and probabilities are left to torch.
    """
    others = (weight, size_average, reduce, label_smoothing or None)
    if input.ndim < 2 or target.is_floating_point() or others != (None,) * 4:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    kept = target != ignore_index
    rows = input.movedim(1, -1).reshape(-1, input.shape[1])
    classes = torch.where(kept, target, 0).flatten().long()
    losses: Tensor = _Rows.apply(rows, classes, ignore_index)  # type: ignore[no-untyped-call]
    losses = torch.where(kept, losses.view_as(target), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


class _Rows(torch.autograd.Function):
    """Cross entropies ``[N]`` of logits ``[N, C]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None]:
        return _Slopes.apply(*ctx.saved_tensors, slopes), None, None  # type: ignore[no-untyped-call]


class _Slopes(torch.autograd.Function):
    """Their gradient ``[N, C]``: probabilities, less one at the target, times ``slopes`` ``[N]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, slopes: Tensor) -> Tensor:
        residuals = logits.softmax(1)
        residuals.scatter_add_(1, target[:, None], residuals.new_full((len(target), 1), -1.0))
        return residuals.mul_(slopes[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, Tensor]:
        logits, target, slopes = ctx.saved_tensors
        product, means = torch.empty_like(u), []
        some_rows = max(1, CHUNK // logits.shape[1])
        for z, tangent, slope, into in zip(
            *(t.split(some_rows) for t in (logits, u, slopes, product)), strict=True
        ):
            p = z.softmax(1)
            means.append(torch.linalg.vecdot(p, tangent))
            into.copy_((tangent - means[-1][:, None]).mul_(p).mul_(slope[:, None]))
        return product, None, torch.cat(means) - u.gather(1, target[:, None]).squeeze(1)
