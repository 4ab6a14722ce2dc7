"""The arguments that all solvers share, checked once at the front door."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_like, check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, ExtremeResult
from hvpkit.solvers.common.rayleigh_ritz import WHICH
from hvpkit.solvers.driver import Limits

DEFAULT_MAX_MATVECS = 1000.0

Start = Tensor | EigenResult | ExtremeResult
"""Where to begin: vectors ``[n]`` or ``[n, p]``, or an earlier result, whose vectors are meant."""


@dataclass(frozen=True)
class Request:
    """What every solver is asked for; one with arguments of its own has a ``Goal`` that adds them.

    Attributes:
        k: how many pairs.
        which: at which ends. Both ends of one pair are the high end.
        tol: relative error of the values; at least eps.
        start: columns ``[n, p]``, or None.
        limits: what may be spent.
        seed: of random vectors.
    """

    k: int
    which: str
    tol: float
    start: Tensor | None
    limits: Limits
    seed: int

    def left(self, num_matvecs: float) -> float:
        """What is left of the budget after so many full-data products, besides those of the final check."""
        return self.limits.max_matvecs * (1 + 1e-12) - self.limits.reserve - num_matvecs


def check_arguments(
    op: LinearOperator,
    k: int,
    which: str,
    *,
    v0: Start | None,
    tol: float,
    max_matvecs: float | None,
    time_limit: float | None,
    seed: Seed,
    offered: tuple[str, ...] = WHICH,
    block_size: int = 1,
    num_checks: int | None = None,
) -> Request:
    """The request that a user function's arguments make.

    ``offered`` are the words for ``which`` that the solver knows, ``block_size`` the products of a step that cannot
    be taken apart, ``num_checks`` those of the final check, by default one for each pair.

    Raises:
        TypeError: an argument of another type, named.
        ValueError: an argument out of its range, named.
    """
    check_count("k", k, 1, op.n)
    check_choice("which", which, offered)
    if max_matvecs is None:
        max_matvecs = max(DEFAULT_MAX_MATVECS, 10 * k * op.cost)
    minimum = math.ceil(k / block_size) * block_size * op.cost
    return Request(
        k,
        "LA" if (which, k) == ("BE", 1) else which,
        max(check_positive("tol", tol), torch.finfo(op.dtype).eps),
        check_start(op, v0),
        Limits(
            max_matvecs,
            time_limit,
            reserve=(k if num_checks is None else num_checks) * op.cost,
            minimum=minimum,
        ),
        resolve_seed(seed),
    )


def check_confidence(confidence: float) -> float:
    """Returns ``confidence`` if it is one; a ValueError if not."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence


def check_start(op: LinearOperator, v0: Start | None) -> Tensor | None:
    """The start of the caller's as columns ``[n, p]``; of an earlier result, its vectors.

    Raises:
        ValueError: it has another shape, dtype or device, or a column that is zero or not finite.
    """
    if v0 is None:
        return None
    if isinstance(v0, EigenResult | ExtremeResult):
        v0 = v0.vectors
    if not isinstance(v0, Tensor) or v0.ndim not in (1, 2) or v0.shape[0] != op.n or not v0.numel():
        found = list(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(f"v0 must be a tensor of shape [{op.n}] or [{op.n}, p], got {found}")
    check_like(v0, torch.empty(0, dtype=op.dtype, device=op.device), name="v0")
    columns = v0.detach().reshape(op.n, -1)
    if not bool(torch.isfinite(columns).all()) or bool((columns == 0).all(dim=0).any()):
        raise ValueError("v0 has a column that is zero or contains NaN or infinity")
    return columns
