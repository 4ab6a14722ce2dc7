from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import bench_distributed as bench
import hvpkit as hk
from hvpkit._utils import ranks


def tiny() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    return *hk.from_module(model, torch.nn.CrossEntropyLoss()), (x, y)


def test_one_process_answers_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PROBLEMS, "tiny", tiny)
    monkeypatch.setitem(bench.BATCH_SIZES, "tiny", 8)
    for owner, name in (
        (torch.distributed, "all_reduce"),
        (ranks, "_all_gather"),
        (ranks, "_all_to_all"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # they are counted, and put back
    found = bench.answer(None, "tiny")
    H = hk.hessian(*tiny())
    values = torch.linalg.eigvalsh(H.to_dense())
    assert found["both ends"]["values"][0] == pytest.approx(float(values[-1]), rel=1e-2)
    assert found["trace"]["values"][0] == pytest.approx(float(values.sum()), rel=1.0)
    assert {one["bytes"] for one in found.values()} == {0}


def test_a_half_has_half_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PROBLEMS, "tiny", tiny)
    monkeypatch.setitem(bench.BATCH_SIZES, "tiny", 8)
    monkeypatch.setattr(bench, "_count_bytes", list)
    objective, params, (x, y) = tiny()
    found = bench.answer(None, "tiny", 1)["both ends"]
    values = torch.linalg.eigvalsh(hk.hessian(objective, params, (x[10:], y[10:])).to_dense())
    assert found["values"][0] == pytest.approx(float(values[-1]), rel=1e-2)
    assert found["num_matvecs"] == found["values"][2]


def test_ratios_are_of_the_slowest_process() -> None:
    one = {
        "values": [2.0, 0.0],
        "seconds": 4.0,
        "cpu_seconds": 4.0,
        "num_matvecs": 10.0,
        "bytes": 0,
        "peak_mib": 10.0,
    }
    two = [{**one, "values": [2.1, 0.0], "seconds": s, "cpu_seconds": 2.0, "bytes": 8} for s in (2.0, 2.5)]
    halves = [{**one, "seconds": 2.2, "num_matvecs": 11.0}, {**one, "seconds": 1.8, "num_matvecs": 10.0}]
    found = bench.compare([(one, two, halves), ({**one, "seconds": 5.0}, two, halves)])
    assert found["ratios"] == [1.6, 2.0]
    assert found["possible_ratios"] == pytest.approx([2.0, 2.5])
    assert found["seconds_of_halves"] == pytest.approx(2.0)
    assert found["cpu_ratios"] == [2.0, 2.0]
    assert found["error"] == pytest.approx(0.05)
    assert found["bytes"] == 8


def test_the_table_is_made_from_the_file() -> None:
    record = json.loads((bench.harness.RESULTS / "distributed.json").read_text())
    table = bench.table(record)
    assert set(record["problems"]) == set(bench.PROBLEMS)
    assert all(set(found) == set(bench.QUESTIONS) for found in record["problems"].values())
    assert table.count("\n") == 1 + len(bench.PROBLEMS) * len(bench.QUESTIONS)
    for questions in record["problems"].values():
        assert all(one["error"] < 1e-3 for one in questions.values())
