"""``hvpkit track``: both ends of the spectrum at each of several checkpoints."""

from __future__ import annotations

import glob
import json as json_format
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hvpkit.cli.application import command
from hvpkit.cli.choices import Mode
from hvpkit.cli.options import ModeOption, Solve, Source
from hvpkit.cli.output import Output, as_json, one_line, write_json, write_picture
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.cli.ranks import shared
from hvpkit.cli.targets import Network
from hvpkit.cli.train import SPECTRUM
from hvpkit.train import SpectrumTracker


@command(
    "hvpkit track digits --checkpoints 'run/epoch-*.pt' --out tracked",
    "hvpkit track cifar10 --arch c1 --data-dir data --checkpoints run/epoch-*.pt",
    "hvpkit track problem.py:make --checkpoints 'step-*.pt' --out tracked",
)
def track(
    source: Source,
    solve: Solve,
    output: Output,
    checkpoints: Annotated[
        list[str], typer.Option(help="A checkpoint, or a glob in quotes. May be repeated.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINTS]", help="Further checkpoints.")
    ] = None,
    mode: ModeOption = Mode.AUTO,
) -> bool:
    """Find both ends of the Hessian at each of several checkpoints.

    Checkpoints are ordered by the numbers in their names: epoch-2.pt before epoch-10.pt. With --out, each result is
    added to spectrum.jsonl at once, and the same command, also with further checkpoints, continues after the last one;
    spectrum.png is drawn at the end.
    """
    output.prepare("track.json", SPECTRUM, "spectrum.png")
    paths = _sorted([*checkpoints, *(more or [])])
    target = source.find()
    if output.out is not None:
        _claim(
            output.out, {"paths": [str(path) for path in paths], **vars(source), **vars(solve), "mode": mode}
        )
    watch, all_converged = ProgressLine("Both ends"), True
    options: dict[str, Any] = {
        "mode": mode,
        **vars(solve),
        "seed": source.seed,
        "path": output.out / SPECTRUM if output.out else None,
        "monitor": watch,
    }
    tracker = (
        SpectrumTracker.for_module(
            target.criterion, shared(target.data), batchnorm=source.batchnorm, **options
        )
        if isinstance(target, Network)
        else SpectrumTracker(target.loss_fn, shared(target.data), **options)
    )
    known = dict(tracker.results)
    for step, path in enumerate(paths):
        ex = known.get(step)
        if ex is None:
            at = target.load(path)
            with output.measuring({"step": step, "checkpoint": str(path)}, path.name, watch):
                ex = tracker(at.model if isinstance(at, Network) else at.params, step=step)
        assert ex is not None
        output.print(
            {"step": step, "checkpoint": str(path), **ex.to_dict()}, f"{path.name:<16}  {one_line(ex)}"
        )
        all_converged &= ex.converged
    if output.out is not None:
        tracker.save()
        write_picture(output.out / "spectrum.png", lambda: tracker.plot(unit="checkpoint"))
        output.print_written("track.json", SPECTRUM, "spectrum.png")
    return all_converged


def _sorted(patterns: list[str]) -> list[Path]:
    """Return the files that match, each once, ordered by the numbers in their names.

    Raises:
        ValueError: a pattern matches no file.
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
    """Write into a folder which checkpoints are tracked there, and with which options.

    Raises:
        ValueError: the folder holds the track of others. Checkpoints may be added after those tracked before.
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
                f"--out: {folder} holds the track of other checkpoints or options; name another folder"
            )
    elif (folder / SPECTRUM).exists():
        raise ValueError(f"--out: {folder} has the {SPECTRUM} of something else; name another folder")
    write_json(path, record)
