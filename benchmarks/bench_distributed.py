"""One process and two ranks that share the data: seconds, bytes and memory of a matvec, both ends and a trace.

    python benchmarks/bench_distributed.py [--repeats N]

A convolutional network on images and a wide perceptron, at their initial values, float32, one thread for each process,
no graphs held. Accuracy comes first: what two ranks find, over what one process does. One process and two ranks take
turns, so that both meet the same machine; seconds are medians, processor seconds those of the busier rank. Bytes are
those that a rank sends. Writes ``benchmarks/results/distributed.json``.
"""

from __future__ import annotations

import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import _harness as harness
import hvpkit as hk
from _harness import Record
from hvpkit._utils import ranks

NUM_RANKS = 2
MATVECS = 5
"""Matvecs that are timed one by one, after a first one."""


def convolutional() -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data of a small residual network on 256 random images."""
    g = torch.Generator().manual_seed(0)
    model = hk.zoo.cifar_resnet(8, width=8, seed=0)
    data = torch.randn(256, 3, 32, 32, generator=g), torch.randint(0, 10, (256,), generator=g)
    return *hk.from_module(model, nn.CrossEntropyLoss()), data


def perceptron() -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data of a perceptron of 1.3 million parameters on 1,024 random vectors."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)
    )
    data = torch.randn(1024, 256, generator=g), torch.randint(0, 10, (1024,), generator=g)
    return *hk.from_module(model, nn.CrossEntropyLoss()), data


PROBLEMS: dict[str, Callable[[], tuple[Any, Any, tuple[Tensor, Tensor]]]] = {
    "convolutional network": convolutional,
    "wide perceptron": perceptron,
}
BATCH_SIZES = {"convolutional network": 32, "wide perceptron": 128}


def matvec(H: hk.CurvatureOperator) -> tuple[float, Any]:
    """Return the median seconds of a matvec, and the norm of its result."""
    v = torch.linspace(-1, 1, H.n)
    times, image = [], H @ v
    for _ in range(MATVECS):
        began = time.perf_counter()
        image = H @ v
        times.append(time.perf_counter() - began)
    return statistics.median(times), [float(image.norm())]


def extremes(H: hk.CurvatureOperator) -> tuple[float, Any]:
    """Return the seconds of both ends by Lanczos, and their values."""
    began = time.perf_counter()
    ex = hk.extreme_eigenvalues(H, method="lanczos", tol=1e-2)
    return time.perf_counter() - began, [ex.largest.value, ex.smallest.value, ex.num_matvecs]


def trace(H: hk.CurvatureOperator) -> tuple[float, Any]:
    """Return the seconds of a trace by ten matvecs, and its value."""
    began = time.perf_counter()
    found = hk.trace(H, num_matvecs=10, method="hutchinson")
    return time.perf_counter() - began, [found.value, found.num_matvecs]


QUESTIONS = {"matvec": matvec, "both ends": extremes, "trace": trace}


def answer(mesh: DeviceMesh | None, problem: str) -> Record:
    """Ask all questions in this process, alone or as a rank."""
    objective, params, data = PROBLEMS[problem]()
    counted, found = _count_bytes(), {}
    examples = hk.as_data(data, batch_size=BATCH_SIZES[problem], mesh=mesh)
    H = hk.hessian(objective, params, examples, mode="reverse-over-reverse", memory_limit=0)
    for name, question in QUESTIONS.items():
        counted.clear()
        began = time.process_time()
        seconds, values = question(H)
        found[name] = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - began,
            "values": values,
            "bytes": sum(counted),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    return found


def _count_bytes() -> list[int]:
    """Count the bytes that this process, which is one of the benchmark's own, sends in reductions and gathers."""
    counted: list[int] = []

    def counting(call: Any, passes: int, place: int, *args: Any, **options: Any) -> Any:
        size = dist.get_world_size()
        counted.append(passes * (size - 1) * args[place].nbytes // size)
        return call(*args, **options)

    dist.all_reduce = partial(counting, dist.all_reduce, 2, 0)
    ranks._all_gather = partial(counting, ranks._all_gather, 1, 0)
    ranks._reduce_scatter = partial(counting, ranks._reduce_scatter, 1, 1)
    return counted


def _process(folder: str, rank: int, size: int, problem: str) -> None:
    torch.set_num_threads(1)
    mesh = None
    if size > 1:
        store, timeout = f"file://{folder}/store", timedelta(minutes=10)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
        mesh = init_device_mesh("cpu", (size,))
    Path(folder, str(rank)).write_bytes(pickle.dumps(answer(mesh, problem)))
    if mesh is not None:
        dist.destroy_process_group()


def ask(size: int, problem: str) -> list[Record]:
    """Return the answers of so many ranks; of one, of a process alone."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(folder, rank, size, problem) for rank in range(size)]
        processes = [context.Process(target=_process, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def measure(problem: str, repeats: int) -> Record:
    """Return medians for each question, over turns of one process and of ranks."""
    turns = [(ask(1, problem)[0], ask(NUM_RANKS, problem)) for _ in range(repeats)]
    return {
        name: compare([(one[name], [rank[name] for rank in two]) for one, two in turns]) for name in QUESTIONS
    }


def compare(turns: Sequence[tuple[Record, list[Record]]]) -> Record:
    """Return what one process and the ranks took in each turn."""
    expected, found = turns[0][0]["values"], turns[0][1][0]["values"]

    def ratios(of: str) -> list[float]:
        return [one[of] / max(rank[of] for rank in two) for one, two in turns]

    return {
        "values": expected,
        "error": max(abs(a - b) / (abs(a) or 1.0) for a, b in zip(expected, found, strict=True)),
        "seconds": statistics.median(one["seconds"] for one, _ in turns),
        "seconds_of_ranks": statistics.median(max(rank["seconds"] for rank in two) for _, two in turns),
        "ratios": ratios("seconds"),
        "cpu_ratios": ratios("cpu_seconds"),
        "bytes": turns[0][1][0]["bytes"],
        "peak_mib": turns[0][0]["peak_mib"],
        "peak_mib_of_ranks": max(rank["peak_mib"] for rank in turns[0][1]),
    }


def table(record: Record) -> str:
    """Return the results as Markdown."""
    rows = [
        [
            problem,
            question,
            f"{one['seconds']:.2f}",
            f"{one['seconds_of_ranks']:.2f}",
            f"{statistics.median(one['ratios']):.2f}",
            f"{statistics.median(one['cpu_ratios']):.2f}",
            f"{one['error']:.0e}",
            f"{one['bytes'] / 2**20:.1f}",
            f"{one['peak_mib']:.0f} / {one['peak_mib_of_ranks']:.0f}",
        ]
        for problem, questions in record["problems"].items()
        for question, one in questions.items()
    ]
    head = ["problem", "question", "1 process, s", "2 ranks, s", "ratio", "ratio of CPU s", "difference"]
    return harness.markdown([*head, "MiB sent", "peak MiB, 1 / a rank"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "distributed.json")
    harness.add_names(parser, choices=PROBLEMS)
    parser.add_argument("--repeats", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        old = harness.read(given.out)["problems"] if given.resume and given.out.exists() else {}
        record: Record = {"machine": harness.machine(threads=1), "num_ranks": NUM_RANKS, "problems": old}
        for problem in harness.pending(given, given.problems, old):
            record["problems"][problem] = measure(problem, given.repeats)
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
