"""``hvpkit train``: trains a built-in network, and finds both ends after its epochs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

from hvpkit._utils.files import atomic_write
from hvpkit.cli.app import command
from hvpkit.cli.checkpoints import load
from hvpkit.cli.options import Model
from hvpkit.cli.output import Output, Watch, draw, ends
from hvpkit.cli.training import LR, Plan, State
from hvpkit.cli.training import train as train_epochs
from hvpkit.train import SpectrumTracker

CHECKPOINT, MODEL, SPECTRUM = "checkpoint.pt", "model.pt", "spectrum.jsonl"


@command(
    "hvpkit train digits --epochs 10 --out run",
    "hvpkit train cifar10 --arch resnet20 --data-dir data --method knee --epochs 100 --device cuda --out run",
    "hvpkit train cifar10 --arch c1 --data-dir data --method absa --lr 0.02 --epochs 90 --out run",
    "hvpkit extremes cifar10 --arch c1 --data-dir data --resume run/model.pt",
)
def train(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; if it holds one, that is continued.", file_okay=False)
    ],
    method: Annotated[str, typer.Option(help=f"{', '.join(LR)}.")] = "sgd",
    epochs: Annotated[int, typer.Option(help="In all.")] = 10,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; by default 0.15 for adahessian and 0.1 for others.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of training; the first one, for absa.")] = 128,
    weight_decay: Annotated[float, typer.Option(help="Penalty on parameters.")] = 5e-4,
    lr_decay: Annotated[
        float, typer.Option(help="Factor of the learning rate after --lr-decay-epoch.")
    ] = 0.1,
    lr_decay_epoch: Annotated[
        list[int] | None, typer.Option(help="When the learning rate decays. May be repeated. Not for knee.")
    ] = None,
    track_every: Annotated[int, typer.Option(help="Of how many epochs both ends are found after one.")] = 1,
    tol: Annotated[float, typer.Option(help="Relative error of each eigenvalue.")] = 1e-2,
    keep: Annotated[bool, typer.Option("--keep", help="Keep each epoch's model as epoch-0001.pt.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="A line of strict JSON for each epoch, nothing else.")
    ] = False,
) -> bool:
    """Trains a network, and prints both ends of its full-data Hessian after each epoch.

    The run folder holds checkpoint.pt, replaced after each epoch, from which the same command goes on after an
    interruption to the same numbers; model.pt at the end; spectrum.jsonl and spectrum.png. No images are augmented: the
    loss that is trained is the loss whose Hessian is measured.
    """
    output = Output(json, out)
    output.prepare()
    rate = LR.get(method, 0.1) if lr is None else lr
    plan = Plan(
        method, epochs, rate, batch_size, weight_decay, lr_decay, tuple(lr_decay_epoch or ()), model.seed
    )
    problem = model.load()
    run = {**asdict(plan), "lr_decay_epochs": list(plan.lr_decay_epochs), **_identity(model)}
    run |= {"track_every": track_every, "tol": tol}
    saved = _saved(out, run)
    watch = Watch("Both ends")
    tracker = SpectrumTracker.for_module(
        F.cross_entropy,
        problem.data,
        every=track_every,
        tol=tol,
        seed=plan.seed,
        path=out / SPECTRUM,
        monitor=watch,
    )

    def measure(state: State) -> None:
        epoch: int = state["epoch"]
        ex = dict(tracker.results).get(epoch)  # known where the interruption came after it
        if ex is None:
            with watch:
                ex = tracker(problem.model, step=epoch)
        loss = state["losses"][-1] if epoch else None
        record = {"epoch": epoch, "loss": loss, "spectrum": None if ex is None else ex.to_dict()}
        told = "" if loss is None else f"loss {loss:.5g}"
        output.print(record, f"epoch {epoch:>4}  {told:<14}{'' if ex is None else ends(ex)}")

    for state in train_epochs(problem.model, problem.data, plan, saved):
        _save(out / CHECKPOINT, {"run": run, **state})
        if keep:
            _save(out / f"epoch-{state['epoch']:04d}.pt", state["model"])
        measure(state)
    _save(out / MODEL, state["model"])
    draw(out / "spectrum.png", lambda: plotted(tracker, "epoch"))
    if not json:
        output.print(None, f"Wrote {out / MODEL}, {out / SPECTRUM} and {out / 'spectrum.png'}.")
    return all(ex.converged for _, ex in tracker.results)


def _identity(model: Model) -> dict[str, Any]:
    """What of a model's options its numbers depend on."""
    names = ("target", "num_examples", "dtype", "seed", *(("arch",) if model.target == "cifar10" else ()))
    return {name: getattr(model, name) for name in names}


def _saved(out: Path, run: dict[str, Any]) -> State | None:
    """Where the run in a folder stands; None if there is none.

    Raises:
        ValueError: it is another run; the spectrum of one is there without a checkpoint.
    """
    if not (out / CHECKPOINT).exists():
        if (out / SPECTRUM).exists():
            raise ValueError(
                f"out: {out} has a {SPECTRUM} and no {CHECKPOINT} to go on from; name another folder"
            )
        return None
    state: State = load(out / CHECKPOINT)
    theirs = state.get("run") if isinstance(state, dict) else None
    if not isinstance(theirs, dict):
        raise ValueError(f"out: {out / CHECKPOINT} is not a checkpoint of hvpkit train; name another folder")
    other = [
        f"{key} was {theirs.get(key)} and is {value}"
        for key, value in run.items()
        if theirs.get(key) != value
    ]
    if other:
        raise ValueError(
            f"out: {out} holds another run ({', '.join(other)}); repeat its options to continue it, or "
            "name another folder"
        )
    return state


def _save(path: Path, content: Any) -> None:
    with atomic_write(path) as draft:
        torch.save(content, draft)


def plotted(tracker: SpectrumTracker, steps: str) -> Any:
    """Both ends over training, whose steps are whole numbers of what ``steps`` says."""
    axes = tracker.plot()
    axes.set_xlabel(steps)
    axes.locator_params(axis="x", integer=True)
    return axes
