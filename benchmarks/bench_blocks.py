"""CPU seconds of `hk.blocks` and of a loop over `wrt=` that asks each layer of a network for the same.

    python benchmarks/bench_blocks.py [--width N] [--examples N]

A network of 20 linear layers with tanh between them, at its initial values. Accuracy comes first, on a narrow one of
the same depth in float64: both ends, and the trace in standard errors, of every layer against dense eigenvalues. The
loop makes an operator for each layer and calls `extreme_eigenvalues`, `trace` with as many samples (hutch++, three
matvecs each), and `spectral_density`; once with the graphs of gradients held between matvecs (the default), once
without (`memory_limit=0`), as for data whose graphs do not fit. Seconds are of the processor, with one thread: others
at work on the machine count less. Writes ``benchmarks/results/blocks.json``.
"""

from __future__ import annotations

import itertools
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
QUESTIONS = {"ends and trace": False, "ends, trace and density": True}
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


def looped(args: tuple[Any, Any, Any], names: Sequence[str], density: bool, **options: Any) -> Record:
    """Ask for one layer after the other."""
    found: Record = {}
    for name in names:
        H = hk.hessian(*args, wrt=f"{name}.*", **options)
        ends, trace = hk.extreme_eigenvalues(H, tol=TOL), hk.trace(H, num_matvecs=3 * NUM_PROBES)
        found[name] = (ends, trace, hk.spectral_density(H, num_steps=NUM_STEPS) if density else None)
    return found


def accuracy() -> list[Record]:
    """Return the errors of both ways, layer by layer, on the narrow network."""
    args = problem(NARROW, FEW, torch.float64)
    found, records = together(args, False), []
    loop = looped(args, found.names, False)
    for block in found:
        values = torch.linalg.eigvalsh(hk.hessian(*args, wrt=f"{block.name}.*").to_dense())
        record: Record = {"block": block.name, "n": block.n}
        for way, ends, trace in (
            ("together", block.extremes, block.trace),
            ("loop", *loop[block.name][:2]),
        ):
            pairs = [(ends.smallest, float(values[0])), (ends.largest, float(values[-1]))]
            record[way] = {
                "status": str(ends.status),
                "errors_over_tol": [abs(pair.value - exact) / abs(exact) / TOL for pair, exact in pairs],
                "in_interval": [exact in pair.interval for pair, exact in pairs],
                "trace_error": abs(trace.value / float(values.sum()) - 1),
                "trace_stderr": trace.stderr / abs(float(values.sum())),
            }
        records.append(record)
    return records


def seconds_of(function: Any, *args: Any, **options: Any) -> tuple[float, Any]:
    """Return the processor's seconds for a call, and its result."""
    began = time.process_time()
    found = function(*args, **options)
    return time.process_time() - began, found


def timing(width: int, examples: int) -> Record:
    """Return the seconds of both ways for each question, with graphs held and not."""
    torch.set_num_threads(1)
    args, record = problem(width, examples, torch.float32), Record()
    names = together(args, False).names  # and torch is warm
    for question, density in QUESTIONS.items():
        for graphs, memory_limit in GRAPHS.items():
            fast, found = seconds_of(together, args, density, memory_limit=memory_limit)
            slow, loop = seconds_of(looped, args, names, density, memory_limit=memory_limit)
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
    for way in ("together", "loop"):
        layers = [layer[way] for layer in record["accuracy"]]
        worst = max(max(layer["errors_over_tol"]) for layer in layers)
        inside = sum(sum(layer["in_interval"]) for layer in layers)
        trace = max(layer["trace_error"] for layer in layers)
        lines.append(
            f"{way}: ends off by at most {worst:.2g} tol, {inside} of {2 * len(layers)} in their interval; traces off "
            f"by at most {100 * trace:.2g} %"
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
    given = harness.parse(parser, argv)
    if not given.report:
        record = {"tol": TOL, "depth": DEPTH, "width": given.width, "examples": given.examples}
        record |= {"machine": harness.machine(), "accuracy": accuracy(), "timing": {}}
        record["timing"] = timing(given.width, given.examples)
        harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
