"""``hvpkit density``: the spectral density."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit.cli.app import command
from hvpkit.cli.options import HessianProblem
from hvpkit.cli.output import Output, Watch, table
from hvpkit.results.eigen import Status
from hvpkit.results.estimate import plus_minus

NumSteps = Annotated[int, typer.Option(help="Products with each probe.")]
NumProbes = Annotated[int, typer.Option(help="Random vectors; two or more give standard errors.")]


@command(
    "hvpkit density digits --num-steps 80 --num-probes 4 --out results",
    "hvpkit density problem.py:make --method chebyshev --json",
)
def density(
    problem: HessianProblem,
    output: Output,
    method: Annotated[str, typer.Option(help="lanczos or chebyshev.")] = "lanczos",
    num_steps: NumSteps = 100,
    num_probes: NumProbes = 1,
    time_limit: Annotated[float | None, typer.Option(help="Seconds, at most.")] = None,
) -> bool:
    """The density of all eigenvalues of the full-data Hessian.

    It is complete when all steps of all probes are taken.
    """
    output.prepare()
    target, H = problem.hessian()
    with Watch("Density") as watch:
        found = hk.spectral_density(
            H,
            method=method,
            num_steps=num_steps,
            num_probes=num_probes,
            time_limit=time_limit,
            seed=problem.seed,
            monitor=watch,
        )
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
        "problem": problem.describe(target, H),
    }
    shown = [table(target.title, ("density", "value"), rows), f"{found.status}: {found.message}."]
    output.give("density", record, shown, found.plot)
    return found.status in (Status.COMPLETED, Status.INVARIANT_SUBSPACE)
