import json

import pytest
import torch

import hvpkit as hk
import study_edge_of_stability as edge
from oracles import hessian_by_double_backward

SMALLEST = [
    "--small",
    "--width",
    "6",
    "--examples",
    "40",
    "--steps",
    "60",
    "--measurements",
    "6",
    "--seeds",
    "0",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("edge")
    edge.main([*SMALLEST, "--out", str(out)])
    return json.loads((out / "study.json").read_text()), out


def test_published_values():
    settings = edge.FULL | {"lr_gd": 0.5, "lr_rmsprop": 0.01, "lr_adam": 0.1, "beta1": 0.9}
    found = [edge.published(variant, settings) for variant in edge.FULL["variants"]]
    assert found == pytest.approx([4, 200, 380])


@pytest.mark.parametrize("variant", edge.FULL["variants"])
def test_sharpness_is_that_of_the_dense_preconditioned_hessian(variant):
    settings = edge.SMALL | {"width": 5, "examples": 30}
    x, targets = data = edge.examples(settings)
    model = edge.network(settings, 1)
    optimizer = edge.MAKERS[variant](model.parameters(), settings)
    for _ in range(3):
        optimizer.zero_grad()
        edge.squared_error(model(x), targets).mean().backward()
        optimizer.step()
    found = edge.sharpness(model, data, optimizer, 1e-4)
    objective, params = hk.from_module(model.double(), edge.squared_error)
    H = hessian_by_double_backward(objective, params, (x.double(), targets.double()))
    D = torch.ones(len(H), dtype=torch.float64)
    states = [optimizer.state[p] for p in model.parameters()]
    if variant == "RMSprop":
        D = torch.cat([state["square_avg"].double().reshape(-1) for state in states]).sqrt() + 1e-7
    if variant == "Adam":
        v = torch.cat([state["exp_avg_sq"].double().reshape(-1) for state in states])
        D = (v / (1 - settings["beta2"] ** 3)).sqrt() + 1e-7
    assert found == pytest.approx(float(torch.linalg.eigvalsh(H / (D[:, None] * D).sqrt())[-1]), rel=1e-3)


def test_study_writes_runs_claims_and_pictures(study):
    found, out = study
    assert set(found["runs"]) == {"gradient descent 0", "RMSprop 0", "Adam 0"}
    assert len(found["claims"]) == 6
    for record in found["runs"].values():
        assert record["measured"][0]["step"] == 1
        assert record["measured"][-1]["step"] == 60
        assert record["measured"][-1]["loss"] < record["measured"][0]["loss"]
    assert "| Adam settles at the published sharpness, 19000 |" in (out / "study.md").read_text()
    assert (out / "study.png").stat().st_size > 5000


def test_finished_study_measures_nothing_again(study, monkeypatch):
    monkeypatch.setattr(edge, "run", lambda *_: pytest.fail("trained again"))
    files = [study[1] / name for name in ("study.json", "study.md")]
    before = [json.loads(files[0].read_text())["runs"], files[1].read_text()]
    edge.main([*SMALLEST, "--out", str(study[1])])
    assert [json.loads(files[0].read_text())["runs"], files[1].read_text()] == before


def test_verdicts():
    def record(variant, ratios):
        measured = [{"ratio": ratio} for ratio in ratios]
        return {"variant": variant, "published": 4.0, "measured": measured}

    runs = [
        record("a", [0.5, 0.8, 1.0, 1.05]),
        record("a", [0.2, 0.9, 0.95, 1.0]),
        record("b", [0.95, 1.3, 1.2, 1.1]),
    ]
    verdicts = [claim["verdict"] for claim in edge.judge_claims(runs, 0.1)]
    assert verdicts == ["held", "held", "not held", "not held"]


def test_results_that_are_kept_hold_the_published_values():
    """The small study in benchmarks/results: each method settles where the papers say."""
    found = json.loads((edge.RESULTS / "study.json").read_text())
    assert found["settings"] == json.loads(json.dumps(edge.SMALL | {"data": "digits"}))
    assert {claim["verdict"] for claim in found["claims"]} == {"held"}
    assert (edge.RESULTS / "study.md").read_text() == edge.report(found)
