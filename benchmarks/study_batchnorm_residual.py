"""What BatchNorm and residual connections do to the Hessian along training, by depth: the PyHessian study.

    python benchmarks/study_batchnorm_residual.py --small --out DIR
    python benchmarks/study_batchnorm_residual.py --cifar10 FOLDER --device cuda --out DIR

Source: Yao, Gholami, Keutzer, Mahoney, PyHessian, arXiv:1912.07145. Networks with and without either are trained
alike; the ends of the spectrum, its trace and its density are measured along training, over all training examples.
CLAIMS says what the paper found, in our words. A claim is judged at each depth, by the ratios of both networks of
a pair at the end of training over several seeds. The full size is the paper's networks, on CIFAR-10 on a GPU.
``--small``, on one core, is narrow networks on small images (digits, or CIFAR-10): it shows that the study runs, and
says little about the paper's networks.

Into DIR: ``study.json`` after each network, from which an interrupted run goes on; parameters (``.pt``) and density
(``.npz``) of each network; at the end ``study.md``, the claims in a table, and ``study.png``.

Departures from the paper:
1. Several seeds, and standard errors.
2. BatchNorm's running statistics are taken anew over all training examples before each measurement: with few steps
   they lag behind the parameters, and the Hessian would be that of another function.
3. Without BatchNorm the second convolution of each block begins smaller: see ``hvpkit.zoo.cifar_resnet``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.files import atomic_write

FULL: dict[str, Any] = {
    "depths": [20, 32, 38, 56],
    "variants": ["both", "no batchnorm", "no residual", "neither"],
    "seeds": [0, 1, 2],
    "width": 16,
    "pixels": 32,
    "examples": 50_000,
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
}
SMALL: dict[str, Any] = FULL | {
    "depths": [8, 20],
    "variants": ["both", "no batchnorm", "no residual"],
    "width": 4,
    "pixels": 8,
    "examples": 120,
    "epochs": 24,
    "measurements": 2,
    "lr": 0.05,
    "batch_size": 15,
    "tol": 0.1,
    "products": 15,
    "steps": 15,
    "augment": 0,
}
EXTENDABLE = ("depths", "variants", "seeds", "explore")
"""Settings that say which networks there are, and not how one is made: a run may go on with others."""

QUANTITIES = ("largest", "trace")
LEARNT = 0.8
"""Of a guess's loss: a network whose loss is higher at the end has learnt nothing, and is not compared."""

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Claim:
    """That a part's absence raises (+1) or lowers (-1) curvature, at these depths of those studied, in order."""

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


def read_settings(doc: str, full: dict[str, Any], small: dict[str, Any], argv: Sequence[str] | None) -> Any:
    """The folder, and settings: a flag for each of ``full``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="one or two minutes on one core")
    parser.add_argument("--cifar10", type=Path, help="the folder; without, scikit-learn's digits")
    parser.add_argument("--device", default="cpu")
    for name, value in full.items():
        several = isinstance(value, list)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value[0]) if several else type(value),
            nargs="+" if several else None,
            help=f"{value}; with --small {small[name]}",
        )
    given = vars(parser.parse_args(argv))
    settings = small if given.pop("small") else full
    chosen = {name: settings[name] if given[name] is None else given[name] for name in settings}
    out, cifar10, device = given["out"], given["cifar10"], given["device"]
    return out, {**chosen, "data": "CIFAR-10" if cifar10 else "digits"}, cifar10, torch.device(device)


def read_data(cifar10: Path | None, settings: dict[str, Any], device: torch.device) -> tuple[Data, Data]:
    """Training and test examples; digits that are not trained on are the test."""
    num = settings["examples"]
    if cifar10:
        train, test = (hk.zoo.cifar10(cifar10, train=part, normalize=True) for part in (True, False))
    else:
        x, y = hk.zoo.digits()
        train, test = (x.expand(-1, 3, -1, -1), y), (x[num:].expand(-1, 3, -1, -1), y[num:])
    train = train[0][:num], train[1][:num]
    if len(train[0]) < num:
        raise SystemExit(f"--examples: there are {len(train[0])}, got {num}")
    size = (settings["pixels"],) * 2
    (x, y), (x_test, y_test) = (
        (F.interpolate(images, size=size, mode="area").to(device), classes.to(device))
        for images, classes in (train, test)
    )
    return (x, y), (x_test, y_test)


def open_study(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The study in a file, to go on with, or an empty one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "hvpkit": hk.__version__}
    study: dict[str, Any] = {"settings": settings, "machine": machine, "runs": {}}
    if not file.exists():
        return study
    found = json.loads(file.read_text())
    others = [
        name for name in settings if name not in EXTENDABLE and found["settings"].get(name) != settings[name]
    ]
    if others:
        raise SystemExit(f"--out: {file} is a study with another {', '.join(others)}; take another folder")
    return study | {"runs": found["runs"]}


def save(file: Path, study: dict[str, Any]) -> None:
    with atomic_write(file) as draft:
        draft.write_text(json.dumps(study, indent=1) + "\n")


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to an eighth of their size, half of them mirrored."""
    size, pad = x.shape[-1], x.shape[-1] // 8
    across, down = (torch.randint(2 * pad + 1, (len(x),), generator=generator).to(x.device) for _ in "xy")
    windows = F.pad(x, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    x = windows[torch.arange(len(x), device=x.device), :, down, across]
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def train_epoch(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, settings: dict[str, Any], seed: int
) -> float:
    """One pass in an order by ``seed``; the mean loss on the way."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    model.train()
    total = torch.zeros((), device=x.device)
    for order in torch.randperm(len(x), generator=generator).split(settings["batch_size"]):
        chosen = order.to(x.device)
        images = crop_and_flip(x[chosen], generator) if settings["augment"] else x[chosen]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), y[chosen])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(chosen)
    return float(total) / len(x)


@torch.no_grad()
def with_statistics_of(model: nn.Module, x: Tensor, batch_size: int) -> nn.Module:
    """A copy whose BatchNorm has the mean statistics of batches of all examples, in evaluation."""
    model = deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
    for images in x.split(batch_size):
        model(images)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch_size: int = 1000) -> float:
    x, y = data
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(int((model(images).argmax(1) == classes).sum()) for images, classes in batches) / len(x)


def network(settings: dict[str, Any], depth: int, variant: str, seed: int) -> nn.Module:
    return hk.zoo.cifar_resnet(
        depth,
        batchnorm=variant in ("both", "no residual"),
        residual=variant in ("both", "no batchnorm"),
        shortcut="projection",
        width=settings["width"],
        seed=seed,
    )


def operator(model: nn.Module, data: Data, batch_size: int) -> tuple[hk.LinearOperator, float]:
    """The Hessian of the mean loss over all examples, and that loss."""
    objective, params = hk.from_module(model, F.cross_entropy)
    mode = "forward-over-reverse" if data[0].is_cuda else "reverse-over-reverse"
    H = hk.hessian(objective, params, data, batch_size=batch_size, mode=mode)
    return H, float(hk.loss(objective, params, data))


def measure(model: nn.Module, data: Data, settings: dict[str, Any]) -> tuple[dict[str, Any], hk.Density]:
    """Both ends, trace and density of a network in evaluation."""
    H, loss = operator(model, data, settings["hessian_batch_size"])
    ex = hk.extreme_eigenvalues(H, tol=settings["tol"], max_matvecs=200)
    trace = hk.trace(H, num_matvecs=settings["products"])
    density = hk.spectral_density(H, num_steps=settings["steps"])
    return {
        "loss": loss,
        "accuracy": accuracy(model, data),
        "smallest": ex.smallest.value,
        "largest": ex.largest.value,
        "extremes": ex.to_dict(),
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "density": {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()},
    }, density


def run(
    settings: dict[str, Any], data: Data, depth: int, variant: str, seed: int, stem: Path
) -> dict[str, Any]:
    """Trains one network, measures it along the way, and writes its parameters and density."""
    epochs, record = settings["epochs"], {"depth": depth, "variant": variant, "seed": seed}
    model = network(settings, depth, variant, seed).to(data[0].device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], momentum=0.9, weight_decay=settings["weight_decay"]
    )
    falls = [round(4 * epochs / 9), round(2 * epochs / 3)]  # 80 and 120 of 180
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, 0.1)
    due = {
        round(number * epochs / settings["measurements"]) for number in range(settings["measurements"] + 1)
    }
    measured: list[dict[str, Any]] = []
    for epoch in range(epochs + 1):
        if epoch in due:
            frozen = with_statistics_of(model, data[0], settings["hessian_batch_size"])
            try:
                found, density = measure(frozen, data, settings)
            except hk.NonFiniteError:
                return {**record, "status": "diverged", "measured": measured}
            measured.append({"epoch": epoch, **found})
        if epoch < epochs:
            if not math.isfinite(train_epoch(model, data, optimizer, settings, epochs * seed + epoch)):
                return {**record, "status": "diverged", "measured": measured}
            schedule.step()
    with atomic_write(stem.with_suffix(".pt")) as draft:
        torch.save(frozen.state_dict(), draft)
    density.save(stem.with_suffix(".npz"))
    learnt = measured[-1]["loss"] < LEARNT * math.log(10)
    return {**record, "status": "learnt" if learnt else "at chance", "measured": measured}


def judge(values: Sequence[float], sign: int) -> str:
    """Whether the mean of what these are drawn from has this sign: Student's t, 5 % to one side."""
    if len(values) < 2:
        return "undecided"
    mean, spread = statistics.mean(values), statistics.stdev(values)
    if abs(mean) <= float(student.ppf(0.95, len(values) - 1)) * spread / len(values) ** 0.5:
        return "undecided"
    return "held" if mean * sign > 0 else "opposite"


def log_ratios(runs: Sequence[dict[str, Any]], variant: str, depth: int, quantity: str) -> dict[int, float]:
    """By seed: log of the quantity at the end of training, without a part over with both, where both have learnt."""
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


def judge_claims(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim for each quantity and depth, with the ratios that it is judged by."""
    depths = sorted({run["depth"] for run in runs})
    rows = []
    for quantity in QUANTITIES:
        for claim in CLAIMS:
            for depth in depths[claim.depths]:
                logs = [*log_ratios(runs, claim.variant, depth, quantity).values()]
                rows.append(row(claim.text, quantity, f"{depth}", logs, claim.sign))
        low, high = (log_ratios(runs, "no batchnorm", depth, quantity) for depth in (depths[0], depths[-1]))
        if len(depths) > 1:
            growth = [high[seed] - low[seed] for seed in low if seed in high]
            rows.append(row(GROWTH, quantity, f"{depths[0]}, {depths[-1]}", growth, 1))
    return rows


def row(text: str, quantity: str, depth: str, logs: list[float], sign: int) -> dict[str, Any]:
    """A claim's line; the ratio is the geometric mean."""
    return {
        "claim": text,
        "quantity": quantity,
        "depth": depth,
        "ratio": math.exp(statistics.mean(logs)) if logs else None,
        "log_ratios": logs,
        "verdict": judge(logs, sign),
    }


def shown(claim: dict[str, Any]) -> str:
    if claim["ratio"] is None:
        return "no pair that has learnt"
    ratios = ", ".join(f"{math.exp(value):.3g}" for value in claim["log_ratios"])
    return f"{claim['ratio']:.3g} ({ratios})"


def report(study: dict[str, Any]) -> str:
    """The claims and the networks, as Markdown."""
    lines = [
        f"Data: {study['settings']['data']}. A ratio is that of the network without the part over that with both, at",
        "the end of training: the geometric mean, and each seed's; for two depths, the ratio of the deeper one over",
        "that of the other. All are trained alike, so their losses differ, and with the loss the Hessian: part of a",
        "ratio may be that.",
        "",
        "| claim | quantity | depth | ratio | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in study["claims"]:
        lines.append(
            f"| {claim['claim']} | {claim['quantity']} | {claim['depth']} | {shown(claim)} | {claim['verdict']} |"
        )
    lines += [
        "",
        "| depth | variant | seed | status | loss | accuracy | smallest | largest | trace |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in study["runs"].values():
        head = f"| {run['depth']} | {run['variant']} | {run['seed']} | {run['status']} |"
        last = run["measured"][-1] if run["status"] != "diverged" else None
        lines.append(
            f"{head} {last['loss']:.3g} | {last['accuracy']:.3f} | {last['smallest']:.3g} | {last['largest']:.3g} | "
            f"{last['trace']:.3g} ± {last['trace_stderr']:.2g} |"
            if last
            else f"{head} | | | | |"
        )
    return "\n".join(lines) + "\n"


def beyond(d: hk.Density) -> tuple[Tensor, Tensor]:
    """Eigenvalues, and which share of all lies further from zero to the same side: the density without smoothing.

    A smoothed density is as wide as its resolution, which is a share of the span: it would blur sharp spectra more.
    """
    sizes = torch.logspace(-2, 4, 400, dtype=torch.float64)
    x = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])
    x = x[(x >= d.nodes[0]) & (x <= d.nodes[-1])]
    share = torch.where(x < 0, d.cdf(x), 1 - d.cdf(x))
    return x, torch.where((share > 1e-9) & (x != 0), share, torch.nan)  # a gap between both sides


def draw(study: dict[str, Any], folder: Path) -> Any:
    """Top eigenvalue and trace along training, and the spectrum at the end of the first seed, by depth."""
    import matplotlib.pyplot as plt

    from hvpkit.plots.style import STYLE

    runs = [{"name": name, **run} for name, run in study["runs"].items()]
    depths = sorted({run["depth"] for run in runs})
    variants = sorted({run["variant"] for run in runs})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3, len(depths), figsize=(3.4 * len(depths), 8), squeeze=False, sharey="row"
        )
        for column, depth in enumerate(depths):
            for color, variant in enumerate(variants):
                own = [run for run in runs if (run["depth"], run["variant"]) == (depth, variant)]
                for run in own:
                    first = {"label": variant} if run is own[0] else {}
                    for place, quantity in enumerate(QUANTITIES):
                        steps = [found["epoch"] for found in run["measured"]]
                        values = [found[quantity] for found in run["measured"]]
                        axes[place, column].plot(steps, values, color=f"C{color}", alpha=0.7, **first)
                if own and own[0]["status"] != "diverged":
                    d = hk.Density.load(folder / f"{own[0]['name']}.npz")
                    axes[2, column].plot(*beyond(d), color=f"C{color}", label=variant)
            for place, quantity in enumerate(QUANTITIES):
                axes[place, column].set(yscale="symlog", xlabel="epoch", title=f"{depth} layers: {quantity}")
            axes[2, column].set(yscale="log", xlabel="eigenvalue", title=f"{depth} layers: share beyond")
            axes[2, column].set_xscale("symlog", linthresh=0.1)
        axes[0, 0].legend()
    return figure


def complete(
    out: Path,
    settings: dict[str, Any],
    wanted: dict[str, Callable[[], dict[str, Any]]],
    claims: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Makes the runs that a folder does not have yet, and writes the study after each."""
    file = out / "study.json"
    study = open_study(file, settings)
    for name, make in wanted.items():
        if name in study["runs"]:
            continue
        study["runs"][name] = made = make()
        study["claims"] = claims(list(study["runs"].values()))
        save(file, study)
        print(f"{len(study['runs'])}: {name} {made['status']}", flush=True)
    return study


def publish(out: Path, text: str, figure: Any) -> None:
    with atomic_write(out / "study.md") as draft:
        draft.write_text(text)
    with atomic_write(out / "study.png") as draft:
        figure.savefig(draft, dpi=120, format="png")
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    out, settings, cifar10, device = read_settings(__doc__ or "", FULL, SMALL, argv)
    data, _ = read_data(cifar10, settings, device)
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed, depth, variant in product(settings["seeds"], settings["depths"], settings["variants"]):
        place = out / f"resnet{depth}-{variant.replace(' ', '-')}-{seed}"
        wanted[place.name] = partial(run, settings, data, depth, variant, seed, place)
    study = complete(out, settings, wanted, judge_claims)
    publish(out, report(study), draw(study, out))


if __name__ == "__main__":
    main()
