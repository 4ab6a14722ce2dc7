"""Errors and warnings of hvpkit."""

from __future__ import annotations


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


class CapturedParameterWarning(UserWarning):
    """A loss depends on parameters that are not in ``params``, which are taken for constants."""
