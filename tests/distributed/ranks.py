"""Functions and programs run by several processes, connected by gloo; what each returns, raises or prints."""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import scipy.special
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.hf_storage
import torch.distributed.fsdp
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AT_FIRST_USE = (
    safetensors.torch,
    scipy.special,
    torch._dynamo,
    torch.distributed.checkpoint.hf_storage,
    torch.distributed.fsdp,
)
"""What torch and hvpkit import when it is first used: here once, before ranks are forked, and not 3 s in each."""

CONTEXT: Any = multiprocessing.get_context("fork")


def run(
    size: int, *functions: Callable[[DeviceMesh], Any], timeout: float = 120, seconds: float = 900
) -> list[list[Any]]:
    """Run the functions one after the other on ``size`` ranks; return, of each, what each rank returned.

    The group's timeout is ``timeout`` seconds, that of the whole run ``seconds``.

    An exception is what a rank returned, as the text of its type and message; a rank that was killed returns its
    exit code for all that is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank, args=(folder, rank, size, timeout, functions))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        _wait(processes, seconds)
        found = []
        for rank, process in enumerate(processes):
            path = Path(folder, str(rank))
            results = pickle.loads(path.read_bytes()) if path.exists() else []
            found.append(results + [f"exit code {process.exitcode}"] * (len(functions) - len(results)))
        return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def launch(size: int, *program: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``script.py arguments`` or ``-m module arguments`` on ranks that have the environment of torchrun's.

    They are forked from this process, so that what is imported here is imported there. Return what all wrote, and the
    first exit code that is not zero.
    """
    with tempfile.TemporaryDirectory() as folder:
        ports = CONTEXT.SimpleQueue()
        processes = [
            CONTEXT.Process(target=_program, args=(folder, rank, size, ports, program))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
        for _ in processes:
            ports.put(store.port)
        _wait(processes, seconds)
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        written = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(program, code, *written)


def torchrun(
    *arguments: str, size: int = 2, module: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run a program by torchrun itself."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    paths = [*sys.path, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    call = [sys.executable, *start, *(["-m"] if module else []), *arguments]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def told(call: Callable[[], object]) -> str:
    """Return the type and message of what a call raises, or "nothing"."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _wait(processes: list[Any], seconds: float) -> None:
    """Wait for processes, and kill what takes longer."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()


def _program(folder: str, rank: int, size: int, ports: Any, program: tuple[str, ...]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    warnings.resetwarnings()
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank)},
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(size)),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.get())},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "tests"},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
    }
    sys.argv = [*program[program[0] == "-m" :]]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


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
