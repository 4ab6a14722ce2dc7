import json

import pytest
import torch

import _problems as problems
import bench_fidelity
import hvpkit as hk

NAME = "two layers"


@pytest.fixture
def bench(two_layers, tmp_path):  # noqa: ARG001
    def run(*options):
        file = tmp_path / "found.json"
        bench_fidelity.main(
            ["--cache", str(tmp_path), "--problems", NAME, "--seeds", "2", "--out", str(file), *options]
        )
        return json.loads(file.read_text())

    return run


def test_errors_are_against_the_dense_matrix(bench, ends, tmp_path, capsys):
    found = bench()
    entry = found["problems"][NAME]
    problem = problems.load(NAME, tmp_path, torch.float64)
    truth = ends(problem.model, problem.x, problem.y)
    assert entry["reference"] == pytest.approx(truth, rel=1e-6)
    assert (entry["n"], entry["num_examples"]) == (75, 64)
    assert set(entry["runs"]) == set(bench_fidelity.METHODS)
    for method, runs in entry["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert max(run["errors_over_tol"]) < 1
            assert all(run["in_interval"])
            assert len(run["errors_over_tol"]) == (1 if method == "largest alone" else 2)
            assert run["passes"] > 1
    text = capsys.readouterr().out
    assert f"| {NAME} | {truth[0]:.3g} ... {truth[1]:.3g} |" in text
    assert ", 0 over 1 |" in text


def test_wrong_answer_is_counted_as_such(bench, monkeypatch, capsys):
    right = bench_fidelity.METHODS["lanczos"]
    monkeypatch.setitem(bench_fidelity.METHODS, "auto", lambda H, seed: right(1.5 * H, seed))
    runs = bench("--methods", "auto")["problems"][NAME]["runs"]["auto"]
    assert runs[0]["errors_over_tol"] == pytest.approx([50, 50], rel=0.05)
    assert "at most 5" in (text := capsys.readouterr().out)
    assert ", 2 over 1 |" in text


def test_methods_are_merged_and_resume_skips_those_that_are_there(bench, monkeypatch):
    first = bench("--methods", "auto")["problems"][NAME]["runs"]
    monkeypatch.setitem(bench_fidelity.METHODS, "auto", lambda *_: pytest.fail("solved again"))
    runs = bench("--methods", "auto", "lanczos", "--resume")["problems"][NAME]["runs"]
    assert runs["auto"] == first["auto"]
    assert set(runs) == {"auto", "lanczos"}


def test_report_measures_nothing(bench, monkeypatch, capsys):
    bench("--methods", "auto")
    before = capsys.readouterr().out.splitlines()[-4:]
    monkeypatch.setattr(hk, "hessian", lambda *_, **__: pytest.fail("measured"))
    bench("--report")
    assert capsys.readouterr().out.splitlines() == before
