"""``hvpkit check``: test an operator's matvecs before a long solve."""

from __future__ import annotations

import hvpkit as hk
from hvpkit._utils.monitoring import monitored
from hvpkit.cli.application import command
from hvpkit.cli.options import CurvatureProblem
from hvpkit.cli.output import Output
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit check digits",
    "hvpkit check problem.py:make --dtype float64 --json",
)
def check(problem: CurvatureProblem, output: Output) -> bool:
    """Check that matvecs repeat, are symmetric and agree with finite differences; name causes and remedies."""
    output.prepare("check.json")
    target, H = problem.operator()
    findings: list[hk.Finding] = []
    try:
        with monitored(ProgressLine("Check")):
            found = hk.check(H, seed=problem.seed, monitor=findings.append)
    except KeyboardInterrupt:
        if findings:
            so_far = hk.Report(f"{repr(H)[1:-1]}, interrupted", tuple(findings))
            record = {"ok": False, "status": "interrupted", "operator": repr(H)[1:-1], "findings": findings}
            output.write_so_far("check", {**record, "problem": problem.describe(target, H)}, [str(so_far)])
        raise
    record = {
        "ok": found.ok,
        "operator": found.operator,
        "findings": found.findings,
        "problem": problem.describe(target, H),
    }
    output.write("check", record, [str(found)])
    return found.ok
