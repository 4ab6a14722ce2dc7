"""Signals that wait, and signals that raise: work is saved, and not torn, before they end a program."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a program; Windows has no SIGHUP."""

TERMINATING = tuple(number for number in SIGNALS if number != signal.SIGINT)
"""Those that raise nothing by themselves; Python raises KeyboardInterrupt for SIGINT."""


_WAITING: list[list[Callable[[], object]]] = []
"""What signals will do that arrived in each ``with signals_deferred()`` that is open, outer ones first."""


class Terminated(KeyboardInterrupt):
    """Raised where the program is when one of ``TERMINATING`` arrives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def terminating_signals_raised() -> Iterator[list[int]]:
    """Raise :class:`Terminated` for ``TERMINATING``, inside ``with``; handlers that somebody has set are kept.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Outside of the main thread nothing changes.
    Yields the signals whose default action this replaces.
    """
    ours: list[int] = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in TERMINATING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield ours
    finally:
        for number in ours:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def ending_after_cleanup() -> Iterator[None]:
    """Let ``except`` and ``finally`` inside ``with`` run before a signal ends the process by its default action."""
    ours: list[int] = []
    try:
        with terminating_signals_raised() as ours:
            yield
    except Terminated as error:
        if error.number in ours:
            signal.raise_signal(error.number)
        raise


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Handle signals that arrive inside ``with`` at its end, by the handlers that are set.

    Only ``SIGNALS`` with a handler of Python's wait: a default action, which kills, and an ignored signal stay. Outside
    of the main thread, where no handler runs, nothing changes.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    waiting: list[Callable[[], object]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(lambda: handlers[number](number, frame))

    _WAITING.append(waiting)
    try:
        for number in handlers:
            signal.signal(number, wait)
        yield
    finally:
        _WAITING[:] = [other for other in _WAITING if other is not waiting]
        for number, handler in handlers.items():
            if signal.getsignal(number) is wait:
                signal.signal(number, handler)
        for handle in waiting:
            handle()


def handle_waiting_signals() -> None:
    """Handle the signals that wait, here, where an exception from a handler does no harm."""
    for waiting in _WAITING:
        while waiting:
            waiting.pop(0)()
