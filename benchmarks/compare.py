"""hvpkit and its peers on the same networks: accuracy first, then passes, seconds and memory.

    python benchmarks/compare.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--tasks NAME ...] [--quick]

installs nothing, says what is missing (``pip install --no-deps -r benchmarks/peers.txt``), and runs what is here in
one process, in turn: each task of each problem in several rounds, in each round every library once, with another seed.
Every answer is judged by a stored reference. The first that is wrong beyond the task's tolerance is said to be, with
its error, and its library is not timed at that task. Memory is that of a product, in a process of its own each time.

Seconds include what a library needs to make its operator, but for products, gradients and memory, which are of an
operator that is there; the product is the third with the same operator. A run ends at twenty times hvpkit's passes, at
least 100 and at most 400: "not converged". After ``--seconds`` no further round of a task begins. Trace, density and
top-5 are of the problems with cheap products; ``--tasks`` runs what it names on any. Results are merged into ``--out``
by problem and task; ``--report`` makes the tables and the picture anew, ``--readme FILE`` puts the tables between the
markers in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compare_peers import LIBRARIES, Library, OutOfPasses, derivable
from compare_references import NUM_SKETCHES, TOL, Problem, available, error, load, probe, reference
from compare_report import notes, picture, table, write_readme

RESULTS = Path(__file__).parent / "results" / "compare.json"
TASKS = ("gradient", "product", "memory", "extremes", "top5", "trace", "density")
ONE_PASS = ("gradient", "product")
CHEAP = ("digits CNN, early", "digits CNN, late", "dense, 40,000 digits")
"""Problems on which all tasks take minutes; on others the ones after the extremes would take hours."""

Entry = dict[str, Any]


def seed_global_generators(seed: int) -> None:
    """Peers take their random numbers from global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def run_once(
    task: str, library: type[Library], problem: Problem, seed: int, effort: Any, limit: float
) -> tuple[Any, float, float]:
    """Answer, seconds and passes of one run."""
    seed_global_generators(seed)
    with derivable():
        begin = time.perf_counter()
        instance, before = library(problem, limit), 0.0
        if task in ONE_PASS:
            for _ in range(2 if task == "product" else 0):
                instance.product(probe(problem.n), effort)
            begin, before = time.perf_counter(), instance.passes
        answer = getattr(instance, task)(probe(problem.n) if task == "product" else seed, effort)
        return answer, time.perf_counter() - begin, instance.passes - before


def attempt(
    task: str, library: type[Library], problem: Problem, truth: Entry, seed: int, effort: Any, limit: float
) -> Entry:
    """One run, judged."""
    try:
        answer, seconds, passes = run_once(task, library, problem, seed, effort, limit)
    except OutOfPasses as stopped:
        return {"status": "not converged", "message": str(stopped)}
    except Exception as failed:  # a peer's, of any kind; it is shown
        return {"status": "failed", "message": f"{type(failed).__name__}: {failed}".split("\n")[0][:200]}
    off = error(task, answer, truth["value"], problem.n)
    if off > TOL[task]:
        return {"status": "wrong"} | ({"error": off} if math.isfinite(off) else {})  # JSON knows no infinity
    return {"status": "right", "error": off, "passes": passes, "seconds": seconds}


def lacking(library: type[Library], task: str) -> Entry | None:
    """Why a library cannot be asked, if it cannot."""
    if library.missing():
        return {"status": "missing"}
    return None if hasattr(library, task) else {"status": "not offered"}


def first_right(
    task: str, library: type[Library], problem: Problem, truth: Entry, limit: float
) -> tuple[Entry, Any]:
    """The library's first run that is right, over what its user has to choose; else its last."""
    if (reason := lacking(library, task)) is not None:
        return reason, None
    for effort in efforts(library, task, truth):
        found = attempt(task, library, problem, truth, 0, effort, limit)
        if found["status"] != "wrong":
            break
    return found, effort


def efforts(library: type[Library], task: str, truth: Entry) -> list[Any]:
    """Tolerances or counts to try; steps that a plain recurrence needs are known, with doubling if they do not do."""
    choices: list[Any] = []
    for effort in library.EFFORT.get(task, ("",)):
        choices += [truth["steps"], 2 * truth["steps"]] if effort == "steps" else [effort]
    return choices


def measure(
    task: str, names: list[str], problem: Problem, truth: Entry, repeats: int, max_seconds: float
) -> Entry:
    """A task of a problem, by all libraries in turn."""
    begin, limit, cells, chosen = time.perf_counter(), 400.0, {}, {}
    for name in names:
        found, effort = first_right(task, LIBRARIES[name], problem, truth, limit)
        if name == "hvpkit" and "passes" in found:
            limit = min(400.0, max(100.0, 20 * found["passes"]))
        how = LIBRARIES[name].HOW.get(task, "")
        runs = [found] if found["status"] == "right" else []
        cells[name] = found | {"how": how.format(effort=effort), "effort": effort, "runs": runs}
        chosen[name] = effort
        print(f"{problem.name}, {task}, {name}: {shown(found)}", flush=True)
    timed = [name for name in names if cells[name]["status"] == "right"]
    rounds, least = (3 * repeats, repeats) if task in ONE_PASS else (repeats, 1)
    for seed in range(1, rounds):
        if seed >= least and time.perf_counter() - begin > max_seconds:
            break
        gc.collect()
        for name in timed:
            cells[name]["runs"].append(
                attempt(task, LIBRARIES[name], problem, truth, seed, chosen[name], limit)
            )
    return {name: summary(cell, cells.get("hvpkit")) for name, cell in cells.items()}


def warm_up(names: list[str], problem: Problem) -> None:
    """Imports and first calls, which no round is to pay for."""
    for name in names:
        if lacking(LIBRARIES[name], "product") is None:
            attempt("product", LIBRARIES[name], problem, {"value": [1.0] * NUM_SKETCHES}, 0, "", math.inf)


def shown(found: Entry) -> str:
    numbers = (f"{key} {found[key]:.3g}" for key in ("error", "passes", "seconds") if key in found)
    return ", ".join([found["status"], *numbers, *([found["message"]] if "message" in found else [])])


def summary(cell: Entry, own: Entry | None) -> Entry:
    """A cell of the table: lists over rounds, without what is not right, and ratios to hvpkit in the same round."""
    runs = cell["runs"]
    keys = ("status", "how", "effort", "message", "error")
    kept = {key: cell[key] for key in keys if cell.get(key) not in (None, "")}
    if not runs:
        return kept
    pairs = zip(runs, (own or {"runs": []})["runs"], strict=False)
    return kept | {
        "error": max(run.get("error", 0.0) for run in runs),
        "right": sum(run["status"] == "right" for run in runs),
        "rounds": len(runs),
        "passes": [run["passes"] for run in runs if run["status"] == "right"],
        "seconds": [run["seconds"] for run in runs if run["status"] == "right"],
        "ratios": [a["seconds"] / b["seconds"] for a, b in pairs if a["status"] == b["status"] == "right"],
    }


def measure_memory(names: list[str], problem: Problem, cache: Path, repeats: int) -> Entry:
    """Peak memory of a product beyond that of a small one, in MB; each time in a new process."""
    cells: Entry = {}
    for _ in range(repeats):
        for name in names:
            if (reason := lacking(LIBRARIES[name], "product")) is not None:
                cells[name] = reason
                continue
            options = ["--child", name, "--problems", problem.name, "--cache", str(cache)]
            done = subprocess.run(
                [sys.executable, __file__, *options], capture_output=True, text=True, check=False
            )
            if done.returncode:
                cells[name] = {"status": "failed", "message": done.stderr.strip().split("\n")[-1][:200]}
                continue
            found = json.loads(done.stdout.strip().split("\n")[-1])
            cell = cells.setdefault(name, {"status": "right", "megabytes": []})
            if found["error"] > TOL["product"]:
                cells[name] = {"status": "wrong", "error": found["error"]}
            elif cell["status"] == "right":
                cell["megabytes"].append(found["megabytes"])
    own = statistics.median(cells["hvpkit"]["megabytes"]) if "megabytes" in cells.get("hvpkit", {}) else None
    for name in names:
        print(f"{problem.name}, memory, {name}: {cells[name]}", flush=True)
        if own and "megabytes" in cells[name]:
            cells[name]["ratios"] = [value / own for value in cells[name]["megabytes"]]
    return cells


def child(name: str, problem: Problem, cache: Path) -> Entry:
    """In a process of its own: what a product's peak adds to the process as it is after one on 32 examples."""
    few = Problem(problem.name, problem.model, problem.x[:32], problem.y[:32], 32)
    truth = reference(problem.name, "product", cache)
    v = probe(problem.n)
    error("product", v, truth["value"], problem.n)
    with derivable():
        LIBRARIES[name](few).product(v, "")
        library = LIBRARIES[name](problem)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        answer = library.product(v, "")
        after = memory("VmHWM")
    off = error("product", answer, truth["value"], problem.n)
    return {"megabytes": (after - before) / 1000, "error": off}


def memory(key: str) -> int:
    """Kilobytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def machine() -> Entry:
    """Where and with what it is measured."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {
            library.PACKAGE: library.version() for library in LIBRARIES.values() if not library.missing()
        },
    }


def keep(file: Path, problem: Problem, task: str, cells: Entry, here: Entry) -> None:
    """Puts a task of a problem into the file, which is of one machine and its versions."""
    whole = json.loads(file.read_text()) if file.exists() else {"machine": here, "problems": {}}
    entry = whole["problems"].setdefault(problem.name, {"tasks": {}})
    entry |= {"n": problem.n, "num_examples": problem.num_examples, "batch_size": problem.batch_size}
    entry["tasks"][task] = cells
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.replace(file)


def report(file: Path, readme: Path | None) -> None:
    """Tables beside the JSON and on the screen, and the picture."""
    found = json.loads(file.read_text())
    text = table(found)
    file.with_suffix(".md").write_text(f"{text}\n\n{notes(found)}\n")
    picture(found, file.with_suffix(".png"))
    if readme is not None:
        write_readme(readme, found)
    print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("compare-cache"), help="trained parameters")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--problems", nargs="*")
    parser.add_argument("--tasks", nargs="*", choices=TASKS)
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="after which no further round begins")
    parser.add_argument("--quick", action="store_true", help="the smallest problem, one round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only tables and picture, from --out")
    parser.add_argument("--readme", type=Path, help="put the tables into this file, between the markers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cifar10:
        os.environ["CIFAR10"] = str(given.cifar10)
    if given.child:
        print(json.dumps(child(given.child, load(given.problems[0], given.cache), given.cache)))
        return
    if not given.report:
        names = given.problems or (CHEAP[:1] if given.quick else available(given.cifar10 is not None))
        run(given, names, 1 if given.quick else given.repeats)
    report(given.out, given.readme)


def run(given: argparse.Namespace, names: list[str], repeats: int) -> None:
    """All that is asked for, into the file as it goes."""
    here = machine()
    if given.out.exists() and json.loads(given.out.read_text())["machine"] != here:
        raise SystemExit(f"--out: {given.out} is of another machine or other versions; take another file")
    for name in given.libraries:
        if LIBRARIES[name].missing():
            print(f"{name} is missing: pip install --no-deps -r benchmarks/peers.txt", flush=True)
    for name in names:
        problem = load(name, given.cache)
        warm_up(given.libraries, problem)
        for task in given.tasks or (TASKS if name in CHEAP else TASKS[:4]):
            if task == "memory":
                cells = measure_memory(given.libraries, problem, given.cache, repeats)
            else:
                truth = reference(name, task, given.cache)
                cells = measure(task, given.libraries, problem, truth, repeats, given.seconds)
            keep(given.out, problem, task, cells, here)


if __name__ == "__main__":
    main()
