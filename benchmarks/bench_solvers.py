"""Products that every solver takes to 10, 1 and 0.1 % of both ends, beside the fewest that Lanczos could take.

    python benchmarks/bench_solvers.py --out benchmarks/results

The floor is Lanczos from a random start without restart, looked at after every product by somebody who knows the
answer: the first product after which both Ritz values are within the accuracy. Solvers are looked at in the same way,
through their history; what ``hk.extreme_eigenvalues`` takes is what it says, with its own stop and its last products.
Matrices of networks are made explicit once: products cost nothing, and the truth is their eigenvalues in float64.
Prints a table, and writes ``solvers.json`` and ``solvers.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers import krylov
from solver_problems import diagonal, networks, spectra

ACCURACIES = (0.1, 0.01, 0.001)
SEEDS = range(5)
MAX_MATVECS = 400
MAX_PASSES, MINIBATCH_SEEDS = 60, 2
"""For solvers on minibatches: their products are of networks and cost time."""

BOTH_AT_ONCE: dict[str, Callable[..., hk.EigenResult]] = {
    "lanczos": hk.lanczos,
    "eigsh": hk.eigsh,
    "lobpcg": hk.lobpcg,
    "chebyshev": hk.chebyshev,
}
ONE_BY_ONE: dict[str, Callable[..., hk.EigenResult]] = {
    "scipy_lobpcg": hk.scipy_lobpcg,
    "accelerated_power": hk.accelerated_power,
    "power": hk.power,
}
BY_MINIBATCHES: dict[str, Callable[..., hk.EigenResult]] = {
    "stochastic_power": hk.stochastic_power,
    "accelerated_power, reduced variance": partial(hk.accelerated_power, variance_reduced=True),
    "oja": hk.oja,
}
SOLVERS = (*BOTH_AT_ONCE, *ONE_BY_ONE, *BY_MINIBATCHES)


@dataclass(frozen=True)
class Problem:
    """An operator that costs nothing, its ends, and, of a network, the operator that can draw minibatches."""

    name: str
    op: hk.LinearOperator
    ends: tuple[float, float]
    network: hk.LinearOperator | None = None


@dataclass(frozen=True)
class Row:
    """Products of one solve to each accuracy, at the low end, the high one, and both; None: not within the budget."""

    problem: str
    solver: str
    seed: int
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    both: tuple[float | None, ...]


def problems() -> Iterator[Problem]:
    """Prescribed spectra as diagonal operators, and networks as dense ones."""
    for name, values in spectra().items():
        yield Problem(name, diagonal(values), (float(values.min()), float(values.max())))
    for name, H in networks():
        dense = explicit(H)
        truth = torch.linalg.eigvalsh(dense.double())
        matrix = replace(hk.aslinearoperator(dense), name=name)
        yield Problem(name, matrix, (float(truth[0]), float(truth[-1])), H)


def explicit(H: hk.LinearOperator) -> Tensor:
    """The matrix ``[n, n]`` of an operator, symmetric."""
    identity = torch.eye(H.n, dtype=H.dtype, device=H.device)
    columns = torch.cat([H @ block for block in identity.split(32, dim=1)], dim=1)
    return (columns + columns.mT) / 2


def first_within(values: list[tuple[float, float]], truth: float) -> tuple[float | None, ...]:
    """Products from which on the value stays within each accuracy, of a list of (products, value)."""

    def first(accuracy: float) -> float | None:
        begin = None
        for products, value in values:
            near = abs(value - truth) <= accuracy * abs(truth)
            begin = None if not near else products if begin is None else begin
        return begin

    return tuple(first(accuracy) for accuracy in ACCURACIES)


def together(
    combine: Callable[[float, float], float], low: tuple[float | None, ...], high: tuple[float | None, ...]
) -> tuple[float | None, ...]:
    """Products for both ends, from those for either."""
    return tuple(None if a is None or b is None else combine(a, b) for a, b in zip(low, high, strict=True))


def floor(problem: Problem, seed: int) -> Row:
    """Unrestarted Lanczos with an all-knowing stop."""
    op = problem.op
    state = krylov.start(op, min(op.n, MAX_MATVECS) + 1, 1, seed)
    low, high = [], []
    while state.num_frontier and state.num_products < min(op.n, MAX_MATVECS):
        state = krylov.step(op, state)
        state, _ = krylov.compact(state)
        values = krylov.project(op, state)[0].values * float(state.scale)
        low.append((state.num_matvecs, float(values[0])))
        high.append((state.num_matvecs, float(values[-1])))
        if all(abs(v[-1][1] - t) <= 1e-4 * abs(t) for v, t in zip((low, high), problem.ends, strict=True)):
            break
    lows, highs = first_within(low, problem.ends[0]), first_within(high, problem.ends[1])
    return Row(problem.name, "floor", seed, lows, highs, together(max, lows, highs))


def run(problem: Problem, name: str, seed: int) -> Row | None:
    """One solver on one problem; None if it cannot take it."""
    solve = {**BOTH_AT_ONCE, **ONE_BY_ONE, **BY_MINIBATCHES}[name]
    op = problem.network if name in BY_MINIBATCHES else problem.op
    if op is None or (name in BY_MINIBATCHES and seed >= MINIBATCH_SEEDS):
        return None
    budget = MAX_PASSES if name in BY_MINIBATCHES else MAX_MATVECS

    def trace(which: str) -> list[hk.Progress]:
        k = 2 if which == "BE" else 1
        found = solve(op, k, which=which, tol=1e-3, max_matvecs=budget, seed=seed)
        ends = found.values.tolist()
        low, high = (ends[0] if which != "LA" else math.nan), (ends[-1] if which != "SA" else math.nan)
        return [*found.history, hk.Progress(found.num_matvecs, found.seconds, low, high, 0.0, 0.0)]

    if name in BOTH_AT_ONCE:
        history = trace("BE")
        low = first_within([(h.num_matvecs, h.smallest) for h in history], problem.ends[0])
        high = first_within([(h.num_matvecs, h.largest) for h in history], problem.ends[1])
        return Row(problem.name, name, seed, low, high, together(max, low, high))
    low = first_within([(h.num_matvecs, h.smallest) for h in trace("SA")], problem.ends[0])
    high = first_within([(h.num_matvecs, h.largest) for h in trace("LA")], problem.ends[1])
    return Row(problem.name, name, seed, low, high, together(lambda a, b: a + b, low, high))


@dataclass(frozen=True)
class FrontDoor:
    """What ``hk.extreme_eigenvalues(tol=1e-2)`` took, its ratio to the floor, and its error over tol."""

    problem: str
    seed: int
    num_matvecs: float
    ratio: float
    worst_error: float
    inside: bool


def front_door(problem: Problem, seed: int, least: Row) -> FrontDoor:
    ex = hk.extreme_eigenvalues(problem.op, tol=1e-2, seed=seed)
    pairs = (ex.smallest, ex.largest)
    errors = [
        abs(pair.value - truth) / (1e-2 * abs(truth)) for pair, truth in zip(pairs, problem.ends, strict=True)
    ]
    slack = 1e-6 * max(abs(end) for end in problem.ends) if problem.op.dtype == torch.float32 else 0.0
    inside = all(
        pair.interval.lower - slack <= truth <= pair.interval.upper + slack
        for pair, truth in zip(pairs, problem.ends, strict=True)
    )
    fewest = least.both[1]
    ratio = math.nan if fewest is None else ex.num_matvecs / fewest
    return FrontDoor(problem.name, seed, ex.num_matvecs, ratio, max(errors), inside)


def median(values: list[float | None]) -> float:
    """The median, infinity standing for what was not reached."""
    return statistics.median(math.inf if value is None else value for value in values)


def print_table(rows: list[Row], doors: list[FrontDoor]) -> None:
    names = list(dict.fromkeys(row.problem for row in rows))
    solvers = ["floor", *SOLVERS]
    by = {(p, s): [r for r in rows if (r.problem, r.solver) == (p, s)] for p in names for s in solvers}
    print(
        "Products to 10 / 1 / 0.1 % of the low end and of the high end (median over seeds; - : over budget)\n"
    )
    for problem in names:
        print(problem)
        for solver in solvers:
            if not by[problem, solver]:
                continue
            cells = [
                " / ".join(
                    f"{m:.0f}" if math.isfinite(m) else "-"
                    for m in (median([getattr(r, end)[i] for r in by[problem, solver]]) for i in range(3))
                )
                for end in ("low", "high", "both")
            ]
            print(f"    {solver:<36}low {cells[0]:<18}high {cells[1]:<18}both {cells[2]}")
    print("\nhk.extreme_eigenvalues(tol=1e-2), its last products included")
    medians = []
    for problem in names:
        mine = [d for d in doors if d.problem == problem]
        fewest = median([r.both[1] for r in by[problem, "floor"]])
        ratio = statistics.median(d.ratio for d in mine)
        if fewest >= 10:
            medians.append(ratio)
        print(
            f"    {problem:<28}floor {fewest:>4.0f}  took {statistics.median(d.num_matvecs for d in mine):>4.0f}  "
            f"ratio {ratio:.2f}  worst error {max(d.worst_error for d in mine):.2f} tol  "
            f"inside {sum(d.inside for d in mine)}/{len(mine)}"
        )
    print(
        f"    ratio over problems with a floor of 10 and more: median {statistics.median(medians):.2f}, "
        f"worst {max(medians):.2f}"
    )


def draw(rows: list[Row], path: Path) -> None:
    """Products to 1 % of both ends, a row for each problem."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.problem for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.6), layout="constrained")
    for number, solver in enumerate(("floor", *SOLVERS)):
        points = []
        for place, problem in enumerate(names):
            mine = [r.both[1] for r in rows if (r.problem, r.solver) == (problem, solver)]
            if mine and math.isfinite(median(mine)):
                points.append((median(mine), place + (0.07 * (number - 5) if number else 0.0)))
        if points:
            x, y = zip(*points, strict=True)
            style = {"marker": "|", "s": 220, "color": "black"} if solver == "floor" else {"s": 36}
            axes.scatter(x, y, label=solver, zorder=3 if number else 4, **style)
    axes.set(xscale="log", xlabel="products to 1 % of both ends (median over seeds)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for solvers.json and solvers.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    doors: list[FrontDoor] = []
    for problem in problems():
        begin = time.perf_counter()
        for seed in SEEDS:
            least = floor(problem, seed)
            doors.append(front_door(problem, seed, least))
            rows.append(least)
            rows += [row for name in SOLVERS if (row := run(problem, name, seed)) is not None]
        print(f"{problem.name}: {time.perf_counter() - begin:.0f} s", flush=True)
    print_table(rows, doors)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {
            "accuracies": ACCURACIES,
            "max_matvecs": MAX_MATVECS,
            "max_passes_by_minibatches": MAX_PASSES,
            "machine": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "hvpkit": hk.__version__,
            },
            "solvers": [asdict(row) for row in rows],
            "extreme_eigenvalues": [asdict(door) for door in doors],
        }
        (arguments.out / "solvers.json").write_text(json.dumps(report, indent=0))
        draw(rows, arguments.out / "solvers.png")


if __name__ == "__main__":
    main()
