import json

import numpy as np
import pytest
import torch

import _accuracy_problems as accuracy
import _problems
import bench_accuracy
import hvpkit as hk

TRAINING = accuracy.Training((3,), "momentum", 2, 100)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Measure two states of a perceptron of 235 parameters, and a prescribed spectrum of two draws."""
    monkeypatch.setattr(accuracy, "STEPS", (1, 3))
    monkeypatch.setattr(accuracy, "SMALL", [TRAINING])
    monkeypatch.setattr(accuracy, "LARGE", [])
    monkeypatch.setattr(
        accuracy, "FAMILIES", {"outliers": lambda rng: np.r_[-5, rng.uniform(-1, 1, 198), 20]}
    )
    monkeypatch.setattr(accuracy, "NUM_DRAWS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run(*options):
        file = tmp_path / "found.json"
        bench_accuracy.main(["--cache", str(tmp_path), "--seeds", "2", "--out", str(file), *options])
        return json.loads(file.read_text())

    return run


def test_ends_along_training_are_those_of_the_dense_matrix(bench, ends, tmp_path):  # noqa: ARG001
    states, (x, y) = TRAINING.states(), TRAINING.data()
    assert len(states) == 2
    for case, state in zip(accuracy.along_training(TRAINING, tmp_path), states, strict=True):
        model = TRAINING.model()
        model.load_state_dict(state)
        assert case.ends == pytest.approx(ends(model, x, y), rel=1e-8)
        ex = hk.extreme_eigenvalues(case.make(), tol=1e-8, seed=0)
        assert (ex.smallest.value, ex.largest.value) == pytest.approx(case.ends, rel=1e-7)


def test_counts_are_over_all_cases_seeds_and_ends(bench, capsys):
    found = bench("--methods", "lanczos", "certify", "--confidence", "0.99", "0.9")
    assert {name: entry["set"] for name, entry in found["problems"].items()} == {
        TRAINING.name: "small",
        "outliers": "spectra",
    }
    for name, cases in ((TRAINING.name, 2), ("outliers", 4)):
        runs = found["problems"][name]["runs"]
        assert set(runs) == {"lanczos", "certify"}
        for by_confidence in runs.values():
            assert set(by_confidence) == {"0.99", "0.9"}
            for part in by_confidence.values():
                assert part["ends"] == part["converged"] == sum(part["intervals"].values()) == 4 * cases
                assert len(part["passes"]) == 2 * cases
                assert part["off"] == {"1": 0, "2": 0, "5": 0}
                assert not part["wrong"]
    text = capsys.readouterr().out
    assert "| small | certify | 0.99 | 8 | 8 | 0 | 0 | 0 |" in text
    assert "| spectra | lanczos | 0.9 | 16 | 16 | 0 | 0 | 0 |" in text


def test_wrong_ends_are_counted_and_listed(bench, monkeypatch, capsys):
    make = bench_accuracy.diagonal
    monkeypatch.setattr(
        bench_accuracy, "diagonal", lambda values: make(torch.where(values > 2, 1.03 * values, values))
    )
    part = bench("--sets", "spectra", "--methods", "lanczos")["problems"]["outliers"]["runs"]["lanczos"][
        "0.99"
    ]
    assert part["off"] == {"1": 8, "2": 8, "5": 0}
    assert part["worst"] == pytest.approx(3, rel=0.01)
    assert part["outside"] == {"largest, random-start": 8}
    assert len({row["seed"] for row in part["wrong"]}) == 8
    assert {row["end"] for row in part["wrong"]} == {"largest"}
    assert "| 16 | 16 | 8 | 8 | 0 | 3.0" in capsys.readouterr().out


def test_error_of_an_end_that_is_zero_is_in_units_of_the_norm():
    values = torch.cat([torch.zeros(1), torch.linspace(1, 5, 50)]).double()
    rows = bench_accuracy.solve(accuracy.diagonal(values), (0.0, 5.0), "lanczos", 0.99, 0)
    assert all(0 <= row["error"] < 1 for row in rows)
    wrong = bench_accuracy.solve(accuracy.diagonal(values + 0.1), (0.0, 5.0), "lanczos", 0.99, 0)
    assert wrong[0]["error"] == pytest.approx(0.1 / (5 * 1e-5), rel=1e-2)


def test_solves_that_may_sample_have_the_real_operator(bench, tmp_path):  # noqa: ARG001
    case = accuracy.along_training(TRAINING, tmp_path)[0]
    assert bench_accuracy.operator(case, "multifidelity").num_examples == 100
    assert bench_accuracy.operator(case, "lanczos").name == "diagonal"
    assert bench_accuracy.operator(case, "auto").name == "diagonal"


def test_solve_that_did_not_converge_is_not_off():
    row = {"end": "smallest", "kind": "random-start", "inside": True, "passes": 9.0, "error": 3.0}
    found = bench_accuracy.summary([{**row, "converged": True}, {**row, "converged": False}])
    assert (found["ends"], found["converged"], found["off"]["2"], len(found["wrong"])) == (2, 1, 1, 1)


def test_resume_measures_only_what_is_not_there(bench, monkeypatch):
    first = bench("--sets", "spectra", "--methods", "lanczos")
    right = bench_accuracy.solve
    monkeypatch.setattr(
        bench_accuracy,
        "solve",
        lambda *given: pytest.fail("solved again") if given[2:4] == ("lanczos", 0.99) else right(*given),
    )
    runs = bench("--sets", "spectra", "--methods", "lanczos", "certify", "--resume")["problems"]["outliers"][
        "runs"
    ]
    assert runs["lanczos"] == first["problems"]["outliers"]["runs"]["lanczos"]
    assert set(runs) == {"lanczos", "certify"}


def test_problem_of_another_set_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--sets", "small", "--problems", "outliers")
    assert "outliers not in the sets small" in capsys.readouterr().err


def test_trained_networks_have_stored_references(two_layers, ends, tmp_path):
    (case,) = accuracy.trained("two layers", tmp_path)
    assert case.spectrum is None
    model, (x, y) = two_layers.model(), two_layers.data()
    model.load_state_dict(torch.load(tmp_path / "two_layers.pt", weights_only=True))
    assert case.ends == pytest.approx(ends(model, x, y), rel=1e-6)
    for state, found in zip(
        _problems.checkpoints("two layers", tmp_path, 20),
        accuracy.checkpoints("two layers", tmp_path),
        strict=True,
    ):
        model.load_state_dict(state)
        assert found.ends == pytest.approx(ends(model, x, y), rel=1e-3)
