"""A line on standard error that shows a solve's progress."""

from __future__ import annotations

from rich.console import Console
from rich.status import Status

from hvpkit.results.eigen import Progress


class ProgressLine:
    """A monitor that shows the last entry of a solve's history on a terminal's standard error, inside ``with``.

    Attributes:
        last: the last entry, or None.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.status: Status | None = None
        self.last: Progress | None = None

    def __enter__(self) -> ProgressLine:
        # a new one for each solve: rich's Status, started again, erases lines that were printed since
        self.status = Console(stderr=True).status(self.text)
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, entry: Progress) -> None:
        """Keep and show an entry."""
        self.last = entry
        if self.status is not None:
            low, high = (
                f"{value:.4g} ± {bound:.1g}"
                for value, bound in (
                    (entry.smallest, entry.smallest_bound),
                    (entry.largest, entry.largest_bound),
                )
            )
            self.status.update(f"{self.text}: {low} and {high}, {entry.num_matvecs:g} passes")
