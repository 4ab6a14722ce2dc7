"""The losses of single examples of a criterion that reduces them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def per_example(criterion: Callable[..., Tensor]) -> Callable[[Any, Any], Tensor]:
    """Return ``criterion`` in its per-example form, which returns losses ``[B]``."""
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
        raise ValueError(
            "criterion has parameters of its own, which would be constants; make them part of model, or say so "
            "by criterion.requires_grad_(False)"
        )
    unreduced, summed = _without_reduction(criterion)

    def losses(outputs: Any, targets: Any) -> Tensor:
        values = unreduced(outputs, targets)
        if isinstance(values, Tensor) and values.ndim == 0:
            raise ValueError(
                "criterion has no per-example form: it returned a 0-d tensor; pass one that returns one loss "
                'for each example, as functools.partial(F.cross_entropy, reduction="none")'
            )
        if summed is None or values.ndim < 2:
            return values
        flat = values.flatten(1)
        return flat.sum(1) if summed else flat.mean(1)

    return losses


def _without_reduction(
    criterion: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], bool | None]:
    """Return the criterion without reduction, and True for a sum, False for a mean, None for neither."""
    if isinstance(criterion, nn.Module) and isinstance(vars(criterion).get("reduction"), str):
        reduction: str = vars(criterion)["reduction"]
        _check_class_weights(reduction, getattr(criterion, "weight", None), criterion)
        unreduced = copy.copy(criterion)
        vars(unreduced)["reduction"] = "none"
        return unreduced, _is_sum(reduction)
    function = criterion.func if isinstance(criterion, functools.partial) else criterion
    if getattr(function, "__module__", None) == F.__name__ and _has_reduction(function):
        keywords = criterion.keywords if isinstance(criterion, functools.partial) else {}
        reduction = keywords.get("reduction", "mean")
        _check_class_weights(reduction, keywords.get("weight"), function)
        return functools.partial(criterion, reduction="none"), _is_sum(reduction)
    return criterion, None


def _is_sum(reduction: str) -> bool | None:
    return None if reduction == "none" else reduction in ("sum", "batchmean")


def _has_reduction(function: Callable[..., Any]) -> bool:
    return "reduction" in inspect.signature(function).parameters


def _check_class_weights(reduction: str, weight: object, criterion: object) -> None:
    weighted = (nn.CrossEntropyLoss, nn.NLLLoss)
    by_class = isinstance(criterion, weighted) or criterion in (F.cross_entropy, F.nll_loss)
    if reduction == "mean" and weight is not None and by_class:
        raise ValueError(
            "criterion has no per-example form: with class weights, torch's mean divides by the weights that "
            "happen to be in a batch; pass reduction='none' for the mean over examples of the weighted losses"
        )
