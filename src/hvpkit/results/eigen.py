"""Results of eigensolvers: eigenpairs with residuals and intervals, status and history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns


class Status(StrEnum):
    """The reason why a solver or an estimator stopped. ``advice`` says what to do about it.

    ``NEGATIVE_CURVATURE`` and ``SINGULAR`` are of linear systems. ``COMPLETED`` is for estimates without ``tol``: all
    samples that were asked for are taken. It is a success, but
    ``converged`` is False, as no accuracy was asked for: see the standard error.
    """

    CONVERGED = "converged"
    INVARIANT_SUBSPACE = "invariant-subspace"
    ZERO_WITHIN_ATOL = "zero-within-atol"
    ZERO_TO_ROUNDING = "zero-to-rounding"
    COMPLETED = "completed"
    ROUNDING_LIMITED = "rounding-limited"
    MAX_MATVECS = "max-matvecs"
    TIME_LIMIT = "time-limit"
    NEGATIVE_CURVATURE = "negative-curvature"
    SINGULAR = "singular"
    NON_FINITE = "non-finite"

    @property
    def converged(self) -> bool:
        """True if the values have the accuracy asked for, or are zero to rounding."""
        return self in (
            Status.CONVERGED,
            Status.INVARIANT_SUBSPACE,
            Status.ZERO_WITHIN_ATOL,
            Status.ZERO_TO_ROUNDING,
        )

    @property
    def advice(self) -> str:
        """The meaning of the status and the remedy."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "every error bound is at most tol * |value|",
    Status.INVARIANT_SUBSPACE: "the Krylov space is invariant: the values are exact to rounding",
    Status.ZERO_WITHIN_ATOL: (
        "a value cannot be told from zero: it and its error bound are at most atol * norm; the other bounds are at "
        "most tol * |value|; see the intervals, or lower atol for more digits"
    ),
    Status.ZERO_TO_ROUNDING: (
        "a value is zero to the rounding of the matvecs and has no relative digits; the other bounds are at "
        "most tol * |value|"
    ),
    Status.COMPLETED: (
        "all samples that were asked for are taken; the standard error says how well the value is known; raise "
        "num_matvecs for more accuracy, or set tol"
    ),
    Status.ROUNDING_LIMITED: (
        "the rounding of the matvecs does not allow tol for every value; see the intervals, use float64, or "
        "raise tol or atol"
    ),
    Status.MAX_MATVECS: (
        "the matvec budget is used up; the values bound the ends from inside, the intervals say how well; "
        "raise max_matvecs or tol"
    ),
    Status.TIME_LIMIT: (
        "the time limit is reached; the values bound the ends from inside, the intervals say how well; raise "
        "time_limit or tol"
    ),
    Status.NEGATIVE_CURVATURE: (
        "conjugate gradients met a direction of negative curvature, given as negative_curvature: the matrix is not "
        'positive definite; take method="minres", or more damping'
    ),
    Status.SINGULAR: (
        "the matrix is singular, or nearly so for this dtype, and the right-hand side is not in its range: no x has a "
        "clearly smaller residual; add damping, or use float64"
    ),
    Status.NON_FINITE: "a matvec gave NaN or infinity; the values are from the matvecs before it",
}


@dataclass(frozen=True)
class Interval:
    """An interval that contains an eigenvalue.

    Attributes:
        lower, upper: its ends.
        kind: what the outer end rests on; the inner one is the value itself, with rounding, as a Ritz value
            never lies outside the spectrum. ``"random-start"``: by the polynomial that Lanczos applied to a
            random start, no eigenvalue lies further out; ``"random-block"``: the same by the number of steps alone;
            ``"residual"``: an eigenvalue lies inside, which may not be the one that was asked for;
            ``"exact"``: the Krylov space was invariant; ``"none"``: nothing is known.
        confidence: the probability, over random starts, with which the extreme eigenvalue lies inside; None
            where no such claim is made.
    """

    lower: float
    upper: float
    kind: str
    confidence: float | None = None

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper


@dataclass(frozen=True, repr=False)
class Eigenpair:
    """An eigenvalue and its vector.

    Attributes:
        value: the Ritz value.
        vector: of unit norm, ``[n]``; of an operator over data of a mesh a DTensor, ``Shard(0)`` on it.
        residual_norm: norm of ``H v - value v``.
        error_bound: the convergence test compares it with ``tol * |value|``, or ``atol * norm`` for a value of at most
            that: the residual norm, or its square over the gap to the next eigenvalue where that is smaller and no
            eigenvalue is likely to hide in the gap.
        interval: contains the eigenvalue.
    """

    value: float
    vector: Tensor = field(metadata=LONG)
    residual_norm: float
    error_bound: float
    interval: Interval

    def __repr__(self) -> str:
        return f"{self.value:.6g} in [{self.interval.lower:.6g}, {self.interval.upper:.6g}]"


@dataclass(frozen=True)
class Progress:
    """Progress of an eigensolver: what ``monitor`` is called with and ``history`` keeps.

    Attributes:
        num_matvecs: full-data matvecs so far.
        seconds: since the start.
        smallest, largest: both ends so far, as Ritz values; NaN before there are any. Of eigenvalues closest to a
            point, the lowest and the highest of them.
        smallest_bound, largest_bound: their error bounds: residual norms, from the recurrence, or better.
        level: of several operators, the index of the one that is worked on: see :func:`hvpkit.multifidelity`.
        seconds_left: an estimate, at most up to the limits; infinite if it is not known.
    """

    num_matvecs: float = 0.0
    seconds: float = 0.0
    smallest: float = math.nan
    largest: float = math.nan
    smallest_bound: float = math.inf
    largest_bound: float = math.inf
    level: int = 0
    seconds_left: float = math.inf

    def __str__(self) -> str:
        return (
            f"smallest {self.smallest:.4g} ± {self.smallest_bound:.1g}, "
            f"largest {self.largest:.4g} ± {self.largest_bound:.1g}"
        )


@dataclass(frozen=True, repr=False)
class EigenResult(Result):
    """Some eigenpairs of an operator.

    Attributes:
        values: ascending ``[k]``, float64, on the CPU.
        vectors: orthonormal columns ``[n, k]``; of an operator over data of a mesh a DTensor, ``Shard(0)`` on it.
        residual_norms: ``[k]``, of true residuals: from matvecs, or verified by one.
        error_bounds: ``[k]``, of the convergence test: see :class:`Eigenpair`.
        intervals: one for each value.
        num_matvecs: full-data matvecs spent.
        seconds: wall time.
        status: why the solver stopped.
        message: the status in words, with the remedy.
        history: one entry for each assessment.
    """

    values: Tensor
    vectors: Tensor = field(metadata=LONG)
    residual_norms: Tensor
    error_bounds: Tensor
    intervals: tuple[Interval, ...]
    num_matvecs: float
    seconds: float
    status: Status
    message: str
    history: tuple[Progress, ...]

    @property
    def converged(self) -> bool:
        """True if the values have the accuracy asked for."""
        return self.status.converged

    def pair(self, index: int) -> Eigenpair:
        """Return the pair at ``index`` of the ascending values."""
        return Eigenpair(
            float(self.values[index]),
            self.vectors[:, index]
            if len(self.vectors)
            else self.vectors,  # none, of a result without vectors
            float(self.residual_norms[index]),
            float(self.error_bounds[index]),
            self.intervals[index],
        )

    def summary(self) -> str:
        """Return a small table of the values, the largest first, and a line with status, passes and seconds."""
        pairs = [self.pair(index) for index in reversed(range(len(self.values)))]
        lines = [f"{HEADER}  rests on", *(f"{_row(pair)}  {pair.interval.kind}" for pair in pairs)]
        lines.append(f"{self.status}: {self.num_matvecs:g} passes, {self.seconds:.3g} s; {self.message}")
        if any(pair.interval.kind == "residual" for pair in pairs):
            lines.append(
                "by a residual an eigenvalue lies inside; that no other one is missed is not claimed"
            )
        return "\n".join(lines)

    def _columns(self) -> Columns:
        return _columns([self.pair(index) for index in range(len(self.values))])

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.6g}" for value in self.values.tolist())
        return f"<{type(self).__name__}: [{values}], {self.status}, {self.num_matvecs:g} matvecs>"


@dataclass(frozen=True, repr=False)
class ExtremeResult(Result):
    """Both ends of an operator's spectrum.

    Attributes:
        smallest, largest: the pairs.
        num_matvecs: full-data matvecs spent: passes over the data.
        seconds: wall time.
        status, message: why the solver stopped, and the remedy.
        history: both ends against passes, one entry for each assessment.
        tol: the relative error asked for.
        operator: the operator, in words.
    """

    smallest: Eigenpair
    largest: Eigenpair
    num_matvecs: float
    seconds: float
    status: Status
    message: str
    history: tuple[Progress, ...]
    tol: float
    operator: str

    @property
    def converged(self) -> bool:
        """True if both values have the accuracy asked for."""
        return self.status.converged

    @property
    def vectors(self) -> Tensor:
        """Both vectors as columns ``[n, 2]``, smallest first; a DTensor where they are."""
        return torch.stack([self.smallest.vector, self.largest.vector], dim=1)

    def _columns(self) -> Columns:
        return {"end": ["smallest", "largest"], **_columns([self.smallest, self.largest])}

    def summary(self) -> str:
        """Return a small table of both ends, a line with status, passes and seconds, and one on the confidence."""
        header = f"{'end':<9}{HEADER}"
        ends = (("smallest", self.smallest), ("largest", self.largest))
        rows = [f"{name:<9}{_row(pair)}" for name, pair in ends]
        close = f"{self.status}: {self.num_matvecs:g} passes, {self.seconds:.3g} s; {self.message}"
        return "\n".join([header, *rows, close, *self._claim()])

    def _claim(self) -> list[str]:
        """Return what is known of both ends with a probability, in words; nothing where none is claimed."""
        ends = self.smallest.interval, self.largest.interval
        confidence = ends[0].confidence
        if confidence is None or any(end.kind != "random-start" for end in ends):
            return []
        claim = f"with probability {confidence:g} over random starts, an end is in its interval"
        if self.status in (Status.CONVERGED, Status.ZERO_WITHIN_ATOL):
            claim += " and off by at most 2 tol * |value|"
        if self.status is Status.ZERO_WITHIN_ATOL:
            claim += ", or 2 atol * norm if it cannot be told from zero"
        return [claim]

    def __repr__(self) -> str:
        return (
            f"<ExtremeResult: smallest {self.smallest!r}, largest {self.largest!r}, {self.status}, "
            f"{self.num_matvecs:g} matvecs>"
        )


HEADER = f"{'value':>13}  {'interval':<29}{'residual norm':>14}"


def _row(pair: Eigenpair) -> str:
    """Return the columns of ``HEADER`` for a pair."""
    interval = f"[{pair.interval.lower:.6g}, {pair.interval.upper:.6g}]"
    return f"{pair.value:>13.6g}  {interval:<29}{pair.residual_norm:>14.3g}"


def _columns(pairs: Sequence[Eigenpair]) -> Columns:
    """Return a table with a row for each pair."""
    return {
        "value": [pair.value for pair in pairs],
        **{
            name: [getattr(pair.interval, name) for pair in pairs]
            for name in ("lower", "upper", "kind", "confidence")
        },
        "residual_norm": [pair.residual_norm for pair in pairs],
        "error_bound": [pair.error_bound for pair in pairs],
    }
