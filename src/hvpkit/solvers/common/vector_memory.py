"""Memory for the vectors that a method keeps: how many fit, and an error before the first matvec if they do not."""

from __future__ import annotations

import torch

from hvpkit._utils.memory import free_memory, in_words
from hvpkit.operators.base import LinearOperator

BASIS_SHARE = 0.5
"""Share of the free memory that a default number of vectors may take. Chosen by feel: a quarter is for kept graphs, a
quarter for matvecs."""


FEWER = "take fewer pairs, hvpkit.lanczos with a small ncv, or fewer parameters (wrt=)"
"""The remedy of solvers whose vectors follow the number of pairs."""


def vector_bytes(op: LinearOperator) -> int:
    """Return the bytes of a vector."""
    return op.n * op.dtype.itemsize


def vectors_that_fit(op: LinearOperator, share: float = BASIS_SHARE) -> float:
    """Return how many vectors fit into a share of the memory that is free on the operator's device."""
    return share * free_memory(op.device) // vector_bytes(op)


def check_room(op: LinearOperator, num_vectors: float, remedy: str) -> None:
    """Raise MemoryError if so many vectors do not fit, with what would in words.

    Args:
        op: the operator, on whose device they are.
        num_vectors: that a method keeps and works with.
        remedy: what to change, for the message.
    """
    needed, free = num_vectors * vector_bytes(op), free_memory(op.device)
    if needed <= free:
        return
    host = torch.device("cpu")
    elsewhere = "" if op.device == host else f" ({in_words(free_memory(host))} in host memory)"
    raise MemoryError(
        f"{num_vectors:.0f} vectors of {op.n:,} numbers in {str(op.dtype).removeprefix('torch.')} take "
        f"{in_words(needed)}, and {in_words(free)} are free on {op.device}{elsewhere}, room for "
        f"{free // vector_bytes(op):.0f}: {remedy}"
    )
