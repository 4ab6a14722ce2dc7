import json
from dataclasses import replace

import pytest

import bench_step
import hvpkit as hk
from _problems import over

SMALL = ["--n", "3000", "--vectors", "30", "--repeats", "3"]


@pytest.fixture
def bench(two_layers, monkeypatch, tmp_path):
    networks = {"two layers": lambda: over(two_layers.model(), two_layers.data())}
    monkeypatch.setattr(bench_step, "NETWORKS", networks)
    file = tmp_path / "found.json"

    def run(*options):
        bench_step.main([*SMALL, "--out", str(file), *options])
        return json.loads(file.read_text())

    run.file = file
    return run


def test_seconds_and_shares(bench, capsys):
    found = bench()
    assert (found["n"], found["vectors"], len(found["runs"])) == (3000, 30, 3)
    ratios = [run["solve"] / run["traffic"] for run in found["runs"]]
    assert found["median"] == pytest.approx(sorted(ratios)[1])
    assert min(ratios) > 0
    row = found["networks"]["two layers"]
    assert row["n"] == 75
    assert row["share"] == pytest.approx(row["beside"] / (row["beside"] + row["products"]))
    assert 0 < row["share"] < 1
    assert f"median ratio {found['median']:.2f}" in capsys.readouterr().out


def test_wrong_vectors_are_not_timed(bench, monkeypatch):
    solve = hk.lanczos

    def spoilt(*args, **options):
        found = solve(*args, **options)
        return replace(found, vectors=found.vectors.flip(1))

    monkeypatch.setattr(hk, "lanczos", spoilt)
    with pytest.raises(SystemExit, match=r"residuals or vectors are off by .*; not timed"):
        bench()
    assert not bench.file.exists()


def test_solve_that_stops_early_is_not_timed(bench, monkeypatch):
    solve = hk.lanczos
    monkeypatch.setattr(hk, "lanczos", lambda *args, **options: solve(*args, **options | {"max_matvecs": 12}))
    with pytest.raises(SystemExit, match="12 matvecs instead of 31; not timed"):
        bench()


def test_interrupted_run_goes_on(bench, monkeypatch):
    whole = bench()
    monkeypatch.setattr(bench_step, "solve", lambda *_: pytest.fail("measured again"))
    assert bench("--resume") == whole
