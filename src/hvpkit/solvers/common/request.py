"""The arguments that all solvers share, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.ranks import is_shards, whole
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import (
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_like,
    check_non_negative,
    check_probability,
    check_tolerance,
)
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, ExtremeResult
from hvpkit.solvers.common.rayleigh_ritz import WHICH
from hvpkit.solvers.driver import Limits

DEFAULT_MAX_MATVECS, DEFAULT_MATVECS_PER_PAIR = 1000.0, 10
"""The default budget, in full-data matvecs: the first, or the second for each pair if that is more. Chosen by feel."""

MAX_ATOL, ATOL_SHARE = 1e-5, 1e-3
"""The default ``atol``, in units of the operator's norm: the first, or the second times ``tol`` if that is less. Chosen
by feel; larger values keep their relative accuracy."""

Start = Tensor | EigenResult | ExtremeResult
"""Start vectors ``[n]`` or ``[n, p]``, or an earlier result, whose vectors are meant."""


@dataclass(frozen=True)
class Request:
    """Arguments of a solve that all solvers share.

    Attributes:
        k: number of pairs.
        which: at which ends, or ``"CLOSEST"``. Both ends of one pair are the high end.
        tol: relative error of the values; at least eps.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero; its error, then.
        start: columns ``[n, p]``, or None.
        limits: budget and time limit.
        seed: of random vectors.
        sigma: the point that ``"CLOSEST"`` means.
    """

    k: int
    which: str
    tol: float
    atol: float
    start: Tensor | None
    limits: Limits
    seed: int
    sigma: float = 0.0

    def allowed(self, values: Tensor, norm: float) -> Tensor:
        """Return the errors allowed of values ``[k]``: ``tol * |value|``, or ``atol * norm`` up to that size."""
        sizes, near_zero = values.abs(), self.atol * norm
        return torch.where(sizes <= near_zero, near_zero, self.tol * sizes)

    def on_host(self) -> Request:
        """Return the same request with its start in host memory."""
        return replace(self, start=None if self.start is None else self.start.cpu())


def default_atol(tol: float) -> float:
    """Return the ``atol`` that goes with ``tol`` where none is given: 1e-5, or a thousandth of ``tol``.

    Example:
        >>> default_atol(1e-2), default_atol(1e-6)
        (1e-05, 1e-09)
    """
    return min(MAX_ATOL, ATOL_SHARE * tol)


def check_arguments(
    op: LinearOperator,
    k: int,
    which: str,
    *,
    v0: Start | None,
    tol: float,
    atol: float | None = None,
    max_matvecs: float | None,
    time_limit: float | None,
    seed: Seed,
    offered: tuple[str, ...] = WHICH,
    block_size: int = 1,
    num_checks: int | None = None,
) -> Request:
    """Check a user function's arguments and return them as a request.

    ``offered`` are the values of ``which`` that the solver accepts, ``block_size`` the matvecs of a step that cannot
    be split, ``num_checks`` those of the final check, by default one for each pair.

    Raises:
        TypeError: an argument of another type, named.
        ValueError: an argument out of its range, named.
    """
    k = check_count("k", k, 1, op.n)
    check_choice("which", which, offered)
    if max_matvecs is None:
        max_matvecs = max(DEFAULT_MAX_MATVECS, DEFAULT_MATVECS_PER_PAIR * k * op.cost)
    minimum = math.ceil(k / block_size) * block_size * op.cost
    return Request(
        k,
        "LA" if (which, k) == ("BE", 1) else which,
        max(check_tolerance("tol", tol), torch.finfo(op.dtype).eps),
        default_atol(tol) if atol is None else check_atol(atol),
        check_start(op, v0),
        Limits(
            max_matvecs,
            time_limit,
            reserve=(k if num_checks is None else num_checks) * op.cost,
            minimum=minimum,
        ),
        resolve_seed(seed),
    )


def check_atol(atol: float) -> float:
    """Return ``atol``; raise TypeError or ValueError unless it is in [0, 1), in units of the norm."""
    if check_non_negative("atol", atol) >= 1:
        raise ValueError(f"atol must be less than 1, in units of the operator's norm, got {atol}")
    return atol


def check_sigma(which: str, sigma: float | None) -> float:
    """Return ``sigma``, or 0 where no point is meant; raise unless it goes with ``which``."""
    if which == "CLOSEST" and sigma is None:
        raise ValueError('which="CLOSEST" needs sigma, the point that the eigenvalues are to be closest to')
    if which != "CLOSEST" and sigma is not None:
        raise ValueError(f'sigma goes with which="CLOSEST", and which is {which!r}')
    return 0.0 if sigma is None else check_finite("sigma", sigma)


def check_certainty(confidence: float, certify: bool) -> None:
    """Raise TypeError or ValueError unless these are a probability and a flag."""
    check_probability("confidence", confidence)
    check_flag("certify", certify)


def check_start(op: LinearOperator, v0: Start | None) -> Tensor | None:
    """Return the caller's start as columns ``[n, p]``; of an earlier result, its vectors.

    Raises:
        ValueError: it has another shape, dtype or device, or a column that is zero or not finite.
    """
    if v0 is None:
        return None
    if isinstance(v0, EigenResult | ExtremeResult):
        v0 = v0.vectors
    if is_shards(v0):
        v0 = whole(v0)
    if not isinstance(v0, Tensor) or v0.ndim not in (1, 2) or v0.shape[0] != op.n or not v0.numel():
        found = list(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(f"v0 must be a tensor of shape [{op.n}] or [{op.n}, p], got {found}")
    check_like(v0, op, name="v0")
    columns = v0.detach().reshape(op.n, -1)
    if not bool(torch.isfinite(columns).all()) or bool((columns == 0).all(dim=0).any()):
        raise ValueError("v0 has a column that is zero or contains NaN or infinity")
    return columns
