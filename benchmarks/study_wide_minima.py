"""Sharpness and both ends of the Hessian against how long the Knee schedule explores.

    python benchmarks/study_wide_minima.py --small --out DIR
    python benchmarks/study_wide_minima.py --cifar10 FOLDER --device cuda --out DIR
    python benchmarks/study_wide_minima.py --medium --out DIR

Source: Iyer, Thejas, Kwatra, Ramjee, Sivathanu, JMLR 24(65), 2023, arXiv:2003.03977. Its hypothesis: wide minima are
rarer than narrow ones, so that finding one takes time at a high learning rate; the longer this phase, the wider the
minimum and the better the test accuracy, on average; half of the budget is enough. Here the number of epochs is fixed;
the first ``--explore`` of them are at the peak rate, then the rate falls to zero. Each duration is run from several
seeds. A claim is tested by one regression slope for each seed: of the quantity (the log of a curvature) over the share
of epochs that explore. Beside it stands Spearman's rank correlation of all runs, with its p-value. Half counts as
enough if longer durations gain less than one point of test accuracy over it, in the mean of a seed.

The full size is ResNet-18 on CIFAR-10, on a GPU. ``--small``, on one core, is a narrow network on small images: it
shows that the study runs, and is no evidence about the paper's networks. ``--medium``, some minutes of one core for a
seed, made the published table: a narrow ResNet of 8 layers on 400 digits.

Writes into DIR: ``study.json`` after each network, from which an interrupted run continues; parameters (``.pt``); at
the end ``study.md``, the claims and the means in tables, and ``study.png``.

Departure from the paper: BatchNorm's running statistics are computed again over all training examples before measuring.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, markdown, save
from _study import (
    complete,
    judge,
    mean_and_stderr,
    operator,
    plus_minus,
    publish,
    read_settings,
    without_history,
)
from _training import Data, accuracy, read_images, recompute_batchnorm, sgd, train_epoch

RESULTS = harness.RESULTS / "study_wide_minima.json"
FULL: Record = {
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
MEDIUM: Record = FULL | {
    "explore": [0, 5, 10, 15],
    "network": "resnet8",
    "width": 4,
    "pixels": 8,
    "examples": 400,
    "epochs": 20,
    "batch_size": 25,
    "hessian_batch_size": 400,
    "tol": 0.02,
    "epsilon": 1e-3,
    "ascent_steps": 40,
}
SMALL: Record = FULL | {
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
"""The paper supports the second only through the first."""
ENOUGH = "exploring for more than half of the epochs gains less than 0.01 of test accuracy"


def network(settings: Record, seed: int) -> nn.Module:
    """Return ``resnet18``, or the network for CIFAR whose depth follows ``resnet``."""
    name, width = settings["network"], settings["width"]
    if name == "resnet18":
        return hk.zoo.resnet18_cifar(width=width, seed=seed)
    return hk.zoo.cifar_resnet(int(name.removeprefix("resnet")), width=width, seed=seed)


def measure(model: nn.Module, train: Data, test: Data, settings: Record) -> Record:
    """Return Keskar's sharpness and both ends of a network in evaluation mode, over all training examples."""
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
        "extremes": without_history(ex),
    }


def run(settings: Record, train: Data, test: Data, explore: int, seed: int, place: Path) -> Record:
    """Train one network with the Knee schedule, write its parameters and measure it."""
    epochs = settings["epochs"]
    record = {"explore": explore, "share": explore / epochs, "seed": seed}
    model = network(settings, seed).to(train[0].device)
    optimizer = sgd(model, settings)
    # one rate an epoch, and one epoch more: the schedule ends with a step of rate zero, which is left out
    schedule = hk.train.KneeLR(optimizer, explore_steps=explore + 1, total_steps=epochs + 1)
    for epoch in range(epochs):
        if not math.isfinite(train_epoch(model, train, optimizer, settings, epochs * seed + epoch)):
            return {**record, "status": "diverged"}
        schedule.step()
    model = recompute_batchnorm(model, train[0], settings["hessian_batch_size"])
    save(place.with_suffix(".pt"), model.state_dict())
    return {**record, "status": "trained", **measure(model, train, test, settings)}


def slopes(runs: Sequence[Record], quantity: str) -> list[float]:
    """Return a least-squares slope for each seed, over the share of epochs that explore; of logs, except accuracies."""
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


def rank_correlation(runs: Sequence[Record], quantity: str) -> tuple[float, float] | None:
    """Return Spearman's correlation of a quantity with the share of epochs that explore, over all runs, and its p."""
    own = [run for run in runs if run["status"] == "trained"]
    shares, values = ([run[key] for run in own] for key in ("share", quantity))
    if len(own) < 3 or 1 in (len(set(shares)), len(set(values))):
        return None
    found = spearmanr(shares, values)
    return float(found.statistic), float(found.pvalue)


def gains(runs: Sequence[Record]) -> list[float]:
    """Return, for each seed, the mean test accuracy of durations over half of the epochs, less that of half."""
    found = []
    for seed in sorted({run["seed"] for run in runs}):
        own = [run for run in runs if run["seed"] == seed and run["status"] == "trained"]
        half = [run["test_accuracy"] for run in own if run["share"] == 0.5]
        longer = [run["test_accuracy"] for run in own if run["share"] > 0.5]
        if half and longer:
            found.append(statistics.mean(longer) - half[0])
    return found


def judge_claims(runs: Sequence[Record]) -> list[Record]:
    """Return each claim with a figure for each seed and the verdict; slopes with the rank correlation of all runs."""
    rows = []
    for text, quantity, sign in CLAIMS:
        own = slopes(runs, quantity)
        ranks = rank_correlation(runs, quantity)
        rows.append({"claim": text, "figures": own, "ranks": ranks, "verdict": judge(own, sign)})
    if gained := gains(runs):
        verdict = judge([gain - 0.01 for gain in gained], -1)
        rows.append({"claim": ENOUGH, "figures": gained, "ranks": None, "verdict": verdict})
    return rows


def means(runs: Sequence[Record]) -> list[Record]:
    """Return mean and standard error over seeds of each quantity, by duration of the explore phase."""
    rows = []
    for explore in sorted({run["explore"] for run in runs}):
        own = [run for run in runs if run["explore"] == explore and run["status"] == "trained"]
        if own:
            found = {name: mean_and_stderr([run[name] for run in own]) for name in SHOWN}
            rows.append({"explore": explore, "seeds": len(own), **found})
    return rows


def report(study: Record) -> str:
    """Return the claims and the means, as Markdown."""
    claims = [
        [
            claim["claim"],
            plus_minus(claim["figures"]),
            "{:.2f} (p = {:.2g})".format(*claim["ranks"]) if claim["ranks"] else "-",
            claim["verdict"],
        ]
        for claim in study["claims"]
    ]
    rows = [
        [f"{row['explore']}", f"{row['seeds']}", *("{:.4g} ± {:.2g}".format(*row[name]) for name in SHOWN)]
        for row in means(list(study["runs"].values()))
    ]
    return (
        f"Data: {study['settings']['data']}. The figure is the slope of the quantity (the log of a curvature) over\n"
        "the share of epochs that explore, or the gain; mean and standard error over seeds. The rank correlation is\n"
        f"that of all {len(study['runs'])} runs.\n\n"
        f"{markdown(['claim', 'figure', 'rank correlation', 'verdict'], claims)}\n\n"
        f"{markdown(['explore', 'seeds', *SHOWN], rows)}\n"
    )


def draw(study: Record) -> Figure:
    """Draw each quantity over the duration of the explore phase: seeds as dots, means with standard errors."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import COLORS, STYLE

    runs = [run for run in study["runs"].values() if run["status"] == "trained"]
    rows = means(runs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
        for ax, name in zip(axes, ("sharpness", "largest", "smallest", "test_accuracy"), strict=True):
            color = COLORS.get(name, COLORS["measured"])
            ax.plot([run["explore"] for run in runs], [run[name] for run in runs], ".", color="0.6")
            values, errors = zip(*(row[name] for row in rows), strict=True)
            ax.errorbar([row["explore"] for row in rows], values, errors, color=color, marker="o", capsize=3)
            ax.set(title=name.replace("_", " "), xlabel="explore epochs")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv, MEDIUM)
    out, settings = asked.out, asked.settings
    train, test = read_images(asked.images, settings, asked.device)
    wanted = {}
    for seed, explore in product(settings["seeds"], settings["explore"]):
        place = out / f"explore{explore}-{seed}"
        wanted[place.name] = partial(run, settings, train, test, explore, seed, place)
    study = complete(asked, wanted, judge_claims)
    publish(out, report(study), draw(study))


if __name__ == "__main__":
    main()
