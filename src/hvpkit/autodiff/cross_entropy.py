"""Cross entropy whose second derivative needs little memory, for logits over a large vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 2**20
"""Logits in one chunk of the second derivative: 8 MB in float64. Chosen by feel."""


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
    """Compute ``F.cross_entropy``; its double backward needs two copies of ``input`` instead of seven.

    This holds for class indices. Class weights, label smoothing and class probabilities go to torch's own function.
    """
    others = (weight, size_average, reduce, label_smoothing or None)
    if input.ndim < 2 or target.is_floating_point() or others != (None,) * 4:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    kept = target != ignore_index
    rows = input.movedim(1, -1).reshape(-1, input.shape[1])
    classes = torch.where(kept, target, 0).flatten().long()
    losses: Tensor = _RowLosses.apply(rows, classes, ignore_index)  # type: ignore[no-untyped-call]
    losses = torch.where(kept, losses.view_as(target), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


class _RowLosses(torch.autograd.Function):
    """Cross entropies ``[N]`` of logits ``[N, C]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor, None, None]:
        return _RowGradients.apply(*ctx.saved_tensors, cotangents), None, None  # type: ignore[no-untyped-call]


class _RowGradients(torch.autograd.Function):
    """Gradient ``[N, C]`` of :class:`_RowLosses`: ``softmax - onehot(target)``, times the cotangents ``[N]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, cotangents: Tensor) -> Tensor:
        residuals = logits.softmax(1)
        residuals.scatter_add_(1, target[:, None], residuals.new_full((len(target), 1), -1.0))
        return residuals.mul_(cotangents[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, Tensor]:
        logits, target, cotangents = ctx.saved_tensors
        hvp, means = torch.empty_like(u), []
        num_rows = max(1, CHUNK // logits.shape[1])
        for z, tangent, cotangent, out in zip(
            *(t.split(num_rows) for t in (logits, u, cotangents, hvp)), strict=True
        ):
            p = z.softmax(1)
            means.append(torch.linalg.vecdot(p, tangent))
            out.copy_((tangent - means[-1][:, None]).mul_(p).mul_(cotangent[:, None]))
        return hvp, None, torch.cat(means) - u.gather(1, target[:, None]).squeeze(1)
