"""Convergence tests, and the result of a solve: Rayleigh quotients, true residuals, intervals, status."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.deadline import DeadlineReached
from hvpkit._utils.ranks import check_deadline_of
from hvpkit.errors import AsymmetryWarning, NotSymmetricError
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Interval, Progress, Status
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, num_at_low_end
from hvpkit.solvers.common.request import Request

ROUNDING = 8.0
"""In units of eps * norm: the rounding of matvecs in an error bound. Chosen by feel."""

ATTAINABLE = 32.0
"""In units of eps * norm: the attainable accuracy, an error bound that further matvecs do not make smaller. Chosen by
feel."""

ASYMMETRY = 10.0
"""In units of an operator's precision: an asymmetry that its matvecs may have. Chosen by feel."""

MIN_STEPS = 12
"""Steps before which a convergence test is not accepted: a start may happen to be near other eigenvectors, and its
residual small. Chosen by feel."""


UNVERIFIED = (
    "{}; residuals are those of the solver's own vectors, as no time was left to verify them by matvecs"
)
"""The message of a result whose final check was cut by the time limit."""


@dataclass(frozen=True)
class Outer:
    """Distances beyond the values found that the spectrum may reach, by :mod:`hvpkit.solvers.common.bounds`.

    Attributes:
        low, high: distances at either end; infinite where nothing is known.
        kind: what they rest on.
        confidence: of each.
    """

    low: float
    high: float
    kind: str
    confidence: float


def rounding(op: LinearOperator, norm: float) -> float:
    """Return what the rounding of matvecs adds to an error bound, for an operator of this norm."""
    return ROUNDING * torch.finfo(op.dtype).eps * norm


def attainable_accuracy(op: LinearOperator, norm: float) -> float:
    """Return the attainable accuracy, 32 eps ||A||, for an operator of this norm."""
    return ATTAINABLE * torch.finfo(op.dtype).eps * norm


def check_symmetric(op: LinearOperator, asymmetry: float, norm: float) -> None:
    """Raise NotSymmetricError if ``|v'(Aw) - w'(Av)|``, for unit v and w, is above the rounding of this norm."""
    allowed = max(torch.finfo(op.dtype).eps ** 0.5, ASYMMETRY * op.precision)
    if asymmetry > allowed * norm:
        raise NotSymmetricError(
            f"{op!r} is not symmetric: v'(Aw) and w'(Av) differ by {asymmetry / norm:.1e} of its norm, where its "
            f"precision allows {allowed:.1e}; hvpkit.check looks for the cause. For a Hessian try another mode, for a "
            "matrix take (A + A.T) / 2"
        )


def warn_asymmetric(op: LinearOperator, asymmetry: float, norm: float) -> None:
    """Warn if an asymmetry that :func:`check_symmetric` accepts is above the rounding of this norm."""
    if asymmetry > max(torch.finfo(op.dtype).eps ** (2 / 3), ASYMMETRY * op.precision) * norm:
        warnings.warn(
            f"{op!r} is slightly asymmetric: v'(Aw) and w'(Av) differ by {asymmetry / norm:.1e} of its norm, more "
            "than by rounding; its eigenvalues may be off by as much. hvpkit.check looks for the cause",
            AsymmetryWarning,
            stacklevel=4,
        )


def is_converged(op: LinearOperator, allowed: Tensor | float, norm: float, residual_norms: Tensor) -> Tensor:
    """Return which values ``[k]`` have converged: to the errors ``allowed``, or to the attainable accuracy."""
    bounds = residual_norms + rounding(op, norm)
    return (bounds <= allowed) | (bounds <= attainable_accuracy(op, norm))


def final_status(
    best: Status, request: Request, norm: float, attainable: float, values: Tensor, bounds: Tensor
) -> Status:
    """Return ``best`` if all error bounds ``[k]`` are as small as asked for, else what the others allow.

    A value whose bound is above ``tol * |value|`` is zero within atol, zero to rounding, or clearly neither: then it
    is limited by rounding. For bounds that further matvecs do not make smaller, or that end the solve.
    """
    sizes = values.abs()
    short = (bounds > request.tol * sizes) | (values == 0)
    larger = torch.maximum(sizes, bounds)
    within_atol = short & (larger <= request.atol * norm) & (larger > attainable)
    no_digits = short & ~within_atol & (sizes <= bounds.clamp(min=attainable))
    if bool((short & ~within_atol & ~no_digits).any()):
        return Status.ROUNDING_LIMITED
    if bool(within_atol.any()):
        return Status.ZERO_WITHIN_ATOL
    return Status.ZERO_TO_ROUNDING if bool(no_digits.any()) else best


def progress_of(values: Tensor, bounds: Tensor, scale: Tensor, level: int = 0) -> Progress:
    """Return the progress that ascending Ritz values and their error bounds over ``scale`` show."""
    if not len(values):
        return Progress()
    unit = float(scale)
    ends = float(values[0]), float(values[-1]), float(bounds[0]), float(bounds[-1])
    low, high, low_bound, high_bound = (end * unit for end in ends)
    return Progress(0.0, 0.0, low, high, low_bound, high_bound, level)


def intervals(
    pairs: RitzPairs, request: Request, slack: float, kind: str, outer: Outer | None = None
) -> tuple[Interval, ...]:
    """Return the interval of each eigenvalue: inwards to the value, outwards by residual or ``outer``.

    ``slack`` is added at both sides. ``outer`` replaces the residual for the outermost value of an end where one value
    was asked for. Inside of the spectrum, and where fewer than ``k`` were found, so that it is not known which ones
    they are, the residual counts both ways.
    """
    found, which = len(pairs.values), request.which
    if which == "CLOSEST":
        radii = zip(pairs.values.tolist(), (pairs.residual_norms + slack).tolist(), strict=True)
        return tuple(Interval(value - radius, value + radius, kind) for value, radius in radii)
    num_low = int((pairs.values < 0).sum()) if which == "LM" else num_at_low_end(found, which)
    result = []
    for place, (value, radius) in enumerate(
        zip(pairs.values.tolist(), pairs.residual_norms.tolist(), strict=True)
    ):
        low = high = radius
        name, confidence = kind, None
        if found == request.k:
            low, high = (radius, 0.0) if place < num_low else (0.0, radius)
        alone = num_low == 1 if place < num_low else found - num_low == 1
        reach = math.inf if outer is None else (outer.low if place < num_low else outer.high)
        if outer is not None and found == request.k and alone and which != "LM" and math.isfinite(reach):
            low, high = (reach, 0.0) if place < num_low else (0.0, reach)
            name, confidence = outer.kind, outer.confidence
        result.append(Interval(value - low - slack, value + high + slack, name, confidence))
    return tuple(result)


def eigen_result(
    pairs: RitzPairs,
    where: tuple[Interval, ...],
    status: Status,
    num_matvecs: float,
    *,
    message: str | None = None,
    error_bounds: Tensor | None = None,
) -> EigenResult:
    """Return a result, without history and seconds; error bounds are residual norms if not given."""
    return EigenResult(
        pairs.values,
        pairs.vectors,
        pairs.residual_norms,
        pairs.residual_norms if error_bounds is None else error_bounds,
        where,
        num_matvecs,
        seconds=0.0,
        status=status,
        message=message or status.advice,
        history=(),
    )


def product_in_time(op: LinearOperator, vectors: Tensor) -> Tensor | None:
    """Return the matvec with columns ``[n, k]``, or None if the context's deadline passes before its end."""
    try:
        check_deadline_of(op.space.ranks)
        return op.product(vectors)
    except DeadlineReached:
        return None


def check_pairs(
    op: LinearOperator,
    request: Request,
    found: RitzPairs,
    scale: Tensor,
    norm: float,
    *,
    status: Status,
    num_matvecs: float,
) -> EigenResult:
    """Return the result of a solve that found these pairs, after a matvec with each of them.

    Args:
        op: the operator; its matvecs are taken in native arithmetic.
        request: what was asked for.
        found: vectors ``[n, m]`` that are orthonormal up to rounding; values and norms over ``scale``. Returned
            as they are if the matvecs are not finite, or were not before, or if the context's deadline passes.
        scale: what matvecs are divided by, 0-d.
        norm: of the operator, over scale.
        status: why the solve stopped.
        num_matvecs: full-data matvecs before.
    """
    op, message = op.exact or op, None
    images = None
    if len(found.values) and status is not Status.NON_FINITE:
        vectors = found.vectors / op.space.reduce(found.vectors.square().sum(dim=0)).sqrt()
        images = product_in_time(op, vectors)
        if images is None:
            status = status if status is Status.MAX_MATVECS else Status.TIME_LIMIT
            message = UNVERIFIED.format(status.advice)
    if images is not None:
        num_matvecs += len(found.values) * op.cost
        images = images / scale
        quotients = op.space.reduce((vectors * images).sum(dim=0))
        norms = op.space.reduce((images - vectors * quotients).square().sum(dim=0)).sqrt()
        values, residual_norms = torch.stack([quotients, norms]).to("cpu", torch.float64)
        if not bool(torch.isfinite(residual_norms).all()):
            status = Status.NON_FINITE
            message = f"{status.advice}; {op.blame(found.vectors)}"
        else:
            order = torch.argsort(values, stable=True)
            found = RitzPairs(values[order], vectors[:, order.to(op.device)], residual_norms[order])
            if status not in (Status.MAX_MATVECS, Status.TIME_LIMIT):
                attainable = attainable_accuracy(op, norm)
                status = final_status(status, request, norm, attainable, found.values, found.residual_norms)
    unit = float(scale)
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    slack = attainable_accuracy(op, norm) * unit  # a statement wants more of it than a stop
    found = found.scaled(unit)
    where = intervals(found, request, slack, kind)
    return eigen_result(found, where, status, num_matvecs, message=message)
