"""Passes to both ends on trained networks: several fidelities, full-data Lanczos and ARPACK.

    python benchmarks/bench_fidelity.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--methods NAME ...]

writes ``benchmarks/results/fidelity.json`` after each method and prints the table of what is complete in it. The
methods compared with take minutes a seed and hardly depend on it: ``--methods lanczos eigsh --seeds 2``. Reference
values are those of Lanczos in float64 at a tolerance a hundred times smaller; they are kept in
``fidelity_references.json`` with a digest of the parameters that they are of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hvpkit as hk
from fidelity_problems import available, problem
from hvpkit.extreme import sample_levels
from hvpkit.solvers.multifidelity import solve_levels

RESULTS = Path(__file__).parent / "results"
TOL = 1e-2


def operator(name: str, cache: Path, dtype: torch.dtype = torch.float32) -> hk.LinearOperator:
    objective, params, data = problem(name, cache, dtype)
    return hk.hessian(objective, params, data, batch_size=1000, mode="reverse-over-reverse")


def digest(params: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in params)).hexdigest()[:16]


def reference(name: str, cache: Path) -> list[float]:
    """Both ends, from the file or computed anew if the parameters are others."""
    file = RESULTS / "fidelity_references.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    own = digest([*problem(name, cache)[1].values()])
    if known.get(name, {}).get("parameters") != own:
        ex = hk.extreme_eigenvalues(
            operator(name, cache, torch.float64), method="lanczos", tol=TOL / 100, seed=99
        )
        assert ex.converged, ex.message
        values = [ex.smallest.value, ex.largest.value]
        bounds = [ex.smallest.error_bound, ex.largest.error_bound]
        known = json.loads(file.read_text()) if file.exists() else {}
        known[name] = {"parameters": own, "values": values, "error_bounds": bounds, "passes": ex.num_matvecs}
        file.write_text(json.dumps(known, indent=1) + "\n")
    return list(known[name]["values"])


def by_multifidelity(H: hk.LinearOperator, seed: int) -> hk.ExtremeResult | hk.EigenResult:
    return hk.extreme_eigenvalues(H, tol=TOL, method="multifidelity", seed=seed)


def by_lanczos(H: hk.LinearOperator, seed: int) -> hk.ExtremeResult | hk.EigenResult:
    return hk.extreme_eigenvalues(H, tol=TOL, method="lanczos", seed=seed)


def by_arpack(H: hk.LinearOperator, seed: int) -> hk.ExtremeResult | hk.EigenResult:
    return hk.eigsh(H, 2, which="BE", tol=TOL, seed=seed)


def largest_alone(H: hk.LinearOperator, seed: int) -> hk.ExtremeResult | hk.EigenResult:
    levels, spent = sample_levels(H, seed)
    return solve_levels(levels, which="LA", tol=TOL, spent=spent, seed=seed)


Method = Callable[[hk.LinearOperator, int], hk.ExtremeResult | hk.EigenResult]
METHODS: dict[str, Method] = {
    "multifidelity": by_multifidelity,
    "lanczos": by_lanczos,
    "eigsh": by_arpack,
    "largest alone": largest_alone,
}


def solve(method: Method, H: hk.LinearOperator, seed: int, truth: list[float]) -> dict[str, Any]:
    """One solve: passes, seconds, and errors of what was found over tol."""
    found = method(H, seed)
    if isinstance(found, hk.ExtremeResult):
        pairs = [found.smallest, found.largest]
    else:
        pairs = [found.pair(place) for place in range(len(found.values))]
    errors, inside = [], []
    for pair, value in zip(pairs, truth[-len(pairs) :], strict=True):
        errors.append(abs(pair.value - value) / abs(value) / TOL)
        inside.append(value in pair.interval)
    return {
        "seed": seed,
        "passes": found.num_matvecs,
        "seconds": found.seconds,
        "status": str(found.status),
        "errors_over_tol": errors,
        "in_interval": inside,
        "kinds": [pair.interval.kind for pair in pairs],
        "level": found.history[-1].level,
    }


def measure(name: str, label: str, cache: Path, seeds: int) -> dict[str, Any]:
    """The problem, and the runs of one method."""
    truth, H = reference(name, cache), operator(name, cache)
    runs = []
    for seed in range(seeds):
        runs.append(solve(METHODS[label], H, seed, truth))
        print(f"{name}, {label}: {runs[-1]}", flush=True)
    return {"n": H.n, "num_examples": H.num_examples, "reference": truth, "runs": {label: runs}}


def keep(name: str, entry: dict[str, Any]) -> None:
    """Puts the runs of a method into the file, beside those of others."""
    file = RESULTS / "fidelity.json"
    whole = json.loads(file.read_text()) if file.exists() else {"problems": {}}
    runs = whole["problems"].get(name, {}).get("runs", {}) | entry["runs"]
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.machine()}
    whole |= {
        "tol": TOL,
        "machine": machine,
        "problems": whole["problems"] | {name: entry | {"runs": runs}},
    }
    file.write_text(json.dumps(whole, indent=1) + "\n")


def shown(values: list[float], spread: bool = True) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.3g}"
    return f"{middle} ({min(values):.3g} to {max(values):.3g})" if spread and len(values) > 1 else middle


def table(found: dict[str, Any]) -> str:
    """Medians of passes with their spread over seeds, ratios, and the worst errors, as Markdown."""
    rows = [
        "| problem | ends | Lanczos | ARPACK | multifidelity | seeds | Lanczos over it | ARPACK over it | "
        "errors over tol | largest alone |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {"lanczos": [], "eigsh": []}
    for name in (name for name in available() if "multifidelity" in found.get(name, {}).get("runs", ())):
        entry = found[name]
        passes = {label: [run["passes"] for run in entry["runs"].get(label, [])] for label in METHODS}
        own = passes["multifidelity"]
        over = []
        for label, values in ratios.items():
            ratio = statistics.median(passes[label]) / statistics.median(own) if passes[label] else None
            values += [] if ratio is None else [ratio]
            over.append("-" if ratio is None else f"{ratio:.2f}")
        errors = sorted(max(run["errors_over_tol"]) for run in entry["runs"]["multifidelity"])
        off = sum(error > 1 for error in errors)
        low, high = entry["reference"]
        rows.append(
            f"| {name} | {low:.3g} ... {high:.3g} | {shown(passes['lanczos'], False)} | "
            f"{shown(passes['eigsh'], False)} | {shown(own)} | {len(own)} | {over[0]} | {over[1]} | "
            f"at most {errors[-1]:.2f}, {off} over 1 | {shown(passes['largest alone'])} |"
        )
    means = [
        f"{math.exp(statistics.mean(map(math.log, values))):.2f}" if values else "-"
        for values in ratios.values()
    ]
    rows.append(f"| geometric mean | | | | | | {means[0]} | {means[1]} | | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--problems", nargs="*")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.cifar10:
        os.environ["CIFAR10"] = str(arguments.cifar10)
    names = available() if arguments.problems is None else arguments.problems
    for name in names:
        for label in arguments.methods:
            keep(name, measure(name, label, arguments.cache, arguments.seeds))
    print(table(json.loads((RESULTS / "fidelity.json").read_text())["problems"]))


if __name__ == "__main__":
    main()
