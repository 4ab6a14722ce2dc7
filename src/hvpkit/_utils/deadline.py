"""A time by which the work of a context must end: long loops check it between their parts.

A solver sets it and need not know what is inside; an operator checks it between batches and need not know who set it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DEADLINE = ContextVar("deadline", default=math.inf)


class DeadlineReached(Exception):
    """The deadline of the context has passed. Internal: who sets a deadline catches it."""


@contextmanager
def deadline(end: float) -> Iterator[None]:
    """Set the deadline of this context to ``end`` on the clock of ``time.perf_counter``, or leave an earlier one."""
    token = _DEADLINE.set(min(end, _DEADLINE.get()))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def current_deadline() -> float:
    """Return the deadline of this context on the clock of ``time.perf_counter``; infinite if there is none."""
    return _DEADLINE.get()


def has_deadline() -> bool:
    """Return True if this context has a deadline."""
    return _DEADLINE.get() < math.inf


def check_deadline() -> None:
    """Raise DeadlineReached if the deadline of the context has passed. No synchronisation with a device."""
    if time.perf_counter() >= _DEADLINE.get():
        raise DeadlineReached
