"""Criteria as functions of single examples: losses ``[B]`` of a loss that reduces them."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGET_NAMES = ("target", "targets", "label", "labels", "y", "y_true")
"""Names of the argument of a criterion that takes the targets, where it takes several outputs."""


@dataclass(frozen=True)
class Criterion:
    """A criterion without its reduction.

    Attributes:
        original: as it was given.
        unreduced: the same, without reduction where it has one.
        reduction: ``"mean"``, ``"sum"`` or ``"batchmean"``, undone in ``unreduced``; None: there was none to undo.
        is_torch: it is one of torch's own, or of :mod:`hvpkit.hf`, which take tensors and whose reductions are known.
    """

    original: Callable[..., Tensor]
    unreduced: Callable[..., Tensor]
    reduction: str | None
    is_torch: bool

    def losses(self, outputs: Any, targets: Sequence[Any]) -> Tensor:
        """Return losses ``[B]``, or their mean (0-d) where single ones are not to be had."""
        arguments = _arguments(self.original, outputs, targets)
        values = self.unreduced(*arguments)
        if self.is_torch and self.reduction is not None:
            _check_not_broadcast(arguments, values)
        if self.is_torch and self.reduction == "mean" and _function(self.original) in _CTC:
            values = values / torch.as_tensor(arguments[3], device=values.device).clamp(min=1)
        if self.reduction is None or not isinstance(values, Tensor) or values.ndim < 2:
            return values
        flat: Tensor = values.flatten(1)
        summed = self.is_weighted or self.reduction != "mean"
        return flat.sum(1) if summed else flat.mean(1)

    @property
    def is_weighted(self) -> bool:
        """True if its mean is weighted by targets: its losses are weighted sums."""
        if hasattr(self.original, "example_weight"):
            return True
        return self.reduction == "mean" and _function(self.original) in _MEANS_BY_WEIGHT

    @property
    def keeps_targets(self) -> bool:
        """True if the model gets the targets of a batch that is a dict too, to make its own inputs of them."""
        return getattr(self.original, "keeps_targets", False)

    def weights(self, targets: Sequence[Any]) -> Tensor:
        """Return the sum of the weights of each example's targets, ``[B]``, as torch's weighted means have them."""
        target = targets[0] if isinstance(targets[0], Tensor) else torch.as_tensor(targets[0])
        if hasattr(self.original, "example_weight"):
            weights: Tensor = self.original.example_weight(target)
            return weights
        if target.is_floating_point():  # probabilities: each prediction weighs the same
            predictions = target[:, 0] if target.ndim > 1 else target
            return torch.ones_like(predictions, dtype=torch.float64).reshape(len(target), -1).sum(1)
        kept: Tensor = (target != _given(self.original, "ignore_index")).double()
        by_class = _given(self.original, "weight")
        if by_class is not None:
            kept = kept * by_class.to(target.device).double()[torch.where(kept > 0, target, 0)]
        return kept.reshape(len(target), -1).sum(1)

    @property
    def is_custom(self) -> bool:
        """True if its reduction must be compared with its single losses, as it is not one of torch's own."""
        return self.reduction is not None and not self.is_torch

    @property
    def takes_classes(self) -> bool:
        """True if its targets are classes, so that they cannot be the inputs."""
        return _function(self.original) in _OF_CLASSES

    def takes_more_than(self, targets: Sequence[Any]) -> bool:
        """Return True if it needs more arguments than one for the outputs and the targets."""
        return _arity(self.original)[0] > 1 + len(targets)

    def reduced(self, outputs: Any, targets: Sequence[Any]) -> Tensor:
        """Return the loss as the criterion itself reduces it."""
        return self.original(*_arguments(self.original, outputs, targets))


def _check_not_broadcast(arguments: Sequence[Any], values: Tensor) -> None:
    """Raise ValueError if single losses are of all pairs of outputs and targets, as of shapes [B, 1] and [B]."""
    if len(arguments) < 2 or not all(isinstance(argument, Tensor) for argument in arguments[:2]):
        return
    outputs, target = arguments[0].shape, arguments[1].shape
    if len(outputs) != len(target) and values.ndim == max(len(outputs), len(target)):
        raise ValueError(
            f"criterion would pair each output with all targets: the outputs have shape {list(outputs)} and the "
            f"targets {list(target)}, which broadcast to {list(values.shape)}; give both the same shape, as by "
            "targets.unsqueeze(1) or outputs.squeeze(1)"
        )


_CTC = (nn.CTCLoss, F.ctc_loss)
_MEANS_BY_WEIGHT = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_OF_CLASSES = (*_MEANS_BY_WEIGHT, nn.MultiMarginLoss, F.multi_margin_loss, *_CTC)


def as_criterion(criterion: Callable[..., Tensor]) -> Criterion:
    """Return ``criterion`` with its reduction undone.

    Raises:
        TypeError: it cannot be called, or is a class.
        ValueError: it has parameters of its own that require gradients.
    """
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(f"criterion must be an instance, got the class {name}: pass {name}()")
    if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
        raise ValueError(
            "criterion has parameters of its own, which would be constants; make them part of model, or say so "
            "by criterion.requires_grad_(False)"
        )
    function = _function(criterion)
    is_torch = getattr(function, "__module__", "").startswith(("torch.nn.", "hvpkit.hf"))
    if isinstance(criterion, nn.Module):
        if isinstance(reduction := vars(criterion).get("reduction"), str):
            unreduced: Any = copy.copy(criterion)
            vars(unreduced)["reduction"] = "none"
            return Criterion(criterion, unreduced, _undone(reduction), is_torch)
    elif "reduction" in _parameters(function):
        reduction = _given(criterion, "reduction")
        unreduced = functools.partial(criterion, reduction="none")
        return Criterion(criterion, unreduced, _undone(reduction), is_torch)
    return Criterion(criterion, criterion, None, is_torch)


def _function(criterion: Any) -> Any:
    """Return the function or the class of a criterion: what it is, whatever it was given."""
    if isinstance(criterion, functools.partial):
        return _function(criterion.func)
    if not isinstance(criterion, nn.Module):
        return criterion
    kinds = type(criterion).__mro__  # a subclass that computes the same is the same
    return next((kind for kind in kinds if "forward" in vars(kind)), type(criterion))


def _undone(reduction: object) -> str | None:
    if reduction == "none":
        return None
    return reduction if isinstance(reduction, str) and reduction in ("sum", "batchmean") else "mean"


def _given(criterion: Any, name: str) -> Any:
    """Return the value of an option of a criterion: its attribute, what a partial gives, or the default."""
    if isinstance(criterion, nn.Module):
        return getattr(criterion, name, None)
    if isinstance(criterion, functools.partial) and name in criterion.keywords:
        return criterion.keywords[name]
    default = _parameters(_function(criterion))[name].default
    return None if default is inspect.Parameter.empty else default


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a callable by name; none where Python cannot tell."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


# Arguments.


def _arguments(criterion: Callable[..., Tensor], outputs: Any, targets: Sequence[Any]) -> list[Any]:
    """Return what to call a criterion with: ``(outputs, *targets)``, a tuple taken apart where it takes more."""
    least, most = _arity(criterion)
    if most == 1 and len(targets) == 1:
        return [outputs]
    if least > 1 + len(targets):
        if _fits(outputs, least - len(targets), most - len(targets)):
            place = _target_place(criterion, len(outputs)) if len(targets) == 1 else len(outputs)
            return [*outputs[:place], *targets, *outputs[place:]]
        if len(targets) == 1 and _fits(targets[0], least - 1, most - 1):
            return [outputs, *targets[0]]
    return [outputs, *targets]


def _target_place(criterion: Callable[..., Tensor], default: int) -> int:
    """Return the position of the argument that is named as targets are, as in ``(mean, target, variance)``."""
    names = list(_parameters(_called(criterion)))
    return next((place for place, name in enumerate(names) if name in TARGET_NAMES), default)


def _called(criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return criterion.forward if isinstance(criterion, nn.Module) else criterion


def _fits(value: object, least: int, most: float) -> bool:
    return isinstance(value, tuple | list) and least <= len(value) <= most


def _arity(criterion: Callable[..., Tensor]) -> tuple[int, float]:
    """Return how many positional arguments a criterion needs, and how many it takes; 2 where Python cannot tell."""
    parameters = list(_parameters(_called(criterion)).values())
    if not parameters:
        return 2, 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    endless = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return len(required), math.inf if endless else len(positional)
