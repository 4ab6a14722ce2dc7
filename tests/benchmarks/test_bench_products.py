import json

import pytest

import bench_products


@pytest.fixture
def bench(two_layers, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_products, "PROBLEMS", {"two layers": (two_layers.model, two_layers.data)})
    file = tmp_path / "found.json"

    def run(*options):
        bench_products.main(["--repeats", "2", "--out", str(file), *options])
        return json.loads(file.read_text())["problems"]["two layers"]

    run.file = file
    return run


def test_products_are_right_and_timed(bench, capsys):
    row = bench()
    assert (row["parameters"], row["examples"]) == (75, 64)
    sizes = [f"{size}" for size in bench_products.SIZES if size < 128]
    assert set(row["over_gradient"]) == {"fresh", "kept", "auto", *sizes}
    assert min(row["over_gradient"].values()) > 0
    assert row["gradient_seconds"] > 0
    assert 0 < row["auto_batch_size"] <= 64
    assert row["kept_bytes"] > 64 * 8 * 4  # the hidden activations at least
    assert row["peak_bytes_of_a_product"] > 0
    assert row["seconds_to_compile"] is None
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| two layers | 75 | ")
    assert "| - |" in line  # not compiled


def test_wrong_product_is_not_timed(bench, monkeypatch):
    plain = bench_products.plain_product
    monkeypatch.setattr(bench_products, "plain_product", lambda *args: 1.01 * plain(*args))
    with pytest.raises(SystemExit, match=r"two layers: the product of 'fresh' is off by 0\.0099; not timed"):
        bench()
    assert not bench.file.exists()


def test_problems_that_are_there_are_skipped(bench, monkeypatch):
    first = bench()
    monkeypatch.setattr(bench_products, "measure", lambda *_: pytest.fail("measured again"))
    assert bench("--resume") == first
