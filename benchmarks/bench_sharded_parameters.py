"""Parameters whole on every rank, and in parts (``shard_params=True``): memory, bytes and time of a matvec.

    python benchmarks/bench_sharded_parameters.py [--repeats N]

A perceptron of eight layers of 512, float32, 64 examples for each rank in one batch, on 2 and 4 ranks of one thread
each, connected by gloo. Accuracy comes first: the image by parameters in parts, over that by whole ones. Memory is that
of live storages, in units of the parameters, without those that the caller holds; the larger of the ranks'. Bytes are
those that a rank sends or receives, in the same unit, on average. Seconds are processor time of the busier rank, and
the ratio a median over turns. Writes ``benchmarks/results/sharded_parameters.json``.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
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
from hvpkit._utils.memory import Allocations
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded

SIZES = (2, 4)
WIDTH, LAYERS, EXAMPLES = 512, 8, 64
"""Width and number of the layers, and examples of a rank."""


def perceptron(size: int) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Return objective, parameters and data of a perceptron for so many ranks."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    x, y = torch.randn(2, EXAMPLES * size, WIDTH, generator=g)
    return *hk.from_module(nn.Sequential(*layers), nn.MSELoss()), (x, y)


def make(mesh: DeviceMesh, shard_params: bool) -> LinearOperator:
    """Return the Hessian, with vectors in parts."""
    objective, params, data = perceptron(mesh.size())
    examples = hk.as_data(data, mesh=mesh, batch_size=EXAMPLES)
    mode = "reverse-over-reverse"
    H = hk.hessian(objective, params, examples, mode=mode, memory_limit=0, shard_params=shard_params)
    return sharded(H)


def answer(mesh: DeviceMesh, repeats: int) -> Record:
    """Return what whole parameters and parts take on this rank."""
    found: Record = {}
    operators, images = {}, {}
    for name, shard_params in (("whole", False), ("parts", True)):
        with Allocations() as held:
            operators[name] = S = make(mesh, shard_params)
        vector = S.space.random(S.n, like=torch.empty(0), seed=0)[:, None]
        with Allocations() as taken, Traffic(mesh) as traffic:
            images[name] = S.product(vector)
        size = S.n * 4
        memory = {"making": held.peak, "held": held.now, "matvec": taken.peak, "traffic": traffic.num_bytes}
        found[name] = {key: value / size for key, value in memory.items()} | {"seconds": []}
    for _ in range(repeats):
        for name, S in operators.items():
            began = time.process_time()
            S.product(vector)
            found[name]["seconds"].append(time.process_time() - began)
    apart = operators["whole"].space.norm((images["parts"] - images["whole"])[:, 0])
    found["error"] = float(apart / operators["whole"].space.norm(images["whole"][:, 0]))
    return found


class Traffic:
    """A counter of the bytes that a rank sends or receives in collectives of tensors."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.size, self.num_bytes, self.originals = mesh.get_local_rank(), mesh.size(), 0.0, {}

    def __enter__(self) -> Traffic:
        share = (self.size - 1) / self.size
        self._count(ranks, "_all_gather", lambda args, _: share * args[0].nbytes)
        self._count(ranks, "_all_to_all", lambda args, _: share * args[1].nbytes)
        for name, end in (("broadcast", "group_src"), ("reduce", "group_dst")):
            self._count(dist, name, lambda args, o, end=end: args[0].nbytes * (o[end] != self.rank))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in self.originals.items():
            setattr(owner, name, original)

    def _count(self, owner: Any, name: str, num_bytes: Callable[[Any, Any], float]) -> None:
        call = self.originals[owner, name] = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            self.num_bytes += num_bytes(args, options)
            return call(*args, **options)

        setattr(owner, name, counting)


def _process(folder: str, rank: int, size: int, repeats: int) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh("cpu", (size,))
    Path(folder, str(rank)).write_bytes(pickle.dumps(answer(mesh, repeats)))
    dist.destroy_process_group()


def measure(size: int, repeats: int) -> Record:
    """Return what a rank of so many takes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_process, args=(folder, r, size, repeats)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return combine([pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)])


def combine(of_ranks: Sequence[Record]) -> Record:
    """Return the largest memory, mean bytes, and for each turn the seconds of the busier rank."""
    found: Record = {"error": max(one["error"] for one in of_ranks)}
    for name in ("whole", "parts"):
        each = [one[name] for one in of_ranks]
        found[name] = {key: max(one[key] for one in each) for key in ("making", "held", "matvec")}
        found[name]["traffic"] = statistics.mean(one["traffic"] for one in each)
        found[name]["seconds"] = [max(turn) for turn in zip(*(one["seconds"] for one in each), strict=True)]
    return found


def table(record: Record) -> str:
    """Return the results as Markdown."""
    rows = [
        [
            f"{size}",
            "in parts" if name == "parts" else "whole",
            *(f"{one[name][key]:.2f}" for key in ("held", "matvec", "traffic")),
            f"{statistics.median(_ratios(one)):.1f}" if name == "parts" else "1",
            f"{one['error']:.0e}" if name == "parts" else "",
        ]
        for size, one in record["sizes"].items()
        for name in ("whole", "parts")
    ]
    head = [
        "ranks",
        "parameters",
        "held",
        "peak of a matvec",
        "sent or received",
        "CPU s, ratio",
        "difference",
    ]
    return harness.markdown(head, rows)


def _ratios(one: Record) -> list[float]:
    pairs = zip(one["parts"]["seconds"], one["whole"]["seconds"], strict=True)
    return [parts / whole for parts, whole in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "sharded_parameters.json")
    parser.add_argument("--repeats", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        record: Record = {"machine": harness.machine(threads=1), "sizes": {}}
        for size in SIZES:
            record["sizes"][str(size)] = measure(size, given.repeats)
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
