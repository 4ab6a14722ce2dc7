"""The monitor of the work of a context: more than a function of entries, if it has the methods for that.

Who begins the work sets it, and need not know what is inside; an operator tells it of batches and need not know who
listens. Each of these methods is optional:

- ``begin()`` and ``end()``: of a solve, however it ends; those inside it are parts of it.
- ``advance(num_passes, stage)``: after each batch, with its share of a pass over the full data, and the stage in words.
- ``expect(num_passes)``: how many more passes are likely, infinite if that is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_MONITOR = ContextVar[Any]("monitor", default=None)


@contextmanager
def monitored(monitor: object) -> Iterator[None]:
    """Tell a monitor of the work inside ``with``; not if it is None, or another one is told already."""
    if monitor is None or _MONITOR.get() is not None:
        yield
        return
    token = _MONITOR.set(monitor)
    try:
        _tell("begin")
        yield
    finally:
        try:
            _tell("end")
        finally:
            _MONITOR.reset(token)


def advance(num_passes: float, stage: str) -> None:
    """Tell the monitor of the context that a batch is done. No synchronisation with a device."""
    _tell("advance", num_passes, stage)


def expect(num_passes: float) -> None:
    """Tell the monitor of the context how many more passes are likely."""
    _tell("expect", num_passes)


def _tell(name: str, *values: Any) -> None:
    method = getattr(_MONITOR.get(), name, None)
    if method is not None:
        method(*values)
