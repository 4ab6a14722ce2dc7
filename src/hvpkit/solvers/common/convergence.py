"""From approximate eigenvectors and their products to a result: quotients, true residuals, intervals, status."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit.errors import AsymmetryWarning, NotSymmetricError
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Interval, Progress, Status
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end

NOISE, FLOOR = 8.0, 32.0
"""In units of eps * norm: the rounding in an error bound, and an error bound that counts as none."""

ROUGHNESS = 10.0
"""In units of an operator's precision: an asymmetry that its products may have."""


@dataclass(frozen=True)
class Outer:
    """How far beyond the values found the spectrum may reach, by :mod:`hvpkit.solvers.common.bounds`.

    Attributes:
        low, high: distances at either end; infinite where nothing is known.
        kind: what they rest on.
        confidence: of each.
    """

    low: float
    high: float
    kind: str
    confidence: float


@dataclass(frozen=True)
class Checked:
    """Eigenpairs after a last look at products, ascending.

    Attributes:
        values: Rayleigh quotients ``[k]``, float64, on the CPU.
        vectors: unit columns ``[n, k]``.
        residual_norms: of true residuals ``[k]``, float64, on the CPU.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor


def rounding(op: LinearOperator, norm: float) -> float:
    """What rounding in products adds to an error bound, for an operator of this norm."""
    return NOISE * torch.finfo(op.dtype).eps * norm


def check_symmetric(op: LinearOperator, asymmetry: float, norm: float) -> None:
    """A NotSymmetricError if ``|v'(Aw) - w'(Av)|``, for unit v and w, is more than rounding in this norm."""
    allowed = max(torch.finfo(op.dtype).eps ** 0.5, ROUGHNESS * op.precision)
    if asymmetry > allowed * norm:
        raise NotSymmetricError(
            f"{op!r} is not symmetric: v'(Aw) and w'(Av) differ by {asymmetry / norm:.1e} of its norm, where its "
            f"precision allows {allowed:.1e}; hvpkit.check looks for the cause. For a Hessian try another mode, for a "
            "matrix take (A + A.T) / 2"
        )


def warn_asymmetric(op: LinearOperator, asymmetry: float, norm: float) -> None:
    """A warning if an asymmetry that :func:`check_symmetric` lets pass is above rounding in this norm."""
    if asymmetry > max(torch.finfo(op.dtype).eps ** (2 / 3), ROUGHNESS * op.precision) * norm:
        warnings.warn(
            f"{op!r} is slightly asymmetric: v'(Aw) and w'(Av) differ by {asymmetry / norm:.1e} of its norm, more "
            "than by rounding; its eigenvalues may be off by as much. hvpkit.check looks for the cause",
            AsymmetryWarning,
            stacklevel=4,
        )


def final_status(best: Status, tol: float, floor: float, values: Tensor, bounds: Tensor) -> Status:
    """The status of values whose error bounds do not fall any more: ``best``, or less for want of digits."""
    short = (bounds > tol * values.abs()) | (values == 0)
    if not bool(short.any()):
        return best
    zero = values.abs() <= bounds.clamp(min=floor)
    return Status.ZERO_TO_ROUNDING if bool(zero[short].all()) else Status.ROUNDING_LIMITED


def intervals(
    checked: Checked, which: str, k: int, noise: float, kind: str, outer: Outer | None = None
) -> tuple[Interval, ...]:
    """Where each eigenvalue lies: inwards no further than the value, outwards by residual or ``outer``.

    ``outer`` replaces the residual for the outermost value of an end where one value was asked for. Where
    fewer than ``k`` were found, it is not known which ones they are, and the residual counts both ways.
    """
    found = len(checked.values)
    num_low = int((checked.values < 0).sum()) if which == "LM" else num_at_low_end(found, which)
    result = []
    for place, (value, radius) in enumerate(
        zip(checked.values.tolist(), checked.residual_norms.tolist(), strict=True)
    ):
        low = high = radius
        name, confidence = kind, None
        if found == k:
            low, high = (radius, 0.0) if place < num_low else (0.0, radius)
        alone = num_low == 1 if place < num_low else found - num_low == 1
        reach = math.inf if outer is None else (outer.low if place < num_low else outer.high)
        if outer is not None and found == k and alone and which != "LM" and math.isfinite(reach):
            low, high = (reach, 0.0) if place < num_low else (0.0, reach)
            name, confidence = outer.kind, outer.confidence
        result.append(Interval(value - low - noise, value + high + noise, name, confidence))
    return tuple(result)


def eigen_result(
    checked: Checked,
    where: tuple[Interval, ...],
    status: Status,
    *,
    num_matvecs: float,
    seconds: float,
    history: tuple[Progress, ...],
    message: str | None = None,
    error_bounds: Tensor | None = None,
) -> EigenResult:
    """All of it as one result; error bounds are residuals' norms if not given."""
    return EigenResult(
        checked.values,
        checked.vectors,
        checked.residual_norms,
        checked.residual_norms if error_bounds is None else error_bounds,
        where,
        num_matvecs,
        seconds,
        status,
        message or status.advice,
        history,
    )


def floor(op: LinearOperator, norm: float) -> float:
    """The error bound that counts as none, for an operator of this norm."""
    return FLOOR * torch.finfo(op.dtype).eps * norm


def is_converged(
    op: LinearOperator, tol: float, norm: float, values: Tensor, residual_norms: Tensor
) -> Tensor:
    """Which values ``[k]`` are done: by ``tol``, or because no further product makes their bounds smaller."""
    bounds = residual_norms + rounding(op, norm)
    return ((bounds <= tol * values.abs()) & (values != 0)) | (bounds <= floor(op, norm))


def check_pairs(
    op: LinearOperator,
    found: Checked,
    scale: Tensor,
    norm: float,
    *,
    k: int,
    which: str,
    tol: float,
    status: Status,
    num_matvecs: float,
) -> EigenResult:
    """The result of a solve that found these pairs, after a product with each of them.

    Args:
        op: the operator; its products are taken in native arithmetic.
        found: vectors that are orthonormal up to rounding; values and norms over ``scale``. What stays if the
            products are not finite, or were not before.
        scale: what products are divided by, 0-d.
        norm: of the operator, over scale.
        k: how many pairs were asked for.
        which: at which ends.
        tol: with which relative error.
        status: why the solve stopped.
        num_matvecs: full-data products before.
    """
    op = op.exact or op
    if len(found.values) and status is not Status.NON_FINITE:
        num_matvecs += len(found.values) * op.cost
        vectors = found.vectors / op.space.reduce(found.vectors.square().sum(dim=0)).sqrt()
        images = op.product(vectors) / scale
        quotients = op.space.reduce((vectors * images).sum(dim=0))
        norms = op.space.reduce((images - vectors * quotients).square().sum(dim=0)).sqrt()
        values, residual_norms = torch.stack([quotients, norms]).to("cpu", torch.float64)
        if not bool(torch.isfinite(residual_norms).all()):
            status = Status.NON_FINITE
        else:
            order = torch.argsort(values, stable=True)
            found = Checked(values[order], vectors[:, order.to(op.device)], residual_norms[order])
            if status not in (Status.MAX_MATVECS, Status.TIME_LIMIT):
                status = final_status(status, tol, floor(op, norm), found.values, found.residual_norms)
    unit = float(scale)
    found = Checked(found.values * unit, found.vectors, found.residual_norms * unit)
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    room = floor(op, norm) * unit  # a statement wants more of it than a stop
    where = intervals(found, which, k, room, kind)
    return eigen_result(found, where, status, num_matvecs=num_matvecs, seconds=0.0, history=())


def concluded(
    op: LinearOperator,
    found: EigenResult,
    history: tuple[Progress, ...],
    begin: float,
    suspect: Tensor | None = None,
) -> EigenResult:
    """The result with its history and the time since ``begin``, in seconds of ``time.perf_counter``.

    Its message names where a product that was not finite came from: that with ``suspect`` ``[n]``, or else with its
    own vectors.
    """
    message = found.message
    if found.status is Status.NON_FINITE:
        message += "; " + op.blame(found.vectors if suspect is None else suspect[:, None])
    return replace(found, history=history, message=message, seconds=time.perf_counter() - begin)
