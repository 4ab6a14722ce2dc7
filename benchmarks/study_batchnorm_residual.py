"""Effect of BatchNorm and residual connections on the Hessian along training, by depth: the PyHessian study.

    python benchmarks/study_batchnorm_residual.py --small --out DIR
    python benchmarks/study_batchnorm_residual.py --cifar10 FOLDER --device cuda --out DIR
    python benchmarks/study_batchnorm_residual.py --cifar10 FOLDER --seeds 0 --depths 20 --out DIR --results FILE

Source: Yao, Gholami, Keutzer, Mahoney, PyHessian, arXiv:1912.07145. Networks with and without either are trained in the
same way; the ends of the spectrum, its trace and its density are measured along training, over the first
``--hessian-examples`` of the training examples, or only at its end with ``--measurements 0``. CLAIMS lists the paper's
findings in our words. Each claim is tested at each depth by the ratios between both networks of a pair at the end of
training, over several seeds. The full size is the paper's networks, on CIFAR-10 on a GPU. ``--small``, on one core, is
narrow networks on small images (digits, or CIFAR-10): it shows that the study runs, and is no evidence about the
paper's networks. One network follows the other, all variants of the first depth and seed first. ``--results`` adds to
the networks of a published file.

After the last fall of the rate training goes on until the loss settles, for at most as many epochs again: none of
``--patience`` epochs is lower by 1 %. Where a deep network does not train, ``--warmup`` epochs of a rising rate and
``--clip``, the largest norm of a gradient, may help. They hold for all networks of a study.

Writes into DIR: ``study.json`` after each network, from which an interrupted run continues; parameters (``.pt``) and
final density (``.density.json``) of each network; at the end ``study.md``, the claims in a table, and ``study.png``.

Departures from the paper:
1. Several seeds, and standard errors.
2. BatchNorm's running statistics are computed again over all training examples before each measurement: with few steps
   they lag behind the parameters, and the Hessian would be that of another function.
3. Without BatchNorm the second convolution of each block has a smaller initial scale: see ``hvpkit.zoo.cifar_resnet``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import hvpkit as hk
from _harness import Record, markdown, save
from _study import complete, judge, operator, publish, read_settings, share_beyond, without_history
from _training import Data, accuracy, read_images, recompute_batchnorm, sgd, train_epoch

FULL: Record = {
    "depths": [20, 32, 38, 56],
    "variants": ["both", "no batchnorm", "no residual", "neither"],
    "seeds": [0, 1, 2],
    "width": 16,
    "pixels": 32,
    "examples": 50_000,
    "hessian_examples": 50_000,
    "epochs": 180,
    "measurements": 10,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "hessian_batch_size": 1000,
    "tol": 1e-2,
    "products": 90,
    "steps": 80,
    "augment": 1,
    "warmup": 0,
    "clip": 0.0,
    "patience": 10,
}
SMALL: Record = FULL | {
    "depths": [8, 20],
    "variants": ["both", "no batchnorm", "no residual"],
    "width": 4,
    "pixels": 8,
    "examples": 120,
    "hessian_examples": 120,
    "epochs": 24,
    "measurements": 2,
    "lr": 0.05,
    "batch_size": 15,
    "tol": 0.1,
    "products": 15,
    "steps": 15,
    "augment": 0,
    "patience": 0,
}
QUANTITIES = ("largest", "trace")
LEARNT = 0.8
"""Share of the loss of a uniform guess: a network whose final loss is higher has not learnt, and is not compared."""


@dataclass(frozen=True)
class Claim:
    """A claim that leaving out a part raises (+1) or lowers (-1) curvature, at these of the depths in order."""

    text: str
    variant: str
    sign: int
    depths: slice


CLAIMS = (
    Claim("without BatchNorm, the shallowest network ends flatter", "no batchnorm", -1, slice(0, 1)),
    Claim("without BatchNorm, deeper networks end sharper", "no batchnorm", 1, slice(1, None)),
    Claim("without residual connections, networks of any depth end sharper", "no residual", 1, slice(None)),
)
GROWTH = "without BatchNorm, the deepest network gains more in sharpness than the shallowest"


def num_classes(settings: Record) -> int:
    return 100 if settings["data"] == "CIFAR-100" else 10


def network(settings: Record, depth: int, variant: str, seed: int) -> nn.Module:
    return hk.zoo.cifar_resnet(
        depth,
        batchnorm=variant in ("both", "no residual"),
        residual=variant in ("both", "no batchnorm"),
        shortcut="projection",
        width=settings["width"],
        num_classes=num_classes(settings),
        seed=seed,
    )


def measure(H: hk.LinearOperator, settings: Record) -> Record:
    """Return both ends and the trace."""
    ex = hk.extreme_eigenvalues(H, tol=settings["tol"], max_matvecs=200)
    trace = hk.trace(H, num_matvecs=settings["products"])
    return {
        "smallest": ex.smallest.value,
        "largest": ex.largest.value,
        "extremes": without_history(ex),
        "trace": trace.value,
        "trace_stderr": trace.stderr,
    }


def factor(settings: Record, epoch: int) -> float:
    """Return the rate over the highest one: it rises for ``warmup`` epochs, and falls after 80 and 120 of 180."""
    epochs, warmup = settings["epochs"], settings["warmup"]
    falls = sum(epoch >= fall for fall in (round(4 * epochs / 9), round(2 * epochs / 3)))
    return float(min(1.0, (epoch + 1) / max(1, warmup)) * 0.1**falls)


def settled(losses: Sequence[float], patience: int) -> bool:
    """Return True if none of the last ``patience`` losses is lower by 1 % than the lowest before them."""
    earlier = losses[: len(losses) - patience]
    return bool(earlier) and min(losses[-patience:]) >= 0.99 * min(earlier)


def run(settings: Record, data: Data, depth: int, variant: str, seed: int, stem: Path) -> Record:
    """Train one network, measure it along the way, and write its parameters and density."""
    epochs, patience, batch_size = (settings[key] for key in ("epochs", "patience", "hessian_batch_size"))
    record: Record = {"depth": depth, "variant": variant, "seed": seed}
    model = network(settings, depth, variant, seed).to(data[0].device)
    optimizer = sgd(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, settings))
    parts = settings["measurements"]
    due = {round(number * epochs / parts) for number in range(parts + 1 if parts else 0)}
    seen = tuple(part[: settings["hessian_examples"]] for part in data)
    measured: list[Record] = []
    losses: list[float] = []
    for epoch in range(2 * epochs + 1):
        is_settled = settled(losses, patience) if patience else None
        is_last = (epoch >= epochs and is_settled is not False) or epoch == 2 * epochs
        if epoch in due or is_last:
            frozen = recompute_batchnorm(model, data[0], batch_size)
            H, loss = operator(frozen, seen, batch_size)
            try:
                found = measure(H, settings)
            except hk.NonFiniteError:
                return {**record, "status": "diverged", "measured": measured}
            measured.append({"epoch": epoch, "loss": loss, "accuracy": accuracy(frozen, data), **found})
        if is_last:
            break
        losses.append(train_epoch(model, data, optimizer, settings, 2 * epochs * seed + epoch))
        if not math.isfinite(losses[-1]):
            return {**record, "status": "diverged", "measured": measured}
        schedule.step()
    density = hk.spectral_density(H, num_steps=settings["steps"])
    measured[-1]["density"] = {"nodes": density.nodes.tolist(), "weights": density.masses.tolist()}
    save(stem.with_suffix(".pt"), frozen.state_dict())
    density.save(stem.with_suffix(".density.json"))
    learnt = measured[-1]["loss"] < LEARNT * math.log(num_classes(settings))
    status = "learnt" if learnt else "at chance"
    return {**record, "status": status, "settled": is_settled, "measured": measured}


def log_ratios(runs: Sequence[Record], variant: str, depth: int, quantity: str) -> dict[int, float]:
    """Return, by seed, the log ratio of a final quantity without a part to that with both, where both have learnt."""
    ends = {
        (run["variant"], run["seed"]): run["measured"][-1][quantity]
        for run in runs
        if run["depth"] == depth and run["status"] == "learnt" and run["measured"][-1][quantity] > 0
    }
    return {
        seed: math.log(value / ends["both", seed])
        for (name, seed), value in ends.items()
        if name == variant and ("both", seed) in ends
    }


def judge_claims(runs: Sequence[Record]) -> list[Record]:
    """Return each claim for each quantity and depth, with the ratios and the verdict."""
    depths = sorted({run["depth"] for run in runs})
    rows = []
    for quantity in QUANTITIES:
        for claim in CLAIMS:
            for depth in depths[claim.depths]:
                logs = [*log_ratios(runs, claim.variant, depth, quantity).values()]
                rows.append(row(claim.text, quantity, f"{depth}", logs, claim.sign))
        if len(depths) > 1:
            low, high = (
                log_ratios(runs, "no batchnorm", depth, quantity) for depth in (depths[0], depths[-1])
            )
            growth = [high[seed] - low[seed] for seed in low if seed in high]
            rows.append(row(GROWTH, quantity, f"{depths[0]}, {depths[-1]}", growth, 1))
    return rows


def row(text: str, quantity: str, depth: str, logs: list[float], sign: int) -> Record:
    """Return a claim with its verdict; the ratio is the geometric mean."""
    return {
        "claim": text,
        "quantity": quantity,
        "depth": depth,
        "ratio": math.exp(statistics.mean(logs)) if logs else None,
        "log_ratios": logs,
        "verdict": judge(logs, sign),
    }


def shown(claim: Record) -> str:
    """Return the ratio of a claim, with that of each seed."""
    if claim["ratio"] is None:
        return "no pair that has learnt"
    ratios = ", ".join(f"{math.exp(value):.3g}" for value in claim["log_ratios"])
    return f"{claim['ratio']:.3g} ({ratios})"


def report(study: Record) -> str:
    """Return the claims and the networks, as Markdown."""
    claims = [
        [claim["claim"], claim["quantity"], claim["depth"], shown(claim), claim["verdict"]]
        for claim in study["claims"]
    ]
    networks = []
    for run in study["runs"].values():
        head = [f"{run[key]}" for key in ("depth", "variant", "seed", "status")]
        last = run["measured"][-1] if run["status"] != "diverged" else None
        figures = last and [
            f"{last['epoch']}{' (falling)' if run['settled'] is False else ''}",
            f"{last['loss']:.3g}",
            f"{last['accuracy']:.3f}",
            f"{last['smallest']:.3g}",
            f"{last['largest']:.3g}",
            f"{last['trace']:.3g} ± {last['trace_stderr']:.2g}",
        ]
        networks.append([*head, *(figures or [""] * 6)])
    columns = ["depth", "variant", "seed", "status", "epochs", "loss", "accuracy"]
    return (
        f"Data: {study['settings']['data']}. A ratio is that of the network without the part to the network with\n"
        "both, at the end of training: the geometric mean over seeds, and that of each seed; for two depths, the\n"
        "ratio of the deeper one divided by that of the other. All are trained in the same way, so their losses\n"
        "differ, and the Hessian depends on the loss: part of a ratio may be due to that.\n\n"
        f"{markdown(['claim', 'quantity', 'depth', 'ratio', 'verdict'], claims)}\n\n"
        f"{markdown([*columns, 'smallest', 'largest', 'trace'], networks)}\n"
    )


def draw(study: Record) -> Figure:
    """Draw top eigenvalue and trace by depth, along training or at its end; and the first seed's final spectrum.

    Hollow points are of networks that have not learnt.
    """
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import STYLE

    runs = list(study["runs"].values())
    depths = sorted({run["depth"] for run in runs})
    variants = sorted({run["variant"] for run in runs})
    along = any(len(run["measured"]) > 1 for run in runs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3, len(depths), figsize=(3.4 * len(depths), 8), squeeze=False, sharey="row"
        )
        for column, depth in enumerate(depths):
            for color, variant in enumerate(variants):
                own = [run for run in runs if (run["depth"], run["variant"]) == (depth, variant)]
                for run in own:
                    look = {"color": f"C{color}", "alpha": 0.7, "label": variant if run is own[0] else None}
                    look["fillstyle"] = "full" if run["status"] == "learnt" else "none"
                    for place, quantity in enumerate(QUANTITIES):
                        steps = [
                            found["epoch"] if along else variant.replace(" ", "\n")
                            for found in run["measured"]
                        ]
                        values = [found[quantity] for found in run["measured"]]
                        axes[place, column].plot(steps, values, "o-", markersize=4, **look)
                if own and own[0]["status"] != "diverged":
                    density = own[0]["measured"][-1]["density"]
                    beyond = share_beyond(density["nodes"], density["weights"])
                    axes[2, column].plot(*beyond, color=f"C{color}", label=variant)
            for place, quantity in enumerate(QUANTITIES):
                axes[place, column].set(title=f"{depth} layers: {quantity}", yscale="symlog")
                if along:
                    axes[place, column].set(xlabel="epoch")
            axes[2, column].set(yscale="log", xlabel="eigenvalue", title=f"{depth} layers: share beyond")
            axes[2, column].set_xscale("symlog", linthresh=0.1)
            axes[2, column].xaxis.get_major_locator().set_params(numticks=6)
        axes[0, 0].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv)
    out, settings = asked.out, asked.settings
    data, _ = read_images(asked.images, settings, asked.device)
    wanted = {}
    for seed, depth, variant in product(settings["seeds"], settings["depths"], settings["variants"]):
        place = out / f"resnet{depth}-{variant.replace(' ', '-')}-{seed}"
        wanted[place.name] = partial(run, settings, data, depth, variant, seed, place)
    study = complete(asked, wanted, judge_claims)
    publish(out, report(study), draw(study))


if __name__ == "__main__":
    main()
