"""Passes to track both ends over 20 checkpoints of a training run: Lanczos and the default method.

    python benchmarks/bench_tracking.py --cache DIR [--problems NAME ...]

Trains each network for 20 epochs, keeps the parameters of each, and solves at all of them. Errors are against Lanczos
at a tolerance a hundred times smaller. Writes ``benchmarks/results/tracking.json`` after each network.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import _harness as harness
import _problems as problems
import hvpkit as hk
from _harness import Record

TOL = 1e-2
NAMES = ("digits CNN, late", "dense, 40,000 digits")
METHODS = ("lanczos", "auto")


def operators(name: str, cache: Path, num_epochs: int) -> list[hk.LinearOperator]:
    """Return the Hessian at each checkpoint."""
    recipe = problems.RECIPES[name]
    model, data, found = recipe.model(), recipe.data(), []
    for state in problems.checkpoints(name, cache, num_epochs):
        model.load_state_dict(state)
        found.append(problems.over(model, data, batch_size=1000, mode=problems.MODE))
    return found


def overlaps(solved: list[hk.ExtremeResult]) -> list[float]:
    """Return the cosines between the low end's vectors of consecutive checkpoints."""
    pairs = itertools.pairwise(solved)
    return [abs(float(one.smallest.vector @ other.smallest.vector)) for one, other in pairs]


def error(found: hk.ExtremeResult, truth: hk.ExtremeResult) -> float:
    """Return the larger of both ends' relative errors, in units of tol."""
    pairs = ((found.smallest, truth.smallest), (found.largest, truth.largest))
    return max(abs(pair.value / other.value - 1) / TOL for pair, other in pairs)


def measure(name: str, cache: Path, num_epochs: int) -> Record:
    """Return the ends at each checkpoint, and passes and errors of each method."""
    H = operators(name, cache, num_epochs)
    exact = [hk.extreme_eigenvalues(op, method="lanczos", tol=TOL / 100, seed=99) for op in H]
    runs: Record = {}
    for method in METHODS:
        solved = [hk.extreme_eigenvalues(op, method=method, tol=TOL, seed=step) for step, op in enumerate(H)]
        errors = [error(ex, truth) for ex, truth in zip(solved, exact, strict=True)]
        runs[method] = {"passes": [ex.num_matvecs for ex in solved], "errors_over_tol": errors}
        print(f"{name}, {method}: {sum(runs[method]['passes']):.0f} passes", flush=True)
    return {
        "n": H[0].n,
        "num_examples": H[0].num_examples,
        "ends": [[ex.smallest.value, ex.largest.value] for ex in exact],
        "overlap_of_low_vectors": overlaps(exact),
        "runs": runs,
    }


def table(record: Record) -> str:
    """Return passes in all and the solves that are off by more than tol, as Markdown."""
    rows = []
    for name, entry in record["problems"].items():
        runs = [entry["runs"][method] for method in METHODS]
        off = [f"{sum(error > 1 for error in run['errors_over_tol'])}" for run in runs]
        worst = max(max(run["errors_over_tol"]) for run in runs)
        passes = [f"{sum(run['passes']):.0f}" for run in runs]
        rows.append([name, *passes, f"{', '.join(off)} of {len(entry['ends'])}", f"{worst:.2f}"])
    head = ["network", "Lanczos", "default", "off by more than tol: Lanczos, default"]
    return harness.markdown([*head, "worst error over tol"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "tracking.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--epochs", type=int, default=20)
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        for name in harness.pending(given, given.problems or NAMES, record["problems"]):
            record["problems"][name] = measure(name, given.cache, given.epochs)
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
