from __future__ import annotations

import json
import math
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import hvpkit as hk
from hvpkit.cli import app, choices
from hvpkit.cli.options import Problem
from hvpkit.cli.training_methods import LR
from hvpkit.train import keskar_sharpness
from hvpkit.zoo import cifar_resnet, digits, digits_cnn

PROBLEM = """
import os, signal, sys
import torch
import hvpkit as hk

def make():
    print("a target may print")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    params = {"w": torch.ones(4, 3, dtype=torch.float64) / 3, "v": torch.linspace(-1, 1, 3, dtype=torch.float64)}

    def loss_fn(p, batch):
        print("at every call")
        return (torch.tanh(batch[0] @ p["w"]) @ p["v"] - batch[1]) ** 2

    return loss_fn, params, (x, y)

def many():
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)
    return lambda p, b: (p**2 * d).sum(-1) / 2 + 0 * b.sum(-1), torch.ones(300, dtype=torch.float64), torch.ones(3, 2)

def rough():
    return lambda p, b: (p * p.detach()).sum() + 0 * b.sum(-1), torch.ones(2), torch.rand(5, 2)

def infinite():
    scale = torch.tensor([1.0, 1e200], dtype=torch.float64)
    params = torch.zeros(2, dtype=torch.float64)
    return lambda p, b: (torch.exp(p * scale)).sum() + 0 * b.sum(-1), params, torch.ones(3, 2)

def undefined():
    return lambda p, b: p.sum() * torch.nan + 0 * b.sum(-1), torch.zeros(2), torch.ones(3, 2)

def two():
    return 1, 2

def raises():
    raise KeyError("lost")

def mislabelled():
    objective, params = hk.from_module(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss())
    return objective, params, (torch.ones(300, 2), torch.arange(300) // 290 * 7)

def with_argument(size):
    return None

def no_params():
    return (lambda p, b: b @ p), None, torch.ones(3, 2)

def misfit():
    def loss_fn(p, b):
        return b @ p
    return loss_fn, torch.ones(4), torch.ones(3, 2)

def interrupting():
    name, at, calls = os.environ["TEST_SIGNAL"], int(os.environ["TEST_CALL"]), []
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)

    def loss_fn(p, b):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(getattr(signal, name))
        return (p**2 * d).sum(-1) / 2 + 0 * b.sum(-1)

    return loss_fn, torch.ones(300, dtype=torch.float64), torch.ones(3, 2)

def exits():
    sys.exit(0)

def exits_later():
    def loss_fn(p, b):
        raise SystemExit
    return loss_fn, torch.ones(4), torch.ones(3, 2)

def loss_class():
    return torch.nn.CrossEntropyLoss, torch.ones(4), torch.ones(3, 2)

def criterion_class():
    objective, params = hk.from_module(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss)
    return objective, params, (torch.ones(3, 2), torch.arange(3))

def objective():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), torch.arange(20) % 4
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return *hk.from_module(model, torch.nn.CrossEntropyLoss()), (x.double(), y)

def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 4)
    x = torch.linspace(-1, 1, 60).reshape(20, 3).sin()
    return torch.nn.Sequential(*layers).double(), torch.nn.CrossEntropyLoss(), (x.double(), torch.arange(20) % 4)

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM)
    return path


def call(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def made(file: Path, name: str = "make") -> tuple[Callable[..., Any], Any, Any]:
    scope: dict[str, Any] = {}
    exec(file.read_text(), scope)
    return scope[name]()


def without_seconds(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: without_seconds(item) for key, item in record.items() if not key.startswith("seconds")}
    return [without_seconds(item) for item in record] if isinstance(record, list) else record


def drawn(path: Path) -> bool:
    return bool(matplotlib.image.imread(path)[..., :3].std() > 0.02)


def test_extremes_are_those_of_the_library_with_every_option(file: Path, tmp_path: Path) -> None:
    options = [
        "--tol",
        1e-4,
        "--atol",
        1e-3,
        "--method",
        "lanczos",
        "--max-matvecs",
        90,
        "--time-limit",
        100,
        "--seed",
        3,
    ]
    options += ["--batch-size", 7, "--wrt", "w", "--device", "cpu", "--dtype", "float32", "--json"]
    options += ["--out", tmp_path / "out"]
    found = strict(call("extremes", f"{file}:make", *options).stdout)
    loss_fn, params, data = made(file)
    params, data = {name: p.float() for name, p in params.items()}, tuple(part.float() for part in data)
    H = hk.hessian(loss_fn, params, data, wrt="w", batch_size=7, mode=found["operator"].split(", ")[-1])
    ex = hk.extreme_eigenvalues(
        H, tol=1e-4, atol=1e-3, method="lanczos", max_matvecs=90, time_limit=100, seed=3
    )
    about = found.pop("problem")
    assert without_seconds(found) == without_seconds(ex.to_dict())
    assert (about["num_parameters"], about["num_examples"], about["wrt"]) == (12, 30, ["w"])
    assert (about["dtype"], about["device"], about["seed"]) == ("float32", "cpu", 3)
    assert strict((tmp_path / "out" / "extremes.json").read_text()) == {**found, "problem": about}
    assert drawn(tmp_path / "out" / "extremes.png")


def test_how_products_are_made_can_be_said(file: Path) -> None:
    plain = strict(call("extremes", f"{file}:make", "--json").stdout)
    exact = ["--batch-size", "auto", "--mode", "forward-over-reverse", "--memory-limit", "0"]
    reduced = ["--batch-size", 20, "--arithmetic", "bf16", "--dtype", "float32"]
    for options, named in ((exact, ", forward-over-reverse"), (reduced, " in bf16")):
        found = strict(call("extremes", f"{file}:make", *options, "--json").stdout)
        assert named in found["operator"]
        assert found["problem"]["batch_size"] <= 30
        for end in ("smallest", "largest"):
            assert found[end]["value"] == pytest.approx(plain[end]["value"], rel=0.03)
    with pytest.warns(hk.CompileWarning, match="products are made without it"):  # as this loss prints
        call("extremes", f"{file}:make", "--compile")


def test_table_shows_both_ends_of_the_dense_hessian(file: Path) -> None:
    loss_fn, params, data = made(file)
    H = hk.hessian(loss_fn, params, data)
    low, *_, high = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=H.dtype)).tolist()
    text = call("extremes", f"{file}:make").stdout
    assert f"{low:.6g}" in text
    assert f"{high:.6g}" in text


def test_a_module_in_the_working_folder_is_a_target(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = file.parent / "mine_of_cli"
    package.mkdir()
    (package / "problem.py").write_text(PROBLEM)
    monkeypatch.chdir(file.parent)
    path = list(sys.path)
    found = strict(call("extremes", "mine_of_cli.problem:make", "--json").stdout)
    assert found["problem"]["num_parameters"] == 15
    assert sys.path == path


def test_a_limit_is_no_convergence_and_exits_with_1(file: Path) -> None:
    found = strict(
        call("extremes", f"{file}:many", "--json", "--max-matvecs", 5, "--tol", 1e-9, code=1).stdout
    )
    assert found["status"] == "max-matvecs"


def test_a_product_that_is_not_finite_is_said_in_strict_json_and_exits_with_1(
    file: Path, tmp_path: Path
) -> None:
    result = call("extremes", f"{file}:infinite", "--json", "--out", tmp_path, code=1)
    found = strict(result.stdout)
    assert (found["status"], found["largest"]["value"]) == ("non-finite", None)
    assert "no picture" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".png")] == ["extremes.json"]
    assert "loss_fn gave NaN" in call("extremes", f"{file}:undefined", code=1).stderr


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Let the problem `interrupting` raise a signal in a call of its loss."""
    # a job in the background inherits that some are ignored
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}

    def arrange(name: str, at: int) -> None:
        monkeypatch.setenv("TEST_SIGNAL", name)
        monkeypatch.setenv("TEST_CALL", str(at))

    yield arrange
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_solve_gives_its_last_assessment(
    file: Path, tmp_path: Path, signal_at: Callable[[str, int], None], name: str
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    signal_at(name, 40)
    # a named mode, so that no trials of modes call the loss
    mode = ["--mode", "reverse-over-reverse"]
    args = ["extremes", f"{file}:interrupting", "--memory-limit", 0, "--tol", 1e-9, *mode]
    result = call(*args, "--json", "--out", tmp_path, code=128 + number)
    found = strict(result.stdout)
    assert result.stderr.startswith(f"hvpkit: Wrote {tmp_path / 'extremes.json'}.\n")
    assert ("hvpkit: interrupted\n" if name == "SIGINT" else f"interrupted by {name}") in result.stderr
    assert (found["status"], found["converged"]) == ("interrupted", False)
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)
    for end, truth in (("smallest", d[0]), ("largest", d[-1])):
        assert abs(found[end]["value"] - float(truth)) < 0.2
        assert found[end]["error_bound"] > 0
    assert found["history"][-1]["num_matvecs"] == found["num_matvecs"]
    assert strict((tmp_path / "extremes.json").read_text()) == found
    assert f"{found['largest']['value']:.6g}" in call(*args, code=128 + number).stdout
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("command", "options", "at"),
    [
        ("trace", ["--num-matvecs", 100], 8),
        ("density", ["--num-steps", 30], 20),
        ("sharpness", ["--epsilon", 1e-2, "--optimizer", "sgd"], 8),
        ("report", ["--tol", 1e-9, "--method", "lanczos"], 40),
        ("report", ["--tol", 0.5, "--method", "lanczos"], 40),  # both ends are known then
    ],
)
def test_every_measuring_command_gives_a_partial_result(
    file: Path,
    tmp_path: Path,
    signal_at: Callable[[str, int], None],
    command: str,
    options: list[object],
    at: int,
) -> None:
    signal_at("SIGTERM", at)
    matvecs = ["--memory-limit", 0, "--mode", "reverse-over-reverse"] if command != "sharpness" else []
    args = [command, f"{file}:interrupting", *options, *matvecs, "--out", tmp_path]
    found = strict(call(*args, "--json", code=143).stdout)
    assert (found["status"], found["converged"]) == ("interrupted", False)
    partial = found["extremes"] if command == "report" else found
    assert partial["converged"] == (0.5 in options)
    if command == "trace":  # of diag(linspace(-1, 3, 300)): 300
        assert abs(partial["value"] - 300) < 5 * partial["stderr"]
    assert partial.get("num_matvecs", partial.get("num_passes")) > 1
    assert strict((tmp_path / f"{command}.json").read_text()) == found
    result = call(*args, code=143)
    assert "interrupted" in result.stdout + result.stderr
    assert "passes" in result.stdout or "num_" in result.stdout


def test_a_callers_handler_of_a_signal_is_kept(file: Path, signal_at: Callable[[str, int], None]) -> None:
    seen: list[int] = []

    def handler(number: int, _frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        signal_at("SIGTERM", 10)
        call("extremes", f"{file}:interrupting", "--memory-limit", 0)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_an_ignored_signal_stays_ignored(file: Path, signal_at: Callable[[str, int], None]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        signal_at("SIGHUP", 10)
        call("extremes", f"{file}:interrupting", "--memory-limit", 0)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_curvature_is_that_of_the_library(file: Path, curvature: str) -> None:
    args = ["--curvature", curvature, "--tol", 1e-6, "--json"]
    found = strict(call("extremes", f"{file}:objective", *args).stdout)
    H = getattr(hk, curvature)(*made(file, "objective"))
    eigenvalues = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=H.dtype))
    assert found["largest"]["value"] == pytest.approx(float(eigenvalues[-1]), rel=1e-5)
    assert found["smallest"]["value"] == pytest.approx(float(eigenvalues[0]), rel=1e-5, abs=1e-12)
    assert found["problem"]["curvature"] == curvature


def test_curvature_of_a_plain_loss_and_its_compilation_are_refused(file: Path) -> None:
    said = call("extremes", f"{file}:make", "--curvature", "ggn", code=2).stderr
    assert "objective must be a hvpkit.Objective" in said
    said = call("extremes", f"{file}:objective", "--curvature", "ggn", "--compile", code=2).stderr
    assert "--compile: only for --curvature hessian" in said


def test_batchnorm_is_that_of_the_library() -> None:
    args = ["trace", "digits", "--num-examples", 40, "--num-matvecs", 9, "--dtype", "float64", "--json"]
    x, y = digits()
    for batchnorm in ("eval", "batch"):
        found = strict(call(*args, "--batchnorm", batchnorm).stdout)
        objective, params = hk.from_module(digits_cnn().double(), F.cross_entropy, batchnorm=batchnorm)
        H = hk.hessian(objective, params, (x[:40].double(), y[:40]))
        assert found["value"] == pytest.approx(hk.trace(H, num_matvecs=9).value, rel=1e-9)


def test_density_is_that_of_the_library(file: Path, tmp_path: Path) -> None:
    options = ["--num-steps", 9, "--num-probes", 3, "--seed", 2, "--time-limit", 100, "--method", "chebyshev"]
    for given in (options[:-2], options):
        found = strict(call("density", f"{file}:many", *given, "--json", "--out", tmp_path).stdout)
        loss_fn, params, data = made(file, "many")
        H = hk.hessian(loss_fn, params, data)
        method = "chebyshev" if given is options else "lanczos"
        d = hk.spectral_density(H, method=method, num_steps=9, num_probes=3, seed=2)
        assert found["method"] == method
        assert found["nodes"] == pytest.approx(d.nodes.tolist(), rel=1e-12, abs=1e-12)
        assert found["weights"] == pytest.approx(d.weights.tolist(), rel=1e-9, abs=1e-12)
        # the trace of diag(linspace(-1, 3, 300)) is 300
        assert abs(found["trace"]["value"] - 300) < 5 * found["trace"]["stderr"]
        assert found["status"] == "completed"
        assert strict((tmp_path / "density.json").read_text()) == found
        assert drawn(tmp_path / "density.png")
    text = call("density", f"{file}:many", "--num-steps", 5, "--num-probes", 1, "--out", tmp_path).stdout
    assert "share below zero" in text
    assert "± unknown" in text  # one probe gives no standard error
    assert f"Wrote {tmp_path / 'density.json'} and {tmp_path / 'density.png'}." in text


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace_is_that_of_the_library(file: Path, method: str) -> None:
    options = ["--method", method, "--num-matvecs", 60, "--seed", 4, "--time-limit", 100]
    found = strict(call("trace", f"{file}:many", *options, "--json").stdout)
    loss_fn, params, data = made(file, "many")
    truth = hk.trace(hk.hessian(loss_fn, params, data), method=method, num_matvecs=60, seed=4)
    assert found["value"] == pytest.approx(truth.value, rel=1e-12)
    assert found["stderr"] == pytest.approx(truth.stderr, rel=1e-9)
    assert found["num_matvecs"] == truth.num_matvecs


def test_a_trace_without_its_tolerance_exits_with_1(file: Path, tmp_path: Path) -> None:
    args = ["trace", f"{file}:many", "--max-matvecs", 60, "--tol"]
    call(*args, 1e-6, code=1)
    result = call(*args, 0.5, "--out", tmp_path)
    assert strict((tmp_path / "trace.json").read_text())["converged"]
    assert "converged" in result.stdout


def test_sharpness_is_that_of_the_library(file: Path) -> None:
    loss_fn, params, data = made(file)
    for options, mine in (
        (["--epsilon", 1e-2, "--seed", 1], {"epsilon": 1e-2, "lr": 1e-3, "optimizer": "adam", "seed": 1}),
        (
            ["--optimizer", "sgd", "--lr", 0.1, "--tol", 0.1],
            {"epsilon": 1e-3, "optimizer": "sgd", "lr": 0.1, "tol": 0.1},
        ),
    ):
        found = strict(call("sharpness", f"{file}:make", *options, "--batch-size", 30, "--json").stdout)
        truth = keskar_sharpness(loss_fn, params, data, **mine)
        assert found["value"] == pytest.approx(truth.value, rel=1e-12)
        assert found["status"] == truth.status
    text = call(
        "sharpness", f"{file}:make", "--max-steps", 1, "--optimizer", "sgd", "--lr", 1e-9, code=1
    ).stdout
    assert "rising" in text
    assert "wrt" in call("sharpness", f"{file}:make", "--wrt", "w", code=2).stderr


def test_defaults_on_digits_give_usable_answers() -> None:
    examples = ["--num-examples", 200, "--json"]
    found = strict(call("sharpness", "digits", *examples).stdout)
    assert found["status"] == "converged"
    found = strict(call("density", "digits", *examples).stdout)
    assert 0 < found["trace"]["stderr"] < math.inf


def test_check_says_whether_derivatives_are_right(file: Path) -> None:
    found = strict(call("check", f"{file}:make", "--json").stdout)
    assert found["ok"]
    assert {finding["check"] for finding in found["findings"]} >= {"symmetric", "differences"}
    found = strict(call("check", f"{file}:rough", "--json", code=1).stdout)
    assert not found["ok"]
    assert "failed" in call("check", f"{file}:rough", code=1).stdout


def test_report_is_one_page_with_the_values(file: Path, tmp_path: Path) -> None:
    args = ["report", f"{file}:make", "--num-steps", 8, "--num-probes", 2, "--landscape"]
    found = strict(call(*args, "--out", tmp_path, "--json").stdout)
    page = (tmp_path / "report.html").read_text()
    assert f"{found['extremes']['largest']['value']:.8g}" in page
    assert "on the plane of both" in page
    assert found["density"]["n"] == 15
    assert strict((tmp_path / "report.json").read_text()) == found


def test_report_goes_to_the_working_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert "report.html" in call("report", f"{file}:make").stdout
    assert (file.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing", "file.py:function"),
        ("{folder}/none.py:make", "there is no file"),
        ("{file}:none", "has no function none; it has make"),
        ("{file}:number", "has no function number"),
        ("{file}:two", "must return (loss_fn, params, data) or (model, criterion, data), got 2 values"),
        ("{file}:raises", "KeyError: 'lost' ({file}:"),
        ("{file}:misfit", "in loss_fn: return b @ p"),
        (
            "{file}:misfit",
            "loss_fn failed on batch 0 of data (counted from 0), examples 0 to 2: float32 [3, 2]",
        ),
        ("{file}:mislabelled", "loss_fn failed on batch 1 of data (counted from 0), examples 256 to 299"),
        (
            "{file}:with_argument",
            "with_argument must take no arguments and return (loss_fn, params, data) or",
        ),
        ("{file}:no_params", "params must be a tree of tensors"),
        ("{folder}/ending.py:make", "ended by SystemExit(0) ({folder}/ending.py:1"),
        ("no_such_package.module:make", "there is no module no_such_package.module"),
        ("{file}:exits", "ended by SystemExit(0) ({file}:"),
        ("{file}:exits_later", "ended by SystemExit(None) ({file}:"),
        ("{file}:loss_class", "returns the class CrossEntropyLoss as its loss"),
        ("{file}:criterion_class", "criterion is the class CrossEntropyLoss"),
    ],
)
def test_a_bad_target_is_one_clear_line_and_exit_code_2(file: Path, target: str, said: str) -> None:
    places = {"file": str(file), "folder": str(file.parent)}
    (file.parent / "ending.py").write_text("raise SystemExit(0)")
    result = call("extremes", target.format(**places), code=2)
    assert said.format(**places) in result.stderr
    assert result.stderr.removeprefix("a target may print\n").count("\n") == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tol", "-1"], "tol must be"),
        (["--atol", "-1"], "atol must be"),
        (["--method", "newton"], "'newton' is not one of 'auto', 'lanczos', 'multifidelity'"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float64'"),
        (["--curvature", "kfac"], "'kfac' is not one of 'hessian', 'ggn', 'fisher'"),
        (["--batchnorm", "batch"], "--batchnorm: only for a network; "),
        (
            ["--device", "nowhere"],
            "--device must be a device that torch can use here, as 'cpu'; got 'nowhere'",
        ),
        (["--device", "meta"], "--device: meta holds no values"),
        (["--tol", "2"], "tol must be positive and less than 1"),
        (["--wrt", "x*"], "matches no parameter; their names: w, v"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--batch-size", "some"], "batch_size must be a number of examples or 'auto', got 'some'"),
        (["--mode", "exact"], "'exact' is not one of 'auto', "),
        (["--arithmetic", "int8"], "'int8' is not one of 'native', "),
        (["--memory-limit", "-1"], "memory_limit must be"),
        (["--resume", "model.pt"], "checkpoint: there is no file model.pt"),
        (["--data-dir", "data"], "--data-dir: only for digits, cifar10, cifar100"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_options_are_named(file: Path, options: list[str], said: str) -> None:
    stderr = call("extremes", f"{file}:make", *options, code=2).stderr
    assert said in " ".join(stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("choice", "refused"),
    [
        (choices.Mode, lambda *problem: hk.hessian(*problem, mode="?")),
        (choices.Arithmetic, lambda *problem: hk.hessian(*problem, arithmetic="?")),
        (choices.ExtremesMethod, lambda *problem: hk.extreme_eigenvalues(hk.hessian(*problem), method="?")),
        (choices.DensityMethod, lambda *problem: hk.spectral_density(hk.hessian(*problem), method="?")),
        (choices.TraceMethod, lambda *problem: hk.trace(hk.hessian(*problem), method="?")),
        (choices.AscentOptimizer, lambda *problem: keskar_sharpness(*problem, optimizer="?")),
        (choices.BatchNorm, lambda *_: hk.from_module(digits_cnn(), F.cross_entropy, batchnorm="?")),
    ],
)
def test_choices_are_those_that_the_library_names(
    file: Path, choice: type[StrEnum], refused: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="must be one of") as error:
        refused(*made(file))
    assert set(re.findall(r"'([^'?]+)'", str(error.value))) == set(choice)


def test_every_training_method_has_a_learning_rate() -> None:
    assert tuple(choices.TrainingMethod) == tuple(LR)


def test_version_is_that_of_the_package() -> None:
    assert call("--version").stdout == f"hvpkit {hk.__version__}\n"


def test_shells_complete_commands_and_choices() -> None:
    def completed(words: str) -> str:
        env = {"_HVPKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, prog_name="hvpkit", env=env).stdout

    assert completed("hvpkit ext").split() == ["extremes"]
    assert completed("hvpkit extremes --curvature g").split() == ["ggn"]


def test_a_syntax_error_in_a_target_is_said(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def make(:\n")
    said = call("extremes", f"{path}:make", code=2).stderr
    assert "SyntaxError" in said
    assert "broken.py, line 1" in said


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "parallel"])
def test_resume_takes_checkpoints_in_their_usual_forms(tmp_path: Path, wrap: str) -> None:
    model = digits_cnn(seed=5)
    state: Any = model.state_dict()
    if wrap == "parallel":
        state = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
    elif wrap != "plain":
        state = {wrap: state}
    torch.save(state, tmp_path / "model.pt")
    options = ["--resume", tmp_path / "model.pt", "--num-examples", 40, "--tol", 0.2, "--dtype", "float64"]
    found = strict(call("extremes", "digits", *options, "--json").stdout)
    objective, params = hk.from_module(model.double(), F.cross_entropy)
    x, y = digits()
    ex = hk.extreme_eigenvalues(hk.hessian(objective, params, (x[:40].double(), y[:40])), tol=0.2)
    assert found["largest"]["value"] == pytest.approx(ex.largest.value, rel=1e-9)
    assert found["smallest"]["value"] == pytest.approx(ex.smallest.value, rel=1e-9)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "model.pt"
    if form == "torch":
        torch.save({"state_dict": Evil(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(marker), 2))
    result = call("extremes", "digits", "--resume", path, code=2)
    assert "refused" in result.stderr
    assert not marker.exists()
    if form == "torch":
        torch.load(path, weights_only=False)
        assert marker.exists()  # it would have


def test_a_checkpoint_that_does_not_fit_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    args = ["extremes", "digits", "--resume", path]
    assert "there is no file" in call(*args, code=2).stderr
    path.write_bytes(b"PK\x03\x04 cut short")
    assert "cannot be read" in call(*args, code=2).stderr
    torch.save([1, 2], path)
    assert "holds no state_dict" in call(*args, code=2).stderr
    state = digits_cnn().state_dict()
    state["extra"] = state.pop("0.weight")
    state["9.bias"] = torch.zeros(3)
    torch.save(state, path)
    said = call(*args, code=2).stderr
    for part in ("is missing: 0.weight", "is unexpected: extra", "9.bias [3] for [10]", "--arch"):
        assert part in said


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_a_function_may_return_a_network(file: Path, tmp_path: Path, batchnorm: str) -> None:
    model, criterion, data = made(file, "network")
    with torch.no_grad():
        model[3].weight.mul_(3)
        model[1].running_var.mul_(4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    args = ["--resume", tmp_path / "model.pt", "--batchnorm", batchnorm, "--tol", 1e-6, "--json"]
    found = strict(call("extremes", f"{file}:network", *args).stdout)
    H = hk.hessian(*hk.from_module(model, criterion, batchnorm=batchnorm), data)
    truth = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=H.dtype))
    assert found["largest"]["value"] == pytest.approx(float(truth[-1]), rel=1e-5)
    assert found["smallest"]["value"] == pytest.approx(float(truth[0]), rel=1e-5)
    assert found["problem"]["title"] == f"{file}:network, model.pt"


def test_params_of_a_function_are_resumed(file: Path, tmp_path: Path) -> None:
    loss_fn, params, data = made(file)
    params = {name: 2 * p for name, p in params.items()}
    torch.save({"params": params}, tmp_path / "params.pt")
    args = ["extremes", f"{file}:make", "--tol", 1e-6, "--json", "--resume"]
    found = strict(call(*args, tmp_path / "params.pt").stdout)
    H = hk.hessian(loss_fn, params, data)
    truth = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=H.dtype))
    assert found["largest"]["value"] == pytest.approx(float(truth[-1]), rel=1e-5)
    for other in ({"w": params["w"]}, {**params, "v": params["v"][:2]}, 3):
        torch.save(other, tmp_path / "params.pt")
        assert (
            "let TARGET return (model, criterion, data)" in call(*args, tmp_path / "params.pt", code=2).stderr
        )


def test_cifar_100_has_100_classes(tmp_path: Path) -> None:
    rows = torch.randint(0, 256, (4, 3074), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows[:, 1] %= 100
    (tmp_path / "train.bin").write_bytes(rows.numpy().tobytes())
    target = Problem("cifar100", arch="c1", data_dir=tmp_path).load()
    assert list(target.params.values())[-1].shape == (100,)
    assert target.data[1].tolist() == rows[:, 1].tolist()
    assert "CIFAR-100" in target.title


def test_cifar_needs_its_folder_and_an_architecture(tmp_path: Path, cifar: Path) -> None:
    assert "--data-dir" in call("extremes", "cifar10", code=2).stderr
    assert "cifar-10" in call("extremes", "cifar10", "--data-dir", tmp_path, code=2).stderr
    assert "cifar-100" in call("extremes", "cifar100", "--data-dir", tmp_path, code=2).stderr
    args = ["extremes", "cifar10", "--data-dir", cifar]
    assert "arch must be one" in call(*args, "--arch", "vgg", code=2).stderr
    assert "depth must be" in call(*args, "--arch", "resnet21", code=2).stderr
    assert "num_examples must be between 1 and 20" in call(*args, "--num-examples", 21, code=2).stderr


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("c1", 1_756_682),
        ("c2", 1_148_746),
        ("resnet18", 11_173_962),
        ("resnet20", 269_722),
        ("resnet20-nobn", 268_346),
        ("resnet20-nores", 269_722),
        ("resnet20-nobn-nores", 268_346),
        ("resnet32", 464_154),
        ("resnet38", 561_370),
        ("resnet56", 853_018),
    ],
)
def test_architectures_have_their_published_sizes(cifar: Path, arch: str, count: int) -> None:
    target = Problem("cifar10", arch=arch, data_dir=cifar, num_examples=2).load()
    assert sum(p.numel() for p in target.params.values()) == count
    assert target.data[0].shape == (2, 3, 32, 32)


def test_variants_of_a_network_are_those_of_the_zoo(cifar: Path) -> None:
    target = Problem("cifar10", arch="resnet20-nores", data_dir=cifar, seed=2).load()
    objective, params = hk.from_module(cifar_resnet(20, residual=False, seed=2), F.cross_entropy)
    found = target.loss_fn(target.params, target.data)
    assert torch.equal(found, objective(params, target.data))
    assert len(found) == 20


def test_cifar_runs_from_a_checkpoint(cifar: Path, tmp_path: Path) -> None:
    model = cifar_resnet(8, seed=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    args = ["--arch", "resnet8", "--data-dir", cifar, "--resume", tmp_path / "model.pt", "--num-examples", 4]
    found = strict(call("trace", "cifar10", *args, "--num-matvecs", 6, "--json").stdout)
    assert found["problem"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert math.isfinite(found["value"])


def test_every_command_shows_examples_and_exit_codes() -> None:
    commands = [
        "extremes",
        "density",
        "trace",
        "plan",
        "sharpness",
        "check",
        "report",
        "train",
        "track",
        "demo",
    ]
    for name in commands:
        text = call(name, "--help").stdout
        assert f"hvpkit {name} " in text.split("Examples:")[1] or name == "demo"
        assert "Exit codes" in text
        examples = text.split("Examples:")[1].split("Exit codes")[0].splitlines()
        assert all(line.split()[0] == "hvpkit" for line in examples if line.strip()), "no line is broken"
    text = call("--help").stdout
    assert all(name in text for name in commands)
    assert "130 by Ctrl-C" in " ".join(text.split())


def test_a_plan_says_how_long_it_takes_and_whether_it_fits(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--num-steps", 20, "--num-probes", 2, "--num-matvecs", 60, "--method", "lanczos", "--ncv", 9]
    text = call("plan", f"{file}:many", *options[:6]).stdout
    for words in ("extremes", "density", "20 steps x 2", "trace", "hutch++", "a pass takes", "are free"):
        assert words in text
    found = strict(call("plan", f"{file}:many", *options, "--json", "--out", tmp_path / "out").stdout)
    assert found["fits"]
    assert [task["passes"]["expected"] for task in found["tasks"]][1:] == [40, 60]
    assert found["tasks"][0]["num_vectors"] == 21
    assert strict((tmp_path / "out" / "plan.json").read_text()) == found
    monkeypatch.setattr("hvpkit.planning.free_memory", lambda _: 1000.0)
    short = strict(call("plan", f"{file}:many", *options, "--json", code=1).stdout)
    assert not short["fits"]
    assert "smaller ncv" in short["tasks"][0]["remedy"]


def test_what_does_not_fit_into_memory_ends_in_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvpkit.solvers.common.vector_memory.SMALL", 0)
    monkeypatch.setattr("hvpkit.solvers.common.vector_memory.free_memory", lambda _: 1000.0)
    for command in ("extremes", "density", "trace"):
        result = call(command, f"{file}:many", code=2)
        assert "vectors of 300 numbers in float64 take" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


def test_a_named_basis_is_that_of_the_library(file: Path) -> None:
    found = strict(call("extremes", f"{file}:many", "--ncv", 9, "--json").stdout)
    loss_fn, params, data = made(file, "many")
    H = hk.hessian(loss_fn, params, data)
    ex = hk.extreme_eigenvalues(H, ncv=9)
    assert found["num_matvecs"] == ex.num_matvecs > hk.extreme_eigenvalues(H).num_matvecs
    assert found["largest"]["value"] == ex.largest.value
