"""The parts that recurrences for linear systems share: the operator, row-wise sums, reasons to stop.

Vectors are rows of tensors; the few numbers of each row are Python's, which cost a tenth of operations on tensors of a
few entries: a step reads its inner products from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from hvpkit.operators.space import LOCAL, Space
from hvpkit.results.plain_data import LONG

RUNNING, INVARIANT, NEGATIVE, SINGULAR, NON_FINITE = range(5)
"""Reasons why a row's recurrence stopped: none, an invariant space, negative curvature, none at all, NaN."""

FLATNESS = 16.0
"""In units of eps * norm: a curvature, or the remainder of a Lanczos vector, that counts as zero."""

Apply = Callable[[Tensor], Tensor]
"""A symmetric matrix, or the inverse of a preconditioner, on rows ``[k, n]``."""

Numbers: TypeAlias = tuple[float, ...]
"""A number for each row ``[k]``."""


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

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[list[float]]:
        """Return the inner products ``[k]`` of the rows of each pair of blocks ``[k, n]``. Waits for the device."""
        sums = [torch.linalg.vecdot(left, right) for left, right in pairs]
        if self.space is LOCAL and sums[0].device.type == "cpu":
            return [one.tolist() for one in sums]
        found: list[list[float]] = self.space.reduce(torch.stack(sums)).tolist()
        return found

    def preconditioned(self, rows: Tensor) -> Tensor:
        """Apply the inverse of the preconditioner."""
        return rows if self.precondition is None else self.precondition(rows)


@dataclass(frozen=True)
class Iterates:
    r"""Corrections of solutions, and residuals by recurrence.

    Attributes:
        x: to be added to the best solutions so far ``[k, n]``.
        r: ``[k, n]``.
        sizes: norms of r ``[k]``.
        stopped: why a row's recurrence stopped ``[k]``.
        norms: largest :math:`\|A v\| / \|v\|` seen ``[k]``.
        least: 1 where a residual is nearly the least of all, and the row waits for its verification; 2 after that;
            else 0 ``[k]``.
    """

    x: Tensor = field(metadata=LONG)
    r: Tensor = field(metadata=LONG)
    sizes: Numbers
    stopped: tuple[int, ...]
    norms: Numbers
    least: tuple[int, ...]

    @classmethod
    def of(cls, r: Tensor, sizes: Sequence[float]) -> Iterates:
        """Return those before the first step, from residuals and their norms."""
        k = len(r)
        return cls(torch.zeros_like(r), r, tuple(sizes), (RUNNING,) * k, (0.0,) * k, (0,) * k)


def norm_seen(norm: float, square: float, image_square: float) -> float:
    """Return the norm seen so far, with that of the last image where it is finite.

    Args:
        norm: seen before.
        square: of the norm of the vector that was multiplied.
        image_square: of the norm of its image.
    """
    usable = math.isfinite(image_square) and square > 0
    return max(norm, math.sqrt(image_square / square)) if usable else norm


V = TypeVar("V")


class Recurrence(Protocol[V]):
    """A method: the vectors that it carries from step to step, as a dataclass of tensors and tuples ``[k, ...]``."""

    def begin(self, matrix: Matrix, r: Tensor) -> V:
        """Return the vectors before the first step, from residuals ``[k, n]``."""

    def advance(self, matrix: Matrix, iterates: Iterates, vectors: V) -> tuple[Iterates, V]:
        """Take one step, with one matvec for each row; rows that have stopped stay."""

    def multiplied(self, vectors: V) -> Tensor:
        """Return the vectors ``[k, n]`` that the next step multiplies: those of the last, where a row has stopped."""


def combined(rows: Tensor, factors: Sequence[float], others: Tensor) -> Tensor:
    """Return each row plus its factor times its row of ``others``."""
    if len(factors) == 1:
        return torch.add(rows, others, alpha=factors[0])
    return torch.addcmul(rows, _column(factors, rows), others)


def scaled(rows: Tensor, factors: Sequence[float]) -> Tensor:
    """Return each row times its factor."""
    return rows * (factors[0] if len(factors) == 1 else _column(factors, rows))


def _column(factors: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64).to(like)[:, None]


def rows_where(going: Sequence[bool] | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``new`` where ``going`` ``[k]``, else those of ``old``."""
    return torch.where(torch.as_tensor(going, device=new.device)[:, None], new, old)
