"""Several computations in lockstep: each asks for a matvec of its own operator, and all are answered at once.

A computation is a generator that yields vectors ``[n, k]``, is sent their images, and returns its result. Code that is
written for an operator becomes one by :func:`asking`: it is run again from its beginning with each further image, so
that it should be a step between two matvecs, which costs little and leaves what it was given as it was until its last
matvec is answered, as a solver's steps do. At a deadline that matvec raises DeadlineReached, as an operator's would.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from torch import Tensor

from hvpkit._utils.deadline import DeadlineReached
from hvpkit.operators.base import LinearOperator

T = TypeVar("T")

Asking: TypeAlias = Generator[Tensor, Tensor, T]
"""A computation: it yields vectors, is sent their images, and returns its result."""


class _Asked(Exception):
    """A matvec is needed that has not been made yet."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__("a matvec outside of a lockstep")
        self.vectors = vectors


class Asker:
    """An operator whose matvecs are asked for.

    Attributes:
        op: for the functions that :meth:`asking` evaluates; elsewhere its matvecs raise.
    """

    def __init__(self, op: LinearOperator) -> None:
        self.op = replace(op, product=self._answered)
        self._answers: Iterator[Tensor | DeadlineReached] = iter(())

    def _answered(self, vectors: Tensor) -> Tensor:
        image = next(self._answers, None)
        if image is None:
            raise _Asked(vectors)
        if isinstance(image, DeadlineReached):
            raise image
        return image

    def asking(self, function: Callable[[], T]) -> Asking[T]:
        """Evaluate a function that uses ``op``, asking for each matvec."""
        images: list[Tensor | DeadlineReached] = []
        while True:
            self._answers = iter(images)
            try:
                return function()
            except _Asked as asked:
                vectors = asked.vectors
            try:
                images.append((yield vectors))
            except DeadlineReached as reached:
                images.append(reached)


def asking(op: LinearOperator, function: Callable[[LinearOperator], T]) -> Asking[T]:
    """Evaluate a function of an operator, asking for each matvec."""
    asker = Asker(op)
    return asker.asking(lambda: function(asker.op))


def in_lockstep(
    computations: Sequence[Asking[T]],
    products: Callable[[dict[int, Tensor]], dict[int, Tensor]],
) -> list[T]:
    """Run computations to their results.

    Args:
        computations: by number.
        products: returns the images of the vectors that the computations of these numbers ask for. If it raises
            DeadlineReached, so do their matvecs.
    """
    results: dict[int, T] = {}
    asked: dict[int, Tensor] = {}

    def advance(number: int, image: Tensor | DeadlineReached | None) -> None:
        one = computations[number]
        try:
            if isinstance(image, DeadlineReached):
                asked[number] = one.throw(image)
            else:
                asked[number] = next(one) if image is None else one.send(image)
        except StopIteration as stop:
            asked.pop(number, None)
            results[number] = stop.value

    for number in range(len(computations)):
        advance(number, None)
    while asked:
        images: dict[int, Tensor] | None = None
        try:
            images = products(dict(asked))
        except DeadlineReached as error:
            reached = error
        for number in list(asked):
            advance(number, reached if images is None else images[number])
    return [results[number] for number in range(len(computations))]
