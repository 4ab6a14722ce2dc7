"""What a Lanczos step costs beside its product: over plain memory traffic, and of a whole solve of a network.

    python benchmarks/bench_step.py --out benchmarks/results/step.json

Solves without restart of 60 products and one that verifies them, float32, whose products are timed and taken off:

1. n = 10^6, a diagonal matrix, against the inner products and updates of two passes of Gram-Schmidt with the same rows,
   written down plainly. Both in turn, several times, medians.
2. Hessians of networks with 1.0 * 10^6 parameters: the share of the seconds that is not products. A perceptron's
   products, 784-800-450-10 with GELU, are the cheapest that a network of this size has, as each parameter is used once
   an example; a convolution uses each at every place, as in a ResNet-20 of width 31.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import hvpkit as hk


def solve(op: hk.LinearOperator, num_vectors: int) -> tuple[float, float]:
    """Seconds of a solve beside its products, the final check included, and those in its products."""
    spent = 0.0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        begin = time.perf_counter()
        image = op.product(v)
        spent += time.perf_counter() - begin
        return image

    begin = time.perf_counter()
    found = hk.lanczos(
        replace(op, product=product),
        10,  # so many that they are not all found before
        which="BE",
        tol=1e-7,
        ncv=num_vectors + 2,
        max_matvecs=num_vectors + 1,
    )
    seconds = time.perf_counter() - begin
    assert found.num_matvecs == num_vectors + 1, found
    return seconds - spent, spent


def diagonal(n: int) -> hk.LinearOperator:
    entries = torch.rand(n, generator=torch.Generator().manual_seed(0)) ** 4
    return hk.LinearOperator(lambda v: entries[:, None] * v, n, entries.dtype, entries.device)


def perceptron(num_examples: int) -> hk.LinearOperator:
    return hessian(hk.zoo.mlp(in_features=784, hidden=(800, 450)), (784,), num_examples, 1000)


def residual_network(num_examples: int) -> hk.LinearOperator:
    return hessian(hk.zoo.cifar_resnet(20, width=31).eval(), (3, 32, 32), num_examples, 50)


def hessian(
    model: torch.nn.Module, shape: tuple[int, ...], num_examples: int, batch_size: int
) -> hk.LinearOperator:
    """Over noise, in the mode that is the faster on a CPU."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(num_examples, *shape, generator=g), torch.randint(10, (num_examples,), generator=g)
    objective, params = hk.from_module(model, F.cross_entropy)
    return hk.hessian(objective, params, data, batch_size=batch_size, mode="reverse-over-reverse")


NETWORKS: dict[str, Callable[[], hk.LinearOperator]] = {
    "perceptron, 2,000 examples": partial(perceptron, 2000),
    "perceptron, 5,000 examples": partial(perceptron, 5000),
    "ResNet-20, 100 images": partial(residual_network, 100),
}


def traffic(n: int, num_vectors: int) -> float:
    """Seconds of two passes of Gram-Schmidt by plain matrix-vector calls, one row after the other."""
    basis, vector = torch.randn(num_vectors + 1, n), torch.randn(n)
    begin = time.perf_counter()
    for row in range(1, num_vectors + 1):
        for _ in range(2):
            coefficients = basis[:row] @ vector
            vector = torch.addmv(vector, basis[:row].mT, coefficients, alpha=-1e-3)
        basis[row] = vector
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10**6)
    parser.add_argument("--vectors", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    n, m, op = arguments.n, arguments.vectors, diagonal(arguments.n)
    rows = []
    for _ in range(arguments.repeats):
        (ours, _), plain = solve(op, m), traffic(n, m)
        rows.append({"solve": ours, "traffic": plain, "ratio": ours / plain})
        print(f"solve beside products {ours:.2f} s, plain traffic {plain:.2f} s, ratio {ours / plain:.2f}")
    ratio = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {ratio:.2f}")
    networks = {}
    for name, make in NETWORKS.items():
        H = make()
        solve(H, m)  # imports and first calls, and pages of memory
        beside, products = solve(H, m)
        share = beside / (beside + products)
        print(
            f"{name}: beside products {beside:.2f} s, products {products:.2f} s, share {share:.1%}",
            flush=True,
        )
        networks[name] = {"n": H.n, "beside": beside, "products": products, "share": share}
    if arguments.out:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        record = {
            "n": n,
            "vectors": m,
            "machine": machine,
            "median": ratio,
            "runs": rows,
            "networks": networks,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
