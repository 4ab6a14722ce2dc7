from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvpkit._utils import memory
from hvpkit._utils.memory import VERSION_1, VERSION_2, Allocations, free_memory

CPU = torch.device("cpu")


def test_storages_count_once_while_they_live_and_at_their_height() -> None:
    given = torch.ones(1000)
    with Allocations() as made:
        a = given + 1  # 4,000 bytes
        view = a[10:]
        a += 1
        b = torch.zeros(500, dtype=torch.float64)  # 4,000
        assert (made.now, made.peak) == (8000, 8000)
        del a
        assert made.now == 8000  # the view holds it
        del view
        assert (made.now, made.peak) == (4000, 8000)
        given += 1
        given[3:].mul_(2)
    del b
    assert made.now == 0


def test_what_a_graph_saves_counts_until_the_graph_is_gone() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Allocations() as made:
        y = (x.exp() + 1).sin().sum()  # the exponential and the sum are saved
    assert 8000 <= made.now <= 8000 + 64
    del y
    assert made.now == 0


def test_free_memory_of_this_machine_is_a_number_of_bytes() -> None:
    assert 1e7 < free_memory(CPU) < 1e15


def write_group(folder: Path, names: tuple[str, str, str], limit: str, usage: float, cache: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage:.0f}\n")
    (folder / "memory.stat").write_text(f"anon 12\n{names[2]} {cache:.0f}\n")


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc/self and /sys/fs/cgroup, of a machine with 6 GB free."""
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_physical", lambda: 6e9)
    (tmp_path / "proc").mkdir()
    return tmp_path


@pytest.mark.parametrize(("limit", "expected"), [("max", 6e9), ("4000000000", 3.5e9), ("500000000", 0.0)])
@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "cgroup/job/step", VERSION_2),
        ("0::/job/step", "cgroup/job", VERSION_2),  # a group that the own one is in
        ("0::/", "cgroup", VERSION_2),
        ("4:cpu,memory:/job", "cgroup/memory/job", VERSION_1),
        (
            "4:memory:/docker/0123",
            "cgroup/memory",
            VERSION_1,
        ),  # in a container, where the path is that of the host
    ],
)
def test_free_memory_is_what_control_groups_leave(
    line: str, folder: str, names: tuple[str, str, str], limit: str, expected: float, linux: Path
) -> None:
    (linux / "proc" / "cgroup").write_text(f"7:blkio:/elsewhere\n{line}\n")
    write_group(linux / folder, names, limit, usage=1e9, cache=5e8 if limit.startswith("4") else 0)
    assert free_memory(CPU) == expected


def test_groups_of_other_controllers_do_not_count(linux: Path) -> None:
    (linux / "proc" / "cgroup").write_text("7:blkio:/job\n")
    write_group(linux / "cgroup" / "memory" / "job", VERSION_1, "1000", 10, 0)
    assert free_memory(CPU) == 6e9


def in_a_process(code: str, limit: str, num_bytes: float) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose address space may grow by ``num_bytes`` after importing hvpkit."""
    begin = (
        "import resource, torch, hvpkit as hk\n"
        "from hvpkit._utils.memory import free_memory\n"
        "pages = open('/proc/self/statm').read().split()\n"
        f"place = 0 if {limit!r} == 'RLIMIT_AS' else 5\n"
        f"most = int(pages[place]) * resource.getpagesize() + {int(num_bytes)}\n"
        f"resource.setrlimit(resource.{limit}, (most, most))\n"
    )
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are read from /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_free_memory_is_what_limits_of_the_process_leave(limit: str) -> None:
    code = (
        "before = free_memory(torch.device('cpu'))\n"
        "kept = torch.zeros(50_000_000)\n"
        "print(before, free_memory(torch.device('cpu')))"
    )
    before, after = map(float, in_a_process(code, limit, 1e9).stdout.split())
    assert 0.9e9 < before <= 1.001e9
    assert before - after == pytest.approx(2e8, rel=0.05)
