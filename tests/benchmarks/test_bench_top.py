import json

import pytest
import torch

import _problems as problems
import bench_top
import hvpkit as hk


def test_values_are_those_of_the_dense_matrix(two_layers, tmp_path, capsys):  # noqa: ARG001
    file = tmp_path / "found.json"
    bench_top.main(["--cache", str(tmp_path), "--problems", "two layers", "--seeds", "2", "--out", str(file)])
    entry = json.loads(file.read_text())["problems"]["two layers"]
    H = problems.hessian(problems.load("two layers", tmp_path, torch.float64))
    values = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=torch.float64))
    wanted = {"five largest": values[-5:], "three smallest": values[:3]}
    for question, asked in entry["questions"].items():
        assert asked["truth"] == pytest.approx(wanted[question].tolist(), rel=1e-4)
        for runs in asked["runs"].values():
            assert [run["seed"] for run in runs] == [0, 1]
            assert all(max(run["errors_over_tol"]) < 1 and all(run["in_interval"]) for run in runs)
    assert "| two layers: five largest |" in (text := capsys.readouterr().out)
    assert "| 0 over 1, 0 over 2 |" in text


def test_wrong_value_is_counted_as_such(two_layers, tmp_path):  # noqa: ARG001
    H = problems.hessian(problems.load("two layers", tmp_path))
    truth = hk.lanczos(H, 5, tol=1e-5).values
    run = bench_top.solve(H, "five largest", "auto", 0, (1.5 * truth).tolist())
    assert min(run["errors_over_tol"]) > 30
    assert not any(run["in_interval"])
