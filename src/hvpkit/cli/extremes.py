"""``hvpkit extremes``: both ends of a Hessian's spectrum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hvpkit as hk
from hvpkit.cli.application import command
from hvpkit.cli.options import Checkpoint, CurvatureProblem, Solve
from hvpkit.cli.output import Output, print_message, saving_to, table
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit extremes digits",
    "hvpkit extremes problem.py:make --tol 1e-3 --method lanczos --json",
    "hvpkit extremes digits --tol 1e-4 --checkpoint extremes.pt",
    "hvpkit extremes cifar10 --data-dir data --resume model.pt --out results",
)
def extremes(problem: CurvatureProblem, solve: Solve, output: Output, checkpoint: Checkpoint = None) -> bool:
    """Find the smallest and the largest eigenvalue of the full-data Hessian, with error intervals.

    Or of another curvature matrix, by --curvature.
    """
    output.prepare("extremes.json", "extremes.png", checkpoint=checkpoint)
    target, H = problem.operator()
    about = problem.describe(target, H)
    ex = find_both_ends(
        H,
        solve,
        problem.seed,
        lambda record, shown: output.write_so_far("extremes", {**record, "problem": about}, shown),
        checkpoint,
    )
    drawable = bool(ex.vectors.isfinite().all())
    if output.out is not None and not drawable:
        print_message("no picture: the eigenvectors are not finite")
    record = {**ex.to_dict(), "problem": about}
    output.write(
        "extremes",
        record,
        result_items(target.title, ex),
        partial(draw_result, H, ex, target.title) if drawable else None,
    )
    return ex.converged


def find_both_ends(
    H: hk.LinearOperator,
    solve: Solve,
    seed: int,
    write_partial: Callable[[dict[str, Any], list[Any]], None],
    checkpoint: Path | None,
) -> hk.ExtremeResult:
    """Find both ends; if interrupted, write the last assessment: a record and what to print of it."""
    watch = ProgressLine("Both ends")
    try:
        with saving_to(checkpoint):
            ex = hk.extreme_eigenvalues(H, **vars(solve), seed=seed, monitor=watch, checkpoint=checkpoint)
            return ex.full_tensor()
    except KeyboardInterrupt:
        if isinstance(watch.last, hk.Progress):
            record = interrupted(watch.last, solve.tol, H)
            write_partial(record, partial_items(record))
        raise


def result_items(title: str, ex: hk.ExtremeResult) -> list[Any]:
    """Return a table of both ends, and a line with status and cost."""
    rows = []
    for name, pair in (("smallest", ex.smallest), ("largest", ex.largest)):
        interval = f"{pair.interval.lower:.5g} … {pair.interval.upper:.5g}"
        rows.append((name, f"{pair.value:.6g}", interval, pair.interval.kind, f"{pair.residual_norm:.2g}"))
    header = ("end", "value", "interval", "rests on", "residual norm")
    close = f"{ex.status}: {ex.num_matvecs:g} passes, {ex.seconds:.3g} s; {ex.message}."
    return [table(title, header, rows), f"{ex.operator}\n{close}"]


def draw_result(H: hk.CurvatureOperator, ex: hk.ExtremeResult, title: str) -> Any:
    """Draw the loss along both eigenvectors, and both values against passes."""
    from hvpkit import plots

    origin = H.origin
    assert origin is not None
    return plots.extremes(ex, origin.loss_fn, origin.params, origin.data, title=title)


def interrupted(entry: hk.Progress, tol: float, H: hk.LinearOperator) -> dict[str, Any]:
    """Return the last assessment of an interrupted solve in the form of ``ExtremeResult.to_dict``."""
    no_interval = {"lower": None, "upper": None, "kind": "none", "confidence": None}
    ends = {
        name: {"value": value, "residual_norm": None, "error_bound": bound, "interval": no_interval}
        for name, value, bound in (
            ("smallest", entry.smallest, entry.smallest_bound),
            ("largest", entry.largest, entry.largest_bound),
        )
    }
    return {
        **ends,
        "num_matvecs": entry.num_matvecs,
        "seconds": entry.seconds,
        "status": "interrupted",
        "converged": False,
        "message": "interrupted: values and error bounds of the last assessment, not verified",
        "tol": tol,
        "operator": repr(H)[1:-1],
        "history": [entry],
    }


def partial_items(record: dict[str, Any]) -> list[Any]:
    """Return a table of an interrupted solve's last assessment, and a line with status and cost."""
    rows = [
        (name, f"{record[name]['value']:.6g}", f"{record[name]['error_bound']:.2g}")
        for name in ("smallest", "largest")
    ]
    close = f"{record['num_matvecs']:g} passes, {record['seconds']:.3g} s; {record['message']}."
    return [table("Both ends so far", ("end", "value", "error bound"), rows), close]
