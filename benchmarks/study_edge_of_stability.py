"""The sharpness that full-batch training settles at, by gradient descent, RMSprop and Adam.

    python benchmarks/study_edge_of_stability.py --small --out benchmarks/results/edge_of_stability

Source: Cohen, Kaur, Li, Kolter, Talwalkar, ICLR 2021, arXiv:2103.00065: gradient descent settles where the largest
eigenvalue of the Hessian is 2 / lr. Cohen et al., arXiv:2207.14484: adaptive methods settle where that of the Hessian
preconditioned by their diagonal is 2 / lr for RMSprop and (2 + 2 beta1) / ((1 - beta1) lr) for Adam, 38 / lr for 0.9.

A network with tanh units is trained by all of its data with the squared error, from several seeds. The sharpness is
measured on the way, by Lanczos on :func:`hvpkit.precondition`. Two claims for each method: it begins below the known
value, and its mean over the last half of the measurements is that value, to within ``--tolerance``.

The full size has wider layers and five times the data and steps; ``--small`` takes two minutes on one core.

Writes into DIR: ``study.json`` after each run, from which an interrupted study continues; at the end ``study.md`` and
``study.png``.

Departures from the papers: the digits of scikit-learn in place of CIFAR-10; RMSprop's decay is 0.998, as its diagonal
follows the oscillation of the gradient otherwise, and the sharpness settles some 10 % above the value (with 0.99).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, markdown
from _study import complete, publish, read_settings
from hvpkit.zoo.seeding import seeded

FULL: Record = {
    "variants": ["gradient descent", "RMSprop", "Adam"],
    "seeds": [0, 1, 2],
    "examples": 1000,
    "width": 100,
    "steps": 10_000,
    "measurements": 50,
    "lr_gd": 0.5,
    "lr_rmsprop": 5e-4,
    "lr_adam": 2e-3,
    "rmsprop_decay": 0.998,
    "beta1": 0.9,
    "beta2": 0.99,
    "tol": 1e-2,
    "tolerance": 0.1,
}
SMALL: Record = FULL | {"seeds": [0, 1], "examples": 200, "width": 24, "steps": 2000, "measurements": 20}

RESULTS = harness.RESULTS / "edge_of_stability"
"""The small study that is kept."""

MAKERS: dict[str, Callable[[Any, Record], torch.optim.Optimizer]] = {
    "gradient descent": lambda params, s: torch.optim.SGD(params, s["lr_gd"]),
    "RMSprop": lambda params, s: torch.optim.RMSprop(
        params, s["lr_rmsprop"], alpha=s["rmsprop_decay"], eps=1e-7
    ),
    "Adam": lambda params, s: torch.optim.Adam(
        params, s["lr_adam"], betas=(s["beta1"], s["beta2"]), eps=1e-7
    ),
}


def published(variant: str, settings: Record) -> float:
    """Return the sharpness that the papers give."""
    if variant == "Adam":
        beta1 = settings["beta1"]
        return float((2 + 2 * beta1) / ((1 - beta1) * settings["lr_adam"]))
    return float(2 / settings["lr_gd" if variant == "gradient descent" else "lr_rmsprop"])


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half of the squared distance for each example ``[B]``."""
    return 0.5 * (outputs - targets).square().sum(dim=-1)


def examples(settings: Record) -> tuple[Tensor, Tensor]:
    """Return centered digits ``[N, 64]`` and their classes, one-hot ``[N, 10]``."""
    x, y = hk.zoo.digits()
    x, y = x[: settings["examples"]].flatten(1), y[: settings["examples"]]
    return x - x.mean(dim=0), F.one_hot(y, 10).float()


def network(settings: Record, seed: int) -> nn.Module:
    """Return two hidden layers of tanh units."""
    width = settings["width"]
    with seeded(seed):
        return nn.Sequential(
            nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )


def sharpness(
    model: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, tol: float
) -> float:
    """Return the largest eigenvalue of the Hessian, preconditioned by the optimizer's diagonal."""
    objective, params = hk.from_module(model, squared_error)
    H = hk.hessian(objective, params, data, mode="reverse-over-reverse")
    return float(hk.lanczos(hk.precondition(H, optimizer), 1, which="LA", tol=tol).values[0])


def run(settings: Record, variant: str, seed: int) -> Record:
    """Train once, and measure at equal distances; sharpness is over the published value."""
    x, targets = data = examples(settings)
    model, limit = network(settings, seed), published(variant, settings)
    optimizer = MAKERS[variant](model.parameters(), settings)
    every = settings["steps"] // settings["measurements"]
    measured = []
    for step in range(1, settings["steps"] + 1):
        optimizer.zero_grad()
        loss = squared_error(model(x), targets).mean()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step in (1, every // 4):
            ratio = sharpness(model, data, optimizer, settings["tol"]) / limit
            measured.append({"step": step, "loss": float(loss.detach()), "ratio": ratio})
    return {"variant": variant, "seed": seed, "status": "trained", "published": limit, "measured": measured}


def settled(record: Record) -> float:
    """Return the mean ratio over the last half of the measurements."""
    ratios = [entry["ratio"] for entry in record["measured"]]
    return statistics.mean(ratios[len(ratios) // 2 :])


def judge_claims(runs: Sequence[Record], tolerance: float) -> list[Record]:
    """Return both claims for each method with the ratios of each seed, and the verdict: held in all seeds or not."""
    claims = []
    for variant in dict.fromkeys(record["variant"] for record in runs):
        own = [record for record in runs if record["variant"] == variant]
        lowest = [min(entry["ratio"] for entry in record["measured"]) for record in own]
        last = [settled(record) for record in own]
        text = f"{variant} settles at the published sharpness, {own[0]['published']:g}"
        for claim, ratios, held in (
            (f"{variant} comes from below", lowest, all(ratio < 0.9 for ratio in lowest)),
            (text, last, all(abs(ratio - 1) <= tolerance for ratio in last)),
        ):
            claims.append({"claim": claim, "ratios": ratios, "verdict": "held" if held else "not held"})
    return claims


def report(study: Record) -> str:
    """Return the claims as Markdown."""
    rows = [
        [claim["claim"], ", ".join(f"{ratio:.3f}" for ratio in claim["ratios"]), claim["verdict"]]
        for claim in study["claims"]
    ]
    return (
        f"Sharpness over the published value, one number a seed: the lowest, and the mean over the last half of\n"
        f"{study['settings']['steps']} steps with full batches of {study['settings']['examples']} examples.\n\n"
        f"{markdown(['claim', 'ratios', 'verdict'], rows)}\n"
    )


def draw(study: Record) -> Figure:
    """Draw the ratio along training, a panel a method, a line a seed."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import COLORS, STYLE

    runs = list(study["runs"].values())
    variants = [*dict.fromkeys(record["variant"] for record in runs)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(variants), figsize=(4 * len(variants), 3.2), sharey=True, squeeze=False
        )
        for ax, variant in zip(axes[0], variants, strict=True):
            for record in (one for one in runs if one["variant"] == variant):
                steps, ratios = zip(*((e["step"], e["ratio"]) for e in record["measured"]), strict=True)
                ax.plot(steps, ratios, marker=".", color=COLORS["measured"], alpha=0.7)
            ax.axhline(1, color="0.5", linestyle="--", linewidth=1)
            ax.set(title=variant, xlabel="step")
        axes[0][0].set_ylabel("sharpness over the published value")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv)
    out, settings = asked.out, asked.settings
    wanted = {
        f"{variant} {seed}": partial(run, settings, variant, seed)
        for seed, variant in product(settings["seeds"], settings["variants"])
    }
    study = complete(asked, wanted, partial(judge_claims, tolerance=settings["tolerance"]))
    publish(out, report(study), draw(study))


if __name__ == "__main__":
    main()
