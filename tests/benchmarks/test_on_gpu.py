from __future__ import annotations

import json
from pathlib import Path

import pytest

import on_gpu


def test_the_rehearsal_runs_on_a_cpu_and_writes_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "STEPS", (0, 2))
    monkeypatch.setattr(on_gpu, "REPEATS", 1)
    monkeypatch.setattr(on_gpu, "VARIANTS", {k: v for k, v in on_gpu.VARIANTS.items() if k != "compiled"})
    file = tmp_path / "on_gpu.json"
    on_gpu.main(["--small", "--out", str(file), "--parts", "headline", "matvecs", "synchronisation"])
    parts = json.loads(file.read_text())["parts"]
    assert [state["steps"] for state in parts["headline"]["states"]] == [0, 2]
    assert all(state["extremes"]["converged"] for state in parts["headline"]["states"])
    for network in on_gpu.NETWORKS:
        found = parts["matvecs"][network]
        assert found["eager"]["distance"] == 0
        assert 0 < found["bf16"]["distance"] < 0.2
        assert found["eager"]["matvec_over_gradient"] > 1
    assert parts["matvecs"]["ResNet-18"]["channels last"]["distance"] < 1e-4
    assert parts["synchronisation"]["step_waits"] is None
    assert "| ResNet-18 | eager |" in capsys.readouterr().out


def test_a_part_that_fails_is_written_with_its_error_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no kernel for that")

    monkeypatch.setattr(on_gpu, "PARTS", {"one": fails, "two": lambda _: {"done": 1}})
    file = tmp_path / "on_gpu.json"
    on_gpu.main(["--small", "--out", str(file), "--parts", "one", "two"])
    parts = json.loads(file.read_text())["parts"]
    assert parts["one"]["error"] == "RuntimeError: no kernel for that"
    assert parts["two"]["done"] == 1


def test_no_part_begins_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "on_gpu.json"
    on_gpu.main(["--small", "--out", str(file), "--minutes", "0", "--parts", "headline"])
    assert "headline: no time left" in capsys.readouterr().out
    assert not file.exists()
