"""The parts that recurrences for linear systems share: the operator, row-wise sums, reasons to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hvpkit.operators.space import Space
from hvpkit.results.plain_data import LONG

RUNNING, INVARIANT, NEGATIVE, SINGULAR, NON_FINITE = range(5)
"""Reasons why a row's recurrence stopped: none, an invariant space, negative curvature, none at all, NaN."""

FLATNESS = 16.0
"""In units of eps * norm: a curvature, or the remainder of a Lanczos vector, that counts as zero."""

Apply = Callable[[Tensor], Tensor]
"""A symmetric matrix, or the inverse of a preconditioner, on rows ``[k, n]``."""


@dataclass(frozen=True)
class Matrix:
    """The matrix A over its scale, and the inverse of a preconditioner, on rows ``[k, n]``.

    Attributes:
        apply: A.
        precondition: symmetric positive definite; None: the identity.
        space: inner products.
    """

    apply: Apply
    precondition: Apply | None
    space: Space

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner products ``[k]`` of the rows of two blocks ``[k, n]``."""
        return self.space.reduce((left * right).sum(dim=1))

    def preconditioned(self, rows: Tensor) -> Tensor:
        """Apply the inverse of the preconditioner."""
        return rows if self.precondition is None else self.precondition(rows)


@dataclass(frozen=True)
class Iterates:
    r"""Corrections of solutions, and residuals by recurrence.

    Attributes:
        x: to be added to the best solutions so far ``[k, n]``.
        r: ``[k, n]``.
        stopped: why a row's recurrence stopped ``[k]``.
        norm: largest :math:`\|A v\| / \|v\|` seen ``[k]``.
        least: 1 where a residual is nearly the least of all, and the row waits for its verification; 2 after that;
            else 0 ``[k]``.
    """

    x: Tensor = field(metadata=LONG)
    r: Tensor = field(metadata=LONG)
    stopped: Tensor
    norm: Tensor
    least: Tensor

    @classmethod
    def of(cls, r: Tensor) -> Iterates:
        """Return those before the first step."""
        return cls(torch.zeros_like(r), r, *(r.new_zeros(len(r)) for _ in range(3)))


def arrays(*values: Tensor) -> tuple[Any, list[Any]]:
    """Return the module to compute with numbers ``[k]`` by, and these: NumPy on a CPU, whose calls cost a third."""
    if values[0].device.type != "cpu" or values[0].dtype == torch.bfloat16:
        return torch, list(values)
    return np, [value.numpy() for value in values]


def tensors(*values: Any) -> list[Tensor]:
    """Return tensors ``[k]`` of what :func:`arrays` gave."""
    return [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]


def norm_seen(xp: Any, stopped: Any, norm: Any, square: Any, image_square: Any) -> Any:
    """Return the norms ``[k]`` seen so far, with that of the last image where it is finite.

    Args:
        xp: the module of :func:`arrays`.
        stopped: why rows have stopped.
        norm: seen before.
        square: of the norms of the vectors that were multiplied.
        image_square: of the norms of their images.
    """
    usable = (stopped == RUNNING) & xp.isfinite(image_square) & (square > 0)
    ratio = image_square / xp.where(square > 0, square, xp.ones_like(square))
    return xp.maximum(norm, xp.sqrt(xp.where(usable, ratio, xp.zeros_like(ratio))))


V = TypeVar("V")


class Recurrence(Protocol[V]):
    """A method: the vectors that it carries from step to step, as a dataclass of tensors ``[k, ...]``."""

    def begin(self, matrix: Matrix, r: Tensor) -> V:
        """Return the vectors before the first step, from residuals ``[k, n]``."""

    def advance(self, matrix: Matrix, iterates: Iterates, vectors: V) -> tuple[Iterates, V]:
        """Take one step, with one matvec for each row. No host synchronisation; rows that have stopped stay."""

    def multiplied(self, vectors: V) -> Tensor:
        """Return the vectors ``[k, n]`` that the next step multiplies: those of the last, where a row has stopped."""


def mask(going: Any) -> Tensor | None:
    """Return for :func:`rows_where` which rows go on; None where it costs nothing to see that all do."""
    if isinstance(going, np.ndarray):
        return None if going.all() else torch.from_numpy(going)
    return going  # type: ignore[no-any-return]


def rows_where(going: Any, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``new`` where ``going`` ``[k]``, else those of ``old``; all of ``new`` for None."""
    if going is None:
        return new
    return torch.where(going.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def stop(xp: Any, stopped: Any, reasons: list[tuple[Any, int]]) -> Any:
    """Return why rows have stopped: as before, or the first reason whose condition ``[k]`` holds."""
    for condition, reason in reasons:
        stopped = xp.where((stopped == RUNNING) & condition, xp.full_like(stopped, reason), stopped)
    return stopped
