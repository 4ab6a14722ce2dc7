"""Where negative curvature lives along training: the lowest eigenvector of the Hessian by layer and by class.

    python benchmarks/study_negative_curvature.py --small --out DIR
    python benchmarks/study_negative_curvature.py --cifar10 FOLDER --out DIR

A network is trained by Adam. At each of ``--measurements`` steps, denser at the beginning, the smallest eigenvalue of
the Hessian of the mean loss over all training examples is found with its interval and its vector v of norm one. Two
partitions say where it lives. The squared entries of v add up to one over the layers. The loss is a sum of one part
for each example, and so is the Hessian: with H_i that of example i over the number of examples, the v' H_i v add up to
the eigenvalue, over classes, or over examples that are classified rightly and wrongly. A part may be positive: its
examples hold the loss against the others there, and then the share of others is more than one.

No paper makes these claims. They were written down, with their figures, before the networks were trained: CLAIMS lists
them, each with one figure a seed, whose sign is tested over seeds.

Networks: ``hvpkit.zoo.digits_cnn`` and the ResNet of 8 layers, 4 channels wide, on scikit-learn's digits, on the same
digits with a long tail (class c has 10^(-c/9) times the examples of class 0), and on CIFAR-10.

Writes into DIR: ``study.json`` after each network, from which an interrupted run continues; at the end ``study.md`` and
``study.png``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, markdown
from _study import by_network, claims_table, complete, operator, plus_minus, publish, read_settings
from _study_networks import NUM_CLASSES, examples, network, train_by_adam
from _training import Data, recompute_batchnorm

FULL: Record = {
    "networks": [
        "digits CNN",
        "digits ResNet-8",
        "digits ResNet-8, long tail",
        "CIFAR-10 ResNet-8",
    ],
    "seeds": [0, 1, 2],
    "examples": 600,
    "pixels": 16,
    "epochs": 30,
    "measurements": 40,
    "lr": 3e-3,
    "batch_size": 50,
    "hessian_batch_size": 600,
    "tol": 1e-2,
}
SMALL: Record = FULL | {
    "networks": ["digits CNN", "digits ResNet-8, long tail"],
    "seeds": [0, 1],
    "examples": 200,
    "epochs": 10,
    "measurements": 8,
}
RESULTS = harness.RESULTS / "study_negative_curvature.json"


def by_layer(model: nn.Module, v: dict[str, Tensor]) -> dict[str, float]:
    """Return the squared norm of each layer's entries of a vector."""
    layers: dict[str, float] = {}
    for name, part in v.items():
        place = name.rpartition(".")[0]
        layer = f"{place} {type(model.get_submodule(place)).__name__}"
        layers[layer] = layers.get(layer, 0.0) + float(part.double().square().sum())
    return layers


def by_class(values: Tensor, y: Tensor) -> list[float]:
    """Return the sum of the examples' values in each class."""
    return torch.zeros(NUM_CLASSES, dtype=torch.float64).index_add(0, y, values.double()).tolist()


def measure(model: nn.Module, data: Data, settings: Record, before: Tensor | None) -> tuple[Record, Tensor]:
    """Return both ends and the parts of the lowest one, of a network in evaluation mode; and its vector."""
    x, y = data
    H, loss = operator(model, data, settings["hessian_batch_size"])
    ex = hk.extreme_eigenvalues(H, tol=settings["tol"], atol=0, max_matvecs=300)
    low = ex.smallest
    objective, params = hk.from_module(model, F.cross_entropy)
    direction = H.unflatten(low.vector)
    batches = zip(*(part.split(settings["hessian_batch_size"]) for part in data), strict=True)
    bends = torch.cat([hk.quadratic_form(objective, params, batch, direction) for batch in batches]) / len(y)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    return {
        "loss": loss,
        "smallest": low.value,
        "lower": low.interval.lower,
        "upper": low.interval.upper,
        "largest": ex.largest.value,
        "status": str(ex.status),
        "sine": min(1.0, low.error_bound / low.residual_norm),
        "overlap": None if before is None else abs(float(before @ low.vector)),
        "layers": by_layer(model, direction),
        "classes": by_class(bends, y),
        "sum_error": abs(float(bends.double().sum()) / low.value - 1),
        "class_errors": [float(wrong[y == c].double().mean()) for c in range(NUM_CLASSES)],
        "wrong": float(wrong.double().mean()),
        "wrong_part": float(bends[wrong].double().sum()) / low.value,
    }, low.vector


def schedule(num_steps: int, measurements: int) -> list[int]:
    """Return the steps to measure at: from none to all, denser at the beginning."""
    return sorted({round(num_steps * (i / (measurements - 1)) ** 1.5) for i in range(measurements)})


def run(settings: Record, name: str, seed: int, cifar10: Path | None) -> Record:
    """Train one network and measure it along the way."""
    x, y = data = examples(name, settings, cifar10)[0]
    model, epochs = network(name, seed), settings["epochs"]
    due = schedule(epochs * -(-len(y) // settings["batch_size"]), settings["measurements"])
    measured: list[Record] = []
    before = None
    for step in train_by_adam(model, data, settings, epochs, seed):
        if step in due:
            frozen = recompute_batchnorm(model, x, settings["hessian_batch_size"])
            found, before = measure(frozen, data, settings, before)
            measured.append({"step": step, **found})
    counts = torch.bincount(y, minlength=NUM_CLASSES).tolist()
    return {"network": name, "seed": seed, "status": "trained", "counts": counts, "measured": measured}


def negative(record: Record) -> list[Record]:
    """Return the measurements whose eigenvalue is known, and certainly below zero."""
    return [one for one in record["measured"] if one["status"] == "converged" and one["upper"] < 0]


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def shares(one: Record) -> list[float]:
    """Return the share of each class in the eigenvalue."""
    return [part / sum(one["classes"]) for part in one["classes"]]


def last_layer(record: Record) -> float | None:
    return mean([list(one["layers"].values())[-1] - 0.5 for one in negative(record)])


def misclassified(record: Record) -> float | None:
    return mean([one["wrong_part"] - one["wrong"] for one in negative(record) if 0 < one["wrong"] < 1])


def foremost_class(record: Record) -> float | None:
    return mean([max(shares(one)) - 0.5 for one in negative(record)])


def classes_with_errors(record: Record) -> float | None:
    known = [one for one in negative(record) if len(set(one["class_errors"])) > 1]
    return mean([float(spearmanr(shares(one), one["class_errors"])[0]) for one in known])


def rare_classes(record: Record) -> float | None:
    counts = record["counts"]
    if max(counts) < 2 * min(counts):
        return None
    return mean([float(spearmanr(shares(one), [-count for count in counts])[0]) for one in negative(record)])


CLAIMS: tuple[tuple[str, Callable[[Record], float | None], int], ...] = (
    ("the last layer holds more than half of the vector (weight less 0.5)", last_layer, 1),
    (
        "misclassified examples hold more of the eigenvalue than of the data (difference of shares)",
        misclassified,
        1,
    ),
    ("one class holds more than half of the eigenvalue (share less 0.5)", foremost_class, 1),
    ("classes with more errors hold more (rank correlation)", classes_with_errors, 1),
    ("rarer classes hold more (rank correlation)", rare_classes, 1),
)
judge_claims = partial(by_network, CLAIMS)


def overview(runs: Sequence[Record]) -> str:
    """Return, by network, in how many measurements what holds, over all seeds, as a Markdown table."""
    rows = []
    for name in dict.fromkeys(run["network"] for run in runs):
        own = [run for run in runs if run["network"] == name]
        every = [one for run in own for one in run["measured"]]
        known = [one for run in own for one in negative(run)]
        places = [max(one["layers"], key=one["layers"].get) for one in known]
        foremost = max(set(places), key=places.count)
        last = [*known[0]["layers"]][-1]
        rows.append(
            [
                name,
                f"{len(own)}",
                f"{len(known)} of {len(every)}",
                f"{sum(one['sine'] < 0.3 for one in known)}",
                f"{sum(one['layers'][last] > 0.5 for one in known)}",
                f"{foremost} ({places.count(foremost)})",
                f"{sum(max(shares(one)) > 0.5 for one in known)}",
                plus_minus([run["measured"][-1]["loss"] for run in own]),
                plus_minus([run["measured"][-1]["smallest"] for run in own]),
            ]
        )
    head = ["network", "seeds", "below zero", "vector known", "last layer over half", "foremost layer"]
    return markdown([*head, "one class over half", "final loss", "final eigenvalue"], rows)


def report(study: Record) -> str:
    """Return the claims and the counts as Markdown."""
    return (
        "Mean and standard error over seeds; each seed's figure is a mean over the measurements whose eigenvalue is\n"
        "certainly negative.\n\n"
        f"{claims_table(study['claims'], 'figure')}\n\n"
        "Numbers of measurements: below zero, with certainty; of these, with the vector known to a sine of 0.3; with\n"
        "most of the vector in the last layer; the layer that most often holds more than any other; with one class\n"
        "that holds more than half of the eigenvalue.\n\n"
        f"{overview(list(study['runs'].values()))}\n"
    )


def draw(study: Record) -> Figure:
    """Draw both ends, and the shares of layers and classes, along the training of each network's first seed."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import COLORS, STYLE

    firsts = {run["network"]: run for run in reversed(study["runs"].values()) if run["seed"] == 0}
    runs = list(reversed(firsts.values()))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3,
            len(runs),
            figsize=(3.6 * len(runs) + 0.6, 8.5),
            squeeze=False,
            layout="constrained",
            height_ratios=[2, 3, 2.4],
        )
        for top, middle, bottom, record in zip(*axes, runs, strict=True):
            measured = record["measured"]
            steps = [one["step"] for one in measured]
            top.fill_between(
                steps, [one["lower"] for one in measured], [one["upper"] for one in measured], alpha=0.3
            )
            top.plot(steps, [one["smallest"] for one in measured], ".-", color=COLORS["smallest"])
            top.axhline(0, color="0.5", linewidth=1)
            top.set(title=record["network"], ylabel="smallest eigenvalue", xlabel="step")
            layers = [[one["layers"][name] for one in measured] for name in measured[0]["layers"]]
            of_layers = middle.imshow(layers, aspect="auto", cmap="Blues", vmin=0, vmax=0.8)
            middle.set_yticks(range(len(layers)), [*measured[0]["layers"]], fontsize=7)
            parts = list(zip(*(shares(one) for one in measured), strict=True))
            of_classes = bottom.imshow(parts, aspect="auto", cmap="PuOr_r", vmin=-1, vmax=1)
            bottom.set(ylabel="class", yticks=range(NUM_CLASSES))
            for ax in (middle, bottom):
                places = range(0, len(steps), max(1, len(steps) // 4))
                ax.set_xticks(places, [steps[place] for place in places])
                ax.set_xlabel("step")
        figure.colorbar(of_layers, ax=axes[1, :], label="share of the vector", extend="max")
        figure.colorbar(of_classes, ax=axes[2, :], label="share of the eigenvalue", extend="both")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv)
    settings = {key: value for key, value in asked.settings.items() if key != "data"}  # networks name theirs
    wanted = {
        f"{name} {seed}": partial(run, settings, name, seed, asked.images)
        for seed, name in product(settings["seeds"], settings["networks"])
    }
    study = complete(asked._replace(settings=settings), wanted, judge_claims)
    publish(asked.out, report(study), draw(study))


if __name__ == "__main__":
    main()
