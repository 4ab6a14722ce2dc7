import json

import pytest
import torch

import bench_solve

NAME = "two layers"


@pytest.fixture
def bench(two_layers, tmp_path):  # noqa: ARG001
    def run(*options):
        file = tmp_path / "found.json"
        arguments = ["--cache", str(tmp_path), "--seeds", "2", "--rounds", "1", "--size", "60"]
        arguments += ["--out", str(file)]
        bench_solve.main([*arguments, *options])
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize("name", bench_solve.SPECTRA)
def test_spectra_are_solved_by_all_that_can(bench, name):
    entry = bench("--problems", name)["problems"][name]
    for method, runs in entry["runs"].items():
        for run in runs:
            if name == "indefinite" and method in ("cg", "cg, array"):
                assert run["status"] == "negative-curvature"
            elif name != "indefinite" or "minres" in method:
                assert run["residual"] <= 1e-6
                assert run["error"] < 1e-2
                assert run["matvecs"] > 1


def test_matrix_has_the_spectrum_with_damping():
    values = torch.linalg.eigvalsh(bench_solve.dense("decaying", 50)) - bench_solve.DAMPING
    assert torch.allclose(values, torch.logspace(-8, 0, 50, dtype=torch.float64), atol=1e-12)


def test_network_is_solved_with_and_without_a_sample(bench, capsys):
    entry = bench("--problems", NAME)["problems"][NAME]
    assert set(entry["runs"]) >= {*bench_solve.METHODS, *bench_solve.SCIPY}
    for method in bench_solve.METHODS:
        assert all(run["residual"] <= 1e-5 for run in entry["runs"][method])
    assert bench_solve.saved(entry) > 0
    assert f"| {NAME} | matvecs |" in capsys.readouterr().out


def test_ratios_are_to_the_default_in_the_same_round():
    runs = {
        "minres": [{"seconds": seconds} for seconds in (1.0, 2.0, 4.0)],
        "scipy cg": [{"seconds": seconds} for seconds in (3.0, 2.0, 8.0)],
    }
    assert bench_solve.ratio(runs, "scipy cg") == 2.0
    assert bench_solve._cell(runs, "scipy cg", "over minres") == "2 x"
    assert bench_solve._cell(runs, "curvlinops cg", "seconds") == "-"


def test_report_measures_nothing(bench, monkeypatch, capsys):
    bench("--problems", "decaying")
    before = capsys.readouterr().out.splitlines()[-4:]
    monkeypatch.setattr(bench_solve, "on_spectrum", lambda *_: pytest.fail("measured"))
    bench("--report")
    assert capsys.readouterr().out.splitlines()[-4:] == before
