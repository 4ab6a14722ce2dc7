import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn import functional as F

import headline
import hvpkit as hk

SMALL = ["--size", "small", "--examples", "60", "--device", "cpu"]


def run(*arguments):
    headline.main([*SMALL, *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headline")
    run("--epochs", 3, 1, "--check", "--out", folder / "out.json", "--cache", folder)
    return json.loads((folder / "out.json").read_text()), folder


def images():
    x, y = hk.zoo.digits()
    return x[:60].expand(-1, 3, -1, -1), y[:60]


def saved(file):
    model = hk.zoo.resnet18_cifar(width=2, seed=5)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    return model


def both_ends(model, x, y):
    """By ARPACK, with products by double backward in float64, all examples at once."""
    model = headline.recompute_batchnorm(model, x, 1000).double()
    weights = [*model.parameters()]
    gradient = torch.autograd.grad(F.cross_entropy(model(x.double()), y), weights, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradient])

    def product(v):
        image = torch.autograd.grad(gradient, weights, torch.from_numpy(v.ravel()), retain_graph=True)
        return torch.cat([g.flatten() for g in image]).numpy()

    A = LinearOperator((len(gradient),) * 2, product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(gradient))
    return [float(eigsh(A, 1, which=end, tol=1e-3, v0=start)[0][0]) for end in ("SA", "LA")]


@pytest.mark.parametrize(("place", "epoch"), [(0, 1), (1, 3)])
def test_both_ends_are_those_of_the_network_that_is_kept(measured, place, epoch):
    study, folder = measured
    found, ends = study["measured"][place], study["measured"][place]["extremes"]
    model, (x, y) = saved(folder / f"epoch-{epoch}.pt"), images()
    smallest, largest = both_ends(model, x, y)
    assert found["epoch"] == epoch
    assert ends["smallest"]["value"] == pytest.approx(smallest, rel=1e-2)
    assert ends["largest"]["value"] == pytest.approx(largest, rel=1e-2)
    assert found["check"]["extremes"]["smallest"]["value"] == pytest.approx(smallest, rel=2e-3)
    outputs = headline.recompute_batchnorm(model, x, 1000)(x).detach()
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, y)), rel=1e-4)
    assert found["accuracy"] == float((outputs.argmax(1) == y).double().mean())


def test_record_says_of_what_it_is(measured):
    study, _ = measured
    digest = hashlib.sha256(Path(headline.__file__).read_bytes()).hexdigest()
    assert study["script_sha256"] == digest
    assert study["machine"]["torch"] == torch.__version__
    for found in study["measured"]:
        assert found["passes"] == found["extremes"]["num_matvecs"] > 1
        assert found["seconds"] >= found["extremes"]["seconds"] + found["seconds_of_making_the_operator"]
        assert found["seconds_of_a_gradient"] > 0
        assert 0 < found["seconds_of_a_product"] < found["seconds"]
        assert found["peak_device_bytes"] is None
        assert found["check"]["right"]


def test_another_run_goes_on_from_the_cache(measured, tmp_path, monkeypatch):
    study, folder = measured
    passes, train = [], headline.train_epoch
    monkeypatch.setattr(headline, "train_epoch", lambda *args: passes.append(args[-1]) or train(*args))
    run("--epochs", 3, "--out", tmp_path / "again.json", "--cache", folder)
    again = json.loads((tmp_path / "again.json").read_text())["measured"]
    assert passes == []
    assert again[0]["loss"] == study["measured"][1]["loss"]
    assert again[0]["check"] is None

    (tmp_path / "epoch-1.pt").write_bytes((folder / "epoch-1.pt").read_bytes())
    run("--epochs", 3, "--tol", 0.5, "--cache", tmp_path)
    assert passes == [1, 2]
    for one, other in zip(
        saved(tmp_path / "epoch-3.pt").parameters(), saved(folder / "epoch-3.pt").parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_products_are_made_as_asked_for_and_checked_in_full(tmp_path, monkeypatch):
    made, make = [], hk.hessian
    monkeypatch.setattr(hk, "hessian", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1])
    lower = ["--arithmetic", "bf16", "--mode", "reverse-over-reverse", "--batch-size", 40]
    run("--epochs", 1, "--tol", 0.5, "--check", "--out", tmp_path / "out.json", *lower)
    found = json.loads((tmp_path / "out.json").read_text())["measured"][0]
    assert (found["mode"], found["batch_size"]) == ("reverse-over-reverse", 40)
    assert found["precision"] > 1e-4
    assert ["bf16" in repr(H) for H in made] == [True, False]


@pytest.mark.parametrize("wrong", ["value", "limit"])
def test_wrong_and_unfinished_solves_fail_once_all_is_written(wrong, tmp_path, monkeypatch):
    solve, out = hk.extreme_eigenvalues, tmp_path / "out.json"

    def spoilt(H, **options):
        if "method" in options:  # that is the check
            return solve(H, **options)
        return solve(2.0 * H, **options) if wrong == "value" else solve(H, **options, max_matvecs=6)

    monkeypatch.setattr(hk, "extreme_eigenvalues", spoilt)
    epochs, check = ([1], ["--check"]) if wrong == "value" else ([1, 2], [])
    with pytest.raises(SystemExit, match=rf"not to 0\.1 after epoch {', '.join(map(str, epochs))}$"):
        run("--epochs", *epochs, "--tol", 0.1, "--out", out, *check)
    found = json.loads(out.read_text())["measured"]
    assert [entry["epoch"] for entry in found] == epochs
    if check:
        assert not found[0]["check"]["right"]
        assert found[0]["check"]["errors_over_tol"]["largest"] == pytest.approx(10, rel=0.3)


def test_cache_of_another_training_is_refused(measured):
    _, folder = measured
    with pytest.raises(
        SystemExit, match=r"--cache: .*epoch-1\.pt is of another training; take another folder"
    ):
        run("--epochs", 1, "--examples", 50, "--cache", folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "--epochs: must be at least 1, got 0"),
        (["--batch-size", "fast"], "--batch-size: invalid count_or_auto value: 'fast'"),
        (["--tol", 2], "--tol: must be between 0 and 1, got 2"),
        (["--size", "full"], "--cifar10: the full size needs the folder"),
        (["--cifar10", "/no/such"], "--cifar10: dir: no CIFAR-10 in /no/such"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--arithmetic", "tf32"], "--device cpu: arithmetic='tf32' needs a CUDA device"),
        (["--out", "/no/such/file.json"], "--out: there is no folder /no/such"),
        (["--cache", "/no/such"], "--cache: there is no folder /no/such"),
    ],
    ids=str,
)
def test_bad_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_more_examples_than_there_are_are_refused():
    with pytest.raises(SystemExit, match="--examples: there are 1797, got 2000"):
        run("--examples", 2000)


def test_full_size_is_the_question_s():
    full = headline.TRAINING["full"]
    model = hk.zoo.resnet18_cifar(width=full["width"])
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert (full["examples"], full["pixels"]) == (50_000, 32)
