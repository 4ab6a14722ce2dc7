"""``hvpkit check``: test an operator's matvecs before a long solve."""

from __future__ import annotations

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.options import CurvatureProblem
from hvpkit.cli.output import Output


@command(
    "hvpkit check digits",
    "hvpkit check problem.py:make --dtype float64 --json",
)
def check(problem: CurvatureProblem, output: Output) -> bool:
    """Check that matvecs repeat, are symmetric and agree with finite differences; name causes and remedies."""
    output.prepare()
    target, H = problem.operator()
    found = hk.check(H, seed=problem.seed)
    record = {
        "ok": found.ok,
        "operator": found.operator,
        "findings": found.findings,
        "problem": problem.describe(target, H),
    }
    output.write("check", record, [str(found)])
    return found.ok
