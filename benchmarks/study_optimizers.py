"""ABSA and AdaHessian beside Adam and SGD, each at its own best rate.

    python benchmarks/study_optimizers.py --small --out DIR
    python benchmarks/study_optimizers.py --cifar10 FOLDER --out DIR

Every optimizer has the same trials: a training run for each of ``--rates``, and the rate is the one with the lowest
loss over ``--validation`` examples that are not trained on. Then it trains at this rate from several seeds, none of
them that of the trials, and is tested on examples that have played no part. All train for the same number of epochs,
not of seconds: a step of AdaHessian costs about three gradients, and ABSA measures an eigenvalue after each epoch.

Momentum 0.9 for SGD and ABSA; defaults otherwise. Every rate falls to a tenth after two thirds of the epochs. ABSA
starts with the others' batch size, and uses adversarial examples in the first half of the epochs. BatchNorm's running
statistics are computed again over the training examples before each test. Two questions are tested over seeds, paired;
they were written down before the runs.

Writes into DIR: ``study.json`` after each run, from which an interrupted run continues; at the end ``study.md`` and
``study.png``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, markdown
from _study import by_network, claims_table, complete, plus_minus, publish, read_settings
from _study_networks import examples, network
from _training import Data, accuracy, recompute_batchnorm

FULL: Record = {
    "networks": ["digits CNN", "digits ResNet-8", "CIFAR-10 ResNet-8"],
    "variants": ["SGD", "Adam", "AdaHessian", "ABSA"],
    "seeds": [0, 1, 2, 3, 4],
    "rates": [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0],
    "examples": 600,
    "validation": 200,
    "pixels": 16,
    "epochs": 12,
    "batch_size": 50,
    "hessian_examples": 100,
}
SMALL: Record = FULL | {
    "networks": ["digits CNN"],
    "seeds": [0, 1],
    "rates": [1e-2, 0.1],
    "examples": 200,
    "validation": 50,
    "epochs": 3,
    "hessian_examples": 50,
}
RESULTS = harness.RESULTS / "study_optimizers.json"
TRIAL_SEED = 1000

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdaHessian": hk.train.AdaHessian,
}


def train(model: nn.Module, data: Data, variant: str, rate: float, seed: int, settings: Record) -> None:
    """Train a model in place by one of MAKERS.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    x, y = data
    optimizer, source = MAKERS[variant](model.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [fall(settings)], 0.1)
    model.train()
    for _ in range(settings["epochs"]):
        for chosen in torch.randperm(len(x), generator=source).split(settings["batch_size"]):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward(create_graph=variant == "AdaHessian")
            optimizer.step()
            if not math.isfinite(float(loss.detach())):
                raise hk.NonFiniteError(f"the loss is {float(loss.detach())}")
        schedule.step()


def train_by_absa(model: nn.Module, data: Data, rate: float, seed: int, settings: Record) -> list[int]:
    """Train a model in place by ABSA; return the batch size of each epoch.

    Raises:
        NonFiniteError: the parameters, or the eigenvalue, are not finite.
    """
    epochs = settings["epochs"]
    state = hk.train.absa_init(
        settings["batch_size"],
        rate,
        kappa=max(1, epochs // 3),
        adversarial_epochs=epochs // 2,
        lr_decay=0.1,
        lr_decay_epochs=[fall(settings)],
    )
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="batch")
    examples = settings["hessian_examples"]
    found = hk.train.absa(
        objective, params, data, state, num_epochs=epochs, hessian_examples=examples, seed=seed
    )
    model.load_state_dict(found.params, strict=False)
    return [epoch.batch_size for epoch in found.history]


def fall(settings: Record) -> int:
    """Return the number of epochs after which the rate falls."""
    return max(1, 2 * settings["epochs"] // 3)


def outcome(
    settings: Record, name: str, variant: str, rate: float, seed: int, data: Data, test: Data
) -> Record:
    """Train one network and return how it does on examples that it was not trained on."""
    model = network(name, seed)
    more = {}
    try:
        if variant == "ABSA":
            more = {"batch_sizes": train_by_absa(model, data, rate, seed, settings)}
        else:
            train(model, data, variant, rate, seed, settings)
    except hk.NonFiniteError:
        return {"rate": rate, "status": "diverged"}
    model = recompute_batchnorm(model, data[0], settings["batch_size"])
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(x), y)) for x, y in (data, test)]
    if not all(map(math.isfinite, losses)):
        return {"rate": rate, "status": "diverged"}
    return {
        "rate": rate,
        "status": "trained",
        "train_loss": losses[0],
        "loss": losses[1],
        "accuracy": accuracy(model, test),
        **more,
    }


def split(settings: Record, name: str, cifar10: Path | None) -> tuple[Data, Data, Data]:
    """Return the examples to train on, to choose rates by, and to test on."""
    (x, y), test = examples(name, settings, cifar10)
    num = len(y) - settings["validation"]
    return (x[:num], y[:num]), (x[num:], y[num:]), test


def tune(settings: Record, name: str, variant: str, cifar10: Path | None) -> Record:
    """Try each rate; return the trials and the best rate."""
    data, validation, _ = split(settings, name, cifar10)
    trials = [
        outcome(settings, name, variant, rate, TRIAL_SEED, data, validation) for rate in settings["rates"]
    ]
    best = min(trials, key=lambda trial: trial.get("loss", math.inf))
    return {"network": name, "variant": variant, "status": "tuned", "rate": best["rate"], "trials": trials}


def run(settings: Record, name: str, variant: str, seed: int, cifar10: Path | None, study: Path) -> Record:
    """Train one network at the rate that the study has found, and test it."""
    rate = harness.read(study)["runs"][f"{name} {variant} rate"]["rate"]
    data, _, test = split(settings, name, cifar10)
    found = outcome(settings, name, variant, rate, seed, data, test)
    return {"network": name, "variant": variant, "seed": seed, **found}


def difference(quantity: str, one: str, other: str, pair: Record) -> float | None:
    """Return by how much a quantity of one variant is above that of another, where both have trained."""
    if not all(pair.get(variant, {}).get("status") == "trained" for variant in (one, other)):
        return None
    return float(pair[one][quantity] - pair[other][quantity])


CLAIMS = (
    (
        "AdaHessian has a lower test loss than Adam (difference)",
        partial(difference, "loss", "AdaHessian", "Adam"),
        -1,
    ),
    (
        "ABSA has a higher test accuracy than SGD (difference)",
        partial(difference, "accuracy", "ABSA", "SGD"),
        1,
    ),
)


def judge_claims(runs: Sequence[Record]) -> list[Record]:
    """Judge each claim for each network, by the runs of one seed together."""
    seeds: dict[tuple[str, int], Record] = {}
    for run in runs:
        if "seed" in run:
            pair = seeds.setdefault((run["network"], run["seed"]), {"network": run["network"]})
            pair[run["variant"]] = run
    return by_network(CLAIMS, list(seeds.values()))


def report(study: Record) -> str:
    """Return the claims and the means as Markdown."""
    rows = []
    for tuned in (run for run in study["runs"].values() if run["status"] == "tuned"):
        own = [
            run
            for run in study["runs"].values()
            if "seed" in run and all(run[key] == tuned[key] for key in ("network", "variant"))
        ]
        trained = [run for run in own if run["status"] == "trained"]
        rates = [trial["rate"] for trial in tuned["trials"]]
        edge = " (edge)" if tuned["rate"] in (rates[0], rates[-1]) else ""
        columns = [plus_minus([run[key] for run in trained]) for key in ("accuracy", "loss", "train_loss")]
        head = [
            tuned["network"],
            tuned["variant"],
            f"{tuned['rate']:g}{edge}",
            f"{len(trained)} of {len(own)}",
        ]
        rows.append([*head, *columns])
    head = ["network", "optimizer", "rate", "seeds trained", "test accuracy", "test loss", "training loss"]
    num = len(study["settings"]["rates"])
    return (
        f"Mean and standard error over seeds, at the best of {num} rates.\n\n"
        f"{claims_table(study['claims'], 'figure')}\n\n"
        f"{markdown(head, rows)}\n"
    )


def draw(study: Record) -> Figure:
    """Draw the loss of the trials over their rates, and the test loss of each seed."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import STYLE

    runs = study["runs"].values()
    names = [*dict.fromkeys(run["network"] for run in runs)]
    variants = [*dict.fromkeys(run["variant"] for run in runs)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(names), figsize=(4.6 * len(names), 3.8), squeeze=False, layout="constrained"
        )
        for ax, name in zip(axes[0], names, strict=True):
            for run in (one for one in runs if one["network"] == name):
                color = f"C{variants.index(run['variant'])}"
                if run["status"] == "tuned":
                    trials = [trial for trial in run["trials"] if trial["status"] == "trained"]
                    rates, losses = zip(*((trial["rate"], trial["loss"]) for trial in trials), strict=True)
                    ax.plot(rates, losses, ".-", color=color, label=run["variant"], alpha=0.7)
                elif run["status"] == "trained":
                    ax.plot(run["rate"], run["loss"], "x", color=color)
            ax.set(title=name, xscale="log", yscale="log", xlabel="rate", ylabel="loss on other examples")
            ax.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(__doc__, FULL, SMALL, argv)
    settings = {key: value for key, value in asked.settings.items() if key != "data"}  # networks name theirs
    study = asked.out / "study.json"
    wanted = {}
    for name, variant in product(settings["networks"], settings["variants"]):
        wanted[f"{name} {variant} rate"] = partial(tune, settings, name, variant, asked.images)
    for seed, name, variant in product(settings["seeds"], settings["networks"], settings["variants"]):
        made = partial(run, settings, name, variant, seed, asked.images, study)
        wanted[f"{name} {variant} {seed}"] = made
    found = complete(asked._replace(settings=settings), wanted, judge_claims)
    publish(asked.out, report(found), draw(found))


if __name__ == "__main__":
    main()
