"""Plans: time and memory of work before it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvpkit._utils.memory import in_words
from hvpkit._utils.validation import check_choice
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns

HEADER = ("call", "method", "passes", "time", "range", "memory")
"""Over the rows of a plan's table; an exclamation mark says that memory is short."""


@dataclass(frozen=True)
class Range:
    """A number that is known in advance only roughly.

    Attributes:
        low, high: it is rarely outside of these.
        expected: in the middle of what was measured.
    """

    low: float
    expected: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def scaled(self, low: float, expected: float, high: float) -> Range:
        """Return the range with each number multiplied by its own factor."""
        return Range(self.low * low, self.expected * expected, self.high * high)

    def at_most(self, limit: float) -> Range:
        """Return the range of a number that cannot be more than ``limit``."""
        return Range(min(self.low, limit), min(self.expected, limit), min(self.high, limit))


@dataclass(frozen=True)
class PlannedTask:
    """Time and memory of one call.

    Attributes:
        call: ``"extremes"``, ``"density"`` or ``"trace"``.
        method: how, in words.
        passes: full-data matvecs.
        seconds: wall time.
        num_vectors: that it takes memory for.
        num_bytes: of these vectors.
        remedy: what to change so that it fits into memory; None: it fits.
    """

    call: str
    method: str
    passes: Range
    seconds: Range
    num_vectors: int
    num_bytes: float
    remedy: str | None


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """Time and memory of the usual questions about an operator, before they are asked.

    Attributes:
        operator: the operator, in words.
        n: dimension.
        first_pass: seconds of each of the first two passes.
        later_pass: seconds of each pass after that, when graphs are kept where memory allows.
        product_bytes: memory of a matvec beside its vectors: of the largest batch, at its peak.
        graph_bytes: memory of graphs kept between passes.
        graphs_kept: share of the batches whose graphs are kept.
        free_bytes: free where vectors are kept, before any of this.
        place: the device of the vectors.
        num_batches: number of batches timed; None: whole matvecs were.
        tasks: the calls.
        remedy: what to change where a matvec itself does not fit into memory; None: it does.
    """

    operator: str
    n: int
    first_pass: Range
    later_pass: Range
    product_bytes: float
    graph_bytes: float
    graphs_kept: float
    free_bytes: float
    place: str
    num_batches: int | None
    tasks: tuple[PlannedTask, ...]
    remedy: str | None = None

    @property
    def fits(self) -> bool:
        """True if all of it fits into memory."""
        return self.remedy is None and all(task.remedy is None for task in self.tasks)

    def task(self, call: str) -> PlannedTask:
        """Return the task of this call.

        Raises:
            ValueError: there is none.
        """
        found = {task.call: task for task in self.tasks}
        check_choice("call", call, tuple(found))
        return found[call]

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text for each task, under :data:`HEADER`."""
        return [
            (
                task.call,
                task.method,
                _in_text(task.passes),
                time_in_words(task.seconds.expected),
                _times(task.seconds.low, task.seconds.high),
                in_words(task.num_bytes) if task.remedy is None else f"{in_words(task.num_bytes)}!",
            )
            for task in self.tasks
        ]

    def notes(self) -> list[str]:
        """Return lines on the time of a pass, on memory, and on what to change."""
        first, later = (time_in_words(seconds.expected) for seconds in (self.first_pass, self.later_pass))
        kept = f" (graphs of {self.graphs_kept:.0%} of the batches are kept)" if self.graphs_kept else ""
        pace = f"a pass takes {first}" + (f", from the third on {later}{kept}" if later != first else "")
        timed = "matvecs" if self.num_batches is None else f"{self.num_batches} batches"
        memory = [f"{in_words(self.free_bytes)} are free ({self.place})"]
        if self.product_bytes:
            memory.append(f"a matvec takes {in_words(self.product_bytes)}")
        if self.graph_bytes:
            memory.append(f"kept graphs take {in_words(self.graph_bytes)}")
        remedies = [("a matvec", self.remedy), *((task.call, task.remedy) for task in self.tasks)]
        sets = ", ".join(f"{task.call} {task.num_vectors}" for task in self.tasks)
        return [
            f"{pace}, by {timed} timed",
            f"vectors in memory: {sets}",
            f"memory: {', '.join(memory)}",
            *(f"{name} does not fit: {remedy}" for name, remedy in remedies if remedy is not None),
        ]

    def summary(self) -> str:
        """Return a table of the calls, and lines on time, memory and what to change."""
        table = [HEADER, *self.rows()]
        widths = [max(len(row[place]) for row in table) for place in range(len(HEADER))]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([self.operator, *lines, *self.notes()])

    def _columns(self) -> Columns:
        ranges = {
            f"{name}_{end}" if end != "expected" else name: [
                getattr(getattr(task, name), end) for task in self.tasks
            ]
            for name in ("passes", "seconds")
            for end in ("low", "expected", "high")
        }
        others = {
            name: [getattr(task, name) for task in self.tasks]
            for name in ("call", "method", "num_vectors", "num_bytes", "remedy")
        }
        return {"call": others.pop("call"), "method": others.pop("method"), **ranges, **others}

    def __repr__(self) -> str:
        times = (f"{task.call} {time_in_words(task.seconds.expected)}" for task in self.tasks)
        return f"<Plan: {', '.join(times)}>"


def _in_text(passes: Range) -> str:
    ends = f" ({passes.low:.0f}-{passes.high:.0f})" if passes.low < passes.high else ""
    return f"{passes.expected:.0f}{ends}"


def _times(low: float, high: float) -> str:
    """Return two times as text, with one unit where they have the same."""
    first, last = time_in_words(low), time_in_words(high)
    unit = last.split()[-1]
    return f"{first.removesuffix(f' {unit}')} to {last}"


def time_in_words(seconds: float) -> str:
    """Return a time as text.

    Example:
        >>> [time_in_words(x) for x in (0.0123, 4.2, 95, 7000, 300000)]
        ['0.012 s', '4.2 s', '1.6 min', '1.9 h', '3.5 days']
    """
    if not math.isfinite(seconds):
        return "unknown"
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
