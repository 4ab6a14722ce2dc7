import json

import numpy as np
import pytest

import interval_coverage


def test_shares_are_over_both_ends_of_all_problems(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(interval_coverage.torch, "set_num_threads", lambda _: None)
    file = tmp_path / "found.json"
    interval_coverage.main(["--problems", "20", "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["confidence"] == 0.99
    assert found["all"]["intervals"] == 40
    assert [found[name]["intervals"] for name in interval_coverage.SHAPES] == [4] * 10
    assert found[interval_coverage.ADVERSARIAL]["intervals"] == 4
    assert found["all"]["inside"] >= 0.95
    assert found["all"]["claimed"] == sum(found[name]["claimed"] for name in interval_coverage.SHAPES)
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_miss_is_seen(monkeypatch):
    values = np.linspace(-1, 1, 50)
    right = interval_coverage.solve(values, 0)
    assert all(row["inside"] and row["error"] < 0.01 for row in right)
    monkeypatch.setattr(
        interval_coverage, "diagonal", lambda v, make=interval_coverage.diagonal: make(0.5 * v)
    )
    wrong = interval_coverage.solve(values, 0)
    assert not any(row["inside"] for row in wrong)
    assert interval_coverage.summary(right + wrong)["inside"] == 0.5
    assert interval_coverage.summary(right + wrong)["error_above_tol"] == 0.5


def test_starts_are_nearly_orthogonal_to_both_ends_alone():
    values = np.array([3.0, -1.0, 0.5, 3.0, 2.0])
    start = interval_coverage.near_orthogonal(values, np.random.default_rng(0)).numpy()
    plain = np.random.default_rng(0).standard_normal(5)
    assert start == pytest.approx(plain * np.array([1e-6, 1e-6, 1, 1e-6, 1]))
