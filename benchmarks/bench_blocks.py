"""CPU seconds of `hk.blocks` and of a loop over `wrt=` that asks each layer of a network for the same.

    python benchmarks/bench_blocks.py [--width N] [--examples N]

A network of 20 linear layers with tanh between them, at its initial values. Accuracy comes first, on a narrow one of
the same depth in float64: both ends (over the error allowed) and the trace (over the sum of the magnitudes) of every
layer against dense eigenvalues. The loop makes an operator for each layer and calls `extreme_eigenvalues`, `trace` with
as many samples (hutch++, three matvecs each) or with its default of 100 matvecs, and `spectral_density`; once with the
graphs of gradients held between matvecs (the default), once without (`memory_limit=0`), as for data whose graphs do not
fit. Seconds are of the processor, with one thread: others at work on the machine count less. Writes
``benchmarks/results/blocks.json``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import _harness as harness
import hvpkit as hk
from _harness import Record

DEPTH, CLASSES, NARROW, FEW = 20, 10, 12, 128
NUM_PROBES, NUM_STEPS, TOL = 10, 100, 1e-2
ATOL = 1e-5  # the default of extreme_eigenvalues
EQUAL, DEFAULT = 3 * NUM_PROBES, 100
QUESTIONS: dict[str, tuple[bool, int]] = {
    "ends and trace": (False, EQUAL),
    "ends, trace and density": (True, EQUAL),
    "ends and trace, default of the loop": (False, DEFAULT),
}
"""A density as well, and the matvecs of a trace in the loop."""
GRAPHS: dict[str, float | None] = {"held": None, "not held": 0}


def problem(width: int, examples: int, dtype: torch.dtype) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data."""
    torch.manual_seed(0)
    sizes = [width] * DEPTH + [CLASSES]
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())][:-1]
    network = nn.Sequential(*layers).to(dtype)
    inputs = torch.randn(examples, width, dtype=dtype)
    labels = torch.randint(0, CLASSES, (examples,))
    objective, params = hk.from_module(network, nn.CrossEntropyLoss())
    return objective, params, (inputs, labels)


def together(args: tuple[Any, Any, Any], density: bool, **options: Any) -> hk.BlockSpectra:
    """Ask for all layers in one call."""
    return hk.blocks(*args, density=density, tol=TOL, num_probes=NUM_PROBES, num_steps=NUM_STEPS, **options)


def looped(
    args: tuple[Any, Any, Any], names: Sequence[str], density: bool, matvecs: int, **options: Any
) -> Record:
    """Ask for one layer after the other."""
    found: Record = {}
    for name in names:
        H = hk.hessian(*args, wrt=f"{name}.*", **options)
        ends, trace = hk.extreme_eigenvalues(H, tol=TOL), hk.trace(H, num_matvecs=matvecs)
        found[name] = (ends, trace, hk.spectral_density(H, num_steps=NUM_STEPS) if density else None)
    return found


def accuracy() -> list[Record]:
    """Return the errors of both ways, layer by layer, on the narrow network."""
    args = problem(NARROW, FEW, torch.float64)
    found, records = together(args, False), []
    loops = {matvecs: looped(args, found.names, False, matvecs) for matvecs in (EQUAL, DEFAULT)}
    for block in found:
        values = torch.linalg.eigvalsh(hk.hessian(*args, wrt=f"{block.name}.*").to_dense())
        size, norm = float(values.abs().sum()), float(values.abs().max())
        record: Record = {"block": block.name, "n": block.n}
        ways = {f"loop, {matvecs} matvecs": loop[block.name][:2] for matvecs, loop in loops.items()}
        for way, (ends, trace) in {"together": (block.extremes, block.trace), **ways}.items():
            pairs = [(ends.smallest, float(values[0])), (ends.largest, float(values[-1]))]
            allowed = [max(TOL * abs(exact), ATOL * norm) for _, exact in pairs]
            record[way] = {
                "status": str(ends.status),
                "errors_over_allowed": [
                    abs(pair.value - exact) / most for (pair, exact), most in zip(pairs, allowed, strict=True)
                ],
                "in_interval": [exact in pair.interval for pair, exact in pairs],
                "trace_error": abs(trace.value - float(values.sum())) / size,
                "trace_stderr": trace.stderr / size,
            }
        records.append(record)
    return records


def seconds_of(function: Any, *args: Any, **options: Any) -> tuple[float, Any]:
    """Return the processor's seconds for a call, and its result."""
    began = time.process_time()
    found = function(*args, **options)
    return time.process_time() - began, found


def timing(width: int, examples: int, record: Record) -> Record:
    """Return the seconds of both ways for each question that the record lacks, with graphs held and not."""
    torch.set_num_threads(1)
    args = problem(width, examples, torch.float32)
    names = together(args, False).names  # and torch is warm
    for question, (density, matvecs) in QUESTIONS.items():
        for graphs, memory_limit in GRAPHS.items():
            if f"{question}, graphs {graphs}" in record:
                continue
            fast, found = seconds_of(together, args, density, memory_limit=memory_limit)
            slow, loop = seconds_of(looped, args, names, density, matvecs, memory_limit=memory_limit)
            record[f"{question}, graphs {graphs}"] = {
                "seconds": fast,
                "seconds_of_loop": slow,
                "passes": found.num_passes,
                "passes_of_loop": sum(
                    one.num_matvecs for layer in loop.values() for one in layer if one is not None
                ),
                "converged": [found.converged, all(layer[0].converged for layer in loop.values())],
            }
            print(f"{question}, graphs {graphs}: {fast:.1f} s for {slow:.1f} s", flush=True)
    return record


def table(record: Record) -> str:
    """Return seconds and their ratio as Markdown, under a line on accuracy."""
    lines = []
    for way in list(record["accuracy"][0])[2:]:
        layers = [layer[way] for layer in record["accuracy"]]
        worst = max(max(layer["errors_over_allowed"]) for layer in layers)
        inside = sum(sum(layer["in_interval"]) for layer in layers)
        errors = [layer["trace_error"] for layer in layers]
        lines.append(
            f"- {way}: ends off by at most {worst:.2g} of the error allowed, {inside} of {2 * len(layers)} in their "
            f"interval; traces off by {statistics.median(errors):.1e} (median), {max(errors):.1e} at most"
        )
    rows = [
        [
            name,
            f"{one['seconds']:.1f}",
            f"{one['seconds_of_loop']:.1f}",
            f"{one['seconds_of_loop'] / one['seconds']:.1f}",
            f"{one['passes']}",
            f"{one['passes_of_loop']:.0f}",
        ]
        for name, one in record["timing"].items()
    ]
    head = ["question", "`blocks`, CPU s", "loop, CPU s", "loop / `blocks`", "passes", "passes of the loop"]
    return "\n".join([*lines, "", harness.markdown(head, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "blocks.json")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--resume", action="store_true", help="time only the questions that --out lacks")
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "depth": DEPTH, "width": given.width, "examples": given.examples}
        record = header | {"machine": harness.machine(), "timing": {}}
        if given.resume and given.out.exists():
            record |= {"timing": harness.read(given.out)["timing"]}
        record["accuracy"] = accuracy()
        timing(given.width, given.examples, record["timing"])
        harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
