"""``hvpkit plan``: time and memory before the work."""

from __future__ import annotations

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.choices import ExtremesMethod
from hvpkit.cli.density import NumProbes, NumSteps
from hvpkit.cli.options import Atol, Certify, CurvatureProblem, Method, Ncv, Offload, Tol
from hvpkit.cli.output import Output, table
from hvpkit.cli.trace import NumMatvecs
from hvpkit.results.cost_plan import HEADER


@command(
    "hvpkit plan digits",
    "hvpkit plan problem.py:make --tol 1e-3 --num-steps 80 --json",
)
def plan(
    problem: CurvatureProblem,
    output: Output,
    tol: Tol = 1e-2,
    atol: Atol = None,
    method: Method = ExtremesMethod.AUTO,
    ncv: Ncv = None,
    offload: Offload = False,
    certify: Certify = False,
    num_steps: NumSteps = 50,
    num_probes: NumProbes = 4,
    num_matvecs: NumMatvecs = 100,
) -> bool:
    """Say how long extremes, density and trace will take, and whether they fit into memory.

    By a few timed batches, and by the passes that other networks took. The exit code is 1 if something does not fit.
    """
    output.prepare("plan.json")
    target, H = problem.operator()
    found = hk.plan(
        H,
        tol=tol,
        atol=atol,
        method=method,
        ncv=ncv,
        offload=offload,
        certify=certify,
        num_steps=num_steps,
        num_probes=num_probes,
        num_matvecs=num_matvecs,
        seed=problem.seed,
    )
    record = {**found.to_dict(), "fits": found.fits, "problem": problem.describe(target, H)}
    lines = "\n".join([found.operator, *found.notes()])
    output.write("plan", record, [table(target.title, HEADER, found.rows()), f"{lines}."])
    return found.fits
