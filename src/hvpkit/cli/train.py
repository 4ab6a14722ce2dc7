"""``hvpkit train``: train a built-in problem's network, and find both ends after its epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

from hvpkit._utils import checkpoints
from hvpkit._utils.files import atomic_write, reason
from hvpkit.cli.application import command
from hvpkit.cli.choices import Mode, TrainingMethod
from hvpkit.cli.options import Atol, Model, ModeOption, Tol
from hvpkit.cli.output import Output, one_line, print_message, to_plain, write_picture
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.cli.ranks import shared
from hvpkit.cli.targets import Network
from hvpkit.cli.training_methods import LR, Plan, State, accuracy, train_epochs
from hvpkit.results.eigen import ExtremeResult
from hvpkit.train import SpectrumTracker

CHECKPOINT, MODEL, SPECTRUM, PICTURE = "checkpoint.pt", "model.pt", "spectrum.jsonl", "spectrum.png"


@command(
    "hvpkit train digits --epochs 10 --out run",
    "hvpkit train cifar10 --data-dir data --method knee --epochs 100 --out run",
    "hvpkit train cifar10 --arch c1 --data-dir data --method absa --out run",
    "hvpkit extremes cifar10 --arch c1 --data-dir data --resume run/model.pt",
)
def train(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the run. If it holds a run with these options, that run continues.",
            file_okay=False,
        ),
    ],
    method: Annotated[TrainingMethod, typer.Option(help="Training method.")] = TrainingMethod.SGD,
    epochs: Annotated[int, typer.Option(help="Number of epochs in total.")] = 10,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; by default 0.15 for adahessian and 0.1 for others.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Batch size of training; for absa that of the first epoch.")
    ] = 128,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 5e-4,
    lr_decay: Annotated[
        float, typer.Option(help="Factor on the learning rate after each --lr-decay-epoch.")
    ] = 0.1,
    lr_decay_epoch: Annotated[
        list[int] | None,
        typer.Option(help="Epoch after which the learning rate decays. May be repeated. Not for knee."),
    ] = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment",
            help="Shift training images at random by up to an eighth, and mirror half of those of CIFAR. Not for absa.",
        ),
    ] = False,
    track: Annotated[bool, typer.Option(help="Find both ends; without, the network is only trained.")] = True,
    track_every: Annotated[int, typer.Option(help="Find both ends every so many epochs.")] = 1,
    tol: Tol = 1e-2,
    atol: Atol = None,
    mode: ModeOption = Mode.AUTO,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the model of each epoch, as epoch-0001.pt.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a line of strict JSON for each epoch and nothing else.")
    ] = False,
) -> bool:
    """Train a network, and find both ends of its full-data Hessian after each epoch.

    The folder of the run holds checkpoint.pt, replaced after each epoch: after an interruption the same command
    continues from it, to the same numbers. It also holds spectrum.jsonl, and at the end model.pt and spectrum.png.
    The accuracy is that on the test images of CIFAR, or on the digits that --num-examples leaves. The Hessian is that
    of the loss over the training images as they are, also with --augment.
    """
    output, ends = Output(json, out), (SPECTRUM, PICTURE) if track else ()
    output.prepare(CHECKPOINT, MODEL, *ends)
    rate = LR[method] if lr is None else lr
    plan = Plan(
        method.value,
        epochs,
        rate,
        batch_size,
        weight_decay,
        lr_decay,
        tuple(lr_decay_epoch or ()),
        model.seed,
        ("shift" if model.target == "digits" else "shift and mirror") if augment else None,
    )
    problem = model.load()
    options = {"tol": tol, "atol": atol, "mode": mode}
    run = _run(plan, model, {"track_every": track_every, **options} if track else {})
    saved = _saved(out, run)
    watch = ProgressLine("Both ends")
    tracker = _tracker(problem, model, out, every=track_every, monitor=watch, **options) if track else None

    def measure(epoch: int) -> Any:
        if tracker is None:
            return None
        known = dict(tracker.results).get(epoch)  # if the run was interrupted after it
        if known is not None:
            return known
        with output.measuring({"epoch": epoch}, f"epoch {epoch:>4}", watch):
            return tracker(problem.model, step=epoch)

    kept: list[str] = []
    for state in train_epochs(problem.model, problem.data, plan, saved):
        _save_or_warn(partial(checkpoints.write, out / CHECKPOINT, run, state), out / CHECKPOINT)
        if keep:
            path = out / f"epoch-{state['epoch']:04d}.pt"
            _save_or_warn(partial(_save, path, state["model"]), path)
            kept.append(path.name)
        _report(output, problem, state, measure(state["epoch"]))
    _save(out / MODEL, state["model"])
    if tracker is not None:
        tracker.save()
        write_picture(out / PICTURE, lambda: tracker.plot(unit="epoch"))
    output.print_written(CHECKPOINT, MODEL, *ends, *kept)
    return tracker is None or all(ex.converged for _, ex in tracker.results)


def _run(plan: Plan, model: Model, tracking: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same when a run continues."""
    run = {**asdict(plan), "lr_decay_epochs": list(plan.lr_decay_epochs), **_identity(model), **tracking}
    if plan.augmentation is None:  # as in the checkpoints of runs before there was a choice
        del run["augmentation"]
    plain: dict[str, Any] = to_plain(run)
    return plain


def _tracker(problem: Network, model: Model, out: Path, **options: Any) -> SpectrumTracker:
    return SpectrumTracker.for_module(
        F.cross_entropy,
        shared(problem.data),
        batchnorm=model.batchnorm,
        seed=model.seed,
        path=out / SPECTRUM,
        **options,
    )


def _report(output: Output, problem: Network, state: State, ex: ExtremeResult | None) -> None:
    """Print an epoch, and both ends after it where they are known."""
    epoch, right = state["epoch"], None
    loss = state["losses"][-1] if epoch else None
    if problem.test is not None:
        right = accuracy(problem.model, problem.test)
    record = {"epoch": epoch, "loss": loss, "test_accuracy": right}
    record["spectrum"] = None if ex is None else ex.to_dict()
    text = f"{'' if loss is None else f'loss {loss:.5g}':<14}"
    text += "" if right is None else f"test {100 * right:.1f} %  "
    output.print(record, f"epoch {epoch:>4}  {text}{'' if ex is None else one_line(ex)}")


def _identity(model: Model) -> dict[str, Any]:
    """Return the options of a model that its numbers depend on."""
    names = (
        "target",
        "num_examples",
        "dtype",
        "seed",
        "batchnorm",
        *(("arch",) if model.target == "cifar10" else ()),
    )
    return {name: getattr(model, name) for name in names}


def _saved(out: Path, run: dict[str, Any]) -> State | None:
    """Return the checkpoint of the run in a folder; None if there is none.

    Raises:
        ValueError: the folder holds another run, a checkpoint that is damaged or of another version, or a spectrum
            without a checkpoint.
    """
    if not (out / CHECKPOINT).exists():
        if (out / SPECTRUM).exists():
            raise ValueError(
                f"--out: {out} has a {SPECTRUM} and no {CHECKPOINT} to continue from; name another folder"
            )
        return None
    return checkpoints.read(out / CHECKPOINT, run, name="--out")


def _save_or_warn(save: Callable[[], object], path: Path) -> None:
    """Save; where that fails, say so and let the training go on."""
    try:
        save()
    except (OSError, RuntimeError) as error:  # torch raises the second where a disk is full
        print_message(f"--out: {path} could not be written ({reason(error)}); the training goes on")


def _save(path: Path, content: Any) -> None:
    with atomic_write(path) as draft:
        torch.save(content, draft)
