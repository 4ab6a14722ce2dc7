"""The progress bar of commands."""

from __future__ import annotations

from typing import Any

from hvpkit.cli.verbosity import is_quiet
from hvpkit.solvers.monitors import ProgressBar


class ProgressLine(ProgressBar):
    """The library's progress bar, on terminals only, and gone at the end.

    Attributes:
        last: the last entry of the last solve, or None.
    """

    def __init__(self, text: str) -> None:
        super().__init__(desc=text, leave=False, disable=True if is_quiet() else None)
        self.last: Any = None

    def begin(self) -> None:
        """Open the bar, and forget the solve before."""
        self.last = None
        super().begin()

    def __call__(self, entry: Any) -> None:
        """Keep an entry of a solve, and show it."""
        super().__call__(entry)
        self.last = entry
