from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hvpkit as hk
import question
from hvpkit.cli import app


def in_this_process(*words: object) -> str:
    """Run a command as ``question.hvpkit`` does, without a process of its own."""
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(done.exit_code)
    return done.stdout


def test_the_rehearsal_continues_and_its_ends_are_those_of_the_kept_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, args = tmp_path / "question.json", ["--small", "--work", str(tmp_path), "--out"]
    real, calls = question.solve, []

    def interrupted(*given: object) -> object:
        calls.append(given[2:])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(question, "solve", interrupted)
    monkeypatch.setattr(question, "hvpkit", in_this_process)
    with pytest.raises(KeyboardInterrupt):
        question.main([*args, str(file)])
    question.main([*args, str(file)])
    assert calls == [(1, "auto"), (2, "auto"), (2, "auto"), (2, "lanczos")]
    solves = json.loads(file.read_text())["solves"]
    x, y = hk.zoo.digits()
    model = hk.zoo.digits_cnn()
    model.load_state_dict(torch.load(tmp_path / "run" / "epoch-0002.pt", weights_only=True))
    objective, params = hk.from_module(model.double().eval(), torch.nn.functional.cross_entropy)
    exact = hk.extreme_eigenvalues(hk.hessian(objective, params, (x[:300].double(), y[:300])), tol=1e-6)
    for name in ("epoch 2, auto", "epoch 2, lanczos"):
        for end in ("smallest", "largest"):
            assert solves[name]["extremes"][end]["value"] == pytest.approx(
                getattr(exact, end).value, rel=1e-2
            )
    assert "| 2 | lanczos |" in capsys.readouterr().out


def test_commands_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert question.hvpkit("--version") == in_this_process("--version")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match=r"^1$"):
        question.hvpkit("--version")


def test_solves_that_disagree_are_seen() -> None:
    def solve(low: float) -> dict[str, object]:
        interval = {"interval": {"lower": low, "upper": low + 1}}
        return {"extremes": {"smallest": interval, "largest": interval}}

    assert question.agree(solve(0), solve(0.5))
    assert not question.agree(solve(0), solve(2))


def test_a_matvec_of_the_large_network_takes_three_to_four_gradients() -> None:
    forward = (
        2 * 555_422_720
    )  # multiplications and additions of convolutions and the linear layer, for an image
    assert 6 * forward < question.operations_of_a_matvec() < 10 * forward
    found = question.at_full_size(40, 30)
    assert found["n"] == 11_173_962
    assert found["seconds"] == pytest.approx(40 * found["seconds_of_a_pass"], rel=0.05)
