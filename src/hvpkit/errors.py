"""Errors of its own, and the few argument checks that every front door shares."""

from __future__ import annotations

import math
from numbers import Integral, Real


class NonFiniteError(ArithmeticError):
    """A product, a gradient or a loss gave NaN or infinity. The message names the first batch that did."""


class NotSymmetricError(ValueError):
    """An operator that was taken for a symmetric one is not. The message says by how much."""


class AsymmetryWarning(UserWarning):
    """A solver saw an asymmetry that rounding does not explain, though it is less than what ends a solve."""


class CompileWarning(UserWarning):
    """``compile=True`` was asked for, and torch cannot compile the product, or compiles another one."""


class UnstableDataError(RuntimeError):
    """The data gave another number of examples in a later pass than in the first one."""


def check_count(name: str, value: int, low: int, high: int | None = None) -> int:
    """Returns ``value`` if it is a whole number in ``[low, high]``; a ValueError naming it if not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {value}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """Returns ``value`` if it is a positive finite number; a ValueError naming it if not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``; a ValueError that lists them if not."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value
