"""One process and two ranks that share the data: seconds, bytes and memory of a matvec, both ends and a trace.

    python benchmarks/bench_distributed.py [--repeats N]

A convolutional network and a wide perceptron, each with few and with more examples, at their initial values, float32,
one thread for each process, no graphs held. Accuracy comes first: what two ranks find, over what one process does. One
process and two ranks take turns, so that both meet the same machine; seconds are medians, processor seconds those of
the busier rank. Bytes are those that a rank sends. A first small question, which imports what the others need, is not
timed.

What the machine allows is measured beside it: two processes that know nothing of each other, each with half of the
examples, at once. Their seconds, for as many matvecs, are those of ranks without communication, but for the arithmetic
on vectors, which each does whole. Writes ``benchmarks/results/distributed.json``.
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


def convolutional(examples: int) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data of a small residual network on random images."""
    g = torch.Generator().manual_seed(0)
    model = hk.zoo.cifar_resnet(8, width=8, seed=0)
    data = torch.randn(examples, 3, 32, 32, generator=g), torch.randint(0, 10, (examples,), generator=g)
    return *hk.from_module(model, nn.CrossEntropyLoss()), data


def perceptron(examples: int) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data of a perceptron of 1.3 million parameters on random vectors."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)
    )
    data = torch.randn(examples, 256, generator=g), torch.randint(0, 10, (examples,), generator=g)
    return *hk.from_module(model, nn.CrossEntropyLoss()), data


PROBLEMS: dict[str, Callable[[], tuple[Any, Any, tuple[Tensor, Tensor]]]] = {
    "convolutional network, 256 examples": partial(convolutional, 256),
    "convolutional network, 1,024 examples": partial(convolutional, 1024),
    "wide perceptron, 1,024 examples": partial(perceptron, 1024),
    "wide perceptron, 4,096 examples": partial(perceptron, 4096),
}
BATCH_SIZES = {
    "convolutional network, 256 examples": 64,
    "convolutional network, 1,024 examples": 64,
    "wide perceptron, 1,024 examples": 256,
    "wide perceptron, 4,096 examples": 256,
}


def matvec(H: hk.CurvatureOperator) -> tuple[float, Any, float]:
    """Return the median seconds of a matvec, the norm of its result, and one."""
    v = torch.linspace(-1, 1, H.n)
    times, image = [], H @ v
    for _ in range(MATVECS):
        began = time.perf_counter()
        image = H @ v
        times.append(time.perf_counter() - began)
    return statistics.median(times), [float(image.norm())], 1.0


def extremes(H: hk.CurvatureOperator) -> tuple[float, Any, float]:
    """Return the seconds of both ends by Lanczos, their values, and the number of matvecs."""
    began = time.perf_counter()
    ex = hk.extreme_eigenvalues(H, method="lanczos", tol=1e-2)
    seconds = time.perf_counter() - began
    return seconds, [ex.largest.value, ex.smallest.value, ex.num_matvecs], ex.num_matvecs


def trace(H: hk.CurvatureOperator) -> tuple[float, Any, float]:
    """Return the seconds of a trace by ten matvecs, its value, and the number of matvecs."""
    began = time.perf_counter()
    found = hk.trace(H, num_matvecs=10, method="hutchinson")
    return time.perf_counter() - began, [found.value, found.num_matvecs], found.num_matvecs


QUESTIONS = {"matvec": matvec, "both ends": extremes, "trace": trace}


def answer(mesh: DeviceMesh | None, problem: str, half: int | None = None) -> Record:
    """Ask all questions in this process: alone, as a rank, or of one half of the examples."""
    objective, params, data = PROBLEMS[problem]()
    if half is not None:
        data = tuple(tensor.tensor_split(2)[half] for tensor in data)
    _warm_up(mesh)
    counted, found = _count_bytes(), {}
    examples = hk.as_data(data, batch_size=BATCH_SIZES[problem], mesh=mesh)
    H = hk.hessian(objective, params, examples, mode="reverse-over-reverse", memory_limit=0)
    for name, question in QUESTIONS.items():
        counted.clear()
        began = time.process_time()
        seconds, values, num_matvecs = question(H)
        found[name] = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - began,
            "num_matvecs": num_matvecs,
            "values": values,
            "bytes": sum(counted),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    return found


def _warm_up(mesh: DeviceMesh | None) -> None:
    points = hk.as_data(torch.linspace(-1, 1, 40).view(8, 5), mesh=mesh)
    hk.extreme_eigenvalues(hk.hessian(lambda params, batch: (batch @ params) ** 2, torch.ones(5), points))


def _count_bytes() -> list[int]:
    """Count the bytes that this process, which is one of the benchmark's own, sends in reductions and gathers."""
    counted: list[int] = []

    def counting(call: Any, passes: int, place: int, *args: Any, **options: Any) -> Any:
        size = dist.get_world_size()
        counted.append(passes * (size - 1) * args[place].nbytes // size)
        return call(*args, **options)

    dist.all_reduce = partial(counting, dist.all_reduce, 2, 0)
    ranks._all_gather = partial(counting, ranks._all_gather, 1, 0)
    ranks._all_to_all = partial(counting, ranks._all_to_all, 1, 1)
    return counted


def _process(folder: str, rank: int, size: int, problem: str, together: bool) -> None:
    torch.set_num_threads(1)
    mesh = None
    if together:
        store, timeout = f"file://{folder}/store", timedelta(minutes=10)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
        mesh = init_device_mesh("cpu", (size,))
    found = answer(mesh, problem, rank if size > 1 and not together else None)
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    if mesh is not None:
        dist.destroy_process_group()


def ask(size: int, problem: str, *, together: bool = False) -> list[Record]:
    """Return the answers of so many processes: of ranks, if they work together."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(folder, rank, size, problem, together) for rank in range(size)]
        processes = [context.Process(target=_process, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def measure(problem: str, repeats: int) -> Record:
    """Return medians for each question, over turns of one process, of ranks, and of processes with half of the data."""
    turns = [
        (ask(1, problem)[0], ask(NUM_RANKS, problem, together=True), ask(NUM_RANKS, problem))
        for _ in range(repeats)
    ]
    return {
        name: compare(
            [(one[name], *([other[name] for other in others] for others in rest)) for one, *rest in turns]
        )
        for name in QUESTIONS
    }


def compare(turns: Sequence[tuple[Record, list[Record], list[Record]]]) -> Record:
    """Return what one process, the ranks, and halves alone took in each turn; of halves for as many matvecs."""
    expected, found = turns[0][0]["values"], turns[0][1][0]["values"]

    def of_ranks(two: list[Record], of: str = "seconds") -> float:
        return max(rank[of] for rank in two)

    def of_halves(one: Record, halves: list[Record]) -> float:
        return one["num_matvecs"] * max(half["seconds"] / half["num_matvecs"] for half in halves)

    return {
        "values": expected,
        "error": max(abs(a - b) / (abs(a) or 1.0) for a, b in zip(expected, found, strict=True)),
        "seconds": statistics.median(one["seconds"] for one, *_ in turns),
        "seconds_of_ranks": statistics.median(of_ranks(two) for _, two, _ in turns),
        "seconds_of_halves": statistics.median(of_halves(one, halves) for one, _, halves in turns),
        "ratios": [one["seconds"] / of_ranks(two) for one, two, _ in turns],
        "possible_ratios": [one["seconds"] / of_halves(one, halves) for one, _, halves in turns],
        "cpu_ratios": [one["cpu_seconds"] / of_ranks(two, "cpu_seconds") for one, two, _ in turns],
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
            f"{statistics.median(one['possible_ratios']):.2f}",
            f"{one['seconds_of_halves'] / one['seconds_of_ranks']:.2f}",
            f"{statistics.median(one['cpu_ratios']):.2f}",
            f"{one['error']:.0e}",
            f"{one['bytes'] / 2**20:.1f}",
            f"{one['peak_mib']:.0f} / {one['peak_mib_of_ranks']:.0f}",
        ]
        for problem, questions in record["problems"].items()
        for question, one in questions.items()
    ]
    head = ["problem", "question", "1 process, s", "2 ranks, s", "ratio", "two halves alone", "share of that"]
    return harness.markdown([*head, "ratio of CPU s", "difference", "MiB sent", "peak MiB, 1 / a rank"], rows)


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
