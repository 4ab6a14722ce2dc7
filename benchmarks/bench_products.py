"""Products over the full-data gradient: fresh, from kept graphs, compiled, and at each batch size.

    python benchmarks/bench_products.py [--problems NAME ...] [--compile] [--repeats 7]

writes ``benchmarks/results/products.json`` and prints its table. In each round everything is measured once, in turn;
ratios are medians over rounds of the ratio to the same round's gradient, a plain loop of ``torch.autograd.grad`` over
batches of 256. Every product is compared with the others' first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from fidelity_problems import Transformer, characters, dense, digits, digits_cnn, mnist, resnet, shifted_mnist
from hvpkit._utils.memory import Allocations
from hvpkit.zoo import cifar_resnet, tiny_gpt, tiny_vit

RESULTS = Path(__file__).parent / "results" / "products.json"
MODE = "reverse-over-reverse"
SIZES = (32, 64, 128, 256, 512, 1024)
Data = tuple[Tensor, Tensor]


def images(num_examples: int) -> Data:
    g = torch.Generator().manual_seed(0)
    return torch.randn(num_examples, 3, 32, 32, generator=g), torch.arange(num_examples) % 10


def first(data: Data, num_examples: int) -> Data:
    return data[0][:num_examples].clone(), data[1][:num_examples].clone()


def tokens(num_examples: int) -> Data:
    x, y = characters(num_examples)
    return x, y


def by_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data], Callable[..., Tensor]]] = {
    "digits CNN": (digits_cnn, digits, F.cross_entropy),
    "ResNet width 4, 14 px": (resnet, lambda: first(mnist(), 1024), F.cross_entropy),
    "ResNet-20, 32 px": (lambda: cifar_resnet(20), lambda: images(128), F.cross_entropy),
    "dense": (dense, lambda: first(shifted_mnist(), 8192), F.cross_entropy),
    "transformer": (Transformer, lambda: tokens(2048), F.cross_entropy),
    "ViT": (tiny_vit, lambda: images(128), F.cross_entropy),
    "GPT": (tiny_gpt, lambda: tokens(1024), by_token),
}


def gradient(model: nn.Module, criterion: Callable[..., Tensor], data: Data) -> None:
    parameters = list(model.parameters())
    for x, y in zip(data[0].split(256), data[1].split(256), strict=True):
        torch.autograd.grad(criterion(model(x), y).sum(), parameters)


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(name: str, compile: bool, repeats: int) -> dict[str, Any]:
    make, load, criterion = PROBLEMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().eval()
    data = load()
    objective, params = hk.from_module(model, criterion)
    operators = {"fresh": hk.hessian(objective, params, data, mode=MODE, memory_limit=0)}
    operators["kept"] = hk.hessian(objective, params, data, mode=MODE)
    operators["auto"] = hk.hessian(objective, params, data, mode=MODE, batch_size="auto")
    for size in SIZES:
        if size < 2 * len(data[1]):
            operators[f"{size}"] = hk.hessian(objective, params, data, mode=MODE, batch_size=size)
    seconds_to_compile = None
    if compile:
        begin = time.perf_counter()
        operators["compiled"] = hk.hessian(objective, params, data, compile=True)
        seconds_to_compile = time.perf_counter() - begin
    n = operators["fresh"].n
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))
    expected = operators["fresh"] @ v
    for label, H in operators.items():
        for _ in range(3):  # from the third on, graphs are kept
            off = float(torch.linalg.vector_norm(H @ v - expected) / torch.linalg.vector_norm(expected))
            assert off < 1e-4, (name, label, off)
    functions: dict[str, Callable[[], Any]] = {
        "gradient": lambda: gradient(model, criterion_sum(criterion), data)
    }
    functions |= {label: lambda H=H: H @ v for label, H in operators.items()}
    rounds = [{label: timed(function) for label, function in functions.items()} for _ in range(repeats + 1)][
        1:
    ]
    ratios = {label: statistics.median(r[label] / r["gradient"] for r in rounds) for label in operators}
    best = min(statistics.median(r[f"{size}"] for r in rounds) for size in SIZES if f"{size}" in operators)
    with Allocations() as lean:
        operators["fresh"] @ v
    with Allocations() as held:
        H = hk.hessian(objective, params, data, mode=MODE)
        H @ v
        before = held.now
        H @ v
    return {
        "parameters": n,
        "examples": len(data[1]),
        "gradient_seconds": statistics.median(r["gradient"] for r in rounds),
        "over_gradient": {label: round(ratio, 2) for label, ratio in ratios.items()},
        "auto_batch_size": operators["auto"].batch_size,
        "auto_over_best": round(statistics.median(r["auto"] for r in rounds) / best, 2),
        "peak_bytes_of_a_product": lean.peak,
        "kept_bytes": held.now - before,
        "seconds_to_compile": seconds_to_compile,
    }


def criterion_sum(criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, targets: criterion(outputs, targets).sum()


def table(results: dict[str, Any]) -> str:
    lines = [
        "| network | n | gradient | fresh | kept | compiled | auto (batch size) | auto / best | kept MB | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        ratio = row["over_gradient"]
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['gradient_seconds']:.3f} s | {ratio['fresh']} | {ratio['kept']} "
            f"| {ratio.get('compiled', '-')} | {ratio['auto']} ({row['auto_batch_size']}) | {row['auto_over_best']} "
            f"| {row['kept_bytes'] / 1e6:.0f} | {row['peak_bytes_of_a_product'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--compile", action="store_true", help="compiled products too: up to a minute each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text())["problems"] if arguments.out.exists() else {}
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in arguments.problems:
        known[name] = measure(name, arguments.compile, arguments.repeats)
        arguments.out.write_text(json.dumps({"machine": machine, "problems": known}, indent=1) + "\n")
        print(table({name: known[name]}).splitlines()[-1], flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
