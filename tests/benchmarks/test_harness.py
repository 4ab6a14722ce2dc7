import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import _harness as harness
from _problems import diagonal

BENCHMARKS = Path(harness.__file__).parent
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("[!_]*.py"))


def test_record_of_another_setting_or_machine_is_refused(tmp_path):
    file = tmp_path / "found.json"
    header = {"tol": 0.01, "machine": harness.machine()}
    harness.write(file, harness.open_record(file, header, problems={}) | {"problems": {"a": 1}})
    before = file.read_bytes()
    assert harness.open_record(file, header, problems={})["problems"] == {"a": 1}
    other = header | {"tol": 0.1, "machine": header["machine"] | {"threads": 99}}
    with pytest.raises(SystemExit, match="was made with another tol, threads; choose another place"):
        harness.open_record(file, other, problems={})
    found = harness.open_record(file, other, extendable=("tol", "threads"))
    assert (found["tol"], found["problems"]) == (0.1, {"a": 1})
    assert file.read_bytes() == before


def test_keys_that_an_older_file_lacks_are_not_compared(tmp_path):
    file = tmp_path / "old.json"
    harness.write(file, {"machine": {"torch": torch.__version__}, "problems": {}})
    assert harness.open_record(file, {"machine": harness.machine(), "sizes": (1, 2)})["sizes"] == (1, 2)
    harness.write(file, {"sizes": (1, 2)})
    assert harness.open_record(file, {"sizes": (1, 2)}) == {"sizes": (1, 2)}  # JSON has lists


def test_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "found.json"
    harness.write(file, {"a": 1})
    with pytest.raises(TypeError):
        harness.write(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [*file.parent.iterdir()] == [file]


def test_report_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--out: there is no file .*none\.json; measure first"):
        harness.read(tmp_path / "none.json")


def test_resume_skips_what_is_done():
    again, more = argparse.Namespace(resume=False), argparse.Namespace(resume=True)
    assert harness.pending(again, "abc", {"b"}) == ["a", "b", "c"]
    assert harness.pending(more, "abc", {"b"}) == ["a", "c"]


def test_tables():
    assert (
        harness.markdown(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
    )
    assert harness.median([]) == "-"
    assert harness.median([2.0]) == "2"
    assert harness.median([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert harness.median([3.0, 1.0, 2.0], spread=False) == "2"


def test_digest_is_of_every_parameter():
    model = nn.Linear(2, 2)
    first = harness.digest(model)
    assert harness.digest(model) == first
    assert len(first) == 16
    with torch.no_grad():
        model.bias[1] += 1e-3
    assert harness.digest(model) != first


def test_timed_matvecs_are_counted_and_unchanged():
    op, spent = diagonal(torch.arange(3.0)), []
    image = harness.with_timed_matvecs(op, spent.append) @ torch.ones(3)
    assert image.tolist() == [0, 1, 2]
    assert len(spent) == 1
    assert spent[0] >= 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_has_a_help_a_test_and_a_line_in_the_index(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(script.__doc__.splitlines()[0].split()) in text
    assert f"`{name}.py`" in (BENCHMARKS / "README.md").read_text()
    tests = Path(__file__).parent.glob("test_*.py")
    assert any(f"import {name}" in test.read_text() for test in tests if test != Path(__file__))
