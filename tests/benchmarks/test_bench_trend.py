"""The script of the trend over examples, on a network that has learnt nothing and a few hundred images."""

import json

import pytest
import torch

import _problems as problems
import bench_trend


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    images = torch.rand(100, 1, 14, 14, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(problems, "mnist", lambda: (images, torch.arange(100) % 10))


def test_all_methods_are_measured_over_each_number_of_examples(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    network = problems.Problem("dense", problems.dense(), *problems.shifted_mnist(), 100)
    monkeypatch.setattr(problems, "load", lambda *_: network)
    file = tmp_path / "trend.json"
    bench_trend.main(["--cache", str(tmp_path), "--out", str(file), "--seeds", "1", "--problems", "10000"])
    found = json.loads(file.read_text())["problems"]["10000"]
    assert set(found["runs"]) == set(bench_trend.RUNS)
    for method, (run,) in found["runs"].items():
        assert max(run["errors_over_tol"]) <= (1 if "certified" in method else 2)
        assert run["status"] == "converged"
    assert "| 10,000 |" in capsys.readouterr().out


def test_fewer_copies_are_the_first_ones():
    few, many = problems.shifted_mnist(1), problems.shifted_mnist(3)
    assert len(many[0]) == len(many[1]) == 300
    assert torch.equal(many[0][:100], few[0])
    assert torch.equal(many[1][:100], few[1])
