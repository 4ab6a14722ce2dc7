"""``hvpkit solve`` against dense systems."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import hvpkit as hk
from hvpkit.cli import app
from oracles import gradient_at, hessian_by_double_backward, relative_error

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
    d = torch.linspace(0.01, 3, 300, dtype=torch.float64)

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
    result = CliRunner().invoke(app, ["solve", *(str(arg) for arg in args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def dense(file: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The dense Hessian, the gradient and the parameters."""
    scope: dict[str, Any] = {}
    exec(file.read_text(), scope)
    objective, params, (x, y) = scope["make"]()
    H = hessian_by_double_backward(objective, params, (x, y))

    def loss(flat: Tensor) -> Tensor:
        w, b, v, c = (
            piece.view_as(p)
            for piece, p in zip(
                flat.split([p.numel() for p in params.values()]), params.values(), strict=True
            )
        )
        return F.cross_entropy(torch.tanh(x @ w.mT + b) @ v.mT + c, y)

    return H, gradient_at(loss, torch.cat([p.flatten() for p in params.values()])), params


def test_the_newton_step_is_that_of_the_dense_hessian(file: Path, tmp_path: Path) -> None:
    H, g, params = dense(file)
    exact = torch.linalg.solve(H + 0.05 * torch.eye(len(H), dtype=H.dtype), g)
    args = [f"{file}:make", "--damping", 0.05, "--tol", 1e-9, "--out", tmp_path]
    found = json.loads(call(*args, "--json").stdout)
    assert (found["status"], found["converged"], found["rhs"]) == ("converged", True, "gradient")
    assert found["x_norm"] == pytest.approx([float(exact.norm())])
    assert found["rhs_norm"] == pytest.approx([float(g.norm())])
    assert found["inner_product"] == pytest.approx([float(g @ exact)])
    saved = hk.load(tmp_path / "solution.json")
    assert list(saved.x) == list(params)
    assert relative_error(torch.cat([leaf.flatten() for leaf in saved.x.values()]), exact) < 1e-7
    assert json.loads((tmp_path / "solve.json").read_text()) == found
    assert (tmp_path / "solve.png").stat().st_size > 5000
    shown = call(*args).stdout
    assert f"{float(exact.norm()):.6g}" in shown
    assert "converged: " in shown


def test_a_block_and_right_hand_sides_from_files(file: Path, tmp_path: Path) -> None:
    H = dense(file)[0]
    block = H[20:40, 20:40] + torch.eye(20, dtype=H.dtype)
    columns = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))  # float32: it is converted
    torch.save(columns, tmp_path / "columns.pt")
    args = [f"{file}:make", "--wrt", "2.weight", "--damping", 1.0, "--tol", 1e-9]
    found = json.loads(call(*args, "--rhs", tmp_path / "columns.pt", "--json").stdout)
    exact = torch.linalg.solve(block, columns.double())
    assert found["x_norm"] == pytest.approx(exact.norm(dim=0).tolist())
    assert found["statuses"] == ["converged", "converged"]
    torch.save({"2.weight": torch.ones(4, 5)}, tmp_path / "tree.pt")
    found = json.loads(call(*args, "--rhs", tmp_path / "tree.pt", "--method", "cg", "--json").stdout)
    assert found["method"] == "cg"
    exact = torch.linalg.solve(block, torch.ones(20, dtype=H.dtype))
    assert found["inner_product"] == pytest.approx([float(exact.sum())])
    (tmp_path / "no.pt").write_text("no tensors")
    assert "--rhs" in call(*args, "--rhs", tmp_path / "no.pt", code=2).stderr
    assert "--rhs: there is no file" in call(*args, "--rhs", tmp_path / "none.pt", code=2).stderr
    torch.save(torch.ones(3), tmp_path / "short.pt")
    assert "20" in call(*args, "--rhs", tmp_path / "short.pt", code=2).stderr


def test_what_does_not_converge_is_said(file: Path) -> None:
    result = call(f"{file}:make", "--method", "cg", "--json", code=1)
    found = json.loads(result.stdout)
    assert found["status"] == "negative-curvature"
    assert found["negative_curvature"]["curvature"] < 0
    assert "direction of curvature" in result.stderr
    found = json.loads(call(f"{file}:make", "--max-matvecs", 9, "--json", code=1).stdout)
    assert found["status"] == "max-matvecs"
    assert "damping" in call(f"{file}:make", "--damping", -1, code=2).stderr
    assert "needs damping" in call(f"{file}:make", "--preconditioner", "sample", code=2).stderr
    found = json.loads(call(f"{file}:make", "--preconditioner", "sample", "--damping", 0.1, "--json").stdout)
    assert found["converged"]


def test_interrupted_it_prints_what_it_has_and_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "solve.pt"
    args: list[object] = [f"{file}:interrupting", "--tol", 1e-8, "--json"]
    args += ["--mode", "forward-over-reverse", "--memory-limit", 0]
    monkeypatch.setenv("TEST_CALL", "0")
    whole = json.loads(call(*args).stdout)
    monkeypatch.setenv("TEST_CALL", "40")
    part = json.loads(call(*args, "--checkpoint", checkpoint, code=128 + signal.SIGTERM).stdout)
    assert (part["status"], part["converged"]) == ("interrupted", False)
    assert part["num_matvecs"] > 2
    assert 0 < part["residual"] < 1
    monkeypatch.setenv("TEST_CALL", "0")
    again = json.loads(call(*args, "--checkpoint", checkpoint).stdout)
    assert again["x_norm"] == whole["x_norm"]
    assert not checkpoint.exists()
