"""How much a command says: ``--quiet`` and ``--verbose``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_QUIET, _VERBOSE = ContextVar("quiet", default=False), ContextVar("verbose", default=False)


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set how much is said inside ``with``."""
    tokens = _QUIET.set(quiet), _VERBOSE.set(verbose)
    try:
        yield
    finally:
        _QUIET.reset(tokens[0])
        _VERBOSE.reset(tokens[1])


def is_quiet() -> bool:
    """Return True if results and errors are all that is said."""
    return _QUIET.get()


def is_verbose() -> bool:
    """Return True if more than usual is said."""
    return _VERBOSE.get()
