import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from torch.nn import functional as F

import _study as common
import _training as training
import hvpkit as hk
import study_batchnorm_residual as residual
import study_wide_minima as minima
from oracles import hessian_by_double_backward

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMON = ["--small", "--width", "2", "--examples", "60", "--tol", "0.01"]
RESIDUAL = [*COMMON, "--epochs", "6", "--depths", "8", "--variants", "both", "no residual", "--seeds", "0"]
RESIDUAL += ["--measurements", "1", "--products", "30", "--steps", "10", "--width", "1"]
MINIMA = [*COMMON, "--epochs", "4", "--explore", "0", "2", "--seeds", "0", "1", "--ascent-steps", "5"]


@pytest.fixture(autouse=True, scope="module")
def no_window():
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


def finished(study, arguments, out):
    study.main([*arguments, "--out", str(out)])
    return json.loads((out / "study.json").read_text())


@pytest.fixture(scope="module")
def residual_study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("residual")
    return finished(residual, RESIDUAL, out), out


@pytest.fixture(scope="module")
def minima_study(tmp_path_factory, no_window):  # noqa: ARG001
    out = tmp_path_factory.mktemp("minima")
    return finished(minima, MINIMA, out), out


def digits(start, stop):
    x, y = hk.zoo.digits()
    return x[start:stop].expand(-1, 3, -1, -1), y[start:stop]


def saved(model, path):
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def timeless(tree):
    """Drop the seconds from a tree of JSON."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if "seconds" not in key}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize(("variant", "shortcut"), [("both", True), ("no residual", False)])
def test_what_the_study_says_of_a_network_is_true_of_its_saved_parameters(residual_study, variant, shortcut):
    study, out = residual_study
    stem = f"resnet8-{variant.replace(' ', '-')}-0"
    last = study["runs"][stem]["measured"][-1]
    blank = hk.zoo.cifar_resnet(8, width=1, residual=shortcut, shortcut="projection", seed=5)
    model, (x, y) = saved(blank, out / f"{stem}.pt").double(), digits(0, 60)
    batch = x.double(), y
    outputs = model(batch[0]).detach()
    objective, params = hk.from_module(model, F.cross_entropy)
    exact = torch.linalg.eigvalsh(hessian_by_double_backward(objective, params, batch))
    assert last["epoch"] == 6
    assert last["loss"] == pytest.approx(float(F.cross_entropy(outputs, y)), rel=1e-4)
    assert last["accuracy"] == float((outputs.argmax(1) == y).double().mean())
    assert last["largest"] == pytest.approx(float(exact[-1]), rel=1e-2)
    assert last["smallest"] == pytest.approx(float(exact[0]), rel=1e-2)
    assert abs(last["trace"] - float(exact.sum())) < 4 * last["trace_stderr"] < abs(float(exact.sum()))
    density = hk.Density.load(out / f"{stem}.density.json")
    assert density.nodes.tolist() == last["density"]["nodes"]
    assert sum(last["density"]["weights"]) == pytest.approx(1)
    assert exact[0] * 1.001 <= density.nodes[0] < density.nodes[-1] <= exact[-1] * 1.001


def test_what_is_measured_first_is_the_network_before_training(residual_study):
    first = residual_study[0]["runs"]["resnet8-both-0"]["measured"][0]
    model, (x, y) = hk.zoo.cifar_resnet(8, width=1, shortcut="projection", seed=0), digits(0, 60)
    model = residual.recompute_batchnorm(model, x, 1000)
    assert first["epoch"] == 0
    assert first["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)


def test_minima_study_says_what_the_library_says_of_saved_parameters(minima_study):
    study, out = minima_study
    assert list(study["runs"]) == ["explore0-0", "explore2-0", "explore0-1", "explore2-1"]
    run, train = study["runs"]["explore2-1"], digits(0, 60)
    model = saved(hk.zoo.cifar_resnet(8, width=2, seed=5), out / "explore2-1.pt")
    objective, params = hk.from_module(model, F.cross_entropy)
    ex = hk.extreme_eigenvalues(hk.hessian(objective, params, train), tol=1e-3)
    box = {"epsilon": 1e-3, "lr": 2e-4, "max_steps": 5, "optimizer": "adam"}
    sharp = hk.train.keskar_sharpness(objective, params, train, **box)
    x_test, y_test = digits(60, None)
    assert run["largest"] == pytest.approx(ex.largest.value, rel=1e-2)
    assert run["smallest"] == pytest.approx(ex.smallest.value, rel=1e-2)
    assert run["sharpness"] == pytest.approx(sharp.value, rel=1e-3)
    assert run["loss"] == pytest.approx(sharp.loss, rel=1e-5)
    assert run["test_accuracy"] == pytest.approx(float((model(x_test).argmax(1) == y_test).double().mean()))


def test_explore_lengths_of_one_seed_differ_and_begin_alike(minima_study):
    runs = minima_study[0]["runs"]
    assert runs["explore0-0"]["loss"] != runs["explore2-0"]["loss"]
    assert [run["share"] for run in runs.values()] == [0, 0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("module", "arguments", "fixture"),
    [(residual, RESIDUAL, "residual_study"), (minima, MINIMA, "minima_study")],
    ids=["residual", "minima"],
)
def test_interrupted_study_goes_on_to_the_same(module, arguments, fixture, tmp_path, monkeypatch, request):
    whole, out = request.getfixturevalue(fixture)
    made, make = [], module.run

    def interrupted(*args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(args[-1].name)
        return make(*args)

    monkeypatch.setattr(module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finished(module, arguments, tmp_path)
    half = json.loads((tmp_path / "study.json").read_text())
    assert list(half["runs"]) == made == list(whole["runs"])[:1]
    assert not (tmp_path / "study.md").exists()

    monkeypatch.setattr(module, "run", lambda *args: made.append(args[-1].name) or make(*args))
    assert timeless(finished(module, arguments, tmp_path)) == timeless(whole)
    assert made == list(whole["runs"])
    assert (tmp_path / "study.md").read_text() == (out / "study.md").read_text()


def test_study_with_other_settings_is_not_mixed_in(residual_study):
    _, out = residual_study
    before = (out / "study.json").read_bytes()
    with pytest.raises(SystemExit, match=r"--out: .* another lr, batch_size; choose another place"):
        finished(residual, [*RESIDUAL, "--lr", "0.01", "--batch-size", "30"], out)
    assert (out / "study.json").read_bytes() == before


@pytest.mark.parametrize("fixture", ["residual_study", "minima_study"])
def test_study_has_a_table_and_a_picture(fixture, request):
    study, out = request.getfixturevalue(fixture)
    text = (out / "study.md").read_text()
    for claim in study["claims"]:
        assert any(claim["claim"] in line and claim["verdict"] in line for line in text.splitlines())
    picture = matplotlib.image.imread(out / "study.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


def test_study_runs_as_a_script_that_finds_the_other():
    command = [sys.executable, str(BENCHMARKS / "study_wide_minima.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--small" in text
    assert "--cifar10" in text


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9], "held"),
        ([-1.0, -1.1, -0.9], "opposite"),
        ([1.0, -1.1, 0.9], "undecided"),
        ([1.0, 1.0], "held"),
        ([1.0, 0.1], "undecided"),
        ([0.0, 0.0], "undecided"),
        ([5.0], "undecided"),
        ([], "undecided"),
    ],
)
def test_verdict_is_by_sign_and_spread(values, verdict):
    turned = {"held": "opposite", "opposite": "held"}
    assert residual.judge(values, 1) == verdict
    assert residual.judge(values, -1) == turned.get(verdict, verdict)


def test_verdict_errs_in_five_per_cent_of_cases_to_either_side():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    verdicts = [residual.judge(values, 1) for values in draws]
    for word in ("held", "opposite"):
        share, stderr = verdicts.count(word) / 4000, (0.05 * 0.95 / 4000) ** 0.5
        assert abs(share - 0.05) < 4 * stderr


def made_up(factors, status="learnt"):
    """Make runs that end at a factor, by depth and variant, times a number that depends on the seed."""
    return [
        {
            "depth": depth,
            "variant": variant,
            "seed": seed,
            "status": status,
            "measured": [
                {"largest": 1.0, "trace": 1.0},
                {"largest": factor * (3 + seed), "trace": 10 / factor},
            ],
        }
        for (depth, variant), factor in factors.items()
        for seed in range(3)
    ]


def as_in_the_paper():
    shallow = {(20, "both"): 1.0, (20, "no batchnorm"): 0.5, (20, "no residual"): 2.0}
    return shallow | {(38, "both"): 1.0, (38, "no batchnorm"): 4.0, (38, "no residual"): 3.0}


def verdicts(rows, quantity):
    return [
        (row["depth"], round(row["ratio"], 6), row["verdict"]) for row in rows if row["quantity"] == quantity
    ]


def test_claims_are_judged_by_the_numbers_both_ways():
    rows = residual.judge_claims(made_up(as_in_the_paper()))
    held = [("20", 0.5), ("38", 4.0), ("20", 2.0), ("38", 3.0), ("20, 38", 8.0)]
    assert verdicts(rows, "largest") == [(*pair, "held") for pair in held]
    assert verdicts(rows, "trace") == [(depth, round(1 / ratio, 6), "opposite") for depth, ratio in held]


@pytest.mark.parametrize("status", ["at chance", "diverged"])
def test_networks_that_did_not_learn_are_not_compared(status):
    runs = made_up(as_in_the_paper())
    for run in runs:
        if run["variant"] == "no residual" and run["depth"] == 38:
            run["status"] = status
    rows = residual.judge_claims(runs)
    without = [row["verdict"] for row in rows if row["ratio"] is None]
    assert without == ["undecided"] * 2
    assert len(rows) == 10
    assert "no pair that has learnt" in residual.shown(next(row for row in rows if row["ratio"] is None))


def test_slopes_are_of_logs_and_of_accuracies_as_they_are():
    runs = [
        {"seed": seed, "share": share, "status": "trained", "largest": math.exp(seed - 2 * share)}
        | {"test_accuracy": 0.9 - 0.1 * share, "sharpness": math.exp(share)}
        for seed in (3, 1)
        for share in (0.0, 0.25, 0.5)
    ]
    assert minima.slopes(runs, "largest") == pytest.approx([-2, -2])
    assert minima.slopes(runs, "test_accuracy") == pytest.approx([-0.1, -0.1])
    assert [row["verdict"] for row in minima.judge_claims(runs)] == ["opposite", "held", "opposite"]
    runs[0]["status"] = runs[1]["status"] = "diverged"
    assert len(minima.slopes(runs, "largest")) == 1


def test_means_come_with_standard_errors():
    runs = [
        dict.fromkeys(minima.SHOWN, value) | {"explore": 7, "status": "trained"} for value in (1.0, 2.0, 4.0)
    ]
    (row,) = minima.means([*runs, {"explore": 7, "status": "diverged"}])
    assert row["seeds"] == 3
    assert row["largest"] == pytest.approx((7 / 3, (7 / 3 / 3) ** 0.5))


def test_networks_that_diverge_are_said_to(tmp_path):
    wild = ["--lr", "1e30", "--seeds", "0"]
    study = finished(residual, [*RESIDUAL, *wild, "--variants", "no batchnorm", "both"], tmp_path / "one")
    assert next(run["status"] for run in study["runs"].values()) == "diverged"
    assert all(claim["verdict"] == "undecided" for claim in study["claims"])
    assert "diverged" in (tmp_path / "one" / "study.md").read_text()


def test_share_beyond_counts_eigenvalues_further_from_zero():
    entries = torch.tensor([-2.0, -0.5, 0.0, 0.0, 0.15, 1.1, 3.0, 30.0], dtype=torch.float64)
    op = hk.LinearOperator(lambda v: entries[:, None] * v, 8, torch.float64, entries.device)
    density = hk.spectral_density(op, num_steps=8, num_probes=1)  # exact: all columns
    x, share = common.share_beyond(density.nodes, density.masses)
    for point, found in zip(x.tolist(), share.tolist(), strict=True):
        further = (entries > point) if point > 0 else (entries <= point)
        expected = float(further.double().mean()) if point else math.nan
        assert found == pytest.approx(expected, nan_ok=True) or (math.isnan(found) and not expected)


def test_statistics_of_all_examples_are_taken_on_a_copy():
    model, (x, _) = hk.zoo.cifar_resnet(8, width=2), digits(0, 40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = residual.recompute_batchnorm(model, x, 20)
    stem = model.stem[0](x)
    halves = torch.stack([half.var((0, 2, 3)) for half in stem.split(20)])
    assert torch.allclose(found.stem[1].running_mean, stem.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(found.stem[1].running_var, halves.mean(0))
    assert not found.training
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_augmented_images_are_moved_and_mirrored():
    x = torch.arange(1.0, 1 + 12 * 3 * 64).view(12, 3, 8, 8)
    found = training.crop_and_flip(x, torch.Generator().manual_seed(0))
    padded = F.pad(x, (1,) * 4)
    moves = [(i, j, turned) for i in range(3) for j in range(3) for turned in (False, True)]
    seen = []
    for image, source in zip(found, padded, strict=True):
        windows = {(i, j, t): source[:, i : i + 8, j : j + 8] for i, j, t in moves}
        seen += [m for m, w in windows.items() if torch.equal(image, w.flip(2) if m[2] else w)]
    assert len(seen) == 12
    assert len({m[:2] for m in seen}) > 3
    assert {m[2] for m in seen} == {False, True}


def test_augmentation_changes_training(tmp_path, minima_study):
    one = ["--augment", "1", "--explore", "0", "--seeds", "0"]
    study = finished(minima, [*MINIMA, *one], tmp_path)
    assert study["runs"]["explore0-0"]["loss"] != minima_study[0]["runs"]["explore0-0"]["loss"]


def test_cifar_is_read_and_made_smaller(monkeypatch, tmp_path):
    x = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = {True: (x[:20], torch.arange(20) % 10), False: (x[20:], torch.arange(10))}
    monkeypatch.setattr(hk.zoo, "cifar10", lambda _dir, train, normalize: normalize and parts[train])
    out, settings, folder, device, _ = residual.read_settings(
        "",
        residual.FULL,
        residual.SMALL,
        ["--small", "--examples", "15", "--cifar10", "c", "--out", str(tmp_path)],
    )
    train, test = residual.read_images(folder, settings, device)
    assert (out, settings["data"]) == (tmp_path, "CIFAR-10")
    assert torch.allclose(train[0], x[:15].view(15, 3, 8, 4, 8, 4).mean((3, 5)))
    assert torch.equal(train[1], torch.arange(15) % 10)
    assert len(test[0]) == 10
    with pytest.raises(SystemExit, match="--examples: there are 20, got 25"):
        residual.read_images(folder, settings | {"examples": 25}, device)


def test_full_size_is_the_papers():
    settings = residual.read_settings(
        "", residual.FULL, residual.SMALL, ["--out", "o", "--depths", "20", "56"]
    )[1]
    assert settings["depths"] == [20, 56]
    assert settings["epochs"] == 180
    model = residual.network(settings, 20, "both", 0)
    assert sum(p.numel() for p in model.parameters()) == 272_474
    bare = residual.network(settings, 20, "neither", 0)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in bare.modules())
    assert all(block.shortcut is None for block in bare.blocks)
    assert sum(p.numel() for p in minima.network(minima.FULL, 0).parameters()) == 11_173_962
