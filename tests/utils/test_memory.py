from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvpkit._utils import memory
from hvpkit._utils.memory import Allocations, free_memory

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


@pytest.mark.parametrize(("limit", "expected"), [("max\n", 6e9), ("4000000000\n", 3e9), ("500000000\n", 0.0)])
def test_free_memory_is_what_machine_and_container_leave(
    limit: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text(limit)
    (tmp_path / "current").write_text("1000000000\n")
    monkeypatch.setattr(memory, "CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    monkeypatch.setattr(memory, "_physical", lambda: 6e9)
    assert free_memory(CPU) == expected


def test_free_memory_of_this_machine_is_a_number_of_bytes() -> None:
    assert 1e7 < free_memory(CPU) < 1e15
