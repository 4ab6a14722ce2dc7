"""Passes to both ends of trained networks: the default method, full-data Lanczos and ARPACK.

    python benchmarks/bench_fidelity.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--methods NAME ...]

writes ``benchmarks/results/fidelity.json`` after each method and prints the table of the problems that are
complete. The default method and Lanczos make the same promise, at the same confidence; under 10,000 examples they are
the same. Errors are relative to the stored float64 references. A pass is the work of one full-data matvec.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import RECIPES, available, hessian, load
from _references import reference
from hvpkit.extreme import sample_levels
from hvpkit.solvers.multifidelity import solve_levels

TOL = 1e-2
PROBLEMS = [*RECIPES][:7]
"""Without the two whose data are too few for samples to pay; docs/multifidelity.md has these."""


def largest_alone(H: hk.LinearOperator, seed: int) -> hk.EigenResult:
    """Solve for the largest eigenvalue alone, with the samples of the default method."""
    levels, spent = sample_levels(H, seed)
    return solve_levels(levels, which="LA", tol=TOL, spent=spent, seed=seed)


def both_ends(**options: object) -> Callable[[hk.LinearOperator, int], hk.ExtremeResult]:
    """Return a solve by :func:`hvpkit.extreme_eigenvalues` with these options."""
    return lambda H, seed: hk.extreme_eigenvalues(H, tol=TOL, seed=seed, **options)


METHODS: dict[str, Callable[[hk.LinearOperator, int], hk.ExtremeResult | hk.EigenResult]] = {
    "auto": both_ends(),
    "lanczos": both_ends(method="lanczos"),
    "auto, certified": both_ends(certify=True),
    "lanczos, certified": both_ends(method="lanczos", certify=True),
    "eigsh": lambda H, seed: hk.eigsh(H, 2, which="BE", tol=TOL, seed=seed),
    "largest alone": largest_alone,
}


def solve(method: str, H: hk.LinearOperator, seed: int, truth: Sequence[float]) -> Record:
    """Solve once; return passes, seconds, and the error of each end in units of tol."""
    found = METHODS[method](H, seed)
    if isinstance(found, hk.ExtremeResult):
        pairs = [found.smallest, found.largest]
    else:
        pairs = [found.pair(place) for place in range(len(found.values))]
    ends = [*zip(pairs, truth[-len(pairs) :], strict=True)]
    return {
        "seed": seed,
        "passes": found.num_matvecs,
        "seconds": found.seconds,
        "status": str(found.status),
        "errors_over_tol": [abs(pair.value - value) / abs(value) / TOL for pair, value in ends],
        "in_interval": [value in pair.interval for pair, value in ends],
        "kinds": [pair.interval.kind for pair in pairs],
        "level": found.history[-1].level,
    }


def measure(name: str, method: str, cache: Path, seeds: int) -> Record:
    """Return a problem with the runs of one method."""
    truth, H = reference(name, "extremes", cache)["value"], hessian(load(name, cache), batch_size=1000)
    runs = []
    for seed in range(seeds):
        runs.append(solve(method, H, seed, truth))
        print(f"{name}, {method}: {runs[-1]}", flush=True)
    return {"n": H.n, "num_examples": H.num_examples, "reference": truth, "runs": {method: runs}}


def table(record: Record) -> str:
    """Return passes with their spread over seeds, ratios to the default method, and the worst errors, as Markdown."""
    found, rows = record["problems"], []
    pairs = [("lanczos", "auto"), ("eigsh", "auto"), ("auto, certified", "lanczos, certified")]
    ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    in_order = [name for name in dict.fromkeys([*PROBLEMS, *found]) if name in found]
    for name in (name for name in in_order if "auto" in found[name]["runs"]):
        entry = found[name]
        passes = {method: [run["passes"] for run in entry["runs"].get(method, [])] for method in METHODS}
        over = []
        for pair, known in ratios.items():
            above, below = (passes[method] for method in pair)
            ratio = [statistics.median(above) / statistics.median(below)] if above and below else []
            known += ratio
            over += [f"{value:.2f}" for value in ratio] or ["-"]
        errors = [max(run["errors_over_tol"]) for run in entry["runs"]["auto"]]
        rows.append(
            [
                name,
                "{:.3g} ... {:.3g}".format(*entry["reference"]),
                *(harness.median(passes[method], spread=False) for method in ("lanczos", "eigsh")),
                harness.median(passes["auto"]),
                str(len(errors)),
                *over,
                f"at most {max(errors):.2f}, {sum(error > 1 for error in errors)} over 1",
                harness.median(passes["largest alone"]),
            ]
        )
    means = [f"{statistics.geometric_mean(known):.2f}" if known else "-" for known in ratios.values()]
    head = [
        "problem",
        "ends",
        "Lanczos",
        "ARPACK",
        "default",
        "seeds",
        "Lanczos / default",
        "ARPACK / default",
    ]
    rows.append(["geometric mean", *[""] * 5, *means, "", ""])
    return harness.markdown([*head, "certified: default / Lanczos", "errors / tol", "largest alone"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "fidelity.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=10)
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        names = given.problems or [name for name in PROBLEMS if name in available()]
        for name in names:
            done = record["problems"].get(name, {}).get("runs", {})
            for method in harness.pending(given, given.methods, done):
                entry = measure(name, method, given.cache, given.seeds)
                done = done | entry["runs"]
                record["problems"][name] = entry | {"runs": done}
                harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
