"""Matvecs that every solver takes to 10, 1 and 0.1 % of both ends, beside the fewest that Lanczos could take.

    python benchmarks/bench_solvers.py [--problems NAME ...] [--resume]

The floor is Lanczos from a random start without restart, assessed after every matvec with the answer known: the first
matvec after which both Ritz values stay within the accuracy. Solvers are assessed in the same way, by their history;
the matvecs of ``hk.extreme_eigenvalues`` are those it reports, with its own stop and its last matvecs. Matrices of
networks are made explicit once: matvecs cost nothing, and the truth is their eigenvalues in float64. Writes
``solvers.json`` after each problem, and prints tables and draws ``solvers.png`` from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import _harness as harness
import _solvers_report as report
import hvpkit as hk
from _harness import Record
from _problems import dense_digits, diagonal, over, spectra, train_by_epochs
from hvpkit.solvers import krylov
from hvpkit.zoo import digits, digits_cnn

ACCURACIES = (0.1, 0.01, 0.001)
MAX_MATVECS = 400
MAX_PASSES, MINIBATCH_SEEDS = 60, 2
"""For solvers on minibatches: their matvecs are of networks and cost time."""

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
SOLVERS = {**BOTH_AT_ONCE, **ONE_BY_ONE, **BY_MINIBATCHES}

NETWORKS = {
    "digits CNN, 2 epochs": (digits_cnn, 2),
    "digits CNN, trained": (digits_cnn, 60),  # the smallest end a thousandth of the largest
    "dense network, 6 epochs": (dense_digits, 6),
}
PROBLEMS = (*spectra(), *NETWORKS)

Counts = list[float | None]
"""Matvecs to each accuracy; None: not within the budget."""


@dataclass(frozen=True)
class Problem:
    """An operator that costs nothing, its ends, and, of a network, the operator that can draw minibatches."""

    name: str
    op: hk.LinearOperator
    ends: tuple[float, float]
    network: hk.LinearOperator | None = None


def load(name: str) -> Problem:
    """Return a prescribed spectrum as a diagonal operator, or the Hessian of a network as a dense one."""
    if name not in NETWORKS:
        values = spectra()[name]
        return Problem(name, diagonal(values), (float(values.min()), float(values.max())))
    make, max_epochs = NETWORKS[name]
    H = over(train_by_epochs(make, digits(), max_epochs), digits(), batch_size=600)
    dense = explicit(H)
    truth = torch.linalg.eigvalsh(dense.double())
    return Problem(
        name, replace(hk.aslinearoperator(dense), name=name), (float(truth[0]), float(truth[-1])), H
    )


def explicit(H: hk.LinearOperator) -> Tensor:
    """Return the matrix ``[n, n]`` of an operator, symmetric."""
    identity = torch.eye(H.n, dtype=H.dtype, device=H.device)
    columns = torch.cat([H @ block for block in identity.split(32, dim=1)], dim=1)
    return (columns + columns.mT) / 2


def first_within(values: list[tuple[float, float]], truth: float) -> Counts:
    """Return the matvecs from which on the value stays within each accuracy, of a list of (matvecs, value)."""

    def first(accuracy: float) -> float | None:
        begin = None
        for matvecs, value in values:
            near = abs(value - truth) <= accuracy * abs(truth)
            begin = None if not near else matvecs if begin is None else begin
        return begin

    return [first(accuracy) for accuracy in ACCURACIES]


def row(
    problem: Problem,
    solver: str,
    seed: int,
    history: tuple[list[tuple[float, float]], list[tuple[float, float]]],
    combine: Callable[[float, float], float] = max,
) -> Record:
    """Return the matvecs of one solve at the low end, the high end and both, from lists of (matvecs, value)."""
    low, high = (first_within(values, truth) for values, truth in zip(history, problem.ends, strict=True))
    both = [None if a is None or b is None else combine(a, b) for a, b in zip(low, high, strict=True)]
    return {"problem": problem.name, "solver": solver, "seed": seed, "low": low, "high": high, "both": both}


def floor(problem: Problem, seed: int) -> Record:
    """Run Lanczos without restart, and stop with the answer known."""
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
    return row(problem, "floor", seed, (low, high))


def run(problem: Problem, name: str, seed: int) -> Record | None:
    """Run one solver on one problem; return None if it cannot take it."""
    by_minibatches = name in BY_MINIBATCHES
    op = problem.network if by_minibatches else problem.op
    if op is None or (by_minibatches and seed >= MINIBATCH_SEEDS):
        return None
    budget = MAX_PASSES if by_minibatches else MAX_MATVECS

    def trace(which: str) -> list[hk.Progress]:
        k = 2 if which == "BE" else 1
        found = SOLVERS[name](op, k, which=which, tol=1e-3, max_matvecs=budget, seed=seed)
        ends = found.values.tolist()
        low, high = (ends[0] if which != "LA" else math.nan), (ends[-1] if which != "SA" else math.nan)
        return [*found.history, hk.Progress(found.num_matvecs, found.seconds, low, high, 0.0, 0.0)]

    if name in BOTH_AT_ONCE:
        for_low = for_high = trace("BE")
    else:
        for_low, for_high = trace("SA"), trace("LA")
    low = [(step.num_matvecs, step.smallest) for step in for_low]
    high = [(step.num_matvecs, step.largest) for step in for_high]
    combine = max if name in BOTH_AT_ONCE else lambda a, b: a + b
    return row(problem, name, seed, (low, high), combine)


def front_door(problem: Problem, seed: int, least: Record) -> Record:
    """Run ``hk.extreme_eigenvalues(tol=1e-2)``; return its matvecs, their ratio to the floor, and its error."""
    ex = hk.extreme_eigenvalues(problem.op, tol=1e-2, seed=seed)
    ends = [*zip((ex.smallest, ex.largest), problem.ends, strict=True)]
    slack = 1e-6 * max(map(abs, problem.ends)) if problem.op.dtype == torch.float32 else 0.0
    inside = [pair.interval.lower - slack <= truth <= pair.interval.upper + slack for pair, truth in ends]
    fewest = least["both"][ACCURACIES.index(1e-2)]
    return {
        "problem": problem.name,
        "seed": seed,
        "num_matvecs": ex.num_matvecs,
        "ratio": None if fewest is None else ex.num_matvecs / fewest,
        "worst_error": max(abs(pair.value - truth) / (1e-2 * abs(truth)) for pair, truth in ends),
        "inside": all(inside),
    }


def measure(problem: Problem, num_seeds: int) -> tuple[list[Record], list[Record]]:
    """Return the rows of all solvers on a problem, and those of ``hk.extreme_eigenvalues``."""
    rows, doors = [], []
    for seed in range(num_seeds):
        least = floor(problem, seed)
        doors.append(front_door(problem, seed, least))
        found = (run(problem, name, seed) for name in SOLVERS)
        rows += [least, *(row for row in found if row is not None)]
    return rows, doors


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "solvers.json")
    harness.add_names(parser, choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        torch.set_num_threads(1)
        limits = {"max_matvecs": MAX_MATVECS, "max_passes_by_minibatches": MAX_PASSES}
        header = {"accuracies": ACCURACIES, **limits, "machine": harness.machine()}
        record = harness.open_record(given.out, header, solvers=[], extreme_eigenvalues=[])
        done = {door["problem"] for door in record["extreme_eigenvalues"]}
        for name in harness.pending(given, given.problems, done):
            begin = time.perf_counter()
            for key, made in zip(
                ("solvers", "extreme_eigenvalues"), measure(load(name), given.seeds), strict=True
            ):
                record[key] = [row for row in record[key] if row["problem"] != name] + made
            harness.write(given.out, record)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    record = harness.read(given.out)
    print(report.table(record))
    report.draw(record, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
