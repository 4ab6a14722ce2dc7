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
from hvpkit._utils.files import atomic_write
from hvpkit.cli.application import command
from hvpkit.cli.output import as_json, results_stream, table, write_picture
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
    console = Console(file=results_stream())
    with console.status(TRAINING) as status:

        def show(text: str, number: float) -> None:
            status.update(text)
            if not console.is_terminal and number % 10 == 0:
                console.print(text)

        def trained(epoch: int, loss: float) -> None:
            show(f"{TRAINING}: epoch {epoch}, loss {loss:.4f}", epoch)

        def assessed(entry: hk.Progress) -> None:
            ends = f"smallest {entry.smallest:.4g} ± {entry.smallest_bound:.1g}, largest {entry.largest:.4g}"
            show(
                f"{entry.num_matvecs:g} passes over the data: {ends} ± {entry.largest_bound:.1g}",
                entry.num_matvecs,
            )

        ex, problem = train_and_solve(
            out, tol=tol, seed=seed, training_monitor=trained, solver_monitor=assessed
        )
    _print_result(console, ex, problem)
    console.print(f"Wrote {out / 'extremes.json'} and {out / 'extremes.png'}.")
    return ex.converged


def train_and_solve(
    out: Path,
    *,
    tol: float = 1e-2,
    seed: int = 0,
    training_monitor: Callable[[int, float], object] | None = None,
    solver_monitor: Callable[[hk.Progress], object] | None = None,
) -> tuple[hk.ExtremeResult, dict[str, Any]]:
    """Train, solve, and write ``extremes.json`` and ``extremes.png`` into the folder ``out``.

    Returns:
        The result, and a record of the network, the data and the loss.
    """
    from hvpkit import plots

    out.mkdir(parents=True, exist_ok=True)
    data = digits()
    model = digits_cnn(seed=seed)
    train_classifier(model, data, seed=seed, monitor=training_monitor)
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="eval")
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
    with atomic_write(out / "extremes.json") as draft:
        draft.write_text(as_json({**ex.to_dict(), "problem": problem}, indent=2) + "\n", encoding="utf-8")
    title = f"Hessian of the mean loss over all {H.num_examples:,} digits, {H.n:,} parameters"
    write_picture(out / "extremes.png", lambda: plots.extremes(ex, objective, params, data, title=title))
    return ex, problem


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
