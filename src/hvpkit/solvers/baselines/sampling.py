"""Minibatches of an operator's examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator

Schedule = Callable[[int], int]
"""From a minibatch's number, counted from 0, to its number of examples; more than there are means all."""


@runtime_checkable
class SampledOperator(Protocol):
    """An operator over examples that can draw minibatches of itself, as of :func:`hvpkit.hessian`."""

    @property
    def num_examples(self) -> int | None:
        """Number of examples."""

    @property
    def sample(self) -> Callable[[int, int], LinearOperator] | None:
        """The operator over a random subset, from a number of examples and a seed; None if there are none."""


def check_samples(op: LinearOperator, solver: str) -> int:
    """Return the number of examples that minibatches are drawn from.

    Raises:
        TypeError: the operator cannot draw minibatches.
    """
    total = op.num_examples if isinstance(op, SampledOperator) and op.sample is not None else None
    if total is None:
        raise TypeError(
            f"op must be able to draw minibatches of itself, and {op!r} is not: {solver} needs op.sample and "
            "op.num_examples, as of hvpkit.hessian; on any other operator use hvpkit.power or hvpkit.lanczos"
        )
    return total


def examples_of(schedule: Schedule, number: int) -> int:
    """Return the number of examples of a minibatch by the caller's schedule; raise an error if it is no count."""
    return check_count(f"batch_schedule({number})", schedule(number), 1)


def draw(op: LinearOperator, num_examples: int, seed: int, number: int) -> LinearOperator:
    """Return minibatch ``number``; its seed is independent of the random vectors of ``seed``."""
    assert isinstance(op, SampledOperator) and op.sample is not None  # noqa: PT018
    return op.sample(num_examples, resolve_seed(generator(seed, 2**32 + number)))
