"""Passes to several eigenvalues of one end: the default method and full-data Lanczos.

    python benchmarks/bench_top.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--seeds N]

Solves for the five largest and the three smallest. Errors are against Lanczos at a tolerance a thousand times smaller.
The default method certifies each value; Lanczos certifies the outermost one and searches for copies. Writes
``benchmarks/results/top.json`` after each problem. A pass is the work of one full-data matvec.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import available, hessian, load

TOL = 1e-2
PROBLEMS = ("dense, 40,000 digits", "transformer, characters", "CIFAR-10 ResNet")
QUESTIONS: dict[str, tuple[int, str]] = {"five largest": (5, "LA"), "three smallest": (3, "SA")}
METHODS = ("lanczos", "auto")


def solve(H: hk.LinearOperator, question: str, method: str, seed: int, truth: Sequence[float]) -> Record:
    """Solve once; return passes, seconds, and the errors in units of tol."""
    k, which = QUESTIONS[question]
    found = hk.top_eigenvalues(H, k, which=which, tol=TOL, method=method, seed=seed)
    pairs = [*zip(found.values.tolist(), found.intervals, truth, strict=True)]
    return {
        "seed": seed,
        "passes": found.num_matvecs,
        "seconds": found.seconds,
        "status": str(found.status),
        "errors_over_tol": [abs(value - exact) / abs(exact) / TOL for value, _, exact in pairs],
        "in_interval": [exact in interval for _, interval, exact in pairs],
        "kinds": [interval.kind for interval in found.intervals],
    }


def measure(name: str, cache: Path, seeds: int) -> Record:
    """Return the truth of each question, and the runs of each method."""
    H, entry = hessian(load(name, cache), batch_size=1000), Record(questions={})
    for question, (k, which) in QUESTIONS.items():
        truth = hk.lanczos(H, k, which=which, tol=TOL / 1000, seed=99).values.tolist()
        runs = {m: [solve(H, question, m, seed, truth) for seed in range(seeds)] for m in METHODS}
        entry["questions"][question] = {"truth": truth, "runs": runs}
        print(f"{name}, {question}: {[[run['passes'] for run in runs[m]] for m in METHODS]}", flush=True)
    return entry | {"n": H.n, "num_examples": H.num_examples}


def table(record: Record) -> str:
    """Return passes with their spread over seeds, their ratio, and how often a value was off, as Markdown."""
    rows = []
    for name, entry in record["problems"].items():
        for question, asked in entry["questions"].items():
            runs = [asked["runs"][method] for method in METHODS]
            passes = [[run["passes"] for run in one] for one in runs]
            errors = [error for run in runs[1] for error in run["errors_over_tol"]]
            inside = [one for run in runs[1] for one in run["in_interval"]]
            rows.append(
                [
                    f"{name}: {question}",
                    *map(harness.median, passes),
                    f"{statistics.median(passes[0]) / statistics.median(passes[1]):.2f}",
                    f"{sum(error > 1 for error in errors)} over 1, {sum(error > 2 for error in errors)} over 2",
                    f"{sum(inside)} of {len(inside)}",
                ]
            )
    head = ["problem", "Lanczos", "default", "Lanczos / default", "errors / tol", "inside of its interval"]
    return harness.markdown(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "top.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--seeds", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        names = given.problems or [name for name in PROBLEMS if name in available()]
        for name in harness.pending(given, names, record["problems"]):
            record["problems"][name] = measure(name, given.cache, given.seeds)
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
