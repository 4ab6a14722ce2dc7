import json

import pytest

import hvpkit as hk
import study_optimizers as optimizers

SMALLEST = ["--small", "--examples", "60", "--validation", "20", "--epochs", "2", "--batch-size", "20"]
SMALLEST += ["--rates", "0.03", "1e5"]
pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")


def narrow(_name, seed):
    return hk.zoo.digits_cnn(2, seed=seed)


@pytest.fixture(scope="module")
def study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("optimizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "network", narrow)
        optimizers.main([*SMALLEST, "--out", str(out)])
    return json.loads((out / "study.json").read_text()), out


def test_every_optimizer_has_the_same_trials_and_takes_the_best(study):
    runs = study[0]["runs"]
    for variant in optimizers.FULL["variants"]:
        tuned = runs[f"digits CNN {variant} rate"]
        assert [trial["rate"] for trial in tuned["trials"]] == [0.03, 1e5]
        assert tuned["rate"] == 0.03
        assert {runs[f"digits CNN {variant} {seed}"]["rate"] for seed in (0, 1)} == {0.03}


@pytest.mark.parametrize("variant", optimizers.FULL["variants"])
def test_outcome_is_that_of_a_run_of_its_own(study, variant, monkeypatch):
    monkeypatch.setattr(optimizers, "network", narrow)
    settings = study[0]["settings"]
    data, _, test = optimizers.split(settings, "digits CNN", None)
    found = optimizers.outcome(settings, "digits CNN", variant, 0.03, 1, data, test)
    known = study[0]["runs"][f"digits CNN {variant} 1"]
    assert known["loss"] == pytest.approx(found["loss"], rel=1e-4)
    assert known["accuracy"] == pytest.approx(found["accuracy"], abs=2e-3)


def test_adam_is_that_of_torch(study):
    data, _, _ = optimizers.split(study[0]["settings"], "digits CNN", None)
    settings = study[0]["settings"] | {"epochs": 1, "batch_size": 60}
    model, other = narrow("", 0), narrow("", 0)
    optimizers.train(model, data, "Adam", 0.01, 0, settings)
    optimizer = optimizers.torch.optim.Adam(other.parameters(), lr=0.01)
    optimizers.F.cross_entropy(other(data[0]), data[1]).backward()
    optimizer.step()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert one.detach().numpy() == pytest.approx(same.detach().numpy(), abs=1e-5)


def test_examples_are_trained_on_or_validated_with_or_tested(study):
    parts = optimizers.split(study[0]["settings"], "digits CNN", None)
    assert [len(y) for _, y in parts] == [40, 20, 1797 - 60]
    x, _ = hk.zoo.digits()
    assert all(part[0][0].equal(x[place]) for part, place in zip(parts, (0, 40, 60), strict=True))


def test_rate_that_is_much_too_high_is_worse_or_diverges(study):
    trials = study[0]["runs"]["digits CNN SGD rate"]["trials"]
    assert trials[1]["status"] == "diverged" or trials[1]["loss"] > trials[0]["loss"]


def test_study_has_a_table_and_a_picture(study):
    text = (study[1] / "study.md").read_text()
    assert "| digits CNN | ABSA | 0.03 (edge) | 2 of 2 |" in text
    assert "ABSA has a higher test accuracy than SGD" in text
    assert (study[1] / "study.png").stat().st_size > 5000


def test_claims_are_judged_by_seed():
    def run(variant, seed, loss, accuracy, status="trained"):
        return {
            "network": "n",
            "variant": variant,
            "seed": seed,
            "status": status,
            "loss": loss,
            "accuracy": accuracy,
        }

    runs = [run("Adam", 0, 1.0, 0.9), run("AdaHessian", 0, 0.5, 0.9), run("Adam", 1, 2.0, 0.9)]
    runs += [run("AdaHessian", 1, 1.4, 0.9), run("SGD", 0, 1.0, 0.8), run("ABSA", 0, 1.0, 0.7, "diverged")]
    (row,) = optimizers.judge_claims(runs)
    assert row["values"] == pytest.approx([-0.5, -0.6])
    assert row["verdict"] == "held"
