"""Peak memory of a product: each time in a process of its own.

    python benchmarks/_compare_memory.py LIBRARY PROBLEM CACHE

prints one measurement as JSON; :func:`measure` starts these processes.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _compare_peers import LIBRARIES, derivable
from _harness import Record
from _problems import Problem, load
from _references import TOL, error, probe, reference


def peak(name: str, problem: Problem, cache: Path) -> Record:
    """Return the megabytes that a product adds at its peak to the process after a product over 32 examples."""
    few = Problem(problem.name, problem.model, problem.x[:32], problem.y[:32], 32)
    truth = reference(problem.name, "product", cache)
    v = probe(problem.n)
    error("product", v, truth["value"], problem.n)
    with derivable():
        LIBRARIES[name](few).product(v, "")
        library = LIBRARIES[name](problem)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = kilobytes("VmRSS")
        answer = library.product(v, "")
        after = kilobytes("VmHWM")
    off = error("product", answer, truth["value"], problem.n)
    return {"megabytes": (after - before) / 1000, "error": off}


def kilobytes(key: str) -> int:
    """Return a figure of this process, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_a_process(name: str, problem: str, cache: Path) -> Record:
    """Return one measurement, judged: right with its megabytes, wrong with its error, or failed."""
    command = [sys.executable, __file__, name, problem, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"status": "failed", "message": done.stderr.strip().split("\n")[-1][:200]}
    found = json.loads(done.stdout.strip().split("\n")[-1])
    if found["error"] > TOL["product"]:
        return {"status": "wrong", "error": found["error"]}
    return {"status": "right", "megabytes": [found["megabytes"]]}


def measure(names: list[str], problem: str, cache: Path, repeats: int) -> Record:
    """Return a cell for each library: the megabytes of each round, with ratios to hvpkit, or why there are none."""
    cells: Record = {}
    for _ in range(repeats):
        for name in names:
            found, cell = in_a_process(name, problem, cache), cells.get(name)
            if cell is None or found["status"] != "right":
                cells[name] = found
            elif cell["status"] == "right":
                cell["megabytes"] += found["megabytes"]
    own = cells.get("hvpkit", {}).get("megabytes")
    for cell in cells.values():
        if own and statistics.median(own) and "megabytes" in cell:
            cell["ratios"] = [value / statistics.median(own) for value in cell["megabytes"]]
    return cells


if __name__ == "__main__":
    given = sys.argv[1:]
    print(json.dumps(peak(given[0], load(given[1], Path(given[2])), Path(given[2]))))
