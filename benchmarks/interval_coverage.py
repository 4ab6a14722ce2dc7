"""Share of intervals that hold the extreme eigenvalue, over many seeded problems.

    python benchmarks/interval_coverage.py [--problems 2000]

Each problem is a spectrum of one of several shapes, of a size between 2 and 2,000; eigenvectors do not matter (the
operator is diagonal, the start is random). Starts that are nearly orthogonal to both ends' vectors, of spectra of the
shape "late training", are counted apart: the confidence does not cover them. Writes
``benchmarks/results/interval_coverage.json`` and prints a line for each shape.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import diagonal

TOL, CONFIDENCE = 1e-2, 0.99
ENDS = ("smallest", "largest")
ADVERSARIAL = "starts nearly orthogonal to the ends (with a tenth of random)"

SHAPES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
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


def solve(values: np.ndarray, seed: int, v0: torch.Tensor | None = None) -> list[Record]:
    """Return kind, coverage, width and error of the intervals at both ends of one problem."""
    ex = hk.extreme_eigenvalues(diagonal(values), tol=TOL, atol=0.0, confidence=CONFIDENCE, seed=seed, v0=v0)
    slack = 1e-13 * float(np.abs(values).max())  # rounding of the prescribed eigenvalues
    rows = []
    for pair, truth in ((ex.smallest, float(values.min())), (ex.largest, float(values.max()))):
        interval, scale = pair.interval, abs(truth) if abs(truth) > slack else 1.0
        rows.append(
            {
                "num_matvecs": ex.num_matvecs,
                "inside": interval.lower - slack <= truth <= interval.upper + slack,
                "claimed": interval.kind == "random-start",
                "width": (interval.upper - interval.lower) / scale,
                "error": abs(pair.value - truth) / scale,
            }
        )
    return rows


def near_orthogonal(values: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return a start with a part of 1e-6 along both ends' vectors."""
    start = rng.standard_normal(len(values))
    start[(values == values.min()) | (values == values.max())] *= 1e-6
    return torch.from_numpy(start)


def summary(rows: list[Record]) -> Record:
    """Return shares and medians over intervals."""
    claimed = [row for row in rows if row["claimed"]]
    return {
        "intervals": len(rows),
        "inside": sum(row["inside"] for row in rows) / len(rows),
        "claimed": len(claimed),
        "inside_of_claimed": sum(row["inside"] for row in claimed) / max(1, len(claimed)),
        "median_width": statistics.median(row["width"] for row in claimed) if claimed else 0.0,
        "error_above_tol": sum(row["error"] > TOL for row in rows) / len(rows),
        "median_matvecs": statistics.median(row["num_matvecs"] for row in rows),
    }


def measure(num_problems: int) -> Record:
    """Return a summary for each shape, for all, and for the adversarial starts."""
    rows: dict[str, list[Record]] = {name: [] for name in SHAPES}
    adversarial: list[Record] = []
    for seed in range(num_problems):
        rng, name = np.random.default_rng(seed), [*SHAPES][seed % len(SHAPES)]
        n = int(np.exp(rng.uniform(np.log(2), np.log(2000))))
        values = np.ascontiguousarray(SHAPES[name](n, rng)[:n], dtype=np.float64)
        rows[name] += solve(values, seed)
        if name == "late training":
            adversarial += solve(values, seed, near_orthogonal(values, rng))
    every = [row for own in rows.values() for row in own]
    found = {name: own for name, own in {**rows, "all": every, ADVERSARIAL: adversarial}.items() if own}
    return {name: summary(own) for name, own in found.items()}


def table(record: Record) -> str:
    """Return a line for each shape."""
    return "\n".join(
        f"{name:<62}inside {row['inside']:.4f}  of claimed {row['inside_of_claimed']:.4f} ({row['claimed']:g})"
        f"  median width {row['median_width']:.3g}  error > tol {row['error_above_tol']:.4f}"
        for name, row in record.items()
        if name in (*SHAPES, "all", ADVERSARIAL)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "interval_coverage.json")
    parser.add_argument("--problems", type=int, default=2000)
    given = harness.parse(parser, argv)
    if not given.report:
        torch.set_num_threads(1)
        header = {"confidence": CONFIDENCE, "tol": TOL, "machine": harness.machine()}
        harness.write(given.out, header | measure(given.problems))
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
