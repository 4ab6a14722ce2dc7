from __future__ import annotations

import json

import pytest

import bench_sharded_parameters as bench


def of_rank(matvec: float, seconds: list[float]) -> dict[str, object]:
    whole = {"making": 4.0, "held": 1.0, "matvec": 3.0, "traffic": 1.0, "seconds": [2.0, 4.0]}
    return {"error": 1e-7, "whole": whole, "parts": {**whole, "matvec": matvec, "seconds": seconds}}


def test_figures_are_of_the_busier_rank() -> None:
    found = bench.combine([of_rank(1.0, [4.0, 5.0]), of_rank(2.0, [3.0, 8.0])])
    assert found["parts"]["matvec"] == 2.0
    assert found["parts"]["seconds"] == [4.0, 8.0]
    assert bench._ratios(found) == [2.0, 2.0]


def test_the_table_is_made_from_the_file() -> None:
    record = json.loads((bench.harness.RESULTS / "sharded_parameters.json").read_text())
    assert bench.table(record).count("\n") == 1 + 2 * len(bench.SIZES)
    for size in bench.SIZES:
        one = record["sizes"][str(size)]
        assert one["error"] < 1e-5
        saved = one["whole"]["held"] - one["parts"]["held"]  # both hold the data too
        assert saved == pytest.approx(1 - 1 / size, rel=1e-2)
        assert one["parts"]["traffic"] == pytest.approx(7 * (size - 1) / size, rel=1e-3)
