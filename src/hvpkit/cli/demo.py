"""``hvpkit demo``: a first look, on data that is at hand."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hvpkit.cli.app import command
from hvpkit.results.eigen import ExtremeResult, Progress

COMPUTED = "{num_parameters:,} parameters, {num_examples:,} examples (all of {data}), {loss} {mean_loss:.4g}"
BATCHNORM = {
    "eval": "BatchNorm by its running statistics (eval)",
    "batch": "BatchNorm by the statistics of each batch",
}
TRAINING = "Training a convolutional network on 1,797 digits"


@command("hvpkit demo", "hvpkit demo --out first-look --tol 1e-3")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for extremes.json and extremes.png.")] = Path(
        "hvpkit-demo"
    ),
    tol: Annotated[float, typer.Option(help="Relative error of each eigenvalue.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Of the network, its training and the solver.")] = 0,
) -> bool:
    """Train a small network on scikit-learn's digits and find both ends of its Hessian's spectrum."""
    from hvpkit.cli.demonstration import run

    console = Console()
    missing = [module for module in ("sklearn", "matplotlib") if find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install 'hvpkit[demo]'")
    with console.status(TRAINING) as status:

        def say(text: str, number: float) -> None:
            status.update(text)
            if not console.is_terminal and number % 10 == 0:
                console.print(text)

        def trained(epoch: int, loss: float) -> None:
            say(f"{TRAINING}: epoch {epoch}, loss {loss:.4f}", epoch)

        def solved(entry: Progress) -> None:
            ends = f"smallest {entry.smallest:.4g} ± {entry.smallest_bound:.1g}, largest {entry.largest:.4g}"
            say(
                f"{entry.num_matvecs:g} passes over the data: {ends} ± {entry.largest_bound:.1g}",
                entry.num_matvecs,
            )

        ex, problem = run(out, tol=tol, seed=seed, report=trained, monitor=solved)
    _show(console, ex, problem)
    console.print(f"Wrote {out / 'extremes.json'} and {out / 'extremes.png'}.")
    return ex.converged


def _show(console: Console, ex: ExtremeResult, problem: dict[str, Any]) -> None:
    table = Table(title="Extreme eigenvalues of the full-data Hessian", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("end", "value", "interval", "residual norm", "passes", "seconds"):
        table.add_column(column, justify="left" if column == "end" else "right", no_wrap=True)
    for end in ("smallest", "largest"):
        pair = getattr(ex, end)
        table.add_row(
            end,
            f"{pair.value:.5g}",
            f"{pair.interval.lower:.4g} … {pair.interval.upper:.4g}",
            f"{pair.residual_norm:.2g}",
            f"{ex.num_matvecs:g}",
            f"{ex.seconds:.1f}",
        )
    console.print(table)
    console.print(COMPUTED.format(**problem) + ", " + BATCHNORM[problem["batchnorm"]])
    console.print(f"{ex.status}: {ex.message}.")
