import json

import pytest
import torch
from torch.nn import functional as F

import hvpkit as hk
import study_outliers as outliers
from oracles import hessian_by_double_backward

SMALLEST = ["--small", "--examples", "40", "--seeds", "0", "1", "--loss", "2.2", "--batch-size", "10"]
SMALLEST += ["--top", "11", "--steps", "10"]


def narrow(_name, seed, *, batchnorm):
    return hk.zoo.cifar_resnet(8, width=1, batchnorm=batchnorm, seed=seed)


@pytest.fixture(scope="module")
def study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("outliers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "network", narrow)
        outliers.main([*SMALLEST, "--out", str(out)])
    return json.loads((out / "study.json").read_text()), out


@pytest.mark.parametrize("variant", outliers.FULL["variants"])
def test_values_are_those_of_the_dense_hessian_of_the_trained_network(study, variant):
    found = study[0]["runs"][f"digits ResNet-8 {variant} 1"]
    settings = study[0]["settings"]
    (x, y), _ = outliers.examples("digits ResNet-8", settings, None)
    model = narrow("", 1, batchnorm=variant == "with BatchNorm")
    model = outliers.train(model, (x, y), settings, 1).double()
    objective, params = hk.from_module(model, F.cross_entropy)
    exact = torch.linalg.eigvalsh(hessian_by_double_backward(objective, params, (x.double(), y)))
    assert found["status"] == "converged"
    assert found["loss"] <= 2.2
    assert found["num_parameters"] == len(exact)
    assert found["values"] == pytest.approx(exact.flip(0)[:11].tolist(), rel=0.02)
    assert sum(found["density"]["weights"]) == pytest.approx(1)


def test_study_has_a_row_for_each_network_and_a_picture(study):
    found, out = study
    text = (out / "study.md").read_text()
    assert text.count("| converged |") == len(found["runs"]) == 4
    assert len(found["claims"]) == 4
    assert (out / "study.png").stat().st_size > 5000


def test_loss_that_is_not_reached_is_said(tmp_path, monkeypatch, no_window):  # noqa: ARG001
    monkeypatch.setattr(outliers, "network", narrow)
    few = ["--seeds", "0", "--variants", "with BatchNorm", "--loss", "1e-6", "--max-epochs", "1"]
    outliers.main([*SMALLEST, *few, "--out", str(tmp_path)])
    assert "| loss not reached |" in (tmp_path / "study.md").read_text()
    assert json.loads((tmp_path / "study.json").read_text())["claims"] == []


def test_gap_is_the_largest_ratio_of_neighbours():
    assert outliers.gap([30.0, 20.0, 15.0, 3.0, 2.0]) == (3, 5.0)
    assert outliers.gap([8.0, 4.0]) == (1, 2.0)
    assert outliers.reach([30.0, 15.0, 3.0]) == 10


def test_claims_are_judged_by_pairs():
    ten = [100.0] * 10 + [10.0] * 5
    flat = [3.0] * 15

    def run(variant, seed, values, status="converged"):
        return {"network": "n", "variant": variant, "seed": seed, "status": status, "values": values}

    runs = [
        run(f"{word} BatchNorm", seed, values)
        for seed in range(3)
        for word, values in (("with", flat), ("without", ten))
    ]
    assert [row["verdict"] for row in outliers.judge_claims(runs)] == ["held"] * 4
    turned = [run | {"values": ten if run["values"] == flat else flat} for run in runs]
    assert [row["verdict"] for row in outliers.judge_claims(turned)] == ["opposite"] * 4
    runs[1]["status"] = "max-matvecs"
    assert {len(row["values"]) for row in outliers.judge_claims(runs)} == {2}
