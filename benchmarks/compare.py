"""hvpkit and its peers on the same networks: accuracy first, then passes, seconds and memory.

    python benchmarks/compare.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--tasks NAME ...] [--quick]

installs nothing, names missing libraries (``pip install --no-deps -r benchmarks/peers.txt``), and runs the others in
one process, in turn: each task of each problem in several rounds, in each round every library once, with another seed.
Every answer is compared with a stored reference. A library whose first answer is wrong beyond the task's tolerance is
marked as wrong, with its error, and is not timed at that task. Memory is that of a product, each time in a process of
its own.

Seconds are of the processor, all threads together, so that other programs on the machine disturb them less. They
include making the library's operator, except for products, gradients and memory, which are measured with an operator
that exists; the product is the third with the same operator. A run ends at twenty times hvpkit's passes, at least 100
and at most 400: "not converged". After ``--seconds`` no further round of a task begins. Trace, density and top-5 are
measured on the problems with cheap products; ``--tasks`` runs the tasks that it names on any. Results are merged into
``--out`` by problem and task; ``--report`` only makes the tables and the picture from it, and ``--document FILE`` puts
the tables between the markers in that file.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import _compare_memory as memory
import _harness as harness
from _compare_peers import LIBRARIES, Library, OutOfPasses, derivable
from _compare_report import notes, picture, table, write_document
from _harness import Record
from _problems import Problem, available, load
from _references import NUM_SKETCHES, TOL, error, probe, reference

TASKS = ("gradient", "product", "memory", "extremes", "top5", "trace", "density")
ONE_PASS = ("gradient", "product")
CHEAP = ("digits CNN, early", "digits CNN, late", "dense, 40,000 digits")
"""Problems on which all tasks take minutes; on others the tasks after the extremes would take hours."""

MAX_PASSES = 400.0
"""Passes after which a run ends as not converged; chosen by feel."""


def seed_global_generators(seed: int) -> None:
    """Seed the global generators, from which peers take their random numbers."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def run_once(
    task: str, library: type[Library], problem: Problem, seed: int, effort: Any, limit: float
) -> tuple[Any, float, float]:
    """Return answer, processor seconds and passes of one run."""
    seed_global_generators(seed)
    with derivable():
        begin = time.process_time()
        instance, before = library(problem, limit), 0.0
        if task in ONE_PASS:
            for _ in range(2 if task == "product" else 0):
                instance.product(probe(problem.n), effort)
            begin, before = time.process_time(), instance.passes
        answer = getattr(instance, task)(probe(problem.n) if task == "product" else seed, effort)
        return answer, time.process_time() - begin, instance.passes - before


def attempt(
    task: str, library: type[Library], problem: Problem, truth: Record, seed: int, effort: Any, limit: float
) -> Record:
    """Run once, and compare the answer with the reference."""
    try:
        answer, seconds, passes = run_once(task, library, problem, seed, effort, limit)
    except OutOfPasses as stopped:
        return {"status": "not converged", "message": str(stopped)}
    except Exception as failed:  # a peer may raise anything; the table shows it
        return {"status": "failed", "message": f"{type(failed).__name__}: {failed}".split("\n")[0][:200]}
    off = error(task, answer, truth["value"], problem.n)
    if off > TOL[task]:
        return {"status": "wrong"} | ({"error": off} if math.isfinite(off) else {})  # JSON knows no infinity
    return {"status": "right", "error": off, "passes": passes, "seconds": seconds}


def lacking(library: type[Library], task: str) -> Record | None:
    """Return why a library cannot run a task, or None if it can."""
    if library.missing():
        return {"status": "missing"}
    return None if hasattr(library, task) else {"status": "not offered"}


def first_right(task: str, library: type[Library], problem: Problem, truth: Record, limit: float) -> Record:
    """Return the library's first run that is right, over the efforts that its user can choose; else its last."""
    effort, found = None, lacking(library, task)
    for choice in [] if found else efforts(library, task, truth):
        effort, found = choice, attempt(task, library, problem, truth, 0, choice, limit)
        if found["status"] != "wrong":
            break
    return found | {"how": library.HOW.get(task, "").format(effort=effort), "effort": effort}


def efforts(library: type[Library], task: str, truth: Record) -> list[Any]:
    """Return the tolerances or counts to try; steps of a plain recurrence are known, and doubled if too few."""
    choices: list[Any] = []
    for effort in library.EFFORT.get(task, ("",)):
        choices += [truth["steps"], 2 * truth["steps"]] if effort == "steps" else [effort]
    return choices


def measure(
    task: str, names: list[str], problem: Problem, truth: Record, repeats: int, max_seconds: float
) -> Record:
    """Return a cell for each library: its first right run, and further rounds in turn."""
    begin, limit, cells = time.perf_counter(), MAX_PASSES, {}
    for name in names:
        cells[name] = found = first_right(task, LIBRARIES[name], problem, truth, limit)
        if name == "hvpkit" and "passes" in found:
            limit = min(MAX_PASSES, max(100.0, 20 * found["passes"]))
        print(f"{problem.name}, {task}, {name}: {shown(found)}", flush=True)
    timed = {name: [cell] for name, cell in cells.items() if cell["status"] == "right"}
    rounds, least = (3 * repeats, repeats) if task in ONE_PASS else (repeats, 1)
    for seed in range(1, rounds):
        if seed >= least and time.perf_counter() - begin > max_seconds:
            break
        gc.collect()
        for name, runs in timed.items():
            runs.append(attempt(task, LIBRARIES[name], problem, truth, seed, cells[name]["effort"], limit))
    own = timed.get("hvpkit", [])
    return {name: summary(cell, timed.get(name, []), own) for name, cell in cells.items()}


def memory_cells(names: list[str], problem: Problem, cache: Path, repeats: int) -> Record:
    """Return the cells of peak memory."""
    reasons = {name: lacking(LIBRARIES[name], "product") for name in names}
    found = memory.measure([name for name in names if not reasons[name]], problem.name, cache, repeats)
    cells = {name: reasons[name] or found[name] for name in names}
    for name, cell in cells.items():
        print(f"{problem.name}, memory, {name}: {cell}", flush=True)
    return cells


def warm_up(names: list[str], problem: Problem) -> None:
    """Make imports and first calls, so that no round includes them."""
    for name in names:
        if lacking(LIBRARIES[name], "product") is None:
            attempt("product", LIBRARIES[name], problem, {"value": [1.0] * NUM_SKETCHES}, 0, "", math.inf)


def shown(found: Record) -> str:
    """Return a line on a run."""
    numbers = (f"{key} {found[key]:.3g}" for key in ("error", "passes", "seconds") if key in found)
    return ", ".join([found["status"], *numbers, *([found["message"]] if "message" in found else [])])


def summary(cell: Record, runs: list[Record], own: list[Record]) -> Record:
    """Return a cell of the table: lists over the right rounds, and ratios to hvpkit in the same round."""
    keys = ("status", "how", "effort", "message", "error")
    kept = {key: cell[key] for key in keys if cell.get(key) not in (None, "")}
    if not runs:
        return kept
    pairs = zip(runs, own, strict=False)
    return kept | {
        "error": max(run.get("error", 0.0) for run in runs),
        "right": sum(run["status"] == "right" for run in runs),
        "rounds": len(runs),
        "passes": [run["passes"] for run in runs if run["status"] == "right"],
        "seconds": [run["seconds"] for run in runs if run["status"] == "right"],
        "ratios": [a["seconds"] / b["seconds"] for a, b in pairs if a["status"] == b["status"] == "right"],
    }


def report(file: Path, document: Path | None) -> None:
    """Write tables and the picture beside the JSON, and print the tables."""
    found = harness.read(file)
    text = table(found)
    file.with_suffix(".md").write_text(f"{text}\n\n{notes(found)}\n")
    picture(found, file.with_suffix(".png"))
    if document is not None:
        write_document(document, found)
    print(text)


def run(given: argparse.Namespace, names: list[str], repeats: int) -> None:
    """Measure all tasks of all problems, and write the file after each."""
    versions = {library.PACKAGE: library.version() for library in LIBRARIES.values() if not library.missing()}
    record = harness.open_record(given.out, {"machine": harness.machine(versions=versions)}, problems={})
    for name in given.libraries:
        if LIBRARIES[name].missing():
            print(f"{name} is missing: pip install --no-deps -r benchmarks/peers.txt", flush=True)
    for name in names:
        problem = load(name, given.cache)
        warm_up(given.libraries, problem)
        entry = record["problems"].setdefault(name, {"tasks": {}})
        entry |= {"n": problem.n, "num_examples": problem.num_examples, "batch_size": problem.batch_size}
        tasks = given.tasks or (TASKS if name in CHEAP else TASKS[:4])
        for task in harness.pending(given, tasks, entry["tasks"]):
            if task == "memory":
                entry["tasks"][task] = memory_cells(given.libraries, problem, given.cache, repeats)
            else:
                truth = reference(name, task, given.cache)
                entry["tasks"][task] = measure(task, given.libraries, problem, truth, repeats, given.seconds)
            harness.write(given.out, record)


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "compare.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--tasks", nargs="*", choices=TASKS)
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="after which no further round begins")
    parser.add_argument("--quick", action="store_true", help="the smallest problem, one round")
    parser.add_argument("--document", type=Path, help="put the tables into this file, between the markers")
    given = harness.parse(parser, argv)
    if not given.report:
        names = given.problems or (CHEAP[:1] if given.quick else available())
        run(given, names, 1 if given.quick else given.repeats)
    report(given.out, given.document)


if __name__ == "__main__":
    main()
