"""``hvpkit blocks``: the spectra of the diagonal blocks of a Hessian, as those of its layers."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.choices import Mode
from hvpkit.cli.options import ModeOption, Problem
from hvpkit.cli.output import INTERRUPTED, Output, so_far, table
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.results.estimate import plus_minus


@command(
    "hvpkit blocks digits",
    "hvpkit blocks digits --density --out results",
    "hvpkit blocks problem.py:make --by 'layer1.*' --by 'layer2.*' --json",
)
def blocks(
    problem: Problem,
    output: Output,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="module, parameter, or a glob over parameter names, which may be repeated. Default: module."
        ),
    ] = None,
    tol: Annotated[float, typer.Option(help="Relative error of both ends of each block.")] = 1e-2,
    density: Annotated[
        bool, typer.Option("--density", help="Estimate the density of each block too.")
    ] = False,
    num_steps: Annotated[int, typer.Option(help="Lanczos steps of a density.")] = 100,
    max_matvecs: Annotated[float | None, typer.Option(help="The most passes over the data.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None,
    mode: ModeOption = Mode.AUTO,
) -> bool:
    """Find both ends and the trace of each diagonal block of the Hessian, in passes that all blocks share."""
    output.prepare("blocks.json", "blocks.png")
    target, watch = problem.load(), ProgressLine("Blocks")
    about = {"target": problem.target, "title": target.title, "seed": problem.seed}
    try:
        found = hk.blocks(
            target.loss_fn,
            target.params,
            target.data,
            "module" if not by else by[0] if by in (["module"], ["parameter"]) else by,
            density=density,
            tol=tol,
            num_steps=num_steps,
            max_matvecs=max_matvecs,
            time_limit=time_limit,
            mode=mode.value,
            seed=problem.seed,
            monitor=watch,
        )
    except KeyboardInterrupt:
        if isinstance(watch.last, hk.BlocksProgress):
            _write_so_far(output, watch.last, about)
        raise
    rows = [_row(block) for block in found.blocks]
    header = ("block", "n", "smallest", "largest", "trace", "status")
    record = {
        "blocks": [_record(block) for block in found.blocks],
        "num_passes": found.num_passes,
        "seconds": found.seconds,
        "converged": found.converged,
        "problem": about,
    }
    close = f"{found.num_passes:g} passes, {found.seconds:.3g} s for all blocks."
    shown = [table(target.title, header, rows), close]
    output.write("blocks", record, shown, partial(_draw, found, density))
    return found.converged


def _write_so_far(output: Output, entry: hk.BlocksProgress, about: dict[str, Any]) -> None:
    """Print and write both ends of each block at the last pass of an interrupted command."""
    rows = [
        (
            name,
            f"{ends.smallest:.4g}",
            f"{ends.smallest_bound:.1g}",
            f"{ends.largest:.4g}",
            f"{ends.largest_bound:.1g}",
        )
        for name, ends in entry.ends.items()
    ]
    header = ("block", "smallest", "error bound", "largest", "error bound")
    record = {
        "blocks": [{"name": name, **so_far(ends)} for name, ends in entry.ends.items()],
        "num_passes": entry.num_matvecs,
        "seconds": entry.seconds,
        **INTERRUPTED,
        "problem": about,
    }
    close = f"{entry.num_matvecs:g} passes, {entry.seconds:.3g} s; {INTERRUPTED['message']}."
    output.write_so_far("blocks", record, [table(f"{about['title']}, so far", header, rows), close])


def _row(block: hk.BlockSpectrum) -> tuple[str, ...]:
    """Return the line of a block in the table."""
    ends = [f"{end.value:.4g}" for end in (block.extremes.smallest, block.extremes.largest)]
    assert block.trace is not None
    trace = plus_minus(block.trace.value, block.trace.stderr, digits=4)
    return block.name, f"{block.n:,}", *ends, trace, f"{block.extremes.status}"


def _record(block: hk.BlockSpectrum) -> dict[str, Any]:
    """Return a block for JSON."""
    assert block.trace is not None
    trace = {"value": block.trace.value, "stderr": block.trace.stderr}
    return {"name": block.name, "num_parameters": block.n, **block.extremes.to_dict(), "trace": trace}


def _draw(found: hk.BlockSpectra, density: bool) -> object:
    """Draw the density of each block, or both ends."""
    from hvpkit import plots

    if density:
        return found.plot()[0].figure
    return plots.layers({block.name: block.extremes for block in found.blocks})
