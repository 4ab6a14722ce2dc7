"""``hvpkit top``: several eigenvalues at an end of a Hessian's spectrum, or closest to a point in it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.choices import Which
from hvpkit.cli.options import Checkpoint, CurvatureProblem, Solve
from hvpkit.cli.output import Output, saving_to, table
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit top digits --k 5",
    "hvpkit top problem.py:make --k 3 --which SA --tol 1e-3 --json",
    "hvpkit top digits --k 2 --which CLOSEST --sigma 10",
    "hvpkit top cifar10 --data-dir data --resume model.pt --out results",
)
def top(
    problem: CurvatureProblem,
    solve: Solve,
    output: Output,
    k: Annotated[int, typer.Option(help="Number of eigenvalues.")] = 5,
    which: Annotated[
        Which,
        typer.Option(
            help="LA the largest, SA the smallest, BE half from each end, CLOSEST those closest to --sigma."
        ),
    ] = Which.LARGEST,
    sigma: Annotated[float | None, typer.Option(help="The point for CLOSEST.")] = None,
    checkpoint: Checkpoint = None,
) -> bool:
    """Find several eigenvalues at an end of the spectrum, or closest to a point, with error intervals."""
    output.prepare("top.json", "top.png", checkpoint=checkpoint)
    target, H = problem.operator()
    about, watch = problem.describe(target, H), ProgressLine("Eigenvalues")
    try:
        with saving_to(checkpoint):
            found = hk.top_eigenvalues(
                H,
                k,
                which=which.value,
                sigma=sigma,
                **vars(solve),
                seed=problem.seed,
                monitor=watch,
                checkpoint=checkpoint,
            )
    except KeyboardInterrupt:
        output.write_partial("top", watch.last, about)
        raise
    rows = [
        (
            f"{pair.value:.6g}",
            f"{pair.interval.lower:.5g} … {pair.interval.upper:.5g}",
            pair.interval.kind,
            f"{pair.residual_norm:.2g}",
        )
        for pair in map(found.pair, reversed(range(len(found.values))))
    ]
    close = f"{found.status}: {found.num_matvecs:g} passes, {found.seconds:.3g} s; {found.message}."
    header = ("eigenvalue", "interval", "rests on", "residual norm")
    record = {**found.to_dict(), "k": k, "which": which.value, "sigma": sigma, "problem": about}
    output.write("top", record, [table(target.title, header, rows), close], partial(_draw, found))
    return found.converged


def _draw(found: hk.EigenResult) -> object:
    from hvpkit import plots

    return plots.eigenvalues(found)
