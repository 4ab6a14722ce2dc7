import json

import torch

import bench_blocks


def test_both_ways_are_right_and_in_the_table(tmp_path, monkeypatch, capsys):
    for name, value in {
        "DEPTH": 3,
        "NARROW": 5,
        "FEW": 24,
        "NUM_PROBES": 4,
        "NUM_STEPS": 12,
        "EQUAL": 12,
        "DEFAULT": 20,
    }.items():
        monkeypatch.setattr(bench_blocks, name, value)
    threads = torch.get_num_threads()
    file = tmp_path / "found.json"
    bench_blocks.main(["--width", "6", "--examples", "24", "--out", str(file)])
    torch.set_num_threads(threads)
    record = json.loads(file.read_text())
    assert [layer["block"] for layer in record["accuracy"]] == ["0", "2", "4"]
    for layer in record["accuracy"]:
        for way in ("together", "loop, 12 matvecs", "loop, 20 matvecs"):
            one = layer[way]
            assert max(one["errors_over_allowed"]) < 2
            assert all(one["in_interval"])
            assert one["trace_error"] <= 6 * one["trace_stderr"] + 1e-9
    assert len(record["timing"]) == 6
    for timed in record["timing"].values():
        assert timed["passes"] < timed["passes_of_loop"]
        assert timed["converged"] == [True, True]
    assert "| ends and trace, graphs held |" in capsys.readouterr().out


def test_errors_are_in_the_table():
    layer = {"errors_over_allowed": [0.0, 7.0], "in_interval": [True, False], "trace_error": 0.5}
    record = {"accuracy": [{"block": "0", "n": 3, "together": layer}], "timing": {}}
    assert (
        "- together: ends off by at most 7 of the error allowed, 1 of 2 in their interval; traces off by 5.0e-01"
        in (bench_blocks.table(record))
    )
