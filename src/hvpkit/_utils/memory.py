"""Free memory of a device, and the memory that a computation allocates."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

PROCESS, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
"""Where Linux says what a process uses, and what its control groups may use."""

VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Of a memory control group: the files with limit and usage in bytes, and what of the usage is cache to be dropped."""


def free_memory(device: torch.device) -> float:
    """Return how many bytes can still be allocated on the device; infinite if unknown.

    On a CPU the least of what the machine, the control groups of the process (of a container or a batch job) and the
    limits of the process itself (``ulimit -v``, ``ulimit -d``) leave; of processes that torchrun started on the
    machine, each has its part.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    shared = min(_physical(), _left_by_control_groups()) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0.0, min(shared, _left_by_own_limits()))


def _left_by_control_groups() -> float:
    """Return what the memory control groups of the process leave: its own, and all that this is in."""
    left = math.inf
    for line in _text(PROCESS / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS / "memory", VERSION_1) if controllers else (CGROUPS, VERSION_2)
        own = root / path.strip("/")
        # inside of a container the path may be that of the host, and only the root be there
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                left = min(left, _left_by_group(folder, *names))
    return left


def _left_by_group(folder: Path, limit: str, usage: str, cache: str) -> float:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # "max", or no such group
        return math.inf
    pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
    dropped = sum(float(value) for name, value in pairs if name == cache)
    return float(most) - float(used) + dropped


def _left_by_own_limits() -> float:
    """Return what the limits of the process on its address space and on its data leave."""
    pages = _text(PROCESS / "statm").split()
    if not pages:
        return math.inf
    import resource  # not on Windows, which has no statm

    left = math.inf
    for name, place in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        most = resource.getrlimit(name)[0]
        if most != resource.RLIM_INFINITY:
            left = min(left, most - float(pages[place]) * resource.getpagesize())
    return left


def _text(path: Path) -> str:
    """Return the text of a file; nothing if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def in_words(num_bytes: float) -> str:
    """Return a number of bytes as text.

    Example:
        >>> in_words(7.4e7), in_words(1.3e10)
        ('74 MB', '13 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            size = num_bytes / unit
            return "unlimited" if size > 1e6 else f"{size:.{int(size < 9.95)}f} {name}"
    return f"{num_bytes:.0f} bytes"


def _physical() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * float(line.split()[1])
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


class Allocations(TorchDispatchMode):
    """Counter of the bytes in storages allocated inside: alive ``now``, and at the ``peak``.

    Temporary memory within one operation is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in known:
                known.add(id(storage))
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = (leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return [leaf.untyped_storage() for leaf in leaves if not leaf.is_meta]
