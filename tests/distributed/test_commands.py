"""Commands in several processes, one of them under torchrun, print and write what one process does, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distributed.ranks import launch, torchrun
from hvpkit.cli import app

SMALL = ["digits", "--num-examples", "200"]
COMMANDS = {
    "extremes": ["--tol", "1e-4"],
    "trace": ["--num-matvecs", "9"],
    "plan": [],
}


def alone(*arguments: str) -> Any:
    return json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)


def values(record: dict[str, Any]) -> list[Any]:
    """Return the numbers that do not depend on the machine's speed."""
    if "tasks" in record:
        return [[task["call"], task["method"], task["num_vectors"]] for task in record["tasks"]]
    ends = [record[name]["value"] for name in ("smallest", "largest") if name in record]
    return [*ends, record.get("value"), record["num_matvecs"], record["status"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_print_one_result_and_write_it_once(command: str, tmp_path: Path) -> None:
    arguments = [command, *SMALL, *COMMANDS[command], "--json"]
    files = [] if command == "plan" else ["--out", str(tmp_path)]
    call = ["hvpkit", *arguments, *files]
    done = torchrun(*call, module=True) if command == "extremes" else launch(2, "-m", *call)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found, expected = values(json.loads(line)), values(alone(*arguments))
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, rel=1e-3) if isinstance(other, float) else other)
    if files:
        assert values(json.loads((tmp_path / f"{command}.json").read_text())) == found
        assert done.stderr.count("Wrote") == 1


def test_an_error_is_printed_once_with_its_exit_code() -> None:
    done = launch(2, "-m", "hvpkit", "extremes", "digits", "--num-examples", "0")
    assert done.returncode == 2
    assert done.stderr.count("hvpkit: num_examples must be between 1 and") == 1
