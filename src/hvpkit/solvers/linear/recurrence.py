"""The parts that recurrences for linear systems share: the operator, row-wise sums, reasons to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hvpkit.operators.space import Space

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

    def norms(self, rows: Tensor) -> Tensor:
        """Return the norms ``[k]`` of rows ``[k, n]``."""
        return self.dots(rows, rows).sqrt()

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

    x: Tensor
    r: Tensor
    stopped: Tensor
    norm: Tensor
    least: Tensor

    @classmethod
    def of(cls, r: Tensor) -> Iterates:
        """Return those before the first step."""
        return cls(torch.zeros_like(r), r, *(r.new_zeros(len(r)) for _ in range(3)))


def norm_seen(matrix: Matrix, iterates: Iterates, vectors: Tensor, images: Tensor) -> Tensor:
    """Return the norms ``[k]`` seen so far, with those of the images of ``vectors`` where these are finite."""
    size, norms = matrix.norms(vectors), matrix.norms(images)
    usable = (iterates.stopped == RUNNING) & torch.isfinite(norms) & (size > 0)
    return torch.maximum(iterates.norm, torch.where(usable, norms / torch.where(size > 0, size, 1.0), 0.0))


V = TypeVar("V")


class Recurrence(Protocol[V]):
    """A method: the vectors that it carries from step to step, as a dataclass of tensors ``[k, ...]``."""

    def begin(self, matrix: Matrix, r: Tensor) -> V:
        """Return the vectors before the first step, from residuals ``[k, n]``."""

    def advance(self, matrix: Matrix, iterates: Iterates, vectors: V) -> tuple[Iterates, V]:
        """Take one step, with one matvec for each row. No host synchronisation; rows that have stopped stay."""

    def multiplied(self, vectors: V) -> Tensor:
        """Return the vectors ``[k, n]`` that the next step multiplies: those of the last, where a row has stopped."""


def rows_where(going: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``new`` where ``going`` ``[k]``, else those of ``old``."""
    return torch.where(going.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def stop(stopped: Tensor, reasons: list[tuple[Tensor, int]]) -> Tensor:
    """Return why rows have stopped: as before, or the first reason whose condition ``[k]`` holds."""
    for condition, reason in reasons:
        stopped = torch.where((stopped == RUNNING) & condition, reason, stopped)
    return stopped
