"""``hvpkit extremes``: both ends of the spectrum."""

from __future__ import annotations

from functools import partial
from typing import Any

import hvpkit as hk
from hvpkit.cli.app import command
from hvpkit.cli.options import HessianProblem, Solve
from hvpkit.cli.output import Output, Watch, say, table


@command(
    "hvpkit extremes digits",
    "hvpkit extremes problem.py:make --tol 1e-3 --method lanczos --json",
    "hvpkit extremes cifar10 --arch resnet20 --data-dir data --resume model.pt --out results",
)
def extremes(problem: HessianProblem, solve: Solve, output: Output) -> bool:
    """The smallest and the largest eigenvalue of the full-data Hessian, with error intervals."""
    output.prepare()
    target, H = problem.hessian()
    about = problem.describe(target, H)
    watch = Watch("Both ends")
    try:
        with watch:
            ex = hk.extreme_eigenvalues(H, **vars(solve), seed=problem.seed, monitor=watch)
    except KeyboardInterrupt:
        if watch.last is not None:
            known = interrupted(watch.last, solve.tol, H)
            output.give("extremes", {**known, "problem": about}, show_partial(known))
        raise
    drawable = bool(ex.vectors.isfinite().all())
    if output.out is not None and not drawable:
        say("no picture: the eigenvectors are not finite")
    record = {**ex.to_dict(), "problem": about}
    output.give(
        "extremes",
        record,
        show(target.title, ex),
        partial(picture, H, ex, target.title) if drawable else None,
    )
    return ex.converged


def show(title: str, ex: hk.ExtremeResult) -> list[Any]:
    """Both ends as a table, and how it went."""
    rows = []
    for name, pair in (("smallest", ex.smallest), ("largest", ex.largest)):
        interval = f"{pair.interval.lower:.5g} … {pair.interval.upper:.5g}"
        rows.append((name, f"{pair.value:.6g}", interval, pair.interval.kind, f"{pair.residual_norm:.2g}"))
    header = ("end", "value", "interval", "rests on", "residual norm")
    close = f"{ex.status}: {ex.num_matvecs:g} passes, {ex.seconds:.3g} s; {ex.message}."
    return [table(title, header, rows), f"{ex.operator}\n{close}"]


def picture(H: hk.CurvatureOperator, ex: hk.ExtremeResult, title: str) -> Any:
    """The loss along both eigenvectors, and how the values were found."""
    from hvpkit import plots

    origin = H.origin
    assert origin is not None
    return plots.extremes(ex, origin.loss_fn, origin.params, origin.data, title=title)


def interrupted(entry: hk.Progress, tol: float, H: hk.LinearOperator) -> dict[str, Any]:
    """What the last look of an interrupted solve knew, in the form of ``ExtremeResult.to_dict``."""
    nothing = {"lower": None, "upper": None, "kind": "none", "confidence": None}
    ends = {
        name: {"value": value, "residual_norm": None, "error_bound": bound, "interval": nothing}
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
        "message": "interrupted: values and error bounds of the last look, not verified",
        "tol": tol,
        "operator": repr(H)[1:-1],
        "history": [entry],
    }


def show_partial(known: dict[str, Any]) -> list[Any]:
    """What an interrupted solve knew, as a table."""
    rows = [
        (name, f"{known[name]['value']:.6g}", f"{known[name]['error_bound']:.2g}")
        for name in ("smallest", "largest")
    ]
    close = f"{known['num_matvecs']:g} passes, {known['seconds']:.3g} s; {known['message']}."
    return [table("Both ends so far", ("end", "value", "error bound"), rows), close]
