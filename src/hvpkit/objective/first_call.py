"""Checks in the first call of an objective: does it give the losses that the caller's own module and criterion give?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from hvpkit.objective.module_copy import attributes_restored

RELATIVE_CHANGE = 0.01
"""Change of each parameter in a check, relative to 1 plus its size; chosen by feel: far beyond rounding, and small."""

STORED = (
    "criterion refers to model, and gives other losses than after a forward pass of model with the same parameters: "
    "it reads values that a forward pass stores (activations, a penalty, a cached norm), which would be those of an "
    "earlier pass. Let model return what criterion needs, as (outputs, penalty), and take them apart in criterion"
)


def changed_parameters(params: Mapping[str, Tensor], like: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Return other values of all parameters, the same ones in each call, of the dtype and device of ``like``."""

    def changed(p: Tensor) -> Tensor:
        direction = (
            torch.sin(torch.arange(p.numel(), device="cpu") + 1.0).view(p.shape).to(p)
        )  # no random number is drawn
        moved = p + scale * RELATIVE_CHANGE * (1 + p.abs()) * direction
        return moved.to(like.device, like.dtype)

    return {name: changed(p.detach()) for name, p in params.items()}


def check_stored_state(copied: Callable[[], Tensor], original: Callable[[float], Tensor]) -> None:
    """Raise ValueError unless the losses by the copy of a module are those by the original.

    Args:
        copied: the losses at changed parameters, by the copy.
        original: the losses by the original, at parameters changed by so many times as much.
    """
    try:
        found = copied()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        original(1.0)  # raises too where the criterion itself is at fault
        raise ValueError(STORED) from error
    else:
        if not _agree(found, original(1.0)):
            raise ValueError(STORED)
    finally:
        original(0.0)  # what is stored now is of other parameters, also for a second check


def check_reduction(reduced: Tensor, losses: Tensor, reduction: str) -> None:
    """Raise ValueError unless ``reduced`` is what ``reduction`` makes of ``losses`` ``[B]``; a 0-d loss passes."""
    if losses.ndim == 0:
        return
    expected = losses.sum() if reduction == "sum" else losses.mean()
    if not _agree(reduced, expected):
        raise ValueError(
            f"criterion with reduction={reduction!r} gives {float(reduced):.6g} on the first batch, and the "
            f"{'sum' if reduction == 'sum' else 'mean'} over examples of its losses with reduction='none' is "
            f"{float(expected):.6g}. For its own mean over each batch pass a function without reduction, as "
            "lambda outputs, targets: criterion(outputs, targets); for a weighted mean over all data write "
            "hvpkit.Objective(forward, output_loss, example_weight)"
        )


def _agree(found: Tensor, expected: Tensor) -> bool:
    rtol = torch.finfo(expected.dtype).eps ** 0.5
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=rtol, atol=rtol, equal_nan=True
    )


def run_original(
    model: nn.Module, training: Mapping[str, bool], tensors: dict[str, Tensor], call: Callable[[], Tensor]
) -> Tensor:
    """Return ``call()`` while ``model`` has other tensors and modes; these and its attributes are put back."""
    with attributes_restored(model):
        for name, module in model.named_modules():
            module.training = training.get(name, False)
        with _reparametrize_module(model, tensors, tie_weights=True):
            return call()
