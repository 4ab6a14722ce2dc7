"""Sharpness and both ends of the Hessian against how long the Knee schedule explores.

    python benchmarks/study_wide_minima.py --small --out DIR
    python benchmarks/study_wide_minima.py --cifar10 FOLDER --device cuda --out DIR

Source: Iyer, Thejas, Kwatra, Ramjee, Sivathanu, JMLR 24(65), 2023, arXiv:2003.03977. Wide minima, they say, are rarer
than narrow ones, so that it takes time at a high learning rate to come upon one: the longer, the wider the minimum
and the better the test accuracy, on average. Here the budget of epochs is fixed, and of it ``--explore`` epochs are at
the peak rate; then the rate falls to zero. Each length is run from several seeds. A claim is judged by one slope a
seed: of the quantity (the log of a curvature) over the share of epochs that explore.

The full size is ResNet-18 on CIFAR-10, on a GPU. ``--small``, on one core, is a narrow network on small images: it
shows that the study runs, and says little about the paper's networks.

Into DIR: ``study.json`` after each network, from which an interrupted run goes on; parameters (``.pt``); at the end
``study.md``, the claims and the means in tables, and ``study.png``.

Departure from the paper: BatchNorm's running statistics are taken anew over all training examples before measuring.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.files import atomic_write
from study_batchnorm_residual import (
    Data,
    accuracy,
    complete,
    judge,
    operator,
    publish,
    read_data,
    read_settings,
    train_epoch,
    with_statistics_of,
)

FULL: dict[str, Any] = {
    "explore": [0, 30, 60, 100],
    "seeds": [0, 1, 2, 3, 4],
    "network": "resnet18",
    "width": 64,
    "pixels": 32,
    "examples": 50_000,
    "epochs": 200,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "hessian_batch_size": 1000,
    "tol": 1e-2,
    "epsilon": 1e-4,
    "ascent_steps": 200,
    "augment": 1,
}
SMALL: dict[str, Any] = FULL | {
    "explore": [0, 12, 24],
    "network": "resnet8",
    "width": 4,
    "pixels": 8,
    "examples": 300,
    "epochs": 36,
    "batch_size": 20,
    "tol": 0.1,
    "epsilon": 1e-3,
    "ascent_steps": 30,
    "augment": 0,
}

SHOWN = ("sharpness", "largest", "smallest", "loss", "test_accuracy")
CLAIMS = (
    ("a longer explore phase ends at lower sharpness", "sharpness", -1),
    ("a longer explore phase ends at a lower top eigenvalue", "largest", -1),
    ("a longer explore phase ends at higher test accuracy", "test_accuracy", 1),
)
"""Of the second the paper speaks only by way of the first."""


def network(settings: dict[str, Any], seed: int) -> nn.Module:
    """``resnet18``, or ``resnet`` and the depth of a network for CIFAR."""
    name, width = settings["network"], settings["width"]
    if name == "resnet18":
        return hk.zoo.resnet18_cifar(width=width, seed=seed)
    return hk.zoo.cifar_resnet(int(name.removeprefix("resnet")), width=width, seed=seed)


def measure(model: nn.Module, train: Data, test: Data, settings: dict[str, Any]) -> dict[str, Any]:
    """Keskar's sharpness and both ends of a network in evaluation, over all training examples."""
    H, loss = operator(model, train, settings["hessian_batch_size"])
    ex = hk.extreme_eigenvalues(H, tol=settings["tol"], max_matvecs=200)
    objective, params = hk.from_module(model, F.cross_entropy)
    batches = hk.as_data(train, batch_size=settings["hessian_batch_size"])
    found = hk.train.keskar_sharpness(
        objective,
        params,
        batches,
        epsilon=settings["epsilon"],
        lr=settings["epsilon"] / 5,
        max_steps=settings["ascent_steps"],
        optimizer="adam",
    )
    return {
        "loss": loss,
        "accuracy": accuracy(model, train),
        "test_accuracy": accuracy(model, test),
        "sharpness": found.value,
        "sharpness_status": found.status,
        "smallest": ex.smallest.value,
        "largest": ex.largest.value,
        "extremes": ex.to_dict(),
    }


def run(
    settings: dict[str, Any], train: Data, test: Data, explore: int, seed: int, place: Path
) -> dict[str, Any]:
    """Trains one network under the Knee schedule, writes its parameters and measures it."""
    epochs = settings["epochs"]
    record = {"explore": explore, "share": explore / epochs, "seed": seed}
    model = network(settings, seed).to(train[0].device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], momentum=0.9, weight_decay=settings["weight_decay"]
    )
    # one rate an epoch, and one epoch more: the schedule ends with a step of rate zero, which is left out
    schedule = hk.train.KneeLR(optimizer, explore_steps=explore + 1, total_steps=epochs + 1)
    for epoch in range(epochs):
        if not math.isfinite(train_epoch(model, train, optimizer, settings, epochs * seed + epoch)):
            return {**record, "status": "diverged"}
        schedule.step()
    model = with_statistics_of(model, train[0], settings["hessian_batch_size"])
    with atomic_write(place.with_suffix(".pt")) as draft:
        torch.save(model.state_dict(), draft)
    return {**record, "status": "trained", **measure(model, train, test, settings)}


def slopes(runs: Sequence[dict[str, Any]], quantity: str) -> list[float]:
    """One least-squares slope a seed, over the share of epochs that explore: of the log, but for accuracies."""
    found = []
    for seed in sorted({run["seed"] for run in runs}):
        own = [
            run for run in runs if run["seed"] == seed and run["status"] == "trained" and run[quantity] > 0
        ]
        shares = [run["share"] for run in own]
        values = [run[quantity] if "accuracy" in quantity else math.log(run[quantity]) for run in own]
        if len(set(shares)) > 1:
            found.append(statistics.linear_regression(shares, values).slope)
    return found


def judge_claims(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with the slopes that it is judged by."""
    return [
        {
            "claim": text,
            "quantity": quantity,
            "slopes": (own := slopes(runs, quantity)),
            "verdict": judge(own, sign),
        }
        for text, quantity, sign in CLAIMS
    ]


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), spread / len(values) ** 0.5


def means(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds of each quantity, by length of the explore phase."""
    rows = []
    for explore in sorted({run["explore"] for run in runs}):
        own = [run for run in runs if run["explore"] == explore and run["status"] == "trained"]
        if own:
            found = {name: mean_and_stderr([run[name] for run in own]) for name in SHOWN}
            rows.append({"explore": explore, "seeds": len(own), **found})
    return rows


def report(study: dict[str, Any]) -> str:
    """The claims and the means, as Markdown."""
    lines = [
        f"Data: {study['settings']['data']}. A slope is that of the quantity (the log of a curvature) over the share",
        "of epochs that explore; mean and standard error over seeds.",
        "",
        "| claim | slope | verdict |",
        "|---|---|---|",
    ]
    for claim in study["claims"]:
        value = "{:.3g} ± {:.2g}".format(*mean_and_stderr(claim["slopes"])) if claim["slopes"] else "no slope"
        lines.append(f"| {claim['claim']} | {value} | {claim['verdict']} |")
    lines += ["", f"| explore | seeds | {' | '.join(SHOWN)} |", "|---" * (2 + len(SHOWN)) + "|"]
    for entry in means(list(study["runs"].values())):
        cells = " | ".join("{:.4g} ± {:.2g}".format(*entry[name]) for name in SHOWN)
        lines.append(f"| {entry['explore']} | {entry['seeds']} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(study: dict[str, Any]) -> Any:
    """Each quantity against the explore length: seeds as dots, means with standard errors."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import COLORS, STYLE

    runs = [run for run in study["runs"].values() if run["status"] == "trained"]
    rows = means(runs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4))
        for ax, name in zip(axes, ("sharpness", "largest", "smallest", "test_accuracy"), strict=True):
            color = COLORS.get(name, COLORS["measured"])
            ax.plot([run["explore"] for run in runs], [run[name] for run in runs], ".", color="0.6")
            values, errors = zip(*(row[name] for row in rows), strict=True)
            ax.errorbar([row["explore"] for row in rows], values, errors, color=color, marker="o", capsize=3)
            ax.set(title=name.replace("_", " "), xlabel="explore epochs")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    out, settings, cifar10, device = read_settings(__doc__ or "", FULL, SMALL, argv)
    train, test = read_data(cifar10, settings, device)
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed, explore in product(settings["seeds"], settings["explore"]):
        place = out / f"explore{explore}-{seed}"
        wanted[place.name] = partial(run, settings, train, test, explore, seed, place)
    study = complete(out, settings, wanted, judge_claims)
    publish(out, report(study), draw(study))


if __name__ == "__main__":
    main()
