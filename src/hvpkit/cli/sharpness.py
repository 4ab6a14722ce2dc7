"""``hvpkit sharpness``: the largest rise of the loss in a small box around the parameters."""

from __future__ import annotations

from collections import deque
from typing import Annotated

import typer

import hvpkit as hk
from hvpkit._utils.monitoring import monitored
from hvpkit.cli.application import command
from hvpkit.cli.choices import AscentOptimizer
from hvpkit.cli.options import Problem
from hvpkit.cli.output import Output, table
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.train import Sharpness, keskar_sharpness


@command(
    "hvpkit sharpness digits",
    "hvpkit sharpness problem.py:make --optimizer sgd --lr 1e-3 --json",
)
def sharpness(
    problem: Problem,
    output: Output,
    epsilon: Annotated[
        float, typer.Option(help="Size of the box: each parameter w moves by at most epsilon (|w| + 1).")
    ] = 1e-3,
    max_steps: Annotated[int, typer.Option(help="The most steps of the ascent.")] = 1000,
    optimizer: Annotated[
        AscentOptimizer, typer.Option(help="Optimiser of the ascent.")
    ] = AscentOptimizer.ADAM,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the ascent; by default epsilon / 10.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="The most examples in one forward pass.")] = None,
    tol: Annotated[
        float, typer.Option(help="Stop where the gradient allows no further rise by more than this share.")
    ] = 1e-2,
) -> bool:
    """Find Keskar's sharpness: the largest rise of the full-data loss in a box around the parameters, in percent."""
    output.prepare("sharpness.json")
    target = problem.load()
    data = hk.as_data(target.data, batch_size=batch_size)
    about = {
        "target": problem.target,
        "title": target.title,
        "num_examples": data.num_examples,
        "seed": problem.seed,
    }
    last: deque[Sharpness] = deque(maxlen=1)
    try:
        with monitored(ProgressLine("Sharpness")):
            found = keskar_sharpness(
                target.loss_fn,
                target.params,
                data,
                epsilon=epsilon,
                lr=epsilon / 10 if lr is None else lr,
                max_steps=max_steps,
                optimizer=optimizer,
                tol=tol,
                seed=problem.seed,
                monitor=last.append,
            )
    except KeyboardInterrupt:
        output.write_partial("sharpness", last[0] if last else None, about)
        raise
    names = ("value", "loss", "max_loss", "gap", "num_steps", "num_passes", "status", "converged", "message")
    record = {name: getattr(found, name) for name in names}
    header = ("measure", "percent", "loss", "highest loss", "passes")
    row = (f"{found.value:.5g}", f"{found.loss:.6g}", f"{found.max_loss:.6g}", f"{found.num_passes}")
    shown = [table(target.title, header, [("sharpness", *row)]), f"{found.status}: {found.message}."]
    output.write("sharpness", {**record, "epsilon": epsilon, "problem": about}, shown)
    return found.converged
