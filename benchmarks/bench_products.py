"""Products over the full-data gradient: fresh, from kept graphs, compiled, and at each batch size.

    python benchmarks/bench_products.py [--problems NAME ...] [--compile] [--repeats 7]

writes ``benchmarks/results/products.json`` and prints its table. Each round measures everything once, in turn; ratios
are medians over rounds of the ratio to the same round's gradient, a plain loop of ``torch.autograd.grad`` over batches
of 256. Every product is first compared with double backward in plain torch; a wrong one ends the script untimed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, timed
from _problems import (
    MODE,
    Data,
    Problem,
    Scores,
    Transformer,
    characters,
    dense,
    first,
    mnist,
    noise,
    over,
    resnet,
    shifted_mnist,
)
from _references import plain_product, probe
from hvpkit._utils.memory import Allocations
from hvpkit.zoo import cifar_resnet, digits, digits_cnn, tiny_gpt, tiny_vit
from hvpkit.zoo.seeding import seeded

SIZES = (32, 64, 128, 256, 512, 1024)
ALLOWED = 1e-4
"""Relative error of a product in float32."""

PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "digits CNN": (digits_cnn, digits),
    "ResNet width 4, 14 px": (resnet, lambda: first(mnist(), 1024)),
    "ResNet-20, 32 px": (lambda: cifar_resnet(20), lambda: noise(128, 3, 32, 32)),
    "dense": (dense, lambda: first(shifted_mnist(), 8192)),
    "transformer": (Transformer, lambda: characters(2048)),
    "ViT": (tiny_vit, lambda: noise(128, 3, 32, 32)),
    "GPT": (lambda: Scores(tiny_gpt()), lambda: characters(1024)),
}


def load(name: str) -> Problem:
    """Return an untrained network and its data."""
    make, data = PROBLEMS[name]
    with seeded(0):
        model = make().eval()
    return Problem(name, model, *data(), 256)


def gradient(problem: Problem) -> None:
    """Compute the gradient as a user of torch does."""
    parameters = list(problem.model.parameters())
    for x, y in problem:
        torch.autograd.grad(F.cross_entropy(problem.model(x), y), parameters)


def operators(problem: Problem, compiled: bool) -> tuple[dict[str, hk.LinearOperator], float | None]:
    """Return the operators to compare, and the seconds that compiling took."""
    model, data = problem.model, (problem.x, problem.y)
    made = {
        "fresh": over(model, data, mode=MODE, memory_limit=0),
        "kept": over(model, data, mode=MODE),
        "auto": over(model, data, mode=MODE, batch_size="auto"),
    }
    for size in SIZES:
        if size < 2 * problem.num_examples:
            made[f"{size}"] = over(model, data, mode=MODE, batch_size=size)
    if not compiled:
        return made, None
    made["compiled"], seconds = timed(lambda: over(model, data, compile=True))
    return made, seconds


def check(name: str, made: dict[str, hk.LinearOperator], v: Tensor, expected: Tensor) -> None:
    """Compare three products of each operator with the truth; from the third on, graphs are kept.

    Raises:
        SystemExit: a product is wrong.
    """
    for label, H in made.items():
        for _ in range(3):
            off = float(torch.linalg.vector_norm(H @ v - expected) / torch.linalg.vector_norm(expected))
            if not off < ALLOWED:
                raise SystemExit(f"{name}: the product of {label!r} is off by {off:.2g}; not timed")


def memory(problem: Problem, fresh: hk.LinearOperator, v: Tensor) -> tuple[int, int]:
    """Return the most bytes that one fresh product allocates at once, and the bytes of all kept graphs."""
    with Allocations() as lean:
        fresh @ v
    with Allocations() as held:
        H = over(problem.model, (problem.x, problem.y), mode=MODE)
        H @ v
        before = held.now
        H @ v
    return lean.peak, held.now - before


def measure(problem: Problem, compiled: bool, repeats: int) -> Record:
    """Return seconds, ratios to the gradient, and memory of all products of a problem."""
    made, seconds_to_compile = operators(problem, compiled)
    v = probe(problem.n)
    check(problem.name, made, v, plain_product(problem.model, problem, v))
    work: dict[str, Callable[[], Any]] = {"gradient": lambda: gradient(problem)}
    work |= {label: lambda H=H: H @ v for label, H in made.items()}
    rounds = [{label: timed(run)[1] for label, run in work.items()} for _ in range(repeats + 1)][1:]
    seconds = {label: statistics.median(times[label] for times in rounds) for label in work}
    best = min(seconds[f"{size}"] for size in SIZES if f"{size}" in made)
    peak, kept = memory(problem, made["fresh"], v)
    return {
        "parameters": problem.n,
        "examples": problem.num_examples,
        "gradient_seconds": seconds["gradient"],
        "over_gradient": {
            label: round(statistics.median(times[label] / times["gradient"] for times in rounds), 2)
            for label in made
        },
        "auto_batch_size": made["auto"].batch_size,
        "auto_over_best": round(seconds["auto"] / best, 2),
        "peak_bytes_of_a_product": peak,
        "kept_bytes": kept,
        "seconds_to_compile": seconds_to_compile,
    }


def table(record: Record) -> str:
    """Return ratios to the gradient and memory, a row for each network, as Markdown."""
    head = ["network", "n", "gradient", "fresh", "kept", "compiled", "auto (batch size)", "auto / best"]
    rows = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['gradient_seconds']:.3f} s",
            *(f"{row['over_gradient'].get(label, '-')}" for label in ("fresh", "kept", "compiled")),
            f"{row['over_gradient']['auto']} ({row['auto_batch_size']})",
            f"{row['auto_over_best']}",
            f"{row['kept_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes_of_a_product'] / 1e6:.0f}",
        ]
        for name, row in record["problems"].items()
    ]
    return harness.markdown([*head, "kept MB", "peak MB"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "products.json")
    harness.add_names(parser, choices=PROBLEMS)
    parser.add_argument("--compile", action="store_true", help="compiled products too: up to a minute each")
    parser.add_argument("--repeats", type=int, default=7)
    given = harness.parse(parser, argv)
    if not given.report:
        record = harness.open_record(given.out, {"machine": harness.machine()}, problems={})
        for name in harness.pending(given, given.problems, record["problems"]):
            record["problems"][name] = entry = measure(load(name), given.compile, given.repeats)
            harness.write(given.out, record)
            print(table({"problems": {name: entry}}).splitlines()[-1], flush=True)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
