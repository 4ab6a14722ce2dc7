"""Argument checks that all public functions share."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def check_count(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return ``value``; raise TypeError or ValueError unless it is an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r:.80} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {value}")
    return int(value)


def check_number(name: str, value: float) -> float:
    """Return ``value``; raise TypeError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r:.80} of type {type(value).__name__}")
    return float(value)


def check_finite(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a finite number."""
    if not math.isfinite(check_number(name, value)):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a positive finite number."""
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def check_non_negative(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a finite number of at least 0."""
    if not 0 <= check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return float(value)


def check_tolerance(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a relative error: positive and less than 1."""
    if not 0 < check_number(name, value) < 1:
        raise ValueError(f"{name} must be positive and less than 1, as 1e-2 for 1 %, got {value}")
    return float(value)


def check_probability(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is between 0 and 1."""
    if not 0 < check_number(name, value) < 1:
        raise ValueError(f"{name} must be between 0 and 1, as 0.99, got {value}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """Return ``value``; raise TypeError unless it is True or False, which a string such as "no" is not."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r:.80} of type {type(value).__name__}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``; raise ValueError unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r:.80}")
    return value


def check_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return ``value`` as a path; raise TypeError unless it is one."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{name} must be a path of a file or folder, got {value!r:.80} of type {type(value).__name__}"
        )
    return Path(value)


def check_type(name: str, value: object, kind: type[T], source: str = "") -> T:
    """Return ``value``; raise TypeError unless it is of this type; ``source`` says what gives one."""
    if not isinstance(value, kind):
        hint = f", as {source} gives one" if source else ""
        raise TypeError(f"{name} must be a {kind.__name__}{hint}; got {type(value).__name__}")
    return value


def check_function(name: str, value: Any, form: str, num_arguments: int | None = None) -> None:
    """Raise TypeError unless ``value`` can be called as ``form`` says, with this many arguments by position."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} is the class {value.__name__}, and must be a function {form}: pass an instance, {value.__name__}()"
        )
    if not callable(value):
        raise TypeError(f"{name} must be a function {form}, got {value!r:.80} of type {type(value).__name__}")
    if num_arguments is None:
        return
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError:
        raise TypeError(f"{name} must take the arguments of {form}, got a function of {signature}") from None


def check_monitor(monitor: Callable[..., object] | None, form: str = "monitor(progress)") -> None:
    """Raise TypeError unless ``monitor`` is None or can be called as ``form`` says."""
    if monitor is not None:
        check_function("monitor", monitor, f"{form}, or None", form.count(",") + 1)


def check_device(name: str, value: torch.device | str) -> torch.device:
    """Return the device; raise TypeError or ValueError if there is none of that name here."""
    if not isinstance(value, torch.device | str):
        raise TypeError(
            f"{name} must be a torch.device or its name, got {value!r} of type {type(value).__name__}"
        )
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} must be a device that torch can use here, as 'cpu'; got {value!r} ({reason})"
        ) from None
    return device


def check_dense(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``; raise TypeError unless it holds its values in strided memory."""
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, of which each process holds a part; take .full_tensor() on all of them together "
            "first, and for an operator pass the data with mesh=, or all parameters as they are with shard_params=True"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; pad it (torch.nested.to_padded_tensor), or pass a list of batches, read "
            "whole, with hvpkit.as_data(data, num_examples=...)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is a sparse tensor ({tensor.layout}); pass {name}.to_dense()")
    if tensor.is_meta:
        raise TypeError(
            f"{name} is a meta tensor, which has no values; load them first (to_empty, load_state_dict)"
        )
    return tensor


def check_like(leaf: Tensor, reference: Any, *, name: str = "v") -> Tensor:
    """Return ``leaf`` detached; raise TypeError or ValueError unless it is dense and of the same dtype and device.

    ``reference`` is a tensor, or an operator.
    """
    if leaf.is_nested or leaf.layout != torch.strided or type(leaf).__name__ == "DTensor":
        check_dense(name, leaf)
    for what in ("dtype", "device"):
        found, expected = getattr(leaf, what), getattr(reference, what)
        if found != expected:
            raise ValueError(f"{name} has {what} {found}, expected {expected}: use {name}.to({expected!r})")
    return leaf.detach()
