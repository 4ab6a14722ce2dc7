"""Outliers of the Hessian with and without BatchNorm: the top eigenvalues and the gaps between them.

    python benchmarks/study_outliers.py --small --out DIR
    python benchmarks/study_outliers.py --cifar10 FOLDER --out DIR

Source: Ghorbani, Krishnan, Xiao, ICML 2019, arXiv:1901.10159: with BatchNorm there are no outliers far from the bulk of
the spectrum, and without it there are as many as classes.

The same network, with and without BatchNorm, is trained by Adam until the loss over all training examples, tested every
few steps, is at most ``--loss``. Then the ``--top`` largest eigenvalues of the Hessian over all training examples are
found, and its density. The statistics were chosen before any spectrum was seen:

- the gap is the largest ratio of neighbours among these eigenvalues, and the outliers are those above it;
- outliers are far from the bulk if the gap is more than 2;
- they are as many as classes if they are at most one more or less;
- the reach is the ratio of the first eigenvalue to the last of these, which counts as the edge of the bulk.

Each gives one number a seed, whose sign is tested over seeds. The statistics do not depend on the scale of the Hessian,
which differs between both networks.

Writes into DIR: ``study.json`` after each network, from which an interrupted run continues; at the end ``study.md`` and
``study.png``.

Departures from the paper: a narrow ResNet of 8 layers on small images; BatchNorm's running statistics are computed
again over all training examples before measuring, and the Hessian is that of the network in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, markdown
from _study import by_network, claims_table, complete, operator, publish, read_settings, share_beyond
from _study_networks import NUM_CLASSES, examples, network, train_by_adam
from _training import Data, accuracy, recompute_batchnorm

FULL: Record = {
    "networks": ["digits ResNet-8", "CIFAR-10 ResNet-8"],
    "variants": ["with BatchNorm", "without BatchNorm"],
    "seeds": [0, 1, 2],
    "examples": 600,
    "pixels": 16,
    "loss": 0.3,
    "max_epochs": 200,
    "lr": 3e-3,
    "batch_size": 50,
    "hessian_batch_size": 600,
    "top": 15,
    "tol": 1e-2,
    "steps": 60,
}
SMALL: Record = FULL | {
    "networks": ["digits ResNet-8"],
    "seeds": [0, 1],
    "examples": 200,
    "loss": 1.0,
    "steps": 20,
}
RESULTS = harness.RESULTS / "study_outliers.json"
EVERY = 5
"""Steps between two tests of the loss."""


def train(model: nn.Module, data: Data, settings: Record, seed: int) -> nn.Module | None:
    """Train until the loss over all examples is low enough; return a copy in evaluation mode, or None."""
    for step in train_by_adam(model, data, settings, settings["max_epochs"], seed):
        if step and step % EVERY == 0:
            frozen = recompute_batchnorm(model, data[0], settings["hessian_batch_size"])
            with torch.no_grad():
                loss = F.cross_entropy(frozen(data[0]), data[1])
            if loss <= settings["loss"]:
                return frozen
    return None


def run(settings: Record, name: str, variant: str, seed: int, cifar10: Path | None) -> Record:
    """Train one network and measure its top eigenvalues and density."""
    record = {"network": name, "variant": variant, "seed": seed}
    data, test = examples(name, settings, cifar10)
    start = network(name, seed, batchnorm=variant == "with BatchNorm")
    model = train(start, data, settings, seed)
    if model is None:
        return {**record, "status": "loss not reached"}
    H, loss = operator(model, data, settings["hessian_batch_size"])
    top = hk.top_eigenvalues(H, settings["top"], tol=settings["tol"], max_matvecs=1000)
    density = hk.spectral_density(H, num_steps=settings["steps"])
    return {
        **record,
        "status": str(top.status),
        "loss": loss,
        "test_accuracy": accuracy(model, test),
        "num_parameters": H.n,
        "values": top.values.flip(0).tolist(),
        "error_bounds": top.error_bounds.flip(0).tolist(),
        "density": {"nodes": density.nodes.tolist(), "weights": density.masses.tolist()},
    }


def gap(values: Sequence[float]) -> tuple[int, float]:
    """Return how many descending values lie above the largest ratio of neighbours, and that ratio."""
    ratios = [one / other if other > 0 else math.inf for one, other in pairwise(values)]
    widest = max(ratios)
    return 1 + ratios.index(widest), widest


def reach(values: Sequence[float]) -> float:
    """Return the ratio of the first value to the last."""
    return values[0] / values[-1]


def pairs(runs: Sequence[Record]) -> list[Record]:
    """Return the values with and without BatchNorm of each network and seed that has both, converged."""
    done = {
        (run["network"], run["seed"], run["variant"]): run for run in runs if run["status"] == "converged"
    }
    return [
        {
            "network": name,
            "seed": seed,
            "with": run["values"],
            "without": done[name, seed, "without BatchNorm"]["values"],
        }
        for (name, seed, variant), run in done.items()
        if variant == "with BatchNorm" and (name, seed, "without BatchNorm") in done
    ]


CLAIMS: tuple[tuple[str, Callable[[Record], float], int], ...] = (
    (
        "with BatchNorm, no outliers far from the bulk (log of gap over 2 is negative)",
        lambda pair: math.log(gap(pair["with"])[1] / 2),
        -1,
    ),
    (
        "without BatchNorm, outliers far from the bulk (log of gap over 2 is positive)",
        lambda pair: math.log(gap(pair["without"])[1] / 2),
        1,
    ),
    (
        "without BatchNorm, as many outliers as classes (1.5 less the difference)",
        lambda pair: 1.5 - abs(gap(pair["without"])[0] - NUM_CLASSES),
        1,
    ),
    (
        "without BatchNorm, the largest lies further from the bulk (log of the ratio of both reaches)",
        lambda pair: math.log(reach(pair["without"]) / reach(pair["with"])),
        1,
    ),
)


def judge_claims(runs: Sequence[Record]) -> list[Record]:
    return by_network(CLAIMS, pairs(runs))


def report(study: Record) -> str:
    """Return the claims and the networks as Markdown."""
    rows = []
    for run in study["runs"].values():
        head = [run["network"], run["variant"], f"{run['seed']}", run["status"]]
        if "values" not in run:
            rows.append([*head, *[""] * 7])
            continue
        values = run["values"]
        number, widest = gap(values)
        edge = [f"{values[0]:.3g}", f"{values[NUM_CLASSES - 1]:.3g}", f"{values[-1]:.3g}"]
        rows.append(
            [*head, f"{run['loss']:.3f}", f"{run['test_accuracy']:.3f}", *edge, f"{number}", f"{widest:.2f}"]
        )
    columns = ["network", "variant", "seed", "status", "loss", "test accuracy", "first", "tenth", "last"]
    return (
        f"Mean and standard error over seeds, from the {study['settings']['top']} largest eigenvalues.\n\n"
        f"{claims_table(study['claims'], 'figure')}\n\n"
        f"{markdown([*columns, 'outliers', 'gap'], rows)}\n"
    )


def draw(study: Record) -> Figure:
    """Draw the top eigenvalues by place, a line a seed, and the first seed's number of eigenvalues beyond a value."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import COLORS, STYLE

    runs = [run for run in study["runs"].values() if "values" in run]
    names = [*dict.fromkeys(run["network"] for run in runs)]
    colors = {"with BatchNorm": COLORS["smallest"], "without BatchNorm": COLORS["largest"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2,
            max(1, len(names)),
            figsize=(4.6 * max(1, len(names)), 6.6),
            squeeze=False,
            layout="constrained",
        )
        for top, bottom, name in zip(*axes, names, strict=False):
            for run in (one for one in runs if one["network"] == name):
                color, first = colors[run["variant"]], run["seed"] == 0
                places = range(1, 1 + len(run["values"]))
                label = run["variant"] if first else None
                top.plot(places, run["values"], ".-", color=color, alpha=0.8, label=label)
                if first:
                    x, share = share_beyond(run["density"]["nodes"], run["density"]["weights"])
                    bottom.plot(x, share * run["num_parameters"], color=color, label=label)
            top.axvline(NUM_CLASSES, color="0.5", linestyle="--", linewidth=1)
            top.set(title=name, yscale="log", xlabel="place from the top", ylabel="eigenvalue")
            bottom.set(yscale="log", xlabel="eigenvalue", ylabel="eigenvalues beyond")
            bottom.set_xscale("symlog", linthresh=0.1)
            top.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv)
    settings = {key: value for key, value in asked.settings.items() if key != "data"}  # networks name theirs
    wanted = {
        f"{name} {variant} {seed}": partial(run, settings, name, variant, seed, asked.images)
        for seed, name, variant in product(settings["seeds"], settings["networks"], settings["variants"])
    }
    study = complete(asked._replace(settings=settings), wanted, judge_claims)
    publish(asked.out, report(study), draw(study))


if __name__ == "__main__":
    main()
