"""Output of commands: tables or JSON on standard output, files, and messages on standard error."""

from __future__ import annotations

import json as json_format
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from hvpkit._utils.files import atomic_write, beside, check_file, check_folder, reason
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.cli.verbosity import is_quiet
from hvpkit.results.eigen import ExtremeResult

MAX_UNBROKEN = 28
"""Characters of a cell that a table keeps on one line: an interval of two numbers with five digits and exponents."""


def print_message(text: str) -> None:
    """Print a line on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"hvpkit: {text}", markup=False, highlight=False)


class _ToStderr:
    """A stand-in for standard output that writes to standard error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


_RESULTS: list[TextIO] = []
"""The real standard output, while what is printed goes to standard error."""


@contextmanager
def diverted_stdout() -> Iterator[None]:
    """Send what is printed to standard error; :func:`results_stream` gives the real standard output."""
    _RESULTS.append(sys.stdout)
    diverted: Any = _ToStderr()
    try:
        with redirect_stdout(diverted):
            yield
    finally:
        _RESULTS.pop()


def results_stream() -> TextIO:
    """Return the standard output that results go to."""
    return _RESULTS[-1] if _RESULTS else sys.stdout


def to_plain(value: Any) -> Any:
    """Convert to numbers, strings, lists and dicts for strict JSON; NaN and infinity become None."""
    if isinstance(value, Tensor):
        return to_plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(record: Any, indent: int | None = None) -> str:
    """Return a record as strict JSON."""
    return json_format.dumps(to_plain(record), allow_nan=False, indent=indent)


def write_json(path: Path, record: Any) -> None:
    """Write a record as strict JSON, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(as_json(record, indent=2) + "\n", encoding="utf-8")


INTERRUPTED = {
    "status": "interrupted",
    "converged": False,
    "message": "interrupted: values so far, not verified",
}


def so_far(entry: Any) -> dict[str, Any]:
    """Return a record of the last progress entry of an interrupted solve."""
    known = {key: value for key, value in asdict(entry).items() if not isinstance(value, Tensor)}
    return known | INTERRUPTED


@contextmanager
def saving_to(checkpoint: Path | None) -> Iterator[None]:
    """Say, if interrupted, where the work is saved."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is not None and any(path.exists() for path in (checkpoint, beside(checkpoint, "ends"))):
            print_message(f"saved in {checkpoint}; the same command continues from it")
        raise


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make a table with its first column aligned left and the others right."""
    result = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    rows = list(rows)
    for place, column in enumerate(header):
        longest = max((len(row[place]) for row in rows), default=0)
        # a narrow terminal breaks headers and long lists, but no number or interval
        unbroken = len(column) <= longest <= MAX_UNBROKEN
        result.add_column(column, justify="right" if place else "left", no_wrap=unbroken)
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def write_picture(path: Path, draw: Callable[[], Any]) -> None:
    """Write a picture as a PNG file, whole or not at all; ``draw`` returns its figure or axes."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    drawn = draw()
    figure = getattr(drawn, "figure", None) or drawn
    try:
        with atomic_write(path) as draft:
            figure.savefig(draft, dpi=150, format="png")
    finally:
        pyplot.close(figure)


@dataclass(frozen=True)
class Output:
    """Options for where results go."""

    PANEL: ClassVar = "Output"

    json: Annotated[
        bool, typer.Option("--json", help="Print strict JSON on standard output and nothing else.")
    ] = False
    out: Annotated[
        Path | None, typer.Option(help="Folder to write results to: JSON and pictures.", file_okay=False)
    ] = None

    def prepare(self, *names: str, checkpoint: Path | None = None) -> None:
        """Make the folder, and try the files of these names and the checkpoint, before anything is computed.

        Raises:
            ImportError: matplotlib, which draws the pictures, is missing.
            ValueError: the folder cannot be made, or a file cannot be written.
        """
        if checkpoint is not None:
            check_file("--checkpoint", checkpoint)
        if self.out is not None:
            if find_spec("matplotlib") is None:
                raise ImportError("--out draws with matplotlib: pip install 'hvpkit[plots]', or leave it out")
            check_folder("--out", self.out)
            for name in names:
                check_file("--out", self.out / name)

    def write(
        self,
        name: str,
        record: Any,
        shown: Sequence[Any],
        draw: Callable[[], Any] | None = None,
        others: Mapping[str, Callable[[Path], object]] = {},
    ) -> None:
        """Print a result, as JSON or as the items ``shown``, and then write ``name.json`` and ``name.png``.

        Args:
            name: of the files.
            record: for JSON.
            shown: tables and lines to print.
            draw: draws the picture, which is written if this is given.
            others: further files by name, with the functions that write them.

        Raises:
            ValueError: a file cannot be written; what could be was, and the result is printed.
        """
        self.print(record, *shown)
        if self.out is None:
            return
        written = {f"{name}.json": lambda path: write_json(path, record), **others}
        if draw is not None:
            written[f"{name}.png"] = lambda path: write_picture(path, draw)
        failed = {}
        for file, write in written.items():
            try:
                write(self.out / file)
            except OSError as error:
                failed[file] = error
        if len(failed) < len(written):
            self.print_written(*(file for file in written if file not in failed))
        if failed:
            whys = ", ".join(f"{self.out / file} ({reason(error)})" for file, error in failed.items())
            raise ValueError(f"--out: could not write {whys}; the result is printed above")

    def write_so_far(self, name: str, record: Any, shown: Sequence[Any]) -> None:
        """Print and write what an interrupted command has found; where it cannot be written, say so and go on."""
        try:
            self.write(name, record, shown)
        except ValueError as error:
            print_message(str(error))

    def print_written(self, *names: str) -> None:
        """Print which files were written into the folder; on standard error if standard output is for JSON."""
        *first, last = [str((self.out or Path()) / name) for name in names]
        text = f"Wrote {', '.join(first)} and {last}." if first else f"Wrote {last}."
        if is_quiet():
            return
        if self.json:
            print_message(text)
        else:
            self.print(None, text)

    def write_partial(self, name: str, entry: Any, problem: dict[str, Any]) -> None:
        """Print and write the last progress entry of an interrupted command; without one do nothing."""
        if entry is None:
            return
        record = so_far(entry)
        known = {key: record[key] for key in record if key not in INTERRUPTED}
        rows = [
            (key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in known.items()
        ]
        shown = [table(f"{problem['title']}, so far", (name, "value"), rows), f"{record['message']}."]
        self.write_so_far(name, {**record, "problem": problem}, shown)

    @contextmanager
    def measuring(self, place: dict[str, Any], name: str, watch: ProgressLine) -> Iterator[None]:
        """Print, if interrupted, the values so far of one measurement of several; ``place`` says which it is."""
        try:
            yield
        except KeyboardInterrupt:
            if watch.last is not None:
                text = f"{name:<16}  {watch.last}  {watch.last.num_matvecs:g} passes  interrupted"
                self.print({**place, **so_far(watch.last)}, text)
            raise

    def print(self, record: Any, *shown: Any) -> None:
        """Print a line of JSON, or the items ``shown``, on standard output."""
        if self.json:
            print(as_json(record), file=results_stream(), flush=True)
            return
        console = Console(file=results_stream())
        for item in shown:
            console.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))


def one_line(ex: ExtremeResult) -> str:
    """Return both ends on one line."""
    pairs = [
        f"{name} {pair.value:.4g} in [{pair.interval.lower:.4g}, {pair.interval.upper:.4g}]"
        for name, pair in (("smallest", ex.smallest), ("largest", ex.largest))
    ]
    return f"{pairs[0]}  {pairs[1]}  {ex.num_matvecs:g} passes" + ("" if ex.converged else f"  {ex.status}")
