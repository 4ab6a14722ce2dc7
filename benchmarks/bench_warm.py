"""Passes to the top of the spectrum in the course of training: cold, warm, and by matvecs that are recycled.

    python benchmarks/bench_warm.py --cache DIR [--problems NAME ...]

Training is by full batches; each tenth step the largest eigenvalue is solved for to 1 %: by Lanczos from a random
vector (cold), and from the last measurement's vector with a tenth of a random one (warm, ``v0=``), and by
``hk.follow_top`` (followed); and so are the five largest. "Each epoch" is by minibatches of Adam. ``needed`` are the
matvecs without which no polynomial in the Hessian, applied to a random start, excludes an eigenvalue beyond twice the
error allowed at a confidence of 0.99, if all the others but the top fill the interval below it, as Chebyshev's
polynomials do best, and the top is known for nothing.

``overtaken`` are diagonal matrices of 1,000 with a bulk up to the second eigenvalue, an old top at 1, whose vector a
warm solve starts from, and a new one beyond it that is orthogonal to that. Missed: the value is off by more than twice
the error allowed. ``cut`` is the warm solve that is ended after five passes, its value taken for the answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.special import betaincinv
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
import study_edge_of_stability as edge
from _harness import Record
from _problems import MODE, diagonal, load
from bench_tracking import operators

TOL, CONFIDENCE, EVERY, FEW = 1e-2, 0.99, 10, 5
BEYOND = 2 * TOL
SIZE, SEEDS = 1000, 100
SECONDS, NEW = (0.9, 0.5, 0.1), (1.03, 1.2)
"""The second eigenvalue, and the new top, over the old one."""
WAYS, KNOWN = ("cold", "warm", "followed"), 11


def trained(
    model: torch.nn.Module, data: Any, loss: Callable[..., Any], lr: float, before: int, count: int
) -> Iterator[hk.LinearOperator]:
    """Yield the Hessian at each tenth step of gradient descent, after the first ``before`` steps."""
    x, targets = data
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(before + EVERY * (count - 1) + 1):
        if step >= before and (step - before) % EVERY == 0:
            objective, params = hk.from_module(model, loss)
            yield hk.hessian(objective, params, data, mode=MODE)
        optimizer.zero_grad()
        loss(model(x), targets).mean().backward()
        optimizer.step()


def edge_of_stability(before: int, count: int) -> Iterator[hk.LinearOperator]:
    """Yield Hessians of the network of that study, whose top is at 2 / lr after some hundred steps."""
    settings = edge.SMALL
    model = edge.network(settings, 0)
    return trained(model, edge.examples(settings), edge.squared_error, settings["lr_gd"], before, count)


def digits_late(cache: Path, count: int) -> Iterator[hk.LinearOperator]:
    """Yield Hessians of a convolutional network that fits its digits, as it is trained on."""
    problem = load("digits CNN, late", cache)
    return trained(problem.model, (problem.x, problem.y), F.cross_entropy, 0.01, 0, count)


PROBLEMS: dict[str, Callable[[Path, int], Iterator[hk.LinearOperator]]] = {
    "progressive sharpening": lambda _, count: edge_of_stability(50, count),
    "edge of stability": lambda _, count: edge_of_stability(1500, count),
    "digits CNN, late": digits_late,
    "digits CNN, each epoch": lambda cache, count: iter(operators("digits CNN, late", cache, count)),
}


def needed(n: int, low: float, second: float, top: float) -> int:
    """Return the matvecs that exclude an eigenvalue beyond ``top``: see the module."""
    smallest_component = math.sqrt(betaincinv(0.5, (n - 1) / 2, 1 - CONFIDENCE))
    outside = (2 * (1 + BEYOND) * top - second - low) / (second - low)
    return math.ceil(math.acosh(1 / smallest_component) / math.acosh(outside))


def solved(H: hk.LinearOperator, k: int, seed: int, v0: Any = None, **limits: Any) -> hk.EigenResult:
    """Solve for the k largest eigenvalues by Lanczos."""
    return hk.lanczos(H, k, which="LA", tol=TOL, confidence=CONFIDENCE, seed=seed, v0=v0, **limits)


def in_training(name: str, cache: Path, count: int) -> Record:
    """Return passes and errors of cold and warm solves along training."""
    rows, last, spaces = [], {}, dict.fromkeys((1, FEW))
    for step, H in enumerate(PROBLEMS[name](cache, count)):
        truth = hk.lanczos(H, FEW, which="LA", tol=1e-6, seed=99, check_copies=False).values.flip(0).tolist()
        low = float(hk.lanczos(H, 1, which="SA", tol=1e-2, seed=99).values[0])
        row: Record = {"top": truth[0], "second": truth[1], "needed": needed(H.n, low, truth[1], truth[0])}
        for k in (1, FEW):
            cold, warm = solved(H, k, step), solved(H, k, step, last.get(k))
            last[k] = warm.vectors
            followed, spaces[k] = hk.follow_top(H, k, spaces[k], tol=TOL, confidence=CONFIDENCE, seed=step)
            for way, found in (("cold", cold), ("warm", warm), ("followed", followed)):
                errors = (found.values.flip(0) / torch.tensor(truth[:k]) - 1).abs() / TOL
                held = [
                    value in interval for value, interval in zip(truth, found.intervals[::-1], strict=False)
                ]
                row[f"{way}, {k}"] = {
                    "passes": found.num_matvecs,
                    "error_over_tol": float(errors.max()),
                    "held": all(held),
                }
        rows += [row] if step else []  # the first has nothing to start from
    print(f"{name}: {len(rows)} measurements", flush=True)
    return {"n": H.n, "measurements": rows}


def overtaken(second: float, new: float, seeds: int) -> Record:
    """Return passes, and the share of solves that miss a new top, from many random vectors."""
    values = torch.cat(
        [torch.linspace(-0.1, second, SIZE - 2, dtype=torch.float64), torch.tensor([1.0, new]).double()]
    )
    H, old = diagonal(values), torch.eye(SIZE, dtype=torch.float64)[:, -2]
    ways: dict[str, Record] = {"cold": {}, "warm": {"v0": old}, "cut": {"v0": old, "max_matvecs": FEW}}
    found: Record = {"second": second, "new": new}
    space = hk.RecycledSpace(values[-KNOWN - 1 : -1], torch.eye(SIZE).double()[:, -KNOWN - 1 : -1], 10.0, 1)
    for way, options in (*ways.items(), ("followed", {})):
        if way == "followed":
            runs = [
                hk.follow_top(H, 1, space, tol=TOL, confidence=CONFIDENCE, seed=seed)[0]
                for seed in range(seeds)
            ]
        else:
            runs = [solved(H, 1, seed, **options) for seed in range(seeds)]
        missed = [abs(float(run.values[-1]) / new - 1) > BEYOND for run in runs]
        found[way] = {
            "passes": statistics.mean(run.num_matvecs for run in runs),
            "missed": statistics.mean(missed),
        }
    return found


def table(record: Record) -> str:
    """Return both parts as Markdown."""
    rows = []
    for name, entry in record["problems"].items():
        measured = entry["measurements"]
        ratios = harness.median([row["top"] / row["second"] for row in measured])
        ways = [f"{way}, {k}" for k in (1, FEW) for way in WAYS]
        passes = [harness.median([row[way]["passes"] for row in measured]) for way in ways]
        worst = max(row[way]["error_over_tol"] for row in measured for way in ways)
        later = max(row[f"followed, {k}"]["error_over_tol"] for row in measured for k in (1, FEW))
        needs = harness.median([row["needed"] for row in measured])
        rows.append([name, ratios, needs, *passes, f"{worst:.2g}", f"{later:.2g}"])
    five = [f"five, {way}" for way in WAYS]
    head = ["training", "first over second", "needed", *WAYS, *five, "worst error over tol", "of followed"]
    ways = ["cold", "warm", "cut", "followed"]
    new = [
        [f"{1 / one['second']:.3g}", f"{one['new']:g}"]
        + [f"{one[way]['passes']:.1f}, {one[way]['missed']:.1%}" for way in ways]
        for one in record["overtaken"]
    ]
    below = ["old top over bulk", "new top over old", "cold: passes, missed", *ways[1:]]
    return "\n".join([harness.markdown(head, rows), "", harness.markdown(below, new)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "warm.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--count", type=int, default=11, help="measurements of each; default %(default)s")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the matrices; default %(default)s")
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "confidence": CONFIDENCE, "seeds": given.seeds}
        record = harness.open_record(given.out, header, problems={}, overtaken=[])
        if not record["overtaken"]:
            record["overtaken"] = [overtaken(second, new, given.seeds) for second in SECONDS for new in NEW]
            harness.write(given.out, record)
        for name in harness.pending(given, given.problems or [*PROBLEMS], record["problems"]):
            record["problems"][name] = in_training(name, given.cache, given.count)
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
