"""The script of the calibration, on one finite sum, whose errors are known from its dense matrix."""

import json

import bench_calibration


def test_errors_of_every_direction_are_those_of_the_dense_matrix(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_calibration, "POWERS", (1.0,))
    monkeypatch.setattr(bench_calibration, "NEGATIVE", (0.1,))
    file = tmp_path / "calibration.json"
    bench_calibration.main(["--problems", "finite sums", "--seeds", "2", "--out", str(file)])
    entry = json.loads(file.read_text())["problems"]["finite sums"]
    assert [len(run["errors_over_tol"]) for run in entry["runs"]] == [2, 2, 3, 3, 3, 3]
    assert all(max(run["errors_over_tol"]) < 1 and all(run["in_interval"]) for run in entry["runs"])
    assert entry["directions"]
    for group, predicted, true, clamped, _ in entry["directions"]:
        assert group in bench_calibration.GROUPS
        assert predicted > 0
        assert true >= 0
        assert 0 <= clamped <= 1
    text = capsys.readouterr().out
    assert "| finite sums | 6 of 6 |" in text
    assert "0, 0, 0" in text


def test_quantiles_are_of_each_kind_apart():
    rows = [
        ["low end", 1.0, 2.0, 0.5, True],
        ["low end", 1.0, 9.0, 0.5, False],
        ["high end", 2.0, 2.0, 0.0, True],
    ]
    found = bench_calibration.ratios(rows)
    assert found["low end, clamped, returned"] == [2.0]
    assert found["low end, clamped"] == [2.0, 9.0]
    assert found["high end, not clamped"] == [1.0]
    text = bench_calibration.table({"problems": {"one": {"directions": rows}}})
    assert "| low end, clamped | 2 | 5.50 | 8.30 | 8.93 | 8.96 | 9.00 |" in text
