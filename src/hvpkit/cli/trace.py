"""``hvpkit trace``: the trace, with its standard error."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.app import command
from hvpkit.cli.options import HessianProblem
from hvpkit.cli.output import Output, Watch, table
from hvpkit.results.eigen import Status


@command(
    "hvpkit trace digits --num-matvecs 200",
    "hvpkit trace problem.py:make --method xtrace --tol 0.01 --json",
)
def trace(
    problem: HessianProblem,
    output: Output,
    method: Annotated[str, typer.Option(help="hutchinson, hutch++ or xtrace.")] = "hutch++",
    num_matvecs: Annotated[
        float, typer.Option("--num-matvecs", "--max-matvecs", help="Passes over the data, at most.")
    ] = 100,
    tol: Annotated[
        float | None,
        typer.Option(help="Stop at this relative standard error. By default all passes are spent."),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds, at most.")] = None,
) -> bool:
    """The trace of the full-data Hessian, with its standard error.

    Without --tol it has converged when its passes are spent.
    """
    output.prepare()
    target, H = problem.hessian()
    with Watch("Trace") as watch:
        found = hk.trace(
            H,
            method=method,
            num_matvecs=num_matvecs,
            tol=tol,
            time_limit=time_limit,
            seed=problem.seed,
            monitor=watch,
        )
    header = ("quantity", "value", "standard error", "probes", "passes")
    row = (f"{found.value:.6g}", f"{found.stderr:.2g}", f"{found.num_samples}", f"{found.num_matvecs:g}")
    record = {
        **asdict(found),
        "converged": found.converged,
        "method": method,
        "problem": problem.describe(target, H),
    }
    shown = [table(target.title, header, [("trace", *row)]), f"{found.status}: {found.message}."]
    output.give("trace", record, shown)
    return found.converged or found.status is Status.COMPLETED
