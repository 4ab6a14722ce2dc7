import json
import math

import numpy as np
import pytest
from numpy.polynomial.chebyshev import Chebyshev
from scipy.stats import beta

import bench_warm


@pytest.mark.parametrize(("n", "low", "second", "top"), [(1000, -1.0, 1.0, 2.0), (50, 0.0, 0.1, 4.0)])
def test_needed_steps_are_the_first_that_exclude_an_eigenvalue(n, low, second, top):
    def failure(steps):
        """Return how likely the start hides an eigenvalue beyond the top from the best polynomial."""
        at = (2 * 1.02 * top - second - low) / (second - low)
        size = 1 / float(Chebyshev.basis(steps)(at))
        return beta(0.5, (n - 1) / 2).cdf(size**2)

    steps = bench_warm.needed(n, low, second, top)
    assert failure(steps) <= 0.01 < failure(steps - 1)


def test_solve_that_is_cut_misses_a_new_top_and_others_do_not():
    found = bench_warm.overtaken(0.5, 1.2, 3)
    assert [found[way]["missed"] for way in ("cold", "warm", "cut")] == [0, 0, 1]
    assert found["cut"]["passes"] == 5 < min(found["cold"]["passes"], found["warm"]["passes"])


def test_measurements_along_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bench_warm, "PROBLEMS", {"edge": lambda _, count: bench_warm.edge_of_stability(5, count)}
    )
    file = tmp_path / "warm.json"
    bench_warm.main(["--out", str(file), "--count", "2", "--seeds", "1"])
    (row,) = json.loads(file.read_text())["problems"]["edge"]["measurements"]
    assert row["top"] > row["second"] > 0
    assert all(row[f"{way}, {k}"]["error_over_tol"] < 1 for way in ("cold", "warm") for k in (1, 5))
    assert math.isfinite(row["needed"])
    assert np.isfinite([row[f"{way}, 1"]["passes"] for way in ("cold", "warm")]).all()
    assert "| edge |" in capsys.readouterr().out
