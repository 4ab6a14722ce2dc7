"""Where the time of a solve goes: both ends to 1 %, with samples and by Lanczos alone.

    python benchmarks/profile_solve.py --cache DIR [--problems NAME ...] [--repeats 3]

writes ``benchmarks/results/profile.json`` and prints its table: seconds of making the operator, of scoring and drawing
samples, of products with these, of the first product of the whole (nothing is kept yet), the second (which makes what
is kept), those after, and of all that is beside. Of several solves with the same seed, that of median length.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hvpkit as hk
from compare_references import Problem, available, load
from hvpkit.extreme import sample_levels
from hvpkit.solvers.multifidelity import solve_levels

RESULTS = Path(__file__).parent / "results" / "profile.json"
PARTS = ("operator", "samples drawn", "products of samples", "first", "second", "later", "beside")
WHOLE = PARTS[3:6]


class Clock:
    """Seconds and calls by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def timed(self, part: str, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = function()
        self.seconds[part] += time.perf_counter() - begin
        self.calls[part] += 1
        return result

    def sample(self, op: hk.LinearOperator) -> hk.LinearOperator:
        """The operator, with products that are timed."""
        return replace(
            op, product=lambda vectors: self.timed("products of samples", lambda: op.product(vectors))
        )

    def whole(self, op: hk.LinearOperator) -> hk.LinearOperator:
        """The operator, with products that are timed, the first two apart."""

        def product(vectors: Tensor) -> Tensor:
            part = WHOLE[min(sum(self.calls[part] for part in WHOLE), 2)]
            image: Tensor = self.timed(part, lambda: op.product(vectors))
            return image

        return replace(op, product=product)


def profile(problem: Problem, method: str) -> dict[str, Any]:
    """One solve."""
    clock, begin = Clock(), time.perf_counter()
    objective, params = hk.from_module(problem.model, F.cross_entropy)
    H = clock.timed(
        "operator",
        lambda: hk.hessian(objective, params, (problem.x, problem.y), batch_size=problem.batch_size),
    )
    if method == "multifidelity":
        levels, spent = clock.timed("samples drawn", lambda: sample_levels(H, 0))
        levels = [*map(clock.sample, levels[:-1]), clock.whole(H)]
        found = solve_levels(levels, tol=1e-2, spent=spent)
    else:
        found = hk.lanczos(clock.whole(H), 2, which="BE", tol=1e-2)
    total = time.perf_counter() - begin
    clock.seconds["beside"] = total - sum(clock.seconds.values())
    return {
        "seconds": total,
        "passes": found.num_matvecs,
        "status": str(found.status),
        "parts": {part: clock.seconds[part] for part in PARTS},
        "calls": {part: clock.calls[part] for part in PARTS[2:-1]},
    }


def shown(run: dict[str, Any], part: str) -> str:
    """Its share, and how many calls if there were several."""
    calls = run["calls"].get(part, 1)
    if not calls:
        return "-"
    share = f"{run['parts'][part] / run['seconds']:.0%}"
    return f"{share} ({calls})" if calls > 1 else share


def table(results: dict[str, Any]) -> str:
    """A row for each solve."""
    lines = [f"| network, method | seconds | passes | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 3) + "|"]
    for name, runs in results.items():
        for method, run in runs.items():
            cells = " | ".join(shown(run, part) for part in PARTS)
            lines.append(f"| {name}, {method} | {run['seconds']:.3g} | {run['passes']:.3g} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="trained parameters")
    parser.add_argument("--problems", nargs="+", default=available(with_cifar10=False))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    results: dict[str, Any] = {}
    for name in given.problems:
        problem = load(name, given.cache)
        profile(problem, "lanczos")  # imports and first calls
        for method in ("multifidelity", "lanczos"):
            runs = sorted(
                (profile(problem, method) for _ in range(given.repeats)), key=lambda run: run["seconds"]
            )
            results.setdefault(name, {})[method] = runs[len(runs) // 2]
            given.out.write_text(json.dumps({"machine": machine, "problems": results}, indent=1) + "\n")
        print("\n".join(table({name: results[name]}).splitlines()[2:]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
