from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hvpkit.cli import app
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.cli.verbosity import is_quiet, is_verbose, verbosity

PROBLEM = """
import torch

def make():
    return lambda p, b: (torch.tanh(b @ p["w"])) ** 2, {"w": torch.ones(3)}, torch.linspace(-1, 1, 30).reshape(10, 3)

def fails():
    raise OverflowError("too much")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "problem.py").write_text(PROBLEM)
    return tmp_path


def call(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_options_come_from_a_file_and_the_command_line_comes_first(folder: Path) -> None:
    path = folder / "hvpkit.toml"
    path.write_text(f"""
target = "{folder}/problem.py:make"
seed = 3
json = true
num-probes = 1  # not an option of extremes: for others

[extremes]
tol = 0.25
wrt = ["w"]

[density]
num_steps = 2
""")
    found = json.loads(call("extremes", "--config", path).stdout)
    assert (found["tol"], found["problem"]["wrt"], found["problem"]["seed"]) == (0.25, ["w"], 3)
    assert json.loads(call("extremes", "--config", path, "--tol", 0.5).stdout)["tol"] == 0.5
    density = json.loads(call("density", "--config", path).stdout)
    assert (density["num_matvecs"], density["problem"]["wrt"]) == (2, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("tolerance = 1", "the top has tolerance, which is no option"),
        ("[extremes]\nepochs = 1", "[extremes] has epochs, which is no option"),
        ("[extreme]\ntol = 1", "there is no command extreme; there are"),
        ("tol = ", "cannot be read as TOML"),
        ('tol = "small"', "Invalid value for '--tol'"),
        (None, "cannot be read as TOML"),
    ],
)
def test_a_file_that_says_what_there_is_not_is_refused(folder: Path, content: str | None, said: str) -> None:
    path = folder / "hvpkit.toml"
    if content is not None:
        path.write_text(content)
    stderr = call("extremes", f"{folder}/problem.py:make", "--config", path, code=2).stderr
    assert said in " ".join(stderr.replace("│", " ").split())


def test_quiet_leaves_results_and_verbose_adds_how_they_were_made(folder: Path) -> None:
    args = ["extremes", f"{folder}/problem.py:make", "--mode", "reverse-over-reverse", "--out"]
    usual, quiet = call(*args, folder / "a").stdout, call(*args, folder / "b", "-q").stdout
    assert "Wrote" in usual
    assert "Wrote" not in quiet
    assert "largest" in quiet
    assert (folder / "b" / "extremes.json").exists()
    stderr = call(*args, folder / "c", "-v").stderr
    assert "Hessian: 3 x 3" in stderr
    assert "mode of matvecs: reverse-over-reverse" in stderr


def test_verbose_shows_the_traceback_of_an_error(folder: Path) -> None:
    args = ["extremes", f"{folder}/problem.py:fails"]
    assert "Traceback" not in call(*args, code=2).stderr
    stderr = call(*args, "-v", code=2).stderr
    assert 'raise OverflowError("too much")' in stderr
    assert stderr.splitlines()[-1].startswith("hvpkit: OverflowError: too much")


def test_verbosity_lasts_as_long_as_a_command() -> None:
    with verbosity(quiet=True, verbose=True):
        assert is_quiet()
        assert is_verbose()
        assert ProgressLine("text")._options["disable"]
    assert not is_quiet()
    assert not is_verbose()
    assert ProgressLine("text")._options["disable"] is None


def test_the_example_of_the_documentation_is_accepted(folder: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    (folder / "options.toml").write_text(example)
    stderr = call("density", "--config", folder / "options.toml", code=2).stderr
    assert "cifar-10-python.tar.gz" in stderr  # its data are not there
