"""Errors and warnings of hvpkit."""

from __future__ import annotations


class NonFiniteError(ArithmeticError):
    """A matvec, a gradient or a loss is NaN or infinite. The message names the first such batch."""


class NotConvergedError(ArithmeticError):
    """A linear solve inside of an operator did not reach its tolerance. The message states the status and a remedy."""


class NotSymmetricError(ValueError):
    """An operator that must be symmetric is not. The message states the relative asymmetry."""


class AsymmetryWarning(UserWarning):
    """An operator is less symmetric than rounding explains, but symmetric enough for the solve to continue."""


class CompileWarning(UserWarning):
    """``compile=True`` is ignored: torch cannot compile the matvec, or its compiled matvec is wrong."""


class DerivativeWarning(UserWarning):
    """A second derivative of the loss is wrong or could not be checked. The message says which mode is used."""


class RemoteError(RuntimeError):
    """Another rank of a mesh failed, was interrupted, asks another question, or does not answer. The message says."""


class SharedGeneratorWarning(UserWarning):
    """Data draws from global random generators that are seeded while other threads may draw from them."""


class UnstableDataError(RuntimeError):
    """Data gave other examples, or another number of them, in a later pass than in the first one."""


class CapturedParameterWarning(UserWarning):
    """A loss depends on parameters that are not in ``params``; they are taken for constants."""


class UnsavedWarning(UserWarning):
    """A checkpoint or a tracker's file could not be written, and work goes on; or measurements in it are replaced."""
