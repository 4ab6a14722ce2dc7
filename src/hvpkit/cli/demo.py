"""``hvpkit demo``: train a small network on digits, find both ends of its Hessian's spectrum, draw them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.files import check_file, check_folder
from hvpkit._utils.validation import check_tolerance
from hvpkit.cli.application import command
from hvpkit.cli.output import results_stream, table, write_json, write_picture
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.cli.ranks import shared
from hvpkit.cli.verbosity import is_quiet
from hvpkit.zoo import digits, digits_cnn, train_classifier

TRAINING = "Training a convolutional network on 1,797 digits"
PROBLEM = "{num_parameters:,} parameters, {num_examples:,} examples (all of {data}), {loss} {mean_loss:.4g}"
BATCHNORM = {
    "eval": "BatchNorm by its running statistics (eval)",
    "batch": "BatchNorm by the statistics of each batch",
}


@command("hvpkit demo", "hvpkit demo --out first-look --tol 1e-3")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for extremes.json and extremes.png.")] = Path(
        "hvpkit-demo"
    ),
    tol: Annotated[float, typer.Option(help="Relative error of each eigenvalue.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Seed of the network, of its training and of the solver.")] = 0,
) -> bool:
    """Train a small network on scikit-learn's digits and find both ends of its Hessian's spectrum."""
    missing = [module for module in ("sklearn", "matplotlib") if find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install 'hvpkit[demo]'")
    check_outputs(out)
    console, watch = Console(file=results_stream()), ProgressLine("Both ends")

    def trained(epoch: int, loss: float) -> None:
        if epoch % 10 == 0 and not is_quiet():
            console.print(f"{TRAINING}: epoch {epoch}, loss {loss:.4f}")

    try:
        ex, problem, draw = train_and_solve(
            tol=tol, seed=seed, training_monitor=trained, solver_monitor=watch
        )
    except KeyboardInterrupt:
        if watch.last is not None:
            console.print(f"So far, not verified: {watch.last}, {watch.last.num_matvecs:g} passes.")
        raise
    _print_result(console, ex, problem)
    write_files(out, ex, problem, draw)
    console.print(f"Wrote {out / 'extremes.json'} and {out / 'extremes.png'}.")
    return ex.converged


def check_outputs(out: Path) -> None:
    """Make the folder and try its files.

    Raises:
        ValueError: they cannot be written.
    """
    check_folder("--out", out)
    for name in ("extremes.json", "extremes.png"):
        check_file("--out", out / name)


def write_files(out: Path, ex: hk.ExtremeResult, problem: dict[str, Any], draw: Callable[[], Any]) -> None:
    """Write ``extremes.json`` and ``extremes.png`` into the folder ``out``."""
    write_json(out / "extremes.json", {**ex.to_dict(), "problem": problem})
    write_picture(out / "extremes.png", draw)


def train_and_solve(
    *,
    tol: float = 1e-2,
    seed: int = 0,
    training_monitor: Callable[[int, float], object] | None = None,
    solver_monitor: Callable[[hk.Progress], object] | None = None,
) -> tuple[hk.ExtremeResult, dict[str, Any], Callable[[], Any]]:
    """Train and solve.

    Returns:
        The result, a record of the network, the data and the loss, and a function that draws the picture.
    """
    from hvpkit import plots

    check_tolerance("tol", tol)
    data = digits()
    model = digits_cnn(seed=seed)
    train_classifier(model, data, seed=seed, monitor=training_monitor)
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="eval")
    data = shared(data)
    H = hk.hessian(objective, params, data)
    ex = hk.extreme_eigenvalues(H, tol=tol, seed=seed, monitor=solver_monitor)
    problem = {
        "data": "scikit-learn digits",
        "num_examples": H.num_examples,
        "model": "convolutional network with BatchNorm",
        "num_parameters": H.n,
        "loss": "cross entropy",
        "mean_loss": float(hk.loss(objective, params, data)),
        "batchnorm": objective.batchnorm,
        "mode": H.mode,
        "dtype": str(H.dtype).removeprefix("torch."),
        "seed": seed,
    }
    title = f"Hessian of the mean loss over all {H.num_examples:,} digits, {H.n:,} parameters"
    return ex, problem, lambda: plots.extremes(ex, objective, params, data, title=title)


def _print_result(console: Console, ex: hk.ExtremeResult, problem: dict[str, Any]) -> None:
    rows = [
        (
            name,
            f"{pair.value:.5g}",
            f"{pair.interval.lower:.4g} … {pair.interval.upper:.4g}",
            f"{pair.residual_norm:.2g}",
            f"{ex.num_matvecs:g}",
            f"{ex.seconds:.1f}",
        )
        for name, pair in (("smallest", ex.smallest), ("largest", ex.largest))
    ]
    header = ("end", "value", "interval", "residual norm", "passes", "seconds")
    console.print(table("Extreme eigenvalues of the full-data Hessian", header, rows))
    console.print(PROBLEM.format(**problem) + ", " + BATCHNORM[problem["batchnorm"]])
    console.print(f"{ex.status}: {ex.message}.")
