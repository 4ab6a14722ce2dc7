import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import _compare_memory as memory
import _compare_peers as peers
import _compare_report as report
import _problems as problems
import _references as refs
import compare
import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error

NAME = "two layers"


@pytest.fixture
def bench(two_layers, monkeypatch, tmp_path):  # noqa: ARG001
    """Run the comparison on a problem of 75 parameters, in its own folder."""
    monkeypatch.setattr(compare, "picture", lambda _found, _file: None)
    monkeypatch.setattr(compare.gc, "collect", lambda: 0)  # half a second each in a process full of tests

    def run(*options, tasks=("extremes",), libraries=("hvpkit", "torch + SciPy"), out="found.json"):
        command = ["--cache", str(tmp_path), "--out", str(tmp_path / out), "--problems", NAME]
        command += ["--tasks", *tasks, "--libraries", *libraries, "--repeats", "2", *options]
        compare.main(command)
        return json.loads((tmp_path / out).read_text())["problems"][NAME]["tasks"]

    return run


@pytest.fixture
def pictures(bench, monkeypatch):  # noqa: ARG001
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    monkeypatch.setattr(compare, "picture", report.picture)
    yield
    matplotlib.use(before)


@pytest.fixture
def tiny(bench, tmp_path):  # noqa: ARG001
    return problems.load(NAME, tmp_path, torch.float64)


@pytest.fixture
def exact(tiny):
    objective, params = hk.from_module(tiny.model, nn.CrossEntropyLoss())
    return hessian_by_double_backward(objective, params, (tiny.x, tiny.y))


def library(monkeypatch, **methods):
    """Register a library with these methods, and return the names to compare."""
    fake = type("Fake", (peers.Plain,), {"NAME": "fake", "EFFORT": {"extremes": (1, 2)}} | methods)
    monkeypatch.setitem(compare.LIBRARIES, "fake", fake)
    return ("hvpkit", "fake")


TRUTHS = {
    "extremes": lambda values: [values[0], values[-1]],
    "top5": lambda values: sorted(values, key=abs)[-5:],
    "trace": lambda values: sum(values),
}


@pytest.mark.parametrize("limit", [2000, 10])
@pytest.mark.parametrize("task", TRUTHS)
def test_references_are_of_the_dense_matrix(tiny, exact, tmp_path, task, limit, monkeypatch):
    monkeypatch.setattr(refs, "DENSE", limit)
    found = refs.reference(NAME, task, tmp_path)
    truth = TRUTHS[task](torch.linalg.eigvalsh(exact).tolist())
    assert sorted(np.atleast_1d(found["value"])) == pytest.approx(sorted(np.atleast_1d(truth)), rel=1e-5)
    assert (found["by"] == "dense") == (limit == 2000)
    assert refs.reference(NAME, task, tmp_path) == found
    assert tiny.n == 75


def test_known_steps_suffice_for_a_plain_recurrence(tiny, exact):
    values, steps = refs.krylov(tiny, "extremes", 3)
    truth = torch.linalg.eigvalsh(exact)[[0, -1]]
    start = torch.randn(75, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = []
    for m in (steps - 1, steps):
        powers = torch.stack([torch.linalg.matrix_power(exact / 2, p) @ start for p in range(m)], 1)
        basis = torch.linalg.qr(powers)[0]
        ritz = torch.linalg.eigvalsh(basis.mT @ exact @ basis)[[0, -1]]
        errors.append(float(((ritz - truth) / truth).abs().max()))
    assert errors[1] <= 0.005 < errors[0]
    assert values == pytest.approx(truth.tolist(), rel=1e-6)


def test_plain_derivatives_are_those_of_the_loss(tiny, exact):
    v = refs.probe(75, torch.float64)
    assert relative_error(refs.plain_product(tiny.model, tiny, v), exact @ v) < 1e-12
    objective, params = hk.from_module(tiny.model, nn.CrossEntropyLoss())
    gradient = refs.join(hk.grad(objective, params, (tiny.x, tiny.y)).values())
    assert relative_error(sum(refs.gradients(tiny.model, tiny)), gradient) < 1e-12


@pytest.mark.parametrize("task", ["product", "gradient"])
def test_error_of_a_vector_is_seen_in_its_sketch(task):
    v = refs.probe(400, torch.float64)
    other = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    off = v + 0.01 * other * v.norm() / other.norm()
    assert refs.error(task, v, refs.sketch(v), 400) == 0
    assert 0.005 < refs.error(task, off, refs.sketch(v), 400) < 0.02
    assert refs.error(task, v * math.nan, refs.sketch(v), 400) == math.inf
    assert refs.error(task, v[:399], refs.sketch(v), 400) == math.inf


def test_errors_of_numbers():
    assert refs.error("extremes", [11.0, -2.0], [-2.0, 10.0], 5) == pytest.approx(0.1)
    assert refs.error("trace", 3.0, 4.0, 5) == 0.25
    assert refs.error("top5", [1.0, 2.0, 3.0], [1.0] * 5, 5) == math.inf
    assert refs.error("extremes", [math.nan, 1.0], [1.0, 2.0], 5) == math.inf


def test_density_that_is_moved_or_stretched_is_wrong():
    g = torch.Generator().manual_seed(0)
    values = torch.sort(torch.randn(1000, generator=g, dtype=torch.float64)).values
    truth = refs.grouped(values) | {
        "mean": float(values.mean()),
        "second_moment": float(values.square().mean()),
    }
    points, weights = values.numpy(), np.ones(1000)
    span = float(values[-1] - values[0])
    assert len(truth["points"]) < 500
    assert sum(truth["weights"]) == pytest.approx(1)
    assert refs.error("density", (points, weights), truth, 1000) < 1e-3
    assert refs.error("density", (points + 0.02 * span, weights), truth, 1000) > 0.019
    assert refs.error("density", (points * 1.3, weights), truth, 1000) > 0.01
    assert refs.error("density", (points, weights * math.nan), truth, 1000) == math.inf


def test_density_whose_outlier_is_missing_is_wrong_by_its_mean():
    values = torch.cat([torch.linspace(-1e-3, 1e-3, 9999), torch.tensor([100.0])]).double()
    truth = refs.grouped(values) | {"mean": 0.01, "second_moment": 1.0}
    assert refs.error("density", (values.numpy(), np.ones(10000)), truth, 10000) < 1e-3
    assert refs.error("density", (values.numpy(), np.eye(10000)[-1]), truth, 10000) > 0.01


@pytest.mark.parametrize("task", [task for task in compare.TASKS if task != "memory"])
def test_hvpkit_is_right_and_in_time(bench, task):
    cell = bench(tasks=(task,), libraries=("hvpkit",))[task]["hvpkit"]
    assert cell["status"] == "right"
    assert cell["right"] == cell["rounds"] == (6 if task in compare.ONE_PASS else 2)
    assert cell["error"] <= refs.TOL[task]
    assert min(cell["seconds"]) > 0
    assert cell["ratios"] == [1.0] * cell["rounds"]
    assert min(cell["passes"]) >= 1


def test_libraries_take_turns_and_passes_are_counted(bench, monkeypatch):
    turns = []

    def noted(self, seed, effort):
        turns.append((seed, effort))
        v = refs.probe(75)
        for _ in range(7):
            self.product(v, "")
        return peers.Plain.extremes(self, seed, 1e-6)

    cells = bench(libraries=library(monkeypatch, extremes=noted))["extremes"]
    assert turns == [(0, 1), (1, 1)]
    assert all(passes > 7 and passes == int(passes) for passes in cells["fake"]["passes"])
    both = zip(cells["fake"]["seconds"], cells["hvpkit"]["seconds"], strict=True)
    assert cells["fake"]["ratios"] == [own / other for own, other in both]


def test_wrong_answer_is_marked_with_its_error_and_not_timed(bench, monkeypatch):
    efforts = []

    def doubled(self, seed, effort):
        efforts.append(effort)
        return [2 * value for value in peers.Plain.extremes(self, seed, 1e-6)]

    cells = bench("--repeats", "4", libraries=library(monkeypatch, extremes=doubled))["extremes"]
    assert cells["fake"]["status"] == "wrong"
    assert cells["fake"]["error"] == pytest.approx(1, rel=1e-3)
    assert not {"seconds", "ratios", "passes"} & set(cells["fake"])
    assert efforts == [1, 2]
    assert cells["hvpkit"]["rounds"] == 4


def test_answer_that_is_not_finite_is_wrong_in_valid_json(bench, monkeypatch, tmp_path, capsys):
    bench(libraries=library(monkeypatch, extremes=lambda *_: [math.nan, 1.0]))

    def refuse(word):
        raise ValueError(word)

    whole = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    cell = whole["problems"][NAME]["tasks"]["extremes"]["fake"]
    assert cell["status"] == "wrong"
    assert not {"error", "seconds"} & set(cell)
    assert "| **wrong** |" in capsys.readouterr().out


def test_choice_that_is_first_right_is_the_one_that_counts(bench, monkeypatch):
    def by_effort(self, seed, effort):
        return [value * (1 if effort > 1 else 3) for value in peers.Plain.extremes(self, seed, 1e-6)]

    cell = bench(libraries=library(monkeypatch, extremes=by_effort))["extremes"]["fake"]
    assert (cell["status"], cell["effort"], cell["right"]) == ("right", 2, 2)


def test_answer_wrong_in_a_later_round_is_not_in_the_times(bench, monkeypatch, capsys):
    def wrong_later(self, seed, _effort):
        return [value * (3 if seed == 1 else 1) for value in peers.Plain.extremes(self, seed, 1e-6)]

    cell = bench("--repeats", "3", libraries=library(monkeypatch, extremes=wrong_later))["extremes"]["fake"]
    assert (cell["right"], cell["rounds"], len(cell["seconds"]), len(cell["ratios"])) == (2, 3, 2, 2)
    assert "right in 2 of 3" in capsys.readouterr().out


def test_run_without_end_is_stopped(bench, monkeypatch):
    def endless(self, _seed, _effort):
        while True:
            self.product(refs.probe(75), "")

    cells = bench(libraries=library(monkeypatch, extremes=endless))["extremes"]
    limit = min(400, max(100, math.ceil(20 * cells["hvpkit"]["passes"][0])))
    assert cells["fake"]["status"] == "not converged"
    assert cells["fake"]["message"] == f"stopped after {limit} passes"
    assert "seconds" not in cells["fake"]


def test_failure_is_said_with_its_cause(bench, monkeypatch, tmp_path):
    def failing(_self, _seed, _effort):
        raise NotImplementedError("no such derivative\nmore")

    cell = bench(libraries=library(monkeypatch, extremes=failing))["extremes"]["fake"]
    assert (cell["status"], cell["message"]) == ("failed", "NotImplementedError: no such derivative")
    assert "no such derivative" in (tmp_path / "found.md").read_text()


def test_missing_library_is_said_and_skipped(bench, monkeypatch, capsys):
    names = library(monkeypatch, MODULE="no_such_module")
    cells = bench(tasks=("product", "trace"), libraries=names)
    text = capsys.readouterr().out
    assert "fake is missing: pip install --no-deps -r benchmarks/peers.txt" in text
    assert [cell["fake"]["status"] for cell in cells.values()] == ["missing"] * 2
    assert cells["product"]["hvpkit"]["status"] == cells["trace"]["hvpkit"]["status"] == "right"


def test_task_that_is_not_offered_is_said(bench):
    cells = bench(tasks=("density",))["density"]
    assert cells["torch + SciPy"]["status"] == "not offered"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize("name", ["hvpkit", "torch + SciPy"])
def test_memory_holds_at_least_the_activations(tiny, tmp_path, name):
    big = replace(tiny, model=tiny.model.float(), x=tiny.x.float(), batch_size=64)
    many = replace(big, x=big.x.repeat(30_000, 1), y=big.y.repeat(30_000), batch_size=1_920_000)
    found = memory.peak(name, many, tmp_path)
    assert found["megabytes"] > 1_920_000 * 8 * 4 / 1e6
    assert found["error"] < 0.01  # float32 sums of two million


def test_memory_is_of_processes_of_their_own_and_judged_too(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(compare.LIBRARIES, "away", type("Away", (peers.Plain,), {"MODULE": "no_such_module"}))
    said = {"hvpkit": (0, 1e-7), "torch + SciPy": (0, 0.5), "curvlinops": (1, 0.0)}
    grows = iter([10.0, 30.0])

    def run(command, **_options):
        assert command[1:] == [memory.__file__, command[2], NAME, str(tmp_path)]
        code, off = said[command[2]]
        megabytes = next(grows) if command[2] == "hvpkit" else 20.0
        text = "noise\n" + json.dumps({"megabytes": megabytes, "error": off})
        return subprocess.CompletedProcess(command, code, text, "Traceback\nMemoryError: none left\n")

    monkeypatch.setattr(memory.subprocess, "run", run)
    monkeypatch.setattr(peers.CurvLinOps, "missing", classmethod(lambda _: False))
    monkeypatch.setattr(peers.CurvLinOps, "version", classmethod(lambda _: "0"))
    monkeypatch.setattr(compare, "warm_up", lambda _names, _problem: None)
    cells = bench(tasks=("memory",), libraries=(*said, "away"))["memory"]
    assert cells["hvpkit"] == {"status": "right", "megabytes": [10.0, 30.0], "ratios": [0.5, 1.5]}
    assert cells["torch + SciPy"] == {"status": "wrong", "error": 0.5}
    assert cells["curvlinops"] == {"status": "failed", "message": "MemoryError: none left"}
    assert cells["away"] == {"status": "missing"}


def test_tables_and_picture_come_from_the_file_alone(bench, pictures, tmp_path, capsys):  # noqa: ARG001
    tasks = bench(tasks=("product", "extremes"))
    seconds = tasks["extremes"]["hvpkit"]["seconds"]
    text = (tmp_path / "found.md").read_text()
    assert f"{np.median(seconds):.3g} s" in text
    file = tmp_path / "found.json"
    whole = json.loads(file.read_text())
    cells = whole["problems"][NAME]["tasks"]["extremes"]
    cells["hvpkit"]["seconds"] = [1234.0]
    cells["torch + SciPy"] |= {"ratios": [2.0, 8.0, 5.0], "seconds": [77.0]}
    file.write_text(json.dumps(whole))
    (tmp_path / "found.png").unlink()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- compare -->\nold\n<!-- /compare -->\nafter\n")
    compare.main(["--report", "--out", str(file), "--document", str(readme)])
    assert "1.23e+03 s" in capsys.readouterr().out
    assert (tmp_path / "found.md").read_text() != text
    for written in ((tmp_path / "found.md").read_text(), readme.read_text()):
        assert "| two layers | 1.23e+03 s" in written
        assert "**5 x** (2 to 8), 77 s" in written
    assert readme.read_text().startswith("before\n<!-- compare -->\n| Both ends")
    assert readme.read_text().endswith("<!-- /compare -->\nafter\n")
    assert "old" not in readme.read_text()
    assert matplotlib.image.imread(tmp_path / "found.png").std() > 0.05


def test_steps_are_doubled_until_they_are_enough():
    asked = []

    def run(steps):
        asked.append(steps)
        return [float(steps)], steps >= 50

    assert peers.doubled(run, 10) == [80.0]
    assert asked == [10, 20, 40, 80]


def test_a_library_that_nobody_can_ask_has_no_column(bench):
    cells = bench(tasks=("product",), libraries=("hvpkit", "torch + SciPy"))["product"]
    cells["silent"] = {"status": "not offered"}
    found = {"problems": {NAME: {"tasks": {"product": cells}}}}
    assert "silent" not in report.task_table(found, "product", ["hvpkit", "torch + SciPy", "silent"])[0]


def test_readme_without_markers_is_refused(bench, tmp_path):
    bench()
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the lines <!-- compare --> and <!-- /compare -->"):
        compare.main(
            ["--report", "--out", str(tmp_path / "found.json"), "--document", str(tmp_path / "README.md")]
        )


def test_tasks_are_merged_and_other_machines_are_not(bench, tmp_path):
    bench(tasks=("product",))
    assert set(bench(tasks=("gradient",))) == {"product", "gradient"}
    file = tmp_path / "found.json"
    whole = json.loads(file.read_text())
    whole["machine"]["threads"] += 1
    file.write_text(json.dumps(whole))
    with pytest.raises(SystemExit, match=r"--out: .* was made with another threads; choose another place"):
        bench(tasks=("product",))
    assert json.loads(file.read_text()) == whole


def test_fastest_other_is_right_and_does_not_know_the_answer():
    right = {"status": "right", "ratios": [1.0]}
    quick, slow = {**right, "ratios": [2.0, 3.0, 9.0]}, {**right, "ratios": [5.0]}
    told = {report.GIVEN: {**right, "ratios": [0.5]}}
    problems = {
        "a": {"hvpkit": right, "one": slow, "two": quick, **told},
        "b": {"hvpkit": right, "one": {**right, "ratios": [12.0]}, "two": {"status": "wrong"}},
        "c": {"hvpkit": right, "one": {"status": "failed"}},
    }
    found = {"problems": {name: {"tasks": {"extremes": cells}} for name, cells in problems.items()}}
    assert report.fastest(found, "extremes").endswith("times hvpkit's: a 3.00; b 12.00; geometric mean 6.00.")
    assert report.fastest(found, "product") == ""


def test_mean_is_geometric_and_of_the_ratios_that_are_there():
    cells = [{"ratios": [1.0, 2.0, 9.0]}, {"ratios": [8.0]}, {"status": "wrong"}]
    assert report.mean_ratio(cells) == "4.00 x, on 2 of 3"


def test_batches_divide_the_examples(bench, tmp_path, monkeypatch):  # noqa: ARG001
    recipe = problems.RECIPES[NAME]
    x, y = recipe.data()
    many = problems.Recipe(lambda: (x.repeat(19, 1), y.repeat(19)), recipe.model, 1)
    monkeypatch.setitem(problems.RECIPES, "more", many)
    problem = problems.load("more", tmp_path)
    assert [len(batch[1]) for batch in problem] == [608, 608]
    assert len(list(problems.load(NAME, tmp_path))) == 1
