"""Seconds of a solve by part: both ends to 1 %, with samples and by Lanczos alone.

    python benchmarks/profile_solve.py --cache DIR [--problems NAME ...] [--repeats 3]

writes ``benchmarks/results/profile.json`` and prints its table: seconds of making the operator, of scoring and drawing
samples, of matvecs with these, of the first full-data matvec (nothing is kept yet), the second (which makes the graphs
that are kept), those after, and of everything else. Of several solves with the same seed, the one with median seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import RECIPES, Problem, load, over
from hvpkit.extreme import sample_levels
from hvpkit.solvers.multifidelity import solve_levels

PROBLEMS = [name for name in RECIPES if name != "CIFAR-10 ResNet"]
METHODS = ("multifidelity", "lanczos")
PARTS = ("operator", "samples drawn", "products of samples", "first", "second", "later", "beside")
WHOLE = PARTS[3:6]


class Clock:
    """Seconds and calls by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def note(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self.calls[part] += 1

    def note_whole(self, seconds: float) -> None:
        """Note a full-data matvec: the first, the second, or a later one."""
        self.note(WHOLE[min(sum(self.calls[part] for part in WHOLE), 2)], seconds)

    def timed(self, part: str, work: Any) -> Any:
        result, seconds = harness.timed(work)
        self.note(part, seconds)
        return result


def profile(problem: Problem, method: str) -> Record:
    """Solve once, and return the seconds of each part."""
    clock, begin = Clock(), time.perf_counter()
    data = (problem.x, problem.y)
    H = clock.timed("operator", lambda: over(problem.model, data, batch_size=problem.batch_size))
    whole = harness.with_timed_matvecs(H, clock.note_whole)
    if method == "multifidelity":
        levels, spent = clock.timed("samples drawn", lambda: sample_levels(H, 0))
        note = partial(clock.note, "products of samples")
        samples = [harness.with_timed_matvecs(level, note) for level in levels[:-1]]
        found = solve_levels([*samples, whole], tol=1e-2, spent=spent)
    else:
        found = hk.lanczos(whole, 2, which="BE", tol=1e-2)
    total = time.perf_counter() - begin
    clock.seconds["beside"] = total - sum(clock.seconds.values())
    return {
        "seconds": total,
        "passes": found.num_matvecs,
        "status": str(found.status),
        "parts": {part: clock.seconds[part] for part in PARTS},
        "calls": {part: clock.calls[part] for part in PARTS[2:-1]},
    }


def shown(run: Record, part: str) -> str:
    """Return a part's share of the seconds, and its calls if there are several."""
    calls = run["calls"].get(part, 1)
    if not calls:
        return "-"
    share = f"{run['parts'][part] / run['seconds']:.0%}"
    return f"{share} ({calls})" if calls > 1 else share


def table(record: Record) -> str:
    """Return shares of the seconds, a row for each solve, as Markdown."""
    rows = [
        [
            f"{name}, {method}",
            f"{run['seconds']:.3g}",
            f"{run['passes']:.3g}",
            *(shown(run, part) for part in PARTS),
        ]
        for name, runs in record["problems"].items()
        for method, run in runs.items()
    ]
    return harness.markdown(["network, method", "seconds", "passes", *PARTS], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "profile.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--repeats", type=int, default=3)
    given = harness.parse(parser, argv)
    if not given.report:
        record = harness.open_record(given.out, {"machine": harness.machine()}, problems={})
        for name in harness.pending(given, given.problems or PROBLEMS, record["problems"]):
            problem, runs = load(name, given.cache), {}
            profile(problem, "lanczos")  # imports and first calls
            for method in METHODS:
                solves = [profile(problem, method) for _ in range(given.repeats)]
                runs[method] = sorted(solves, key=lambda run: run["seconds"])[len(solves) // 2]
            record["problems"][name] = runs
            harness.write(given.out, record)
            print("\n".join(table({"problems": {name: runs}}).splitlines()[2:]), flush=True)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
