"""Options with a fixed set of values, in the library's words."""

from __future__ import annotations

from enum import StrEnum


class Curvature(StrEnum):
    """A curvature matrix."""

    HESSIAN = "hessian"
    GGN = "ggn"
    FISHER = "fisher"


class BatchNorm(StrEnum):
    """The statistics that BatchNorm uses."""

    EVAL = "eval"
    BATCH = "batch"


class Mode(StrEnum):
    """The mode of automatic differentiation of a matvec."""

    AUTO = "auto"
    FORWARD_OVER_REVERSE = "forward-over-reverse"
    REVERSE_OVER_REVERSE = "reverse-over-reverse"
    FINITE_DIFFERENCE = "finite-difference"


class Arithmetic(StrEnum):
    """The arithmetic of a matvec."""

    NATIVE = "native"
    BF16 = "bf16"
    TF32 = "tf32"


class Dtype(StrEnum):
    """The dtype of parameters and data."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class Which(StrEnum):
    """The part of a spectrum."""

    LARGEST = "LA"
    SMALLEST = "SA"
    BOTH = "BE"
    CLOSEST = "CLOSEST"


class ExtremesMethod(StrEnum):
    """A solver for both ends."""

    AUTO = "auto"
    LANCZOS = "lanczos"
    MULTIFIDELITY = "multifidelity"


class SolveMethod(StrEnum):
    """A solver for linear systems."""

    AUTO = "auto"
    CG = "cg"
    MINRES = "minres"


class Preconditioner(StrEnum):
    """A preconditioner of linear systems."""

    SAMPLE = "sample"


class DensityMethod(StrEnum):
    """An estimator of the density."""

    LANCZOS = "lanczos"
    CHEBYSHEV = "chebyshev"


class TraceMethod(StrEnum):
    """An estimator of the trace."""

    HUTCHINSON = "hutchinson"
    HUTCHPP = "hutch++"
    XTRACE = "xtrace"


class AscentOptimizer(StrEnum):
    """An optimiser for the ascent of sharpness."""

    ADAM = "adam"
    SGD = "sgd"


class TrainingMethod(StrEnum):
    """A training method."""

    SGD = "sgd"
    KNEE = "knee"
    ADAHESSIAN = "adahessian"
    ABSA = "absa"
