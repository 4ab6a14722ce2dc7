"""Argument checks that all public functions share."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torch import Tensor


def check_count(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return ``value``; raise TypeError or ValueError unless it is an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {value}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def check_non_negative(name: str, value: float) -> float:
    """Return ``value``; raise TypeError or ValueError unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``; raise ValueError unless it is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value


def check_like(leaf: Tensor, reference: Tensor, *, name: str = "v") -> Tensor:
    """Return ``leaf`` detached; raise ValueError if its dtype or device is not that of ``reference``."""
    for what in ("dtype", "device"):
        found, expected = getattr(leaf, what), getattr(reference, what)
        if found != expected:
            raise ValueError(f"{name} has {what} {found}, expected {expected}: use {name}.to({expected!r})")
    return leaf.detach()
