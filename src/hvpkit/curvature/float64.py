"""Evaluation of a loss in float64, whatever dtypes it is written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from hvpkit.objective import Objective


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: float64 wherever its first argument, the parameters, enters; constants may have less."""
    if isinstance(function, Objective):
        forward, output_loss = in_float64(function.forward), in_float64(function.output_loss)
        return replace(function, forward=forward, output_loss=output_loss)

    def wide(*args: Any) -> Any:
        with _Float64():
            return function(*args)

    return wide


class _Float64(TorchFunctionMode):
    """Promotion to float64: a function of one float64 tensor gets all its tensors in float64; others are unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        if func == Tensor.dtype.__get__ and args[0].is_floating_point():  # type: ignore[attr-defined]
            return torch.float64  # modules compare it with that of their parameters
        wide = (torch.float64, torch.complex128)
        if any(isinstance(leaf, Tensor) and leaf.dtype in wide for leaf in _pytree.tree_leaves(given)):
            given = _pytree.tree_map(_widened, given)
            func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        return func(*given[0], **given[1])


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.to(torch.complex128 if value.is_complex() else torch.float64)
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
