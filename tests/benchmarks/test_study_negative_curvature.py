import json

import pytest
import torch
from torch.nn import functional as F

import _study_networks as networks
import hvpkit as hk
import study_negative_curvature as curvature
from oracles import hessian_by_double_backward

SMALLEST = ["--small", "--examples", "60", "--epochs", "2", "--measurements", "3", "--batch-size", "20"]
SMALLEST += ["--networks", "digits CNN", "digits CNN, long tail"]


@pytest.fixture(scope="module")
def study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("curvature")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "network", lambda _name, seed: hk.zoo.digits_cnn(1, seed=seed))
        curvature.main([*SMALLEST, "--out", str(out), "--results", str(out / "published.json")])
    return json.loads((out / "study.json").read_text()), out


def test_parts_are_those_of_the_dense_hessian():
    data = x, y = networks.examples("digits CNN", {"examples": 90}, None)[0]
    model = curvature.recompute_batchnorm(hk.zoo.digits_cnn(1, seed=3), x, 90)
    settings = {"hessian_batch_size": 40, "tol": 1e-5}
    found, vector = curvature.measure(model, data, settings, None)
    again, _ = curvature.measure(model, data, settings, vector)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    objective, params = hk.from_module(model.double(), F.cross_entropy)
    every = torch.ones_like(wrong)
    H, third, seventh, of_wrong = (
        hessian_by_double_backward(objective, params, (x[chosen].double(), y[chosen]))
        * chosen.double().mean()
        for chosen in (every, y == 3, y == 7, wrong)
    )
    values, vectors = torch.linalg.eigh(H)
    v = vectors[:, 0]
    assert found["status"] == "converged"
    assert found["lower"] <= float(values[0]) <= found["upper"]
    assert found["smallest"] == pytest.approx(float(values[0]), rel=1e-3)
    assert found["largest"] == pytest.approx(float(values[-1]), rel=1e-3)
    for part, place in ((third, 3), (seventh, 7)):
        assert found["classes"][place] == pytest.approx(float(v @ part @ v), abs=3e-3 * float(-values[0]))
    assert found["wrong_part"] == pytest.approx(float(v @ of_wrong @ v / values[0]), abs=3e-3)
    assert found["wrong"] == float(wrong.double().mean())
    assert found["sum_error"] < 1e-4
    assert sum(found["layers"].values()) == pytest.approx(1, abs=1e-5)
    assert list(found["layers"])[-1] == "9 Linear"
    assert found["layers"]["9 Linear"] == pytest.approx(float(v[-90:].square().sum()), abs=3e-3)
    assert (found["overlap"], again["overlap"]) == (None, pytest.approx(1, abs=1e-4))
    distance = min(float((vector - sign * v).norm()) for sign in (1, -1))
    assert distance < found["sine"] + 1e-3


def test_study_measures_along_training(study):
    found, out = study
    assert list(found["runs"])[:2] == ["digits CNN 0", "digits CNN, long tail 0"]
    for run in found["runs"].values():
        steps = [one["step"] for one in run["measured"]]
        assert steps == curvature.schedule(steps[-1], 3)
        assert run["measured"][-1]["loss"] < run["measured"][0]["loss"]
        for one in run["measured"]:
            assert one["status"] == "converged"
            assert one["sum_error"] < 1e-3
            assert sum(one["classes"]) == pytest.approx(one["smallest"], rel=1e-3)
    assert found["runs"]["digits CNN 0"]["measured"][-1]["step"] == 6
    assert (
        "| rarer classes hold more (rank correlation) | digits CNN, long tail |"
        in (out / "study.md").read_text()
    )
    assert (out / "study.png").stat().st_size > 5000


def test_first_measurement_is_of_the_network_before_training(study):
    first = study[0]["runs"]["digits CNN 1"]["measured"][0]
    (x, y), _ = networks.examples("digits CNN", {"examples": 60}, None)
    model = curvature.recompute_batchnorm(hk.zoo.digits_cnn(1, seed=1), x, 600)
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)


def test_published_runs_are_not_made_again_but_added_to(study, tmp_path, monkeypatch):
    whole, out = study
    published = tmp_path / "published.json"
    published.write_bytes((out / "published.json").read_bytes())
    made = []
    monkeypatch.setattr(
        curvature,
        "run",
        lambda _settings, name, seed, _images: made.append(name) or whole["runs"][f"{name} {seed}"],
    )
    more = [*SMALLEST, "--seeds", "1", "2", "--networks", "digits CNN"]
    whole["runs"]["digits CNN 2"] = {**whole["runs"]["digits CNN 1"], "seed": 2}
    curvature.main([*more, "--out", str(tmp_path / "new"), "--results", str(published)])
    again = json.loads(published.read_text())
    assert made == ["digits CNN"]
    assert list(again["runs"])[-1] == "digits CNN 2"
    assert len(again["runs"]) == 5
    assert again["settings"]["seeds"] == [0, 1, 2]
    assert again["settings"]["networks"] == ["digits CNN", "digits CNN, long tail"]
    assert (
        again["runs"]["digits CNN 0"]
        == json.loads((out / "published.json").read_text())["runs"]["digits CNN 0"]
    )


def test_long_tail_has_a_tenth_of_the_first_class_at_its_end():
    y = torch.arange(10).repeat(50)
    x, kept = networks.long_tailed(torch.arange(500.0), y)
    counts = torch.bincount(kept).tolist()
    assert counts == [50, 39, 30, 23, 18, 14, 11, 8, 6, 5]
    assert torch.equal(y[x.long()], kept)


def test_steps_are_as_many_as_asked_for_and_denser_at_the_beginning():
    steps = curvature.schedule(360, 40)
    assert len(steps) == 40
    assert (steps[0], steps[-1]) == (0, 360)
    assert steps[1] - steps[0] < steps[-1] - steps[-2]


def made_up(**changes):
    one = {
        "status": "converged",
        "upper": -1.0,
        "layers": {"a": 0.2, "b": 0.8},
        "classes": [-3.0, *[0.0] * 8, -1.0],
        "class_errors": [0.5, *[0.1] * 8, 0.2],
        "wrong": 0.25,
        "wrong_part": 0.75,
    }
    return {
        "counts": [9] * 10,
        "measured": [one | changes, {**one, "upper": 0.0}, {**one, "status": "max-matvecs"}],
    }


def test_figures_are_of_measurements_certainly_below_zero():
    record = made_up()
    assert curvature.last_layer(record) == pytest.approx(0.3)
    assert curvature.foremost_class(record) == pytest.approx(0.25)
    assert curvature.misclassified(record) == pytest.approx(0.5)
    assert curvature.classes_with_errors(record) == pytest.approx(1)
    assert curvature.rare_classes(record) is None
    assert curvature.rare_classes(made_up() | {"counts": [1, *[5] * 8, 2]}) == pytest.approx(1)
    assert curvature.last_layer(made_up(upper=1.0)) is None
    assert curvature.misclassified(made_up(wrong=0.0)) is None


def test_network_on_cifar_asks_for_its_folder(tmp_path):
    with pytest.raises(SystemExit, match="CIFAR-10 ResNet-8 needs --cifar10"):
        curvature.main(["--small", "--networks", "CIFAR-10 ResNet-8", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no C7"):
        networks.network("C7", 0)
