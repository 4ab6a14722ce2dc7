"""What a command says: tables or JSON on standard output, files, and all else on standard error."""

from __future__ import annotations

import json as json_format
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from torch import Tensor

from hvpkit._utils.files import written_whole
from hvpkit.results.eigen import ExtremeResult, Progress
from hvpkit.results.estimate import EstimateProgress


def say(text: str) -> None:
    """A line on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"hvpkit: {text}", markup=False, highlight=False)


class Aside:
    """Standard error in the place of standard output, which stays at hand as ``results``."""

    def __init__(self, results: TextIO) -> None:
        self.results = results

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts for strict JSON; what is not finite becomes None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(record: Any, indent: int | None = None) -> str:
    """Strict JSON."""
    return json_format.dumps(plain(record), allow_nan=False, indent=indent)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table, its first column to the left and the others to the right."""
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for place, column in enumerate(header):
        made.add_column(column, justify="right" if place else "left")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def draw(path: Path, picture: Callable[[], Any]) -> None:
    """A picture as a PNG file, written whole; ``picture`` returns its figure or axes."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    drawn = picture()
    figure = getattr(drawn, "figure", None) or drawn
    try:
        with written_whole(path) as draft:
            figure.savefig(draft, dpi=150, format="png")
    finally:
        pyplot.close(figure)


@dataclass(frozen=True)
class Output:
    """Where results go."""

    json: Annotated[bool, typer.Option("--json", help="Strict JSON on standard output and nothing else.")] = (
        False
    )
    out: Annotated[Path | None, typer.Option(help="Folder for files: JSON, pictures.", file_okay=False)] = (
        None
    )

    def prepare(self) -> None:
        """Makes the folder, before anything is computed.

        Raises:
            ImportError: there will be a picture, and matplotlib is missing.
            OSError: the folder cannot be made.
        """
        if self.out is not None:
            if find_spec("matplotlib") is None:
                raise ImportError("--out draws with matplotlib: pip install 'hvpkit[plots]', or leave it out")
            self.out.mkdir(parents=True, exist_ok=True)

    def give(
        self, name: str, record: Any, shown: Sequence[Any], picture: Callable[[], Any] | None = None
    ) -> None:
        """Prints a record or what is shown of it, and writes ``name.json`` and ``name.png``."""
        if self.out is not None:
            with written_whole(self.out / f"{name}.json") as draft:
                draft.write_text(as_json(record, indent=2) + "\n", encoding="utf-8")
        self.print(record, *shown)
        if self.out is not None and picture is not None:
            draw(self.out / f"{name}.png", picture)

    def print(self, record: Any, *shown: Any) -> None:
        """A line of JSON, or what is shown, on standard output."""
        if self.json:
            print(as_json(record), file=getattr(sys.stdout, "results", sys.stdout), flush=True)
            return
        console = Console()
        for item in shown:
            console.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))


def ends(ex: ExtremeResult) -> str:
    """Both ends on one line."""
    pairs = [
        f"{name} {pair.value:.4g} in [{pair.interval.lower:.4g}, {pair.interval.upper:.4g}]"
        for name, pair in (("smallest", ex.smallest), ("largest", ex.largest))
    ]
    return f"{pairs[0]}  {pairs[1]}  {ex.num_matvecs:g} passes" + ("" if ex.converged else f"  {ex.status}")


class Watch:
    """A monitor that keeps the last entry; inside ``with``, a line on a terminal's standard error follows it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.status: Status | None = None
        self.last: Progress | None = None

    def __enter__(self) -> Watch:
        # a new one each time: one that is started again would erase what was printed since
        self.status = Console(stderr=True).status(self.text)
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, entry: Progress | EstimateProgress) -> None:
        """Keep and show an entry of a history."""
        self.last = entry if isinstance(entry, Progress) else None
        if self.status is not None:
            self.status.update(f"{self.text}: {entry}, {entry.num_matvecs:g} passes")
