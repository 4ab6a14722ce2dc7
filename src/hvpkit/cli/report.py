"""``hvpkit report``: both ends and the density of a Hessian on one HTML page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.density import NumProbes, NumSteps
from hvpkit.cli.extremes import find_both_ends, result_items
from hvpkit.cli.options import CurvatureProblem, Solve
from hvpkit.cli.output import Output
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit report digits --out results",
    "hvpkit report cifar10 --arch c1 --data-dir data --landscape --out results",
)
def report(
    problem: CurvatureProblem,
    solve: Solve,
    output: Output,
    num_steps: NumSteps = 40,
    num_probes: NumProbes = 2,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Also draw the loss on the plane of both eigenvectors.")
    ] = False,
) -> bool:
    """Write both ends and the spectral density to one page, report.html, and their numbers to report.json.

    The files go to the folder --out, by default the working folder.
    """
    output = output if output.out is not None else replace(output, out=Path())
    output.prepare()
    target, H = problem.operator()
    about = problem.describe(target, H)
    partial = {"status": "interrupted", "converged": False, "problem": about}
    ex = find_both_ends(
        H,
        solve,
        problem.seed,
        lambda record, shown: output.write("report", {"extremes": record, **partial}, shown),
    )
    try:
        with ProgressLine("Density") as watch:
            density = hk.spectral_density(
                H, num_steps=num_steps, num_probes=num_probes, seed=problem.seed, monitor=watch
            )
    except KeyboardInterrupt:
        output.write("report", {"extremes": ex.to_dict(), **partial}, result_items(target.title, ex))
        raise
    assert output.out is not None
    path = hk.report(H, ex, density, landscape=landscape, title=target.title, path=output.out / "report.html")
    record = {
        "extremes": ex.to_dict(),
        "density": density,
        "problem": about,
        "path": str(path),
    }
    output.write("report", record, result_items(target.title, ex), others=("report.html",))
    return ex.converged
