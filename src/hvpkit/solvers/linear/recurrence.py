"""The parts that recurrences for linear systems share: the matrix, inner products, reasons to stop, steps in turn.

A row, that is, a right-hand side at work, is a generator over vectors ``[n]`` and Python's numbers, which cost a tenth
of operations on tensors of one entry. It asks for the image of a vector, or for inner products; rows are answered
together, by one matvec and one wait for the device, and know nothing of each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.orthogonalize import unit_of
from hvpkit.solvers.linear.arithmetic import Arithmetic, Vector

RUNNING, INVARIANT, NEGATIVE, SINGULAR, NON_FINITE = range(5)
"""Reasons why a row's recurrence stopped: none, an invariant space, negative curvature, none at all, NaN."""

FLATNESS = 16.0
"""In units of eps * norm: a curvature, or the remainder of a Lanczos vector, that counts as zero."""

SAFE = 1 / 16
"""Exponent of matvecs that are not scaled, at most, over the largest of the dtype: the fourth power and a sum over many
entries are still in range. Chosen by feel."""

Apply = Callable[[Tensor], Tensor]
"""The inverse of a preconditioner, symmetric positive definite, on ``[n]``."""


@dataclass(frozen=True)
class Row:
    r"""A right-hand side at work, between two steps. Methods add what else they carry from step to step.

    Attributes:
        x: to be added to the best solution so far ``[n]``.
        size: norm of the residual, by the recurrence.
        stopped: why the recurrence stopped.
        norm: largest :math:`\|A v\| / \|v\|` seen.
        least: 1 where the residual is nearly the least of all, and the row waits for its verification; 2 after that;
            else 0.
    """

    x: Tensor = field(metadata=LONG)
    size: float
    stopped: int
    norm: float
    least: int

    @property
    def r(self) -> Tensor:
        """The residual by the recurrence ``[n]``."""
        raise NotImplementedError

    @property
    def multiplied(self) -> Tensor:
        """The vector ``[n]`` that the next step multiplies: that of the last, where the row has stopped."""
        raise NotImplementedError

    def is_ready(self, goal: float) -> bool:
        """Return True if the residual has reached its goal, or the recurrence has stopped."""
        return self.size <= goal or self.stopped != RUNNING


@dataclass
class Matrix:
    """The matrix A over its scale, and the inverse of a preconditioner.

    Attributes:
        op: A.
        arithmetic: of vectors.
        precondition: None: the identity.
        scale: what images are divided by; None: a power of two by the first ones.
    """

    op: LinearOperator
    arithmetic: Arithmetic
    precondition: Apply | None
    scale: float | None = None

    def images(self, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return the images of vectors, by one matvec with all."""
        one, arithmetic, product = len(vectors) == 1, self.arithmetic, self.op.product
        images = (arithmetic.image(product, vectors[0]),) if one else arithmetic.images(product, vectors)
        if self.scale is None:
            peaks = [float(self.op.space.peak(image)) for image in arithmetic.tensors(images)]
            self.scale = _scale_of(max(peaks), self.op.dtype)
        return images if self.scale == 1 else [image / self.scale for image in images]

    def preconditioned(self, vector: Vector) -> Vector:
        """Apply the inverse of the preconditioner, which there is."""
        assert self.precondition is not None
        (tensor,) = self.arithmetic.tensors([vector])
        return self.arithmetic.vectors([self.precondition(tensor)])[0]


def _scale_of(peak: float, dtype: torch.dtype) -> float:
    """Return 1 where the squares of images with this peak are well within the dtype's range, else a power of two."""
    scale, most = unit_of(peak), torch.finfo(dtype).max ** SAFE
    return 1.0 if 1 / most <= scale <= most else scale


R = TypeVar("R", bound=Row)

Steps: TypeAlias = Generator[Any, Any, None]
"""Steps of a row. It yields a vector, and is sent its image, or None to end; or, where these wait, a tuple of inner
products, and is sent the numbers; or last, of itself or when it is told to end, the row."""


class Recurrence(Protocol[R]):
    """A method."""

    def begin(self, matrix: Matrix, r: Tensor, size: float) -> R:
        """Return a row before its first step, from a residual ``[n]`` and its norm."""

    def steps(self, matrix: Matrix, row: R, goal: float) -> Steps:
        """Take steps, with a matvec each, until the norm of the residual is at most ``goal``, or the row stops."""

    def unpack(self, plain: dict[str, Any]) -> R:
        """Return a row of its plain data."""


def take_steps(
    recurrence: Recurrence[R],
    matrix: Matrix,
    rows: Sequence[R],
    goals: Sequence[float],
    most: int,
    end: float,
) -> tuple[tuple[R, ...], int]:
    """Take steps with all rows, at least one, until a row ends: by its goal, or as it stops or is to be verified.

    Args:
        recurrence: the method.
        matrix: A.
        rows: running.
        goals: for the norms of residuals.
        most: steps, at most.
        end: on the clock of ``time.perf_counter``: no step begins after it, but the first.

    Returns:
        The rows, and the number of steps.
    """
    runs = [recurrence.steps(matrix, row, goal) for row, goal in zip(rows, goals, strict=True)]
    with matrix.arithmetic.context():
        alone = len(runs) == 1 and not matrix.arithmetic.waits
        asked, taken = _take_alone(matrix, runs[0], most, end) if alone else _take(matrix, runs, most, end)
        ended = [
            one if isinstance(one, Row) else run.send(None) for run, one in zip(runs, asked, strict=True)
        ]
    return tuple(cast("list[R]", ended)), taken


def _take(matrix: Matrix, runs: Sequence[Steps], most: int, end: float) -> tuple[Sequence[Any], int]:
    """Take steps; return what rows ask for after them, or rows, and the number of steps."""
    arithmetic, taken, is_over = matrix.arithmetic, 0, False
    asked = [next(run) for run in runs]
    while not is_over:
        asked = [run.send(image) for run, image in zip(runs, matrix.images(asked), strict=True)]
        taken += 1
        while arithmetic.waits and (
            waiting := [place for place, one in enumerate(asked) if type(one) is tuple]
        ):
            found = arithmetic.numbers([asked[place] for place in waiting])
            for place, numbers in zip(waiting, found, strict=True):
                asked[place] = runs[place].send(numbers)
        is_over = taken >= most or time.perf_counter() >= end
        for one in asked:
            is_over = is_over or isinstance(one, Row)
    return asked, taken


def _take_alone(matrix: Matrix, run: Steps, most: int, end: float) -> tuple[Sequence[Any], int]:
    """Take steps with one row, whose numbers are known at once."""
    one, taken = next(run), 0
    while not taken or (taken < most and time.perf_counter() < end and not isinstance(one, Row)):
        one, taken = run.send(matrix.images((one,))[0]), taken + 1
    return [one], taken


def norm_seen(norm: float, square: float, image_square: float) -> float:
    """Return the norm seen so far, with that of the last image where it is finite.

    Args:
        norm: seen before.
        square: of the norm of the vector that was multiplied.
        image_square: of the norm of its image.
    """
    usable = math.isfinite(image_square) and square > 0
    return max(norm, math.sqrt(image_square / square)) if usable else norm
