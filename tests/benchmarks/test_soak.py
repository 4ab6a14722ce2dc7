"""Rounds of random faults over everything that can be resumed: nothing is lost, nothing silently wrong."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import _harness as harness
import soak


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_rounds_of_faults_lose_nothing(tmp_path):
    out, script = tmp_path / "soak.json", Path(soak.__file__)
    args = [sys.executable, str(script), "--rounds", "12", "--seed", "3", "--out", str(out)]
    done = subprocess.run(args, cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = harness.read(out)
    assert (found["wrong"], found["lost"], found["failures"]) == (0, 0, [])
    assert found["num_faults"] >= 5
    assert soak.table(found) in done.stdout


def test_wrong_and_lost_answers_are_told_apart():
    run = soak.Soak(random.Random(0), expected={"trace": "a"})
    for end, outcome in (
        (soak.End(0, "a"), "same bits"),
        (soak.End(0, "b"), "wrong"),
        (soak.End(3, "error"), "lost"),
        (soak.End(-9, ""), "lost"),
    ):
        assert run.compare("trace", end) == outcome
        run.note("trace", "flip", outcome, end)
    record = run.record(1.0)
    assert (record["num_faults"], record["wrong"], record["lost"]) == (4, 1, 2)
    assert len(record["failures"]) == 3


def test_answers_are_compared_without_seconds_and_matvecs():
    one, other = ({"value": 1.0, "seconds": s, "num_matvecs": s, "history": [s]} for s in (1.0, 2.0))
    assert soak.plain(one) == soak.plain(other) == {"value": 1.0}
