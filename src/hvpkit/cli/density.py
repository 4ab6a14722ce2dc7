"""``hvpkit density``: the spectral density of a Hessian."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.choices import DensityMethod
from hvpkit.cli.options import Checkpoint, CurvatureProblem
from hvpkit.cli.output import Output, saving_to, table
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.results.eigen import Status
from hvpkit.results.estimate import plus_minus

NumSteps = Annotated[int, typer.Option(help="Matvecs with each probe vector.")]
NumProbes = Annotated[
    int, typer.Option(help="Number of random probe vectors; two or more give standard errors.")
]


@command(
    "hvpkit density digits --num-steps 80 --out results",
    "hvpkit density digits --num-probes 10 --checkpoint density.pt",
    "hvpkit density problem.py:make --method chebyshev --json",
)
def density(
    problem: CurvatureProblem,
    output: Output,
    method: Annotated[DensityMethod, typer.Option(help="Estimator.")] = DensityMethod.LANCZOS,
    num_steps: NumSteps = 50,
    num_probes: NumProbes = 4,
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None,
    checkpoint: Checkpoint = None,
) -> bool:
    """Estimate the density of all eigenvalues of the full-data Hessian.

    It takes num-steps * num-probes matvecs, and has no tolerance to converge to.
    """
    output.prepare("density.json", "density.png", checkpoint=checkpoint)
    target, H = problem.operator()
    about, watch = problem.describe(target, H), ProgressLine("Density")
    try:
        with saving_to(checkpoint):
            found = hk.spectral_density(
                H,
                method=method,
                num_steps=num_steps,
                num_probes=num_probes,
                time_limit=time_limit,
                seed=problem.seed,
                monitor=watch,
                checkpoint=checkpoint,
            )
    except KeyboardInterrupt:
        output.write_partial("density", watch.last, about)
        raise
    mean = found.expectation(lambda eigenvalues: eigenvalues)
    single = found.outliers()[0].tolist()
    trace = {"value": H.n * mean.value, "stderr": H.n * mean.stderr}
    rows = [
        ("smallest node", f"{found.nodes[0]:.6g}" if len(found.nodes) else "none"),
        ("largest node", f"{found.nodes[-1]:.6g}" if len(found.nodes) else "none"),
        ("single eigenvalues", ", ".join(f"{value:.5g}" for value in single) or "none"),
        ("share below zero", f"{float(found.cdf(-found.noise)):.3g}"),
        ("trace", plus_minus(trace["value"], trace["stderr"], digits=5)),
        ("passes", f"{found.num_matvecs:g}"),
    ]
    record = {
        **asdict(found),
        "weights": found.weights,
        "outliers": single,
        "trace": trace,
        "problem": about,
    }
    shown = [table(target.title, ("density", "value"), rows), f"{found.status}: {found.message}."]
    output.write("density", record, shown, found.plot)
    return found.status in (Status.COMPLETED, Status.INVARIANT_SUBSPACE)
