"""How often intervals hold the extreme eigenvalues: many seeded problems, in one table.

    python benchmarks/interval_coverage.py --problems 2000 --out benchmarks/results/interval_coverage.json

Each problem is a spectrum of one of several shapes, of a size between 2 and 2,000, with eigenvectors that do not
matter (the operator is diagonal, the start is random). Starts that are nearly orthogonal to both ends' vectors are
made by hand and counted apart: they are what the confidence leaves out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import hvpkit as hk

Shape = Callable[[int, np.random.Generator], np.ndarray]

SHAPES: dict[str, Shape] = {
    "uniform": lambda n, rng: rng.uniform(-1, 1, n),
    "normal": lambda n, rng: rng.standard_normal(n),
    "heavy tails": lambda n, rng: rng.standard_t(2, n),
    "late training": lambda n, rng: np.r_[
        -rng.exponential(0.02, n // 2),
        rng.exponential(0.1, n - n // 2 - n // 20),
        rng.uniform(1, 50, n // 20),
    ],
    "negative dominant": lambda n, rng: np.r_[rng.uniform(-1, 1, n - 1), -rng.uniform(2, 50)],
    "clustered ends": lambda n, rng: np.r_[
        rng.uniform(-0.5, 0.5, n - n // 3),
        np.sign(rng.uniform(-1, 1, n // 3)) * (1 + 1e-2 * rng.uniform(0, 1, n // 3)),
    ],
    "multiple": lambda n, rng: np.repeat(rng.standard_normal(max(1, n // 4)), 5)[:n],
    "rank deficient": lambda n, rng: np.r_[np.zeros(n - n // 4), rng.standard_normal(n // 4)],
    "decaying": lambda n, rng: rng.permutation(2.0 ** -np.minimum(np.arange(n) * rng.uniform(0.01, 1), 60.0)),
    "two near ends": lambda n, rng: np.r_[
        rng.uniform(-0.5, 0.5, n - n // 2), np.tile([-1, -0.9, 3, 2.8], n)[: n // 2]
    ],
}


def solve(values: np.ndarray, seed: int, v0: torch.Tensor | None = None) -> dict[str, float | bool | str]:
    """Both ends of one problem against the truth."""
    entries = torch.from_numpy(values)
    op = hk.LinearOperator(lambda v: entries[:, None] * v, len(values), torch.float64, entries.device)
    ex = hk.extreme_eigenvalues(op, tol=1e-2, seed=seed, v0=v0)
    truth = {"smallest": float(values.min()), "largest": float(values.max())}
    row: dict[str, float | bool | str] = {"num_matvecs": ex.num_matvecs, "status": str(ex.status)}
    slack = 1e-13 * float(np.abs(values).max())  # of the statement that the truth is these numbers
    for end, value in truth.items():
        pair = getattr(ex, end)
        interval = pair.interval
        row[f"{end}_inside"] = interval.lower - slack <= value <= interval.upper + slack
        row[f"{end}_kind"] = interval.kind
        scale = abs(value) if abs(value) > slack else 1.0
        row[f"{end}_width"] = (interval.upper - interval.lower) / scale
        row[f"{end}_error"] = abs(pair.value - value) / scale
    return row


def near_orthogonal(values: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """A start with next to nothing of both ends' vectors."""
    start = rng.standard_normal(len(values))
    start[(values == values.min()) | (values == values.max())] *= 1e-6
    return torch.from_numpy(start)


def summary(rows: list[dict[str, float | bool | str]]) -> dict[str, float]:
    """Shares over both ends."""
    ends = [(row, end) for row in rows for end in ("smallest", "largest")]
    inside = [bool(row[f"{end}_inside"]) for row, end in ends]
    claimed = [row[f"{end}_kind"] == "random-start" for row, end in ends]
    widths = [float(row[f"{end}_width"]) for (row, end), claim in zip(ends, claimed, strict=True) if claim]
    return {
        "intervals": len(ends),
        "inside": sum(inside) / len(inside),
        "claimed": sum(claimed),
        "inside_of_claimed": sum(i for i, c in zip(inside, claimed, strict=True) if c) / max(1, sum(claimed)),
        "median_width": statistics.median(widths) if widths else 0.0,
        "error_above_tol": sum(float(row[f"{end}_error"]) > 1e-2 for row, end in ends) / len(ends),
        "median_matvecs": statistics.median(float(row["num_matvecs"]) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, list[dict[str, float | bool | str]]] = {name: [] for name in SHAPES}
    adversarial = []
    for seed in range(arguments.problems):
        rng = np.random.default_rng(seed)
        name = list(SHAPES)[seed % len(SHAPES)]
        n = int(np.exp(rng.uniform(np.log(2), np.log(2000))))
        values = np.ascontiguousarray(SHAPES[name](n, rng)[:n], dtype=np.float64)
        table[name].append(solve(values, seed))
        if seed % 10 == 3:
            adversarial.append(solve(values, seed, near_orthogonal(values, rng)))
    report = {name: summary(rows) for name, rows in table.items()}
    report["all"] = summary([row for rows in table.values() for row in rows])
    report["starts nearly orthogonal to the ends (with a tenth of random)"] = summary(adversarial)
    for name, row in report.items():
        print(
            f"{name:<62}inside {row['inside']:.4f}  of claimed {row['inside_of_claimed']:.4f} ({row['claimed']:g})"
            f"  median width {row['median_width']:.3g}  error > tol {row['error_above_tol']:.4f}"
        )
    if arguments.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "hvpkit": hk.__version__}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"confidence": 0.99, "tol": 1e-2, "machine": machine, **report}, indent=1)
        )


if __name__ == "__main__":
    main()
