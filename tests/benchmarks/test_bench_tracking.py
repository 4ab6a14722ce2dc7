import json

import pytest

import _problems as problems
import bench_tracking


def test_ends_at_each_checkpoint_are_those_of_the_dense_matrix(two_layers, ends, tmp_path, capsys):
    file = tmp_path / "found.json"
    bench_tracking.main(
        ["--cache", str(tmp_path), "--problems", "two layers", "--epochs", "3", "--out", str(file)]
    )
    entry = json.loads(file.read_text())["problems"]["two layers"]
    model, (x, y) = two_layers.model(), two_layers.data()
    for state, found in zip(problems.checkpoints("two layers", tmp_path, 3), entry["ends"], strict=True):
        model.load_state_dict(state)
        assert found == pytest.approx(ends(model, x, y), rel=1e-3)
    assert [0 <= overlap <= 1.001 for overlap in entry["overlap_of_low_vectors"]] == [True, True]
    for run in entry["runs"].values():
        assert len(run["passes"]) == 3
        assert max(run["errors_over_tol"]) < 1
    passes = sum(entry["runs"]["lanczos"]["passes"])
    assert f"| two layers | {passes:.0f} |" in (text := capsys.readouterr().out)
    assert "| 0, 0 of 3 |" in text


def test_error_is_the_worse_ends():
    class Pair:
        def __init__(self, value):
            self.value = value

    class Ends:
        def __init__(self, low, high):
            self.smallest, self.largest = Pair(low), Pair(high)

    assert bench_tracking.error(Ends(-1.02, 10.0), Ends(-1.0, 10.0)) == pytest.approx(2)
    assert bench_tracking.error(Ends(-1.0, 9.5), Ends(-1.0, 10.0)) == pytest.approx(5)
