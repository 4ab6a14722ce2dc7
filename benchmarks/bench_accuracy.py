"""How often converged ends are off by more than tol, how often intervals do not hold the end, with how many passes.

    python benchmarks/bench_accuracy.py --cache DIR [--sets NAME ...] [--methods NAME ...] [--confidence C ...]

The sets are perceptrons of 1,210 and of 3,010 to 4,510 parameters along training, in float64, whose spectra are
computed densely once (20 minutes) and kept in the cache; prescribed spectra; and with ``--sets trained``, which takes
minutes for each network, the problems of ``bench_fidelity.py`` and the checkpoints of ``bench_tracking.py``. From a
random start, Lanczos depends on the spectrum alone: where that is known, solves without samples are of the diagonal
operator with the same spectrum. Writes ``benchmarks/results/accuracy.json`` after each problem, method and confidence.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

import _harness as harness
import hvpkit as hk
from _accuracy_problems import ATOL, TOL, Case, problems
from _harness import Record
from _problems import diagonal
from hvpkit.extreme import worth_sampling

METHODS: dict[str, Record] = {
    "auto": {"method": "auto"},
    "lanczos": {"method": "lanczos"},
    "multifidelity": {"method": "multifidelity"},
    "certify": {"certify": True},
}
SETS = ("small", "large", "spectra")
OFF = (1, 2, 5)
"""In units of tol: ends that are off by more than this are counted."""


def operator(case: Case, method: str) -> hk.LinearOperator:
    """Return the operator that a method solves: diagonal where the spectrum is all that matters, and known."""
    H = case.make()
    samples = method == "multifidelity" or (method == "auto" and worth_sampling(H))
    return H if samples or case.spectrum is None else diagonal(case.spectrum)


def solve(
    op: hk.LinearOperator, ends: Sequence[float], method: str, confidence: float, seed: int
) -> list[Record]:
    """Solve once; return for each end its error over that allowed, beyond rounding, and whether its interval holds it.

    Of an end that is zero an error of ``ATOL * norm`` is allowed.
    """
    ex = hk.extreme_eigenvalues(op, tol=TOL, confidence=confidence, seed=seed, **METHODS[method])
    norm = max(map(abs, ends))
    rounding, slack = 32 * torch.finfo(op.dtype).eps * norm, 1e-13 * norm
    rows = []
    for end, truth in zip(("smallest", "largest"), ends, strict=True):
        pair = getattr(ex, end)
        beyond = max(abs(pair.value - truth) - rounding, 0.0)
        rows.append(
            {
                "end": end,
                "seed": seed,
                "passes": ex.num_matvecs,
                "converged": ex.converged,
                "truth": truth,
                "error": beyond / (TOL * abs(truth) if abs(truth) > ATOL * norm else ATOL * norm),
                "kind": pair.interval.kind,
                "inside": pair.interval.lower - slack <= truth <= pair.interval.upper + slack,
            }
        )
    return rows


def summary(rows: Sequence[Record]) -> Record:
    """Return counts over ends, the passes of each solve, and the rows that are wrong."""
    converged = [row for row in rows if row["converged"]]
    errors = [row["error"] for row in converged]
    return {
        "ends": len(rows),
        "converged": len(converged),
        "off": {str(limit): sum(error > limit for error in errors) for limit in OFF},
        "worst": max(errors, default=0.0),
        "intervals": Counter(f"{row['end']}, {row['kind']}" for row in rows),
        "outside": Counter(f"{row['end']}, {row['kind']}" for row in rows if not row["inside"]),
        "passes": [row["passes"] for row in rows[::2]],
        "wrong": [row for row in rows if not row["inside"] or (row["converged"] and row["error"] > 1)],
    }


def measure(name: str, cases: Sequence[Case], method: str, confidence: float, seeds: int) -> Record:
    """Return the summary of a problem.

    Each solve has a seed of its own, other problems' too: under one seed, a start that is unlucky at an end would be so
    for all spectra of the same size.
    """
    rows, first = [], zlib.crc32(name.encode())
    for place, case in enumerate(cases):
        op = operator(case, method)
        for seed in range(first + place * seeds, first + (place + 1) * seeds):
            rows += [{"case": place, **row} for row in solve(op, case.ends, method, confidence, seed)]
    return summary(rows)


def total(parts: Iterable[Record]) -> list[str]:
    """Return the cells of a table for several problems together."""
    parts = [*parts]
    intervals, outside = (
        sum((Counter(part[key]) for part in parts), Counter()) for key in ("intervals", "outside")
    )
    return [
        *(f"{sum(part[key] for part in parts):,}" for key in ("ends", "converged")),
        *(str(sum(part["off"][str(limit)] for part in parts)) for limit in OFF),
        f"{max(part['worst'] for part in parts):.2f}",
        "; ".join(f"{kind}: {outside[kind]} of {intervals[kind]:,}" for kind in sorted(intervals)),
        harness.median([passes for part in parts for passes in part["passes"]], spread=False),
    ]


def table(record: Record) -> str:
    """Return a line for each set, method and confidence, as Markdown."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for entry in record["problems"].values():
        for method, by_confidence in entry["runs"].items():
            for confidence, found in by_confidence.items():
                groups.setdefault((entry["set"], method, confidence), []).append(found)
    head = ["set", "method", "confidence", "ends", "converged", *(f"off by > {limit} tol" for limit in OFF)]
    rows = [[*group, *total(parts)] for group, parts in sorted(groups.items())]
    return harness.markdown([*head, "worst / tol", "not in the interval", "median passes"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "accuracy.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--sets", nargs="+", choices=problems(), default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["auto", "lanczos", "certify"])
    parser.add_argument("--confidence", nargs="+", type=float, default=[0.99])
    parser.add_argument("--seeds", type=int, default=3)
    given = harness.parse(parser, argv)
    if not given.report:
        torch.set_num_threads(1)
        header = {"tol": TOL, "seeds": given.seeds, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        chosen = {name: (own, make) for own in given.sets for name, make in problems()[own].items()}
        if unknown := set(given.problems or ()) - set(chosen):
            parser.error(
                f"--problems: {', '.join(sorted(unknown))} not in the sets {', '.join(given.sets)}; see --sets"
            )
        for name in given.problems or chosen:
            own, make = chosen[name]
            entry = record["problems"].setdefault(name, {"set": own, "runs": {}})
            runs = [(method, str(confidence)) for method in given.methods for confidence in given.confidence]
            todo = [run for run in runs if not (given.resume and run[1] in entry["runs"].get(run[0], {}))]
            cases = make(given.cache) if todo else []
            for method, confidence in todo:
                found = measure(name, cases, method, float(confidence), given.seeds)
                entry["runs"].setdefault(method, {})[confidence] = found
                print(f"{name}, {method}, {confidence}: {' | '.join(total([found]))}", flush=True)
                harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
