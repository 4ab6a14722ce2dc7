"""A line on standard error that shows a solve's progress."""

from __future__ import annotations

from rich.console import Console
from rich.status import Status

from hvpkit.results.blocks import BlocksProgress
from hvpkit.results.eigen import Progress
from hvpkit.results.estimate import EstimateProgress
from hvpkit.results.linear import SolveProgress
from hvpkit.solvers.driver import time_left

Entry = Progress | EstimateProgress | SolveProgress | BlocksProgress
"""What monitors are called with."""


class ProgressLine:
    """A monitor that shows the last entry of a solve's history on a terminal's standard error, inside ``with``.

    Attributes:
        last: the last entry, or None.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.status: Status | None = None
        self.last: Entry | None = None

    def __enter__(self) -> ProgressLine:
        # a new one for each solve: rich's Status, started again, erases lines that were printed since
        self.status = Console(stderr=True).status(self.text)
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, entry: Entry) -> None:
        """Keep an entry of a solve, and show it."""
        self.last = entry
        if self.status is not None:
            self.status.update(f"{self.text}: {entry}, {entry.num_matvecs:g} passes{time_left(entry)}")
