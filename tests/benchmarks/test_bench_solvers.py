import json
import math

import matplotlib
import numpy as np
import pytest
import torch

import _solvers_report as report
import bench_solvers
import hvpkit as hk
from hvpkit.zoo import digits, mlp

SPECTRUM = np.r_[-5, np.linspace(-1, 1, 198), 20]


@pytest.fixture
def bench(no_window, monkeypatch, tmp_path):  # noqa: ARG001
    """Run four solvers of all kinds on a spectrum and a network of 310 parameters, with one seed."""
    networks = {"perceptron": (lambda: mlp(hidden=(4,)), 1)}
    monkeypatch.setattr(bench_solvers, "spectra", lambda: {"outliers": SPECTRUM})
    monkeypatch.setattr(bench_solvers, "NETWORKS", networks)
    monkeypatch.setattr(bench_solvers, "PROBLEMS", ("outliers", "perceptron"))
    monkeypatch.setattr(bench_solvers, "MAX_PASSES", 8)
    kept = {name: bench_solvers.SOLVERS[name] for name in ("lanczos", "eigsh", "power", "oja")}
    monkeypatch.setattr(bench_solvers, "SOLVERS", kept)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run(*options):
        file = tmp_path / "found.json"
        bench_solvers.main(["--seeds", "1", "--out", str(file), *options])
        return json.loads(file.read_text())

    return run


def test_counts_are_those_of_the_first_right_matvec(bench, tmp_path, capsys):
    found = bench()
    rows = {(row["problem"], row["solver"]): row for row in found["solvers"]}
    assert {solver for _, solver in rows} == {"floor", "lanczos", "eigsh", "power", "oja"}
    assert ("outliers", "oja") not in rows  # it needs minibatches
    for (_, solver), row in rows.items():
        for low, high, both in zip(row["low"], row["high"], row["both"], strict=True):
            if low is not None and high is not None:
                assert both == (low + high if solver in ("power", "oja") else max(low, high))
    floor, lanczos = rows["outliers", "floor"], rows["outliers", "lanczos"]
    assert floor["both"] == lanczos["both"] == sorted(floor["both"])
    for door in found["extreme_eigenvalues"]:
        assert door["worst_error"] < 1
        assert door["inside"]
        assert door["ratio"] == door["num_matvecs"] / rows[door["problem"], "floor"]["both"][1] >= 1
    text = capsys.readouterr().out
    assert "outliers\n    floor " in text
    assert "inside 1/1" in text
    assert matplotlib.image.imread(tmp_path / "found.png").std() > 0.02


def test_floor_needs_the_krylov_space_and_no_less(bench):  # noqa: ARG001
    problem = bench_solvers.load("outliers")
    row = bench_solvers.floor(problem, 3)
    start = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    needed = []
    for m in range(1, 12):  # any random start needs about as many
        powers = torch.stack([(torch.from_numpy(SPECTRUM) / 20) ** p * start for p in range(m)], 1)
        basis = torch.linalg.qr(powers)[0]
        ritz = torch.linalg.eigvalsh(basis.mT @ (torch.from_numpy(SPECTRUM)[:, None] * basis))
        if max(abs(float(ritz[0]) + 5) / 5, abs(float(ritz[-1]) - 20) / 20) <= 1e-3:
            needed.append(m)
    assert abs(row["both"][2] - needed[0]) <= 2
    assert problem.ends == (-5, 20)


def test_value_that_leaves_again_does_not_count():
    values = [(1.0, 5.0), (2.0, 10.1), (3.0, 15.0), (4.0, 10.5), (5.0, 10.0)]
    assert bench_solvers.first_within(values, 10.0) == [4.0, 5.0, 5.0]
    assert bench_solvers.first_within(values[:3], 10.0) == [None] * 3
    assert bench_solvers.first_within([(1.0, math.nan)], 10.0) == [None] * 3


def test_matrix_of_a_network_is_that_of_its_hessian(bench, ends):  # noqa: ARG001
    problem, (x, y) = bench_solvers.load("perceptron"), digits()
    model = bench_solvers.train_by_epochs(lambda: mlp(hidden=(4,)), (x, y), 1)
    assert problem.ends == pytest.approx(ends(model, x, y), rel=1e-4)
    assert problem.network.n == problem.op.n == 310


def test_problems_that_are_there_are_skipped(bench, monkeypatch):
    first = bench("--problems", "outliers")
    monkeypatch.setattr(hk, "lanczos", lambda *_, **__: pytest.fail("solved again"))
    assert bench("--problems", "outliers", "--resume") == first


def test_accuracy_that_is_not_reached_is_a_dash():
    rows = [
        {"problem": "p", "solver": "floor", "seed": seed, "low": [3.0, None, None]}
        | {"high": [1.0, 2.0, 4.0], "both": [3.0, 12.0, None]}
        for seed in range(3)
    ]
    door = {"problem": "p", "seed": 0, "num_matvecs": 18.0, "ratio": 1.5, "worst_error": 0.1, "inside": True}
    text = report.table({"accuracies": [0.1, 0.01, 0.001], "solvers": rows, "extreme_eigenvalues": [door]})
    assert "low 3 / - / - " in text
    assert "high 1 / 2 / 4 " in text
    assert "ratio 1.50" in text
    assert "median 1.50, worst 1.50" in text
