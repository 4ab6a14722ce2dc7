"""What a Lanczos step costs beside its product: over the same memory traffic by plain matrix-vector calls.

    python benchmarks/bench_step.py --out benchmarks/results/step.json

A whole solve without restart (n = 10^6, 60 vectors, float32) of an operator whose products are timed and taken off,
against the inner products and updates of two passes of Gram-Schmidt with the same rows, written down plainly. Both in
turn, several times, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import hvpkit as hk


def solve(n: int, num_vectors: int, diagonal: torch.Tensor) -> float:
    """Seconds of a solve beside its products, the final check included."""
    spent = 0.0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        begin = time.perf_counter()
        image = diagonal[:, None] * v
        spent += time.perf_counter() - begin
        return image

    op = hk.LinearOperator(product, n, diagonal.dtype, diagonal.device)
    begin = time.perf_counter()
    found = hk.lanczos(op, 2, which="BE", tol=1e-7, ncv=num_vectors + 2, max_matvecs=num_vectors + 1)
    seconds = time.perf_counter() - begin - spent
    assert found.num_matvecs == num_vectors + 1, found
    return seconds


def traffic(n: int, num_vectors: int, dtype: torch.dtype) -> float:
    """Seconds of two passes of Gram-Schmidt by plain matrix-vector calls, one row after the other."""
    basis, vector = torch.randn(num_vectors + 1, n, dtype=dtype), torch.randn(n, dtype=dtype)
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
    n, m = arguments.n, arguments.vectors
    diagonal = torch.rand(n) ** 4
    rows = []
    for _ in range(arguments.repeats):
        ours, plain = solve(n, m, diagonal), traffic(n, m, diagonal.dtype)
        rows.append({"solve": ours, "traffic": plain, "ratio": ours / plain})
        print(f"solve beside products {ours:.2f} s, plain traffic {plain:.2f} s, ratio {ours / plain:.2f}")
    ratio = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {ratio:.2f}")
    if arguments.out:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        arguments.out.write_text(
            json.dumps({"n": n, "vectors": m, "machine": machine, "median": ratio, "runs": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
