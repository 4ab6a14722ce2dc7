"""How the networks of the BatchNorm study are trained, on what, and what a published file adds."""

import json
import math

import pytest
import torch

import _study as common
import _training as training
import hvpkit as hk
import study_batchnorm_residual as residual
import study_wide_minima as minima

SMALLEST = ["--small", "--width", "1", "--examples", "60", "--epochs", "2", "--depths", "8", "--seeds", "0"]
SMALLEST += ["--variants", "both", "--measurements", "1", "--products", "9", "--steps", "5", "--tol", "0.1"]


def finished(out, *more):
    residual.main([*SMALLEST, *more, "--out", str(out)])
    return json.loads((out / "study.json").read_text())


def cifar100_of_digits(folder, num):
    """Write digits in the format of CIFAR-100: the fine class is the digit, the coarse one its half."""
    x, y = hk.zoo.digits()
    images = torch.nn.functional.interpolate(x[: 2 * num], size=(32, 32)).expand(-1, 3, -1, -1)
    pixels = (images * 255).to(torch.uint8).flatten(1)
    folder.mkdir()
    for name, part in (("train.bin", slice(0, num)), ("test.bin", slice(num, 2 * num))):
        rows = torch.cat(
            [(y[part, None] // 2).to(torch.uint8), y[part, None].to(torch.uint8), pixels[part]], 1
        )
        (folder / name).write_bytes(rows.numpy().tobytes())


def test_study_takes_the_fine_classes_of_cifar100(tmp_path, no_window):  # noqa: ARG001
    cifar100_of_digits(tmp_path / "cifar-100-binary", 60)
    study = finished(tmp_path / "out", "--cifar100", str(tmp_path))
    (run,) = study["runs"].values()
    assert study["settings"]["data"] == "CIFAR-100"
    assert run["measured"][0]["loss"] > 0.8 * math.log(100)
    x, y = training.read_images(tmp_path, study["settings"], torch.device("cpu"))[0]
    assert x.shape == (60, 3, 8, 8)
    assert torch.equal(y, hk.zoo.digits()[1][:60])
    assert residual.network(study["settings"], 8, "both", 0).head.out_features == 100


def test_rate_rises_in_warm_up_and_falls_twice():
    settings = {"epochs": 18, "warmup": 4}
    rates = [residual.factor(settings, epoch) for epoch in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates[7:] == pytest.approx([1, *[0.1] * 4, *[0.01] * 8])
    assert residual.factor(settings | {"warmup": 0}, 0) == 1


def test_loss_settles_when_the_last_are_no_lower():
    assert not residual.settled([], 2)
    assert not residual.settled([1.0, 1.0], 2)
    assert residual.settled([1.0, 1.0, 0.995], 2)
    assert not residual.settled([1.0, 1.0, 0.98], 2)


@pytest.mark.parametrize(("patience", "epochs", "settled"), [(0, 2, None), (1, 3, True), (9, 4, False)])
def test_training_goes_on_until_the_loss_settles(
    patience,
    epochs,
    settled,
    tmp_path,
    monkeypatch,
    no_window,  # noqa: ARG001
):
    losses = iter([3.0, 2.0, 2.0, 2.0])
    train = residual.train_epoch
    monkeypatch.setattr(residual, "train_epoch", lambda *args: train(*args) * 0 + next(losses))
    (run,) = finished(tmp_path, "--patience", str(patience))["runs"].values()
    assert (run["measured"][-1]["epoch"], run["settled"]) == (epochs, settled)
    assert "density" in run["measured"][-1]
    assert (f"| {epochs} (falling) |" in (tmp_path / "study.md").read_text()) == (settled is False)


def test_curvature_may_be_of_the_first_examples_and_at_the_end_alone(tmp_path, no_window):  # noqa: ARG001
    few = ["--measurements", "0", "--hessian-examples", "20"]
    (run,) = finished(tmp_path, *few)["runs"].values()
    (last,) = run["measured"]
    model = hk.zoo.cifar_resnet(8, width=1, shortcut="projection", seed=5)
    model.load_state_dict(torch.load(tmp_path / "resnet8-both-0.pt", weights_only=True))
    x, y = hk.zoo.digits()
    objective, params = hk.from_module(model.eval(), torch.nn.functional.cross_entropy)
    seen = x[:20].expand(-1, 3, -1, -1), y[:20]
    assert last["epoch"] == 2
    assert last["loss"] == pytest.approx(float(hk.loss(objective, params, seen)), rel=1e-5)
    found = hk.extreme_eigenvalues(hk.hessian(objective, params, seen), tol=1e-3)
    assert last["largest"] == pytest.approx(found.largest.value, rel=0.1)


def test_gradients_are_clipped():
    model = torch.nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    data = torch.full((4, 2), 100.0), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in training.train_pass(model, data, optimizer, torch.Generator(), clip=0.25):
        pass
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-4)


def test_published_networks_are_drawn_without_their_folder_and_added_to(tmp_path, no_window):  # noqa: ARG001
    published = tmp_path / "published.json"
    first = finished(tmp_path / "a", "--results", str(published))
    both = finished(tmp_path / "b", "--results", str(published), "--variants", "no residual", "--seeds", "1")
    assert list(both["runs"]) == ["resnet8-both-0", "resnet8-no-residual-1"]
    assert both["settings"]["variants"] == ["both", "no residual"]
    assert both["settings"]["seeds"] == [0, 1]
    assert both["runs"]["resnet8-both-0"] == common.rounded(first["runs"]["resnet8-both-0"])
    assert json.loads(published.read_text()) == common.rounded(both)
    assert "history" not in published.read_text()
    assert (tmp_path / "b" / "study.png").exists()
    with pytest.raises(SystemExit, match=r"published\.json was made with another lr"):
        finished(tmp_path / "c", "--results", str(published), "--lr", "0.5")


def test_rounding_keeps_five_digits():
    tree = {"a": [1.23456789, 3], "b": ("x", None, True, 1e-7 / 3)}
    assert common.rounded(tree) == {"a": [1.2346, 3], "b": ["x", None, True, 3.3333e-8]}


def runs_of(accuracies):
    return [
        {"seed": seed, "share": share, "status": "trained", "test_accuracy": found + 0.001 * seed}
        | {"sharpness": 5 - share, "largest": 5 + share * (-1) ** seed}
        for seed in range(3)
        for share, found in accuracies.items()
    ]


def test_rank_correlation_is_over_all_runs():
    runs = runs_of({0.0: 0.8, 0.25: 0.9, 0.5: 0.95})
    assert minima.rank_correlation(runs, "sharpness") == (pytest.approx(-1), pytest.approx(0, abs=1e-6))
    correlation, p = minima.rank_correlation(runs, "largest")
    assert abs(correlation) < 0.5 < p + 0.4
    assert minima.rank_correlation(runs[:2], "largest") is None


@pytest.mark.parametrize(("longer", "verdict"), [(0.951, "held"), (0.93, "held"), (0.99, "opposite")])
def test_half_is_enough_unless_longer_gains_a_point(longer, verdict):
    runs = runs_of({0.0: 0.8, 0.5: 0.95, 0.75: longer})
    assert minima.gains(runs) == pytest.approx([longer - 0.95] * 3)
    assert [row["verdict"] for row in minima.judge_claims(runs) if row["claim"] == minima.ENOUGH] == [verdict]
