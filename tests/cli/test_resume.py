"""Commands that are interrupted go on to the same answer, and files that cannot be written never cost one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hvpkit.cli import app

TARGET = """
import os, signal, torch

calls = []

def make():
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)

    def loss_fn(p, b):
        calls.append(1)
        if len(calls) == int(os.environ.get("TEST_CALL", 0)):
            signal.raise_signal(getattr(signal, os.environ["TEST_SIGNAL"]))
        return (p**2 * d).sum(-1) / 2 + 0 * b.sum(-1)

    return loss_fn, torch.ones(300, dtype=torch.float64), torch.ones(3, 2)

def never():
    raise KeyError("the target is loaded")
"""
MODE = ["--memory-limit", 0, "--mode", "reverse-over-reverse"]
COMMANDS: dict[str, tuple[list[object], int]] = {
    "extremes": (["--tol", 1e-9, "--method", "lanczos"], 40),
    "trace": (["--num-matvecs", 100], 9),
    "density": (["--num-steps", 30], 20),
    "density by moments": (["--method", "chebyshev", "--num-steps", 30, "--num-probes", 2], 60),
    "ends of a density": (["--method", "chebyshev", "--num-steps", 30, "--num-probes", 2], 20),
    "report": (["--tol", 1e-9, "--method", "lanczos"], 40),
    "density of a report": (["--tol", 0.5, "--method", "lanczos"], 45),
}
NAMES = {"density by moments": "density", "ends of a density": "density", "density of a report": "report"}


def call(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answer(text: str) -> Any:
    """Return an answer without seconds, matvecs and the history that has both."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            timed = ("seconds", "num_matvecs", "history")
            return {key: plain(item) for key, item in value.items() if key not in timed}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(json.loads(text))


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "problem.py").write_text(TARGET)
    return str(tmp_path / "problem.py")


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
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


@pytest.mark.parametrize(
    ("case", "name"), [*((case, "SIGTERM") for case in COMMANDS), ("trace", "SIGHUP"), ("trace", "SIGINT")]
)
def test_interrupted_command_goes_on_to_the_same_answer(
    target: str, tmp_path: Path, interruption: Callable[[str, int], None], case: str, name: str
) -> None:
    options, at = COMMANDS[case]
    command, saved = NAMES.get(case, case), tmp_path / "saved" / "work.pt"
    saved.parent.mkdir()
    args = [command, f"{target}:make", *options, *MODE, "--json"]
    args += ["--out", tmp_path] if command == "report" else []
    whole = answer(call(*args).stdout)
    interruption(name, at)
    stopped = call(*args, "--checkpoint", saved, code=128 + getattr(signal, name))
    assert json.loads(stopped.stdout)["status"] == "interrupted"
    assert f"hvpkit: saved in {saved}" in stopped.stderr
    assert "; the same command continues from it" in stopped.stderr
    interruption(name, 0)
    assert answer(call(*args, "--checkpoint", saved).stdout) == whole
    assert list(saved.parent.iterdir()) == []


@pytest.mark.parametrize("command", ["extremes", "trace", "density", "report"])
def test_checkpoint_of_other_options_is_refused(
    target: str, tmp_path: Path, interruption: Callable[[str, int], None], command: str
) -> None:
    options, at = COMMANDS[command]
    saved = tmp_path / "work.pt"
    args = [command, f"{target}:make", *options, *MODE, "--out", tmp_path / "out", "--checkpoint", saved]
    interruption("SIGTERM", at)
    call(*args, code=143)
    interruption("SIGTERM", 0)
    said = " ".join(call(*args, "--seed", 1, code=2).stderr.split())
    assert "holds another solve (" in said
    assert "seed was 0 and is 1" in said
    saved.write_bytes(saved.read_bytes()[:-40])
    assert "is damaged" in call(*args, code=2).stderr


@pytest.mark.parametrize("command", ["extremes", "trace", "density", "report", "check", "sharpness"])
def test_files_are_tried_before_the_target_is_loaded(target: str, tmp_path: Path, command: str) -> None:
    args = [command, f"{target}:never"]
    assert "the target is loaded" in call(*args, code=2).stderr
    below = tmp_path / "problem.py" / "out"
    assert "hvpkit: --out: cannot make the folder" in call(*args, "--out", below, code=2).stderr
    (tmp_path / "out" / f"{command}.json").mkdir(parents=True)
    said = call(*args, "--out", tmp_path / "out", code=2).stderr
    assert f"{command}.json is not a regular file" in said.replace("\n", "")
    if command not in ("check", "sharpness"):
        for bad in ("/proc/work.pt", "/dev/full", tmp_path / "nowhere" / "work.pt"):
            assert "hvpkit: --checkpoint: " in call(*args, "--checkpoint", bad, code=2).stderr


@pytest.mark.parametrize("command", ["extremes", "trace", "density", "report", "check"])
def test_a_full_disk_does_not_cost_the_answer(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    args = [command, f"{target}:make", *MODE, "--json", "--out", tmp_path / "out"]
    whole = answer(call(*args).stdout)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    result = call(*args, code=2)
    assert answer(result.stdout) == whole
    said = result.stderr.replace("\n", " ")
    assert "--out: could not write" in said
    assert "(No space left on device)" in said
    assert "the result is printed above" in said
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_does_not_change_an_interruption(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: Callable[[str, int], None],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    interruption("SIGTERM", 9)
    args = ["trace", f"{target}:make", "--num-matvecs", 100, *MODE, "--json", "--out", tmp_path]
    result = call(*args, code=143)
    assert json.loads(result.stdout)["status"] == "interrupted"
    assert "could not write" in result.stderr


def test_check_prints_the_findings_so_far(
    target: str, tmp_path: Path, interruption: Callable[[str, int], None]
) -> None:
    interruption("SIGTERM", 6)
    result = call("check", f"{target}:make", *MODE, "--json", "--out", tmp_path, code=143)
    found = json.loads(result.stdout)
    assert (found["ok"], found["status"]) == (False, "interrupted")
    assert found["findings"][0]["check"] == "data order"
    assert json.loads((tmp_path / "check.json").read_text()) == found


def test_track_and_demo_print_the_values_so_far(
    tmp_path: Path, interruption: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvpkit.solvers.lanczos import Lanczos
    from hvpkit.zoo import digits_cnn

    assess, count = Lanczos.assess, 0

    def interrupted(self: Lanczos, state: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            signal.raise_signal(signal.SIGTERM)
        return assess(self, state)

    interruption("SIGTERM", 0)
    torch.save(digits_cnn(seed=0).state_dict(), tmp_path / "model.pt")
    monkeypatch.setattr(Lanczos, "assess", interrupted)
    args = ["track", "digits", "--num-examples", 60, "--checkpoints", tmp_path / "model.pt", "--json"]
    (line,) = call(*args, code=143).stdout.splitlines()
    found = json.loads(line)
    assert (found["step"], found["status"]) == (0, "interrupted")
    assert found["largest"] > found["smallest"]
    count = 0
    assert "So far, not verified" in call("demo", "--out", tmp_path / "demo", code=143).stdout
