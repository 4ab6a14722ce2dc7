"""Estimates: values with standard errors over random samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from torch import Tensor

from hvpkit.results.eigen import Progress, Status

V = TypeVar("V", float, Tensor)


@dataclass(frozen=True)
class EstimateProgress:
    """Progress of an estimator: the argument of ``monitor``, and an entry of ``history``.

    Attributes:
        num_matvecs: full-data matvecs so far.
        seconds: since the start.
        value: the estimate so far; of a diagonal, its Euclidean norm.
        stderr: standard error of the value; of a diagonal, the Euclidean norm of those of its entries.
    """

    num_matvecs: float
    seconds: float
    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.1g}"


@dataclass(frozen=True, repr=False)
class Estimate(Generic[V]):
    """A value with its standard error.

    Attributes:
        value: a float, or a tensor.
        stderr: standard error of the value, or of each entry: the spread over seeds. Zero where the value is exact
            to rounding, infinite where fewer than two samples leave it unknown.
        samples: the samples whose mean is the value, one for each probe, ``[num_samples, ...]``, float64 on the CPU;
            not kept for a diagonal: ``[0, n]``.
        num_samples: probes that the value rests on.
        num_matvecs: full-data matvecs spent.
        seconds: wall time.
        status: why it stopped.
        message: the status in words, with the remedy.
        history: one entry for each assessment; of a function of a density, those of the density.
    """

    value: V
    stderr: V
    samples: Tensor
    num_samples: int
    num_matvecs: float
    seconds: float
    status: Status
    message: str
    history: tuple[EstimateProgress, ...] | tuple[Progress, ...]

    @property
    def converged(self) -> bool:
        """True if the standard error is within ``tol``, or the value exact; never without ``tol``."""
        return self.status.converged

    def __repr__(self) -> str:
        def show(value: V) -> str:
            return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value:.6g}"

        return (
            f"<Estimate: {show(self.value)} ± {show(self.stderr)}, {self.status}, {self.num_samples} samples, "
            f"{self.num_matvecs:g} products>"
        )


def as_floats(found: Estimate[Tensor]) -> Estimate[float]:
    """Convert an estimate of one number to floats."""
    rest = {field.name: getattr(found, field.name) for field in fields(found)[2:]}
    return Estimate(float(found.value), float(found.stderr), **rest)


@dataclass(frozen=True)
class Mean:
    """A mean of samples ``[k, ...]`` with its standard error."""

    value: Tensor
    stderr: Tensor
    samples: Tensor


def mean_of(samples: Tensor, share: float = 0.0) -> Mean:
    """Return the mean over the first dimension of ``samples`` ``[k, ...]``.

    ``share`` is the fraction of the population drawn, without replacement: the finite-population correction.
    """
    k = len(samples)
    value = samples.mean(dim=0) if k else samples.new_full(samples.shape[1:], math.nan)
    if share >= 1:
        return Mean(value, value.new_zeros(value.shape), samples)
    if k < 2:
        return Mean(value, value.new_full(value.shape, math.inf), samples)
    return Mean(value, samples.std(dim=0) * ((1 - share) / k) ** 0.5, samples)
