"""The question that the library is for, at its own data: both ends of ResNet-20's Hessian over all of CIFAR-10.

    nice -n 10 python benchmarks/question.py --cifar10 FOLDER --work DIR

By the command line, as its users do: ``hvpkit train`` trains 272,474 parameters on 50,000 images, and ``hvpkit
extremes`` finds both ends to 1 %, certified, after epochs 1, 5 and 10, and once more by Lanczos after the last one. In
small batches, without kept graphs. On two cores a pass takes about twelve minutes and the whole a day and more: both
commands save their work in DIR, and a script that was interrupted continues in the middle of a solve when it is called
again.

With ``--small`` it is a narrow network on scikit-learn's digits, in seconds: it shows that the script runs.

Writes ``benchmarks/results/question.json`` after each solve: for each both ends with their intervals, passes, hours,
and whether Lanczos's intervals agree. ``--report`` prints them with what the same number of passes would take at
11,173,962 parameters: floating-point operations of a matvec of ResNet-18, counted, over ``--tflops``, by the cost model
of :func:`hvpkit.plan`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import _harness as harness
import hvpkit as hk
from _harness import RESULTS, Record, machine, markdown, open_record, read, timed, write
from hvpkit.planning import Figures, plan_extremes
from hvpkit.results.cost_plan import Range

EPOCHS, SMALL_EPOCHS = (1, 5, 10), (1, 2)
BATCH_SIZE = 100
NUM_IMAGES = 50_000
GPU_BYTES = 8e10
"""Memory of the GPU that the larger network is planned for."""


def hvpkit(*words: object) -> str:
    """Run a command of the library, and return what it prints.

    Raises:
        SystemExit: it fails, or ends without convergence; with its exit code.
    """
    command = [sys.executable, "-m", "hvpkit", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def problem(cifar10: Path | None) -> list[object]:
    """Return the words that name the network and its data."""
    if cifar10 is None:
        return ["digits", "--num-examples", 300]
    return ["cifar10", "--arch", "resnet20", "--data-dir", cifar10]


def train(words: list[object], work: Path, epochs: Sequence[int]) -> None:
    """Train the network, and keep it after each epoch; an interrupted training continues."""
    options = ["--epochs", max(epochs), "--no-track", "--keep", "--out", work / "run", "--quiet"]
    hvpkit("train", *words, *options)


def solve(words: list[object], work: Path, epoch: int, method: str) -> Record:
    """Return both ends after an epoch; an interrupted solve continues from its checkpoint."""
    network = work / "run" / f"epoch-{epoch:04d}.pt"
    options = [
        "--tol",
        1e-2,
        "--method",
        method,
        "--certify",
        "--batch-size",
        BATCH_SIZE,
        "--memory-limit",
        0,
    ]
    saved = ["--checkpoint", work / f"{method}-{epoch}.pt", "--mode", "reverse-over-reverse"]
    printed = hvpkit("extremes", *words, "--resume", network, *options, *saved, "--json")
    found: Record = json.loads(printed)
    return {"epoch": epoch, "method": method, "extremes": found}


def tasks(epochs: Sequence[int]) -> dict[str, tuple[int, str]]:
    """Return epoch and method of each solve, by name: the default at all epochs, then Lanczos at the last one."""
    pairs = [*((epoch, "auto") for epoch in epochs), (epochs[-1], "lanczos")]
    return {f"epoch {epoch}, {method}": (epoch, method) for epoch, method in pairs}


def agree(one: Record, other: Record) -> bool:
    """Return True if the intervals of both ends of two solves overlap."""
    pairs = [
        (one["extremes"][end]["interval"], other["extremes"][end]["interval"])
        for end in ("smallest", "largest")
    ]
    return all(a["lower"] <= b["upper"] and b["lower"] <= a["upper"] for a, b in pairs)


def operations_of_a_matvec(num_images: int = 2) -> float:
    """Return the floating-point operations of a matvec of ResNet-18's Hessian with one vector, for each image."""
    model = hk.zoo.resnet18_cifar().eval().to("meta")
    params = [*model.parameters()]
    x, y = (
        torch.empty(num_images, 3, 32, 32, device="meta"),
        torch.empty(num_images, dtype=torch.long, device="meta"),
    )
    with FlopCounterMode(display=False) as counter:
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
        torch.autograd.grad(gradient, params, [torch.empty_like(p) for p in params])
    return counter.get_total_flops() / num_images


def at_full_size(passes: float, tflops: float) -> Record:
    """Return what as many passes take with ResNet-18 on one GPU, by the cost model of :func:`hvpkit.plan`."""
    n = sum(p.numel() for p in hk.zoo.resnet18_cifar().parameters())
    seconds = operations_of_a_matvec() * NUM_IMAGES / (tflops * 1e12)
    rows = 4 * 4 * n / 3e12  # two passes over a row, each read twice, at 3 TB/s
    figures = Figures(n, 4, seconds, seconds, rows, 0.2 * GPU_BYTES, 0.0, 0.0, GPU_BYTES)
    task = plan_extremes(figures, "multifidelity", Range(passes, passes, passes))
    return {"n": n, "tflops": tflops, "seconds_of_a_pass": seconds, "seconds": task.seconds.expected}


def rows(solves: Iterable[Record]) -> list[list[str]]:
    """Return a row of the table for each solve."""
    made = []
    for solve in solves:
        ends = solve["extremes"]
        shown = [
            f"{end['value']:.4g} in [{end['interval']['lower']:.4g}, {end['interval']['upper']:.4g}]"
            for end in (ends["smallest"], ends["largest"])
        ]
        cost = [f"{ends['num_matvecs']:.1f}", f"{solve['hours']:.2g}"]
        made.append([f"{solve['epoch']}", solve["method"], *shown, *cost, ends["status"]])
    return made


def report(record: Record) -> str:
    """Return the solves in a table, and what they would take at the size of the question."""
    text = markdown(
        ["epoch", "method", "smallest", "largest", "passes", "hours", "status"],
        rows(record["solves"].values()),
    )
    full = record["at_full_size"]
    return (
        f"{text}\n\nAt {full['n']:,} parameters, {full['tflops']:g} TFLOP/s: {full['seconds_of_a_pass']:.1f} s a pass, "
        f"{full['seconds'] / 60:.1f} minutes for as many passes as the last one of these took by the default."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=RESULTS / "question.json")
    parser.add_argument("--cifar10", type=Path, help="the folder that holds cifar-10-batches-py")
    parser.add_argument("--work", type=Path, help="the folder of training and checkpoints")
    parser.add_argument("--small", action="store_true", help="digits, in seconds")
    parser.add_argument("--tflops", type=float, default=30.0, help="of a GPU in float32; default %(default)s")
    given = parser.parse_args(argv)
    if given.report:
        print(report(read(given.out)))
        return
    if given.work is None or (given.cifar10 is None and not given.small):
        parser.error("--work and --cifar10 (or --small) are needed")
    epochs, words = (SMALL_EPOCHS if given.small else EPOCHS), problem(None if given.small else given.cifar10)
    header = {"machine": machine(), "small": given.small, "batch_size": BATCH_SIZE}
    record = open_record(given.out, header, extendable=header["machine"], solves={})
    given.work.mkdir(parents=True, exist_ok=True)
    train(words, given.work, epochs)
    for name, (epoch, method) in tasks(epochs).items():
        if name in record["solves"]:
            continue
        made, seconds = timed(lambda epoch=epoch, method=method: solve(words, given.work, epoch, method))
        record["solves"][name] = {**made, "hours": seconds / 3600}
        defaults = [done for done in record["solves"].values() if done["method"] == "auto"]
        record["at_full_size"] = at_full_size(defaults[-1]["extremes"]["num_matvecs"], given.tflops)
        write(given.out, record)
    last, check = (record["solves"][f"epoch {epochs[-1]}, {method}"] for method in ("auto", "lanczos"))
    print(report(record))
    if not agree(last, check):
        raise SystemExit("the intervals of both methods do not overlap")


if __name__ == "__main__":
    main()
