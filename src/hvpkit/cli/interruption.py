"""The signal that interrupted a command."""

from __future__ import annotations

import signal

from hvpkit._utils.signals import Terminated


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """Return the signal that caused an interruption."""
    return signal.Signals(error.number) if isinstance(error, Terminated) else signal.SIGINT
