"""``hvpkit top`` and ``hvpkit blocks`` against the dense Hessian."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from hvpkit.cli import app

PROBLEM = """
import torch
import hvpkit as hk

def make():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.arange(40) % 4
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return *hk.from_module(model, torch.nn.CrossEntropyLoss()), (x, y)

calls = []

def interrupting():
    import os, signal
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)

    def loss_fn(p, batch):
        calls.append(1)
        if len(calls) == int(os.environ["TEST_CALL"]):
            signal.raise_signal(signal.SIGTERM)
        return (p**2 * d).sum(-1) / 2 + 0 * batch.sum(-1)

    return loss_fn, torch.ones(300, dtype=torch.float64), torch.ones(3, 2)
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


def drawn(path: Path) -> bool:
    return bool(matplotlib.image.imread(path)[..., :3].std() > 0.02)


def dense(file: Path, wrt: str | None = None) -> Tensor:
    scope: dict[str, Any] = {}
    exec(file.read_text(), scope)
    _, params, (x, y) = scope["make"]()
    names = [name for name in params if wrt is None or name.startswith(wrt)]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([params[name].numel() for name in names])
        chosen = {name: piece.view_as(params[name]) for name, piece in zip(names, pieces, strict=True)}
        full = {**params, **chosen}
        z = torch.tanh(x @ full["0.weight"].T + full["0.bias"]) @ full["2.weight"].T + full["2.bias"]
        return F.cross_entropy(z, y)

    point = torch.cat([params[name].flatten() for name in names])
    return torch.autograd.functional.hessian(loss, point)


@pytest.mark.parametrize(("which", "k"), [("LA", 3), ("SA", 2), ("BE", 4)])
def test_top_finds_the_eigenvalues_of_the_dense_hessian(
    file: Path, tmp_path: Path, which: str, k: int
) -> None:
    args = ["top", f"{file}:make", "--k", k, "--which", which, "--tol", 1e-6, "--atol", 0, "--out", tmp_path]
    found = json.loads(call(*args, "--json").stdout)
    values = torch.linalg.eigvalsh(dense(file))
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    wanted = torch.cat([values[:low], values[len(values) - (k - low) :]])
    assert found["values"] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert (found["k"], found["which"], found["converged"]) == (k, which, True)
    assert json.loads((tmp_path / "top.json").read_text())["values"] == found["values"]
    assert drawn(tmp_path / "top.png")
    text = call(*args).stdout
    assert all(f"{value:.6g}" in text for value in found["values"])
    assert text.index(f"{found['values'][-1]:.6g}") < text.index(f"{found['values'][0]:.6g}")


def test_top_inside_the_spectrum(file: Path) -> None:
    values = torch.linalg.eigvalsh(dense(file))
    args = [
        "top",
        f"{file}:make",
        "--k",
        2,
        "--which",
        "CLOSEST",
        "--sigma",
        float(values[-3]),
        "--tol",
        1e-6,
    ]
    found = json.loads(call(*args, "--json").stdout)
    wanted = values[(values - values[-3]).abs().argsort()[:2]].sort().values
    assert found["values"] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found["sigma"] == float(values[-3])
    assert "needs sigma" in call("top", f"{file}:make", "--which", "CLOSEST", code=2).stderr


def test_top_at_a_limit_and_with_wrong_options(file: Path) -> None:
    found = json.loads(
        call("top", f"{file}:make", "--max-matvecs", 9, "--tol", 1e-9, "--json", code=1).stdout
    )
    assert found["status"] == "max-matvecs"
    assert "which" in call("top", f"{file}:make", "--which", "LM", code=2).stderr
    assert "k must" in call("top", f"{file}:make", "--k", 0, code=2).stderr


def test_top_interrupted_prints_what_it_has_and_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "top.pt"
    args: list[object] = ["top", f"{file}:interrupting", "--k", 2, "--tol", 1e-8, "--json"]
    args += ["--mode", "forward-over-reverse", "--memory-limit", 0]
    monkeypatch.setenv("TEST_CALL", "0")
    whole = json.loads(call(*args).stdout)
    monkeypatch.setenv("TEST_CALL", "40")
    part = json.loads(call(*args, "--checkpoint", checkpoint, code=128 + signal.SIGTERM).stdout)
    assert (part["status"], part["converged"]) == ("interrupted", False)
    assert part["num_matvecs"] > 2
    monkeypatch.setenv("TEST_CALL", "0")
    again = json.loads(call(*args, "--checkpoint", checkpoint).stdout)
    assert again["values"] == whole["values"]
    assert not checkpoint.exists()


@pytest.mark.parametrize("options", [[], ["--density", "--num-steps", 30]])
def test_blocks_are_those_of_the_dense_hessian(file: Path, tmp_path: Path, options: list[object]) -> None:
    args = ["blocks", f"{file}:make", "--tol", 1e-6, "--out", tmp_path, *options]
    found = json.loads(call(*args, "--json").stdout)
    assert [block["name"] for block in found["blocks"]] == ["0", "2"]
    for block in found["blocks"]:
        H = dense(file, f"{block['name']}.")
        values = torch.linalg.eigvalsh(H)
        norm = float(values.abs().max())
        assert block["num_parameters"] == len(H)
        assert block["largest"]["value"] == pytest.approx(float(values[-1]), rel=1e-5)
        assert block["smallest"]["value"] == pytest.approx(float(values[0]), rel=1e-5, abs=1e-6 * norm)
        error = abs(block["trace"]["value"] - float(H.trace()))
        assert error <= 5 * block["trace"]["stderr"] + 1e-6 * norm
    assert json.loads((tmp_path / "blocks.json").read_text()) == found
    assert drawn(tmp_path / "blocks.png")
    assert "0.weight" in call("blocks", f"{file}:make", "--by", "parameter").stdout
    assert "by: 'none*' matches" in call("blocks", f"{file}:make", "--by", "none*", code=2).stderr


def test_blocks_by_globs(file: Path) -> None:
    found = json.loads(call("blocks", f"{file}:make", "--by", "*.weight", "--by", "*.bias", "--json").stdout)
    assert [(block["name"], block["num_parameters"]) for block in found["blocks"]] == [
        ("*.weight", 35),
        ("*.bias", 9),
    ]


def test_blocks_interrupted_prints_what_it_has(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args: list[object] = ["blocks", f"{file}:interrupting", "--tol", 1e-8, "--mode", "forward-over-reverse"]
    monkeypatch.setenv("TEST_CALL", "40")
    part = json.loads(call(*args, "--json", "--out", tmp_path, code=128 + signal.SIGTERM).stdout)
    assert (part["status"], part["converged"]) == ("interrupted", False)
    (block,) = part["blocks"]
    assert part["num_passes"] >= block["num_matvecs"] > 2
    assert -1 <= block["smallest"] < 0 < 2 < block["largest"] <= 3
    assert json.loads((tmp_path / "blocks.json").read_text()) == part
    calls_again = call(*args, code=128 + signal.SIGTERM)
    assert "so far" in calls_again.stdout


def test_blocks_interrupted_before_the_first_pass_prints_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CALL", "1")
    assert not call("blocks", f"{file}:interrupting", "--json", code=128 + signal.SIGTERM).stdout
