from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hvpkit.cli.output import Output, as_json
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.results.eigen import Progress, Status


@dataclass(frozen=True)
class Record:
    numbers: torch.Tensor
    status: Status


def test_json_is_strict_whatever_it_is_made_of() -> None:
    record = {
        "a": Record(torch.tensor([1.0, torch.inf]), Status.CONVERGED),
        "b": (float("nan"), None, True, "x"),
    }
    assert json.loads(as_json(record)) == {
        "a": {"numbers": [1.0, None], "status": "converged"},
        "b": [None, None, True, "x"],
    }


def test_files_need_matplotlib_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Output().prepare()
    with pytest.raises(ImportError, match="hvpkit\\[plots\\]"):
        Output(out=tmp_path / "new").prepare()
    assert not (tmp_path / "new").exists()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    output = Output(json=True, out=tmp_path)
    (tmp_path / "it.png").write_bytes(b"old")

    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        output.write("it", {"x": 1}, [], fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.png"]
    assert (tmp_path / "it.png").read_bytes() == b"old"
    assert json.loads((tmp_path / "it.json").read_text()) == {"x": 1}


def test_a_terminal_shows_progress_and_keeps_what_is_printed_between_two_solves() -> None:
    script = """
from hvpkit.cli.output import Output
from hvpkit.cli.progress_line import ProgressLine
from hvpkit.results.eigen import Progress
watch, output = ProgressLine("Both ends"), Output()
for number in range(2):
    watch.begin()
    watch(Progress(7, 0.1, -1.25, 8.5, 0.1, 0.2))
    watch.end()
    output.print(None, f"line {number}")
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
    ):
        os.close(theirs)
        found = b""
        try:
            while piece := os.read(ours, 4096):
                found += piece
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    text = found.decode()
    assert "7.0 passes, -1.25 ± 0.1 … 8.5 ± 0.2" in text
    begin = text.index("line 0\r\n") + len("line 0\r\n")
    assert "\x1b[" not in text[begin : text.index("Both ends", begin)]  # not up into the printed line
    assert text.rstrip().endswith("line 1")


def test_a_progress_line_keeps_the_last_entry() -> None:
    watch, entry = ProgressLine("Trace"), Progress(7, 0.1, -1.25, 8.5, 0.1, 0.2)
    watch(entry)
    assert watch.last == entry


def test_a_signal_from_outside_leaves_the_partial_result(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("""
import time, torch

def make():
    d = torch.linspace(-1, 3, 400, dtype=torch.float64)

    def loss_fn(p, b):
        print("called", flush=True)
        time.sleep(0.01)
        return (p**2 * d).sum(-1) / 2 + 0 * b.sum(-1)

    return loss_fn, torch.ones(400, dtype=torch.float64), torch.ones(3, 2)
""")
    args = [sys.executable, "-m", "hvpkit", "extremes", "slow.py:make", "--tol", "1e-9", "--json"]
    args += ["--memory-limit", "0", "--mode", "reverse-over-reverse"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(args, cwd=tmp_path, **pipes) as process:
        assert process.stderr is not None
        for _ in range(60):
            assert process.stderr.readline() == "called\n"  # what a target prints is not among the results
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    found = json.loads(stdout)
    assert found["status"] == "interrupted"
    assert 1 < found["largest"]["value"] <= 3
    assert stderr.endswith("hvpkit: interrupted by SIGTERM\n")


PRINTING = """
import atexit, ctypes, os, subprocess, sys
import torch

def make():
    print("printed")
    print("dunder", file=sys.__stdout__, flush=True)
    os.write(1, b"raw\\n")
    subprocess.run(["echo", "from a child"])
    library = ctypes.CDLL(None)
    library.puts(b"from C")
    library.fflush(None)
    atexit.register(print, "at the end")
    sys.stdout = sys.__stdout__
    return lambda p, b: torch.tanh(b @ p) ** 2, torch.ones(2), torch.eye(2)
"""


def test_nothing_that_a_target_prints_gets_between_the_json(tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(PRINTING)
    args = [sys.executable, "-m", "hvpkit", "extremes", "printing.py:make", "--json"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["converged"]
    for text in ("printed", "dunder", "raw", "from a child", "from C", "at the end"):
        assert text in done.stderr
