"""``hvpkit trace``: the trace of a Hessian, with its standard error."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.choices import TraceMethod
from hvpkit.cli.options import Checkpoint, CurvatureProblem
from hvpkit.cli.output import Output, saving_to, table
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.results.eigen import Status

NumMatvecs = Annotated[
    float, typer.Option("--num-matvecs", "--max-matvecs", help="The most passes over the data.")
]


@command(
    "hvpkit trace digits --num-matvecs 200",
    "hvpkit trace digits --num-matvecs 1000 --checkpoint trace.pt",
    "hvpkit trace problem.py:make --method xtrace --tol 0.01 --json",
)
def trace(
    problem: CurvatureProblem,
    output: Output,
    method: Annotated[TraceMethod, typer.Option(help="Estimator.")] = TraceMethod.HUTCHPP,
    num_matvecs: NumMatvecs = 100,
    tol: Annotated[
        float | None,
        typer.Option(help="Relative standard error to stop at. By default all passes are spent."),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None,
    checkpoint: Checkpoint = None,
) -> bool:
    """Estimate the trace of the full-data Hessian, with its standard error.

    Without --tol all passes are spent, and the exit code is 0.
    """
    output.prepare("trace.json", checkpoint=checkpoint)
    target, H = problem.operator()
    about, watch = problem.describe(target, H), ProgressLine("Trace")
    try:
        with saving_to(checkpoint):
            found = hk.trace(
                H,
                method=method,
                num_matvecs=num_matvecs,
                tol=tol,
                time_limit=time_limit,
                seed=problem.seed,
                monitor=watch,
                checkpoint=checkpoint,
            )
    except KeyboardInterrupt:
        output.write_partial("trace", watch.last, about)
        raise
    header = ("quantity", "value", "standard error", "probes", "passes")
    row = (f"{found.value:.6g}", f"{found.stderr:.2g}", f"{found.num_samples}", f"{found.num_matvecs:g}")
    record = {
        **asdict(found),
        "converged": found.converged,
        "method": method,
        "problem": about,
    }
    shown = [table(target.title, header, [("trace", *row)]), f"{found.status}: {found.message}."]
    output.write("trace", record, shown)
    return found.converged or found.status is Status.COMPLETED
