from __future__ import annotations

import signal
import threading

import pytest

from hvpkit._utils.signals import SIGNALS, signals_deferred


@pytest.mark.parametrize("number", SIGNALS)
def test_handler_runs_at_the_end(number: int) -> None:
    seen: list[str] = []
    before = signal.signal(number, lambda *_: seen.append("handled"))
    try:
        mine = signal.getsignal(number)
        with signals_deferred():
            signal.raise_signal(number)
            seen.append("finished")
        assert seen == ["finished", "handled"]
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


def test_ignored_signals_and_default_actions_stay() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with signals_deferred():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_are_left_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with signals_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
