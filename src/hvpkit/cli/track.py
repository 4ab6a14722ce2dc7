"""``hvpkit track``: both ends at each of several checkpoints."""

from __future__ import annotations

import glob
import json as json_format
import re
from pathlib import Path
from typing import Annotated

import typer
from torch.nn import functional as F

from hvpkit._utils.files import atomic_write
from hvpkit.cli.app import command
from hvpkit.cli.checkpoints import load_into
from hvpkit.cli.options import Model, Solve
from hvpkit.cli.output import Output, Watch, as_json, draw, ends
from hvpkit.cli.train import SPECTRUM, plotted
from hvpkit.train import SpectrumTracker


@command(
    "hvpkit track digits --checkpoints 'run/epoch-*.pt' --out tracked",
    "hvpkit track cifar10 --arch c1 --data-dir data --checkpoints run/epoch-*.pt --json",
)
def track(
    model: Model,
    solve: Solve,
    output: Output,
    checkpoints: Annotated[list[str], typer.Option(help="Checkpoint or quoted glob. May be repeated.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[CHECKPOINTS]", help="Further ones.")] = None,
) -> bool:
    """Both ends at each checkpoint of a built-in's network, each solve starting from the one before.

    Checkpoints go by the numbers in their names: epoch-2.pt before epoch-10.pt. With --out, spectrum.jsonl is written
    as they are done, and the same command, also with further checkpoints, goes on after it; spectrum.png at the end.
    """
    output.prepare()
    paths = _sorted([*checkpoints, *(more or [])])
    problem = model.load()
    if output.out is not None:
        _claim(output.out, {"paths": [str(path) for path in paths], **vars(model), **vars(solve)})
    watch, all_converged = Watch("Both ends"), True
    tracker = SpectrumTracker.for_module(
        F.cross_entropy,
        problem.data,
        **vars(solve),
        seed=model.seed,
        path=output.out / SPECTRUM if output.out else None,
        monitor=watch,
    )
    known = dict(tracker.results)
    for step, path in enumerate(paths):
        ex = known.get(step)
        if ex is None:
            load_into(problem.model, path)
            with watch:
                ex = tracker(problem.model, step=step)
        assert ex is not None
        output.print({"step": step, "checkpoint": str(path), **ex.to_dict()}, f"{path.name:<16}  {ends(ex)}")
        all_converged &= ex.converged
    if output.out is not None:
        draw(output.out / "spectrum.png", lambda: plotted(tracker, "checkpoint"))
    return all_converged


def _sorted(patterns: list[str]) -> list[Path]:
    """The files that names and globs stand for, each once, by the numbers in their names.

    Raises:
        ValueError: one stands for none.
    """
    found: set[Path] = set()
    for pattern in patterns:
        files = glob.glob(pattern)
        if not files:
            raise ValueError(f"checkpoints: there is no file {pattern}")
        found |= {Path(file) for file in files}
    return sorted(
        found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(path))]
    )


def _claim(folder: Path, asked: dict[str, object]) -> None:
    """Says in a folder what is tracked there.

    Raises:
        ValueError: it is something else; further checkpoints after the old ones are not.
    """
    path = folder / "track.json"
    record = json_format.loads(
        as_json({name: str(v) if isinstance(v, Path) else v for name, v in asked.items()})
    )
    if path.exists():
        theirs = json_format.loads(path.read_text(encoding="utf-8"))
        same = all(theirs.get(name) == value for name, value in record.items() if name != "paths")
        if not same or record["paths"][: len(theirs["paths"])] != theirs["paths"]:
            raise ValueError(
                f"out: {folder} holds the track of other checkpoints or options; name another folder"
            )
    elif (folder / SPECTRUM).exists():
        raise ValueError(f"out: {folder} has the {SPECTRUM} of something else; name another folder")
    with atomic_write(path) as draft:
        draft.write_text(as_json(record, indent=2) + "\n", encoding="utf-8")
