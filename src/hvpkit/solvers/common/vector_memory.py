"""Memory for the vectors that a method keeps: how many fit, and an error before the first matvec if they do not."""

from __future__ import annotations

import math

import torch

from hvpkit._utils.memory import free_memory, in_words
from hvpkit.operators.base import LinearOperator

BASIS_SHARE = 0.5
"""Share of the free memory that a default number of vectors may take. Chosen by feel: a quarter is for kept graphs, a
quarter for matvecs."""


SMALL, MANY = 2**26, 1000
"""Bytes that always fit, as so many vectors of them: to ask for the free memory takes as long as many steps of a small
solve. Chosen by feel; default sets are of 300 vectors at most, but for many pairs."""

FEWER = "take fewer pairs, hvpkit.lanczos with a small ncv, or fewer parameters (wrt=)"
"""The remedy of solvers whose vectors follow the number of pairs."""


def vector_bytes(op: LinearOperator) -> int:
    """Return the bytes of a vector, or of the part of it that is here."""
    return op.space.size(op.n) * op.dtype.itemsize


def vectors_that_fit(op: LinearOperator) -> float:
    """Return how many vectors a default may take: those in half of the memory that is free on the operator's device.

    Infinite for vectors of which any default always fits.
    """
    if MANY * vector_bytes(op) <= SMALL:
        return math.inf
    fitting = BASIS_SHARE * free_memory(op.device) / vector_bytes(op)
    return fitting if op.space.ranks is None else min(op.space.ranks.gather(fitting))


def check_room(op: LinearOperator, num_vectors: float, remedy: str) -> None:
    """Raise MemoryError if so many vectors do not fit, with what would in words.

    Args:
        op: the operator, on whose device they are.
        num_vectors: that a method keeps and works with.
        remedy: what to change, for the message.
    """
    needed = num_vectors * vector_bytes(op)
    if needed <= SMALL:
        return
    free = free_memory(op.device)
    if needed <= free:
        return
    host = torch.device("cpu")
    elsewhere = "" if op.device == host else f" ({in_words(free_memory(host))} in host memory)"
    raise MemoryError(
        f"{num_vectors:.0f} vectors of {op.n:,} numbers in {str(op.dtype).removeprefix('torch.')} take "
        f"{in_words(needed)}, and {in_words(free)} are free on {op.device}{elsewhere}, room for "
        f"{free // vector_bytes(op):.0f}: {remedy}"
    )
