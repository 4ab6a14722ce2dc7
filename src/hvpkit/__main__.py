"""Entry point of the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Make ``sys.stdout`` the only way to standard output; descriptor 1 is standard error from here on.

    So what C code, child processes and exit handlers of a target print does not get between results.
    """
    own = sys.stdout
    own.flush()
    try:
        results = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    sys.stdout = open(results, "w", encoding=own.encoding, errors=own.errors)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = own


def main() -> None:
    """Run the command line ``hvpkit``; exit with code 2 and a message if its packages are not installed."""
    try:
        from hvpkit.cli import app
    except ImportError as error:
        print(f"hvpkit: {error.name} is missing: pip install 'hvpkit[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    with _stdout_for_results():
        app(prog_name="hvpkit")


if __name__ == "__main__":
    main()
