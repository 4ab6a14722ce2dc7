"""Both ends over 5,000 to 40,000 examples: is it seen where samples save passes?

    python benchmarks/bench_likeness.py --cache DIR [--cifar10 DIR] [--problems NAME ...]

Passes of Lanczos, of samples unasked, and of the default, which compares two samples first, or over many examples looks
at the low end of one: of perceptrons along training on digits as they are and standardised, and of trained networks
over some of their examples. Errors are against Lanczos, whose own are small beside ``tol``. Writes
``benchmarks/results/likeness.json`` after each problem.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import MODE, available, first, load, mnist, over, shifted_mnist
from _training import Data
from bench_fidelity import TOL
from hvpkit.extreme import MANY_EXAMPLES, sample_levels
from hvpkit.zoo.seeding import seeded

STEPS = (20, 60, 100, 300, 1000)
"""Steps of training, with batches of 64, after which the Hessian is a problem."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=3e-3),
}
PERCEPTRONS = (((32,), "SGD"), ((64,), "Adam"), ((32, 32), "Adam"))
NETWORKS = ("transformer, characters", "CIFAR-10 ResNet", "dense, 40,000 digits")


def vectors(num_examples: int) -> Data:
    """Return digits ``[num_examples, 196]``, those that there are, or shifted ones."""
    if num_examples > 5000:
        return shifted_mnist(num_examples // 5000)
    x, y = mnist()
    return x.flatten(1), y


def standardised(data: Data) -> Data:
    """Return the data with entries of mean zero and variance one."""
    x, y = data
    return (x - x.mean(0)) / (x.std(0) + 1e-6), y


def perceptrons(make: Callable[[], Data]) -> Iterator[hk.LinearOperator]:
    """Yield the Hessians of perceptrons with tanh along their training."""
    data = make()
    for hidden, optimizer in PERCEPTRONS:
        with seeded(0):
            widths, layers = (196, *hidden), list[nn.Module]()
            for one, other in zip(widths[:-1], hidden, strict=True):
                layers += [nn.Linear(one, other), nn.Tanh()]
            model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
            trained = OPTIMIZERS[optimizer](model.parameters())
            for step in range(1, max(STEPS) + 1):
                chosen = torch.randint(len(data[0]), (64,))
                trained.zero_grad()
                F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
                trained.step()
                if step in STEPS:
                    yield over(model, data, batch_size=1000, mode=MODE)


def trained(name: str, num_examples: int, cache: Path) -> Iterator[hk.LinearOperator]:
    """Yield the Hessian of a trained network over its first examples."""
    problem = load(name, cache)
    yield over(problem.model, first((problem.x, problem.y), num_examples), batch_size=1000, mode=MODE)


def problems(cache: Path) -> dict[str, Callable[[], Iterator[hk.LinearOperator]]]:
    """Return the problems by name."""
    found: dict[str, Callable[[], Iterator[hk.LinearOperator]]] = {}
    for size in (5000, 10_000, 20_000, 40_000):
        name = f"perceptrons, {size:,} digits"
        found[name] = lambda size=size: perceptrons(lambda: vectors(size))
        found[f"{name}, standardised"] = lambda size=size: perceptrons(lambda: standardised(vectors(size)))
    for name in NETWORKS:
        for size in (5000, 10_000):
            if name in available():
                found[f"{name}, {size:,} examples"] = partial(trained, name, size, cache)
    return found


def solve(H: hk.LinearOperator, seed: int) -> Record:
    """Return the passes of each method, whether the default took samples, and its error in units of ``TOL``."""
    by = {
        method: hk.extreme_eigenvalues(H, tol=TOL, method=method, seed=seed)
        for method in ("lanczos", "multifidelity", "auto")
    }
    right, found = by["lanczos"], by["auto"]
    pairs = ((found.smallest, right.smallest), (found.largest, right.largest))
    levels = sample_levels(H, seed, compare=H.num_examples < MANY_EXAMPLES)[0]
    at_once = found.history[1].level > 0  # a sample is left where its low end is large
    return {
        "seed": seed,
        **{method: ex.num_matvecs for method, ex in by.items()},
        "sampled": len(levels) > 1 and not at_once,
        "error_over_tol": max(abs(one.value - true.value) / abs(true.value) / TOL for one, true in pairs),
    }


def table(record: Record) -> str:
    """Return passes in all, and their ratios, as Markdown."""
    rows = []
    for name, runs in record["problems"].items():
        total = {method: sum(run[method] for run in runs) for method in ("lanczos", "multifidelity", "auto")}
        taken = [run["lanczos"] / run["auto"] for run in runs if run["sampled"]]
        rows.append(
            [
                name,
                str(len(runs)),
                *(f"{total[method]:.0f}" for method in total),
                f"{total['lanczos'] / total['multifidelity']:.2f}",
                f"{total['lanczos'] / total['auto']:.2f}",
                f"{len(taken)}" + (f", {min(taken):.2f} to {max(taken):.2f}" if taken else ""),
                f"{max(run['error_over_tol'] for run in runs):.2f}",
            ]
        )
    ratios = [
        sum(run["lanczos"] for run in runs) / sum(run["auto"] for run in runs)
        for runs in record["problems"].values()
    ]
    rows.append(["geometric mean", *[""] * 5, f"{statistics.geometric_mean(ratios):.2f}", "", ""])
    head = ["problem", "solves", "Lanczos", "samples", "default", "Lanczos / samples", "Lanczos / default"]
    return harness.markdown([*head, "sampled: number, Lanczos / default", "worst error over tol"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "likeness.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--seeds", type=int, default=2)
    given = harness.parse(parser, argv)
    if not given.report:
        record = harness.open_record(given.out, {"tol": TOL, "machine": harness.machine()}, problems={})
        every = problems(given.cache)
        for name in harness.pending(given, given.problems or [*every], record["problems"]):
            record["problems"][name] = [solve(H, seed) for H in every[name]() for seed in range(given.seeds)]
            harness.write(given.out, record)
            print(name, flush=True)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
