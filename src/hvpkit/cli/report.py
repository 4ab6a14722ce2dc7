"""``hvpkit report``: both ends and the density of a Hessian on one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import hvpkit as hk
from hvpkit._utils import checkpoints
from hvpkit._utils.files import beside, reason
from hvpkit.cli.application import command
from hvpkit.cli.density import NumProbes, NumSteps
from hvpkit.cli.extremes import find_both_ends, result_items
from hvpkit.cli.options import Checkpoint, CurvatureProblem, Solve
from hvpkit.cli.output import Output, print_message, saving_to
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit report digits --out results",
    "hvpkit report cifar10 --arch c1 --data-dir data --landscape --out results",
    "hvpkit report digits --out results --checkpoint report.pt",
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
    checkpoint: Checkpoint = None,
) -> bool:
    """Write both ends and the spectral density to one page, report.html, and their numbers to report.json.

    The files go to the folder --out, by default the working folder. A checkpoint has two files beside it while the
    command runs: of the ends that are found, and of the density.
    """
    output = output if output.out is not None else replace(output, out=Path())
    assert output.out is not None
    output.prepare("report.html", "report.json", checkpoint=checkpoint)
    target, H = problem.operator()
    about = problem.describe(target, H)
    partial = {"status": "interrupted", "converged": False, "problem": about}
    found = None if checkpoint is None else beside(checkpoint, "extremes")
    of_density = None if checkpoint is None else beside(checkpoint, "density")
    ex = _kept_ends(
        H,
        solve,
        problem.seed,
        found,
        lambda: find_both_ends(
            H,
            solve,
            problem.seed,
            lambda record, shown: output.write_so_far("report", {"extremes": record, **partial}, shown),
            checkpoint,
        ),
    )
    try:
        with saving_to(of_density):
            density = hk.spectral_density(
                H,
                num_steps=num_steps,
                num_probes=num_probes,
                seed=problem.seed,
                monitor=ProgressLine("Density"),
                checkpoint=of_density,
            )
    except KeyboardInterrupt:
        output.write_so_far("report", {"extremes": ex.to_dict(), **partial}, result_items(target.title, ex))
        raise
    page = output.out / "report.html"
    record = {
        "extremes": ex.to_dict(),
        "density": density,
        "problem": about,
        "path": str(page),
    }

    def write_page(path: Path) -> None:
        hk.report(H, ex, density, landscape=landscape, title=target.title, path=path)

    output.write("report", record, result_items(target.title, ex), others={page.name: write_page})
    if found is not None:
        found.unlink(missing_ok=True)
    return ex.converged


def _kept_ends(
    H: hk.LinearOperator,
    solve: Solve,
    seed: int,
    path: Path | None,
    find: Callable[[], hk.ExtremeResult],
) -> hk.ExtremeResult:
    """Return both ends as an interrupted run of the command left them in a file, or find them and leave them there."""
    if path is None:
        return find()
    identity: dict[str, Any] = {"command": "report", **vars(solve), "seed": seed, **H.identity()}
    saved = checkpoints.read(path, identity)
    if saved is not None:
        ex = hk.ExtremeResult.from_dict(saved["result"])
        smallest, largest = saved["vectors"].to(H.device).unbind(1)
        return replace(
            ex,
            smallest=replace(ex.smallest, vector=smallest),
            largest=replace(ex.largest, vector=largest),
        )
    ex = find()
    if ex.converged:  # else the checkpoint of its solve is there to continue
        try:
            checkpoints.write(path, identity, {"result": ex.to_dict(), "vectors": ex.vectors})
        except (OSError, RuntimeError) as error:
            print_message(f"--checkpoint: {path} could not be written ({reason(error)}); the report goes on")
    return ex
