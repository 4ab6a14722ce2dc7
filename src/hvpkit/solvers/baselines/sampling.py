"""Minibatches of an operator's examples."""

from __future__ import annotations

from collections.abc import Callable

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator

Schedule = Callable[[int], int]
"""From a minibatch's number, counted from 0, to its number of examples; more than there are means all."""


def check_samples(op: LinearOperator, solver: str) -> int:
    """The number of examples that minibatches are drawn from; a TypeError if there are none to draw."""
    num_examples: int | None = getattr(op, "num_examples", None)
    if getattr(op, "sample", None) is None or num_examples is None:
        raise TypeError(
            f"op must be able to draw minibatches of itself, and {op!r} is not: {solver} needs op.sample and "
            "op.num_examples, as of hvpkit.hessian; on any other operator use hvpkit.power or hvpkit.lanczos"
        )
    return num_examples


def examples_of(schedule: Schedule, number: int) -> int:
    """Examples of a minibatch by the caller's schedule; a ValueError or TypeError if that is no count."""
    return check_count(f"batch_schedule({number})", schedule(number), 1)


def draw(op: LinearOperator, num_examples: int, seed: int, number: int) -> LinearOperator:
    """Minibatch ``number`` of those that belong to ``seed``, apart from its random vectors."""
    sample: Callable[[int, int], LinearOperator] = op.sample  # type: ignore[attr-defined]
    return sample(num_examples, resolve_seed(generator(seed, 2**32 + number)))
