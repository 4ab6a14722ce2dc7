from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

import hvpkit as hk
from hvpkit._utils.random import generator
from hvpkit.cli import app, training_methods
from hvpkit.cli.training_methods import Plan, accuracy, estimate_statistics, shifted, train_epochs
from hvpkit.train import SpectrumTracker, knee_lr
from hvpkit.zoo import digits, digits_cnn

METHODS = ("sgd", "knee", "adahessian", "absa")
MODE = ["--mode", "reverse-over-reverse"]  # "auto" is measured, and two runs could differ in their last bits
SMALL = ["--num-examples", 90, "--batch-size", 32, "--tol", 0.3, "--seed", 3]


def call(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without_seconds(record: Any) -> Any:
    if isinstance(record, dict):
        left_out = ("seconds", "seconds_left", "operator")
        return {key: without_seconds(item) for key, item in record.items() if key not in left_out}
    return [without_seconds(item) for item in record] if isinstance(record, list) else record


def spectrum(folder: Path) -> Any:
    lines = without_seconds(strict((folder / "spectrum.jsonl").read_text()))
    return [{key: line[key] for key in line if key not in ("tracker", "checksum")} for line in lines]


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def plan(method: str, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "method": method,
        "epochs": 4,
        "lr": 0.05,
        "batch_size": 32,
        "weight_decay": 5e-4,
        "lr_decay": 0.1,
        "lr_decay_epochs": () if method == "knee" else (2,),
        "seed": 3,
    }
    return Plan(**(given | changes))


@contextmanager
def interrupted_at_step(count: int) -> Iterator[None]:
    """Interrupt the program before this step of any optimiser."""
    calls: list[object] = []

    def stop(optimizer: object, *_: object) -> None:
        calls.append(optimizer)
        if len(calls) == count:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def stop_at(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, interrupted at its call of this number."""
    calls = []

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args, **options)

    return stopping


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_to_the_same_bits(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = ["train", "digits", "--method", method, "--epochs", 3, *SMALL, *MODE, "--lr", 0.05]
    lines = strict(call(*args, "--out", whole, "--json").stdout)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    with monkeypatch.context() as patch, interrupted_at_step(5):  # within the second epoch
        if method == "absa":  # which has no optimiser
            patch.setattr(training_methods, "absa", stop_at(2, training_methods.absa))
        assert "interrupted" in call(*args, "--out", parts, code=130).stderr
    assert loaded(parts / "checkpoint.pt")["content"]["epoch"] == 1
    assert not (parts / "model.pt").exists()
    with monkeypatch.context() as patch:  # in the measurement after the second epoch
        patch.setattr(SpectrumTracker, "__call__", stop_at(1, SpectrumTracker.__call__))
        call(*args, "--out", parts, code=130)
    assert loaded(parts / "checkpoint.pt")["content"]["epoch"] == 2
    assert [entry["step"] for entry in spectrum(parts)] == [0, 1]
    rest = strict(call(*args, "--out", parts, "--json").stdout)
    assert without_seconds(rest) == without_seconds(lines[2:])
    assert same_bits(loaded(parts / "model.pt"), loaded(whole / "model.pt"))
    assert same_bits(loaded(parts / "checkpoint.pt"), loaded(whole / "checkpoint.pt"))
    assert spectrum(parts) == spectrum(whole)
    assert sorted(path.name for path in parts.iterdir()) == [
        "checkpoint.pt",
        "model.pt",
        "spectrum.jsonl",
        "spectrum.png",
    ]
    assert matplotlib.image.imread(parts / "spectrum.png")[..., :3].std() > 0.02


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = call("train", "digits", "--epochs", 3, *SMALL, "--track-every", 2, "--keep", "--out", out)
    for text in ("epoch    3  loss ", "smallest -", "passes", "model.pt"):
        assert text in result.stdout
    return out


def test_without_tracking_it_only_trains_and_another_run_may_not_track(tmp_path: Path) -> None:
    args = ["train", "digits", "--epochs", 2, *SMALL]
    call(*args, "--out", tmp_path / "tracked")
    lines = strict(call(*args, "--no-track", "--keep", "--out", tmp_path / "run", "--json").stdout)
    assert [line["spectrum"] for line in lines] == [None] * 3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint.pt", "model.pt", "epoch-0000.pt", "epoch-0001.pt", "epoch-0002.pt"}
    assert same_bits(loaded(tmp_path / "run" / "model.pt"), loaded(tmp_path / "tracked" / "model.pt"))
    assert "--out" in call(*args, "--out", tmp_path / "run", code=2).stderr


def test_both_ends_are_those_of_the_model_after_the_epochs_asked_for(run: Path) -> None:
    entries = spectrum(run)
    assert [entry["step"] for entry in entries] == [0, 2]
    model = digits_cnn()
    model.load_state_dict(loaded(run / "epoch-0002.pt"))
    objective, params = hk.from_module(model, F.cross_entropy)
    x, y = digits()
    ex = hk.extreme_eigenvalues(hk.hessian(objective, params, (x[:90], y[:90])), tol=1e-3)
    for name in ("smallest", "largest"):
        truth = getattr(ex, name).value
        assert abs(entries[1][name]["value"] - truth) <= 0.3 * abs(truth)
        assert entries[1][name]["interval"]["lower"] <= truth * (1 + 1e-3 * (1 if truth > 0 else -1))


def test_the_last_model_can_be_resumed_from(run: Path) -> None:
    assert same_bits(loaded(run / "model.pt"), loaded(run / "epoch-0003.pt"))
    args = ["extremes", "digits", "--num-examples", 90, "--tol", 0.1, "--json", "--resume"]
    found = [
        strict(call(*args, run / name).stdout)[0]["largest"]["value"]
        for name in ("model.pt", "checkpoint.pt")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_finished_run_has_nothing_to_do(run: Path) -> None:
    before = (run / "spectrum.jsonl").read_bytes(), loaded(run / "model.pt")
    args = ["train", "digits", "--epochs", 3, *SMALL, "--track-every", 2, "--keep", "--out", run, "--json"]
    assert [line["epoch"] for line in strict(call(*args).stdout)] == [3]
    assert (run / "spectrum.jsonl").read_bytes() == before[0]
    assert same_bits(loaded(run / "model.pt"), before[1])


def test_a_folder_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    args = ["train", "digits", "--epochs", 3, *SMALL, "--track-every", 2, "--out"]
    assert "lr was 0.1 and is 0.2" in call(*args, run, "--lr", 0.2, code=2).stderr
    (tmp_path / "spectrum.jsonl").write_text("")
    assert "name another folder" in call(*args, tmp_path, code=2).stderr
    torch.save({"other": 1}, tmp_path / "checkpoint.pt")
    assert "not a checkpoint of hvpkit" in call(*args, tmp_path, code=2).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "newton"], "'newton' is not one of 'sgd', 'knee', 'adahessian', 'absa'"),
        (["--epochs", 0], "epochs"),
        (["--lr", -1], "lr"),
        (["--method", "knee", "--lr-decay-epoch", 2], "its own decay"),
        (["--track-every", 0], "every"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: list[object], said: str) -> None:
    stderr = call("train", "digits", "--out", tmp_path, *options, code=2).stderr
    assert said in " ".join(stderr.replace("│", " ").split())


def test_a_function_is_no_network_to_train(tmp_path: Path) -> None:
    assert "digits, cifar10, cifar100" in call("train", "problem.py:make", "--out", tmp_path, code=2).stderr


def test_a_diverging_training_exits_with_1_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    args = ["train", "digits", "--epochs", 4, *SMALL, "--lr", 1e30, "--track-every", 9]
    assert "diverged" in call(*args, "--out", tmp_path, code=1).stderr
    assert "checkpoint.pt" in {path.name for path in tmp_path.iterdir()}


def test_sgd_is_the_plain_loop() -> None:
    x, y = (part[:90] for part in digits())
    model, mine = digits_cnn(seed=1), digits_cnn(seed=1)
    *_, last = train_epochs(model, (x, y), plan("sgd"), None)
    optimizer = torch.optim.SGD(mine.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, 5):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch <= 2 else 0.005
        order = torch.randperm(90, generator=generator(3, epoch))
        for chosen in order.split(30):
            optimizer.zero_grad()
            F.cross_entropy(mine(x[chosen]), y[chosen]).backward()
            optimizer.step()
    assert last["epoch"] == len(last["losses"]) == 4
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(last["model"][name], value)


def test_knee_follows_its_schedule() -> None:
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        list(train_epochs(digits_cnn(), tuple(part[:90] for part in digits()), plan("knee"), None))
    finally:
        handle.remove()
    expected = [knee_lr(t, peak_lr=0.05, explore_steps=6, total_steps=12) for t in range(12)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_the_loss_that_is_measured(method: str) -> None:
    x, y = (part[:300] for part in digits())
    model = digits_cnn(seed=1)
    *_, last = train_epochs(model, (x, y), plan(method, lr=0.1, epochs=6, lr_decay_epochs=()), None)
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    assert loss < 1.2  # 2.3 at the start
    assert abs(loss - last["losses"][-1]) < 0.5


def test_statistics_of_batches_become_the_running_ones() -> None:
    x = digits()[0][:256]
    model = digits_cnn(seed=1)
    estimate_statistics(model, x, batch_size=256)
    norm, features = model[1], model[0](x)
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, features.transpose(0, 1).flatten(1).var(dim=1))
    assert norm.momentum == 0.1


def test_training_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    data = tuple(part[:60] for part in digits())
    for method in METHODS:
        list(train_epochs(digits_cnn(), data, plan(method, epochs=1, lr_decay_epochs=()), None))
    assert torch.equal(torch.get_rng_state(), before)


def test_track_finds_both_ends_at_each_checkpoint_and_goes_on(run: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        content = (run / f"epoch-{number:04d}.pt").read_bytes()
        (tmp_path / f"step-{8 + number}.pt").write_bytes(content)  # 9, 10, 11: not in the order of letters
    first, last = tmp_path / "first", tmp_path / "whole"
    options = [
        *MODE,
        *SMALL[:2],
        "--tol",
        0.3,
        "--method",
        "lanczos",
        "--max-matvecs",
        80,
        "--time-limit",
        100,
        "--json",
    ]
    whole = strict(
        call("track", "digits", "--checkpoints", tmp_path / "step-*.pt", *options, "--out", last).stdout
    )
    assert [Path(line["checkpoint"]).name for line in whole] == ["step-9.pt", "step-10.pt", "step-11.pt"]
    names = [tmp_path / "step-9.pt", tmp_path / "step-10.pt", tmp_path / "step-11.pt"]
    call("track", "digits", "--checkpoints", *names[:2], *options, "--out", first)
    assert len(spectrum(first)) == 2
    found = strict(call("track", "digits", "--checkpoints", *names, *options, "--out", first).stdout)
    assert [line["step"] for line in found] == [0, 1, 2]
    assert spectrum(first) == spectrum(last)
    assert matplotlib.image.imread(first / "spectrum.png")[..., :3].std() > 0.02
    args = ["extremes", "digits", "--resume", names[2], *SMALL[:2], "--tol", 1e-3, "--json"]
    truth = strict(call(*args).stdout)[0]["largest"]["value"]
    assert abs(found[2]["largest"]["value"] - truth) <= 0.3 * abs(truth)
    said = call("track", "digits", "--checkpoints", names[1], *options, "--out", first, code=2).stderr
    assert "name another folder" in said


def test_track_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    none = tmp_path / "none-*.pt"
    assert "there is no file" in call("track", "digits", "--checkpoints", none, code=2).stderr
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    args = ["track", "digits", "--checkpoints", tmp_path / "other.pt"]
    assert "is unexpected: a" in call(*args, code=2).stderr
    (tmp_path / "spectrum.jsonl").write_text("")
    assert "of something else" in call(*args, "--out", tmp_path, code=2).stderr


def test_track_takes_problems_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "problem.py").write_text("""
import torch

def network():
    x = torch.linspace(-1, 1, 60).reshape(20, 3).sin()
    return torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (x, torch.arange(20) % 2)

def loss():
    return lambda p, b: (b @ p["w"]) ** 4, {"w": torch.ones(3)}, torch.linspace(-1, 1, 60).reshape(20, 3).sin()
""")
    for number in (1, 2):
        torch.save({"w": number * torch.ones(3)}, tmp_path / f"loss-{number}.pt")
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, number)
        torch.nn.init.zeros_(model.bias)
        torch.save(model.state_dict(), tmp_path / f"network-{number}.pt")
    for name in ("loss", "network"):
        args = [
            "track",
            tmp_path / f"problem.py:{name}",
            "--checkpoints",
            tmp_path / f"{name}-*.pt",
            "--tol",
            1e-3,
        ]
        lines = strict(call(*args, "--json", "--out", tmp_path / f"{name}-out").stdout)
        largest = [line["largest"]["value"] for line in lines]
        # of a loss of degree four the curvature grows with the square; equal weights of all classes cancel
        assert largest[1] == pytest.approx((4 if name == "loss" else 1) * largest[0], rel=1e-2)
        assert (tmp_path / f"{name}-out" / "spectrum.png").exists()


def test_images_are_shifted_and_mirrored() -> None:
    images = torch.zeros(400, 1, 8, 8)
    images[:, 0, 3, 2] = 1
    found = {
        tuple(place) for place in shifted(images, generator(0), mirror=False)[:, 0].nonzero()[:, 1:].tolist()
    }
    assert found == {(down, across) for down in (2, 3, 4) for across in (1, 2, 3)}
    found = {
        tuple(place) for place in shifted(images, generator(0), mirror=True)[:, 0].nonzero()[:, 1:].tolist()
    }
    assert found == {(down, across) for down in (2, 3, 4) for across in (1, 2, 3, 4, 5, 6)}


def test_accuracy_is_the_share_of_right_classes_by_running_statistics() -> None:
    model = digits_cnn(seed=1)
    x, y = (part[:70] for part in digits())
    with torch.no_grad():
        y = torch.where(torch.arange(70) < 21, model.eval()(x).argmax(1), 10)
    model.train()
    assert accuracy(model, (x, y), batch_size=32) == 0.3
    assert model.training


def test_a_run_with_augmentation_says_the_accuracy_on_the_rest(tmp_path: Path) -> None:
    args = [
        "train",
        "digits",
        "--epochs",
        2,
        *SMALL,
        "--track-every",
        9,
        "--augment",
        "--json",
        "--out",
        tmp_path,
    ]
    lines = strict(call(*args).stdout)
    model = digits_cnn()
    model.load_state_dict(loaded(tmp_path / "model.pt"))
    x, y = (part[90:] for part in digits())
    with torch.no_grad():
        truth = float((model.eval()(x).argmax(1) == y).double().mean())
    assert lines[-1]["test_accuracy"] == pytest.approx(truth, abs=2e-3)
    assert "augmentation" in call(*[arg for arg in args if arg != "--augment"], code=2).stderr
    said = call(*args, "--method", "absa", code=2).stderr
    assert "leave --augment out" in said


def test_track_without_a_folder_prints_a_line_for_each(run: Path) -> None:
    args = ["track", "digits", "--checkpoints", run / "epoch-*.pt", *SMALL[:2], "--tol", 0.3]
    lines = call(*args).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"epoch-{number:04d}.pt" for number in range(4)]
    assert "max-matvecs" in call(*args[:-2], "--tol", 1e-7, "--max-matvecs", 6, code=1).stdout


def test_a_network_for_cifar_is_trained_tracked_and_resumed(cifar: Path, tmp_path: Path) -> None:
    problem = ["cifar10", "--arch", "resnet8", "--data-dir", cifar]
    options = ["--epochs", 1, "--batch-size", 10, "--tol", 0.5, "--keep", "--json", "--out", tmp_path / "run"]
    lines = strict(call("train", *problem, *options).stdout)
    assert [line["epoch"] for line in lines] == [0, 1]
    names = [tmp_path / "run" / f"epoch-000{number}.pt" for number in (0, 1)]
    tracked = strict(call("track", *problem, "--checkpoints", *names, "--tol", 0.5, "--json").stdout)
    found = strict(call("extremes", *problem, "--resume", names[1], "--tol", 0.05, "--json").stdout)[0]
    truth = found["largest"]["value"]
    for value in (lines[1]["spectrum"]["largest"]["value"], tracked[1]["largest"]["value"]):
        assert 0.5 * truth <= value <= 1.06 * truth
    said = call("train", *problem[:2], "resnet14", *problem[3:], *options, code=2).stderr
    assert "arch was 'resnet8' and is 'resnet14'" in said
