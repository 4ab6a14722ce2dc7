"""Commands under torchrun: all processes share each, and the first one prints and writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hvpkit as hk


@contextmanager
def joined(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Join the processes of torchrun inside ``with``, if it started this one; yield the options to go on with.

    Others than the first one print nothing, and write into folders of their own that are deleted: what a command draws
    may take all of them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield values
        return
    on_gpu = str(values.get("device") or "").startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with ExitStack() as stack:
            if dist.get_rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
                values = _elsewhere(values, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            yield values
    finally:
        dist.destroy_process_group()


def _elsewhere(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return options whose folder for results is a copy of the one asked for."""
    out = values.get("out")
    if out is None:
        return values
    if out.is_dir():
        shutil.copytree(out, folder, dirs_exist_ok=True)
    return {**values, "out": folder}


def mesh() -> DeviceMesh | None:
    """Return the mesh of all processes; None where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    backend = dist.get_backend_config()
    return init_device_mesh("cuda" if "nccl" in str(backend) else "cpu", (dist.get_world_size(),))


def shared(data: Any) -> Any:
    """Return the data shared by all processes, each of which has read all of it."""
    found = mesh()
    return data if found is None or isinstance(data, hk.Data) else hk.as_data(data, mesh=found)
