"""Interruption by signals: SIGTERM and SIGHUP end a command as SIGINT does, so that it prints its partial result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that raise; Windows has no SIGHUP. Python itself raises KeyboardInterrupt for SIGINT."""


class Terminated(KeyboardInterrupt):
    """Raised where the program is when one of ``SIGNALS`` arrives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """Return the signal that caused an interruption."""
    return signal.Signals(error.number) if isinstance(error, Terminated) else signal.SIGINT


@contextmanager
def terminating_signals_raised() -> Iterator[None]:
    """Raise :class:`Terminated` for ``SIGNALS``, inside ``with``; handlers that somebody has set are kept.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Outside of the main thread nothing changes.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)
