"""Functions run by several processes, connected by gloo; what each returns or raises."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def run(
    size: int, *functions: Callable[[DeviceMesh], Any], timeout: float = 30, seconds: float = 300
) -> list[list[Any]]:
    """Run the functions one after the other on ``size`` ranks; return, of each, what each rank returned.

    The group's timeout is ``timeout`` seconds, that of the whole run ``seconds``.

    An exception is what a rank returned, as the text of its type and message; a rank that was killed returns its
    exit code for all that is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_rank, args=(folder, rank, size, timeout, functions))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        found = []
        for rank, process in enumerate(processes):
            path = Path(folder, str(rank))
            results = pickle.loads(path.read_bytes()) if path.exists() else []
            found.append(results + [f"exit code {process.exitcode}"] * (len(functions) - len(results)))
        return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def told(call: Callable[[], object]) -> str:
    """Return the type and message of what a call raises, or "nothing"."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _rank(
    folder: str, rank: int, size: int, timeout: float, functions: tuple[Callable[[DeviceMesh], Any], ...]
) -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a program in the background inherits that it is ignored
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    mesh = init_device_mesh("cpu", (size,))
    results = []
    for function in functions:
        try:
            results.append(function(mesh))
        except BaseException as error:
            if os.environ.get("SHOW"):
                traceback.print_exc()
            results.append(f"{type(error).__name__}: {error}")
        Path(folder, str(rank)).write_bytes(pickle.dumps(results))
    with suppress(RuntimeError):  # nobody leaves while others still connect
        dist.barrier()
