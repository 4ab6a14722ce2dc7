from __future__ import annotations

import copy
import json

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.checkpoints import digest
from hvpkit.train import SpectrumTracker
from problems import network


def data(num_examples: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(num_examples, 4, generator=g), torch.randint(3, (num_examples,), generator=g)


def module() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def train(model: nn.Module, steps: range, tracker: SpectrumTracker | None = None, count: bool = True) -> None:
    x, y = data()
    for step in steps:
        if tracker is not None:
            tracker(model, step=step if count else None)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad


def truth(model: nn.Module) -> torch.Tensor:
    H = hk.hessian(
        *hk.from_module(copy.deepcopy(model).double(), F.cross_entropy), (data()[0].double(), data()[1])
    )
    return torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=torch.float64))


def test_measures_the_module_as_it_is_with_its_buffers() -> None:
    model, tracker = module(), SpectrumTracker.for_module(F.cross_entropy, data())
    for start in (0, 5, 10):
        train(model, range(start, start + 5))
        model.eval()
        ex = tracker(model)
        assert not model.training
        assert not any(child.training for child in model.modules())
        model.train()
        exact = truth(model)
        assert ex is not None
        assert ex.smallest.value == pytest.approx(float(exact[0]), rel=1e-2)
        assert ex.largest.value == pytest.approx(float(exact[-1]), rel=1e-2)
    assert [step for step, _ in tracker.results] == [0, 1, 2]


def test_training_goes_on_as_without_a_tracker() -> None:
    with_tracker, without = module(), module()
    before = torch.get_rng_state()
    train(with_tracker, range(8), SpectrumTracker.for_module(nn.CrossEntropyLoss(), data(), every=3))
    assert torch.equal(torch.get_rng_state(), before)
    train(without, range(8))
    for one, other in zip(with_tracker.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_functions_of_parameters_are_tracked_as_well() -> None:
    problem = network("mlp")
    tracker = SpectrumTracker(problem.objective, problem.data, every=2, wrt="*weight")
    found = [tracker(problem.params) for _ in range(5)]
    assert [ex is None for ex in found] == [False, True, False, True, False]
    H = hk.hessian(problem.objective, problem.params, problem.data, wrt="*weight")
    assert found[0].vectors.shape == (H.n, 2)
    assert found[4].largest.value == pytest.approx(found[0].largest.value, rel=1e-2)


def test_records_are_flat_and_go_into_a_frame() -> None:
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), every=4)
    assert repr(tracker) == "<SpectrumTracker: no measurements>"
    train(module(), range(9), tracker)
    (step, ex), record = tracker.results[1], tracker.records[1]
    assert [entry["step"] for entry in tracker.records] == [0, 4, 8]
    assert step == 4
    last = tracker.results[-1][1]
    ends = f"smallest {last.smallest.value:.6g}, largest {last.largest.value:.6g}"
    assert repr(tracker) == f"<SpectrumTracker: 3 measurements; at step 8: {ends}>"
    assert record["largest"] == ex.largest.value
    assert record["smallest_lower"] == ex.smallest.interval.lower
    assert record["passes"] == ex.num_matvecs
    assert record["status"] == "converged"
    pandas = pytest.importorskip("pandas")
    frame = tracker.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["largest"].tolist() == [entry["largest"] for entry in tracker.records]


@pytest.mark.parametrize("method", ["lanczos", "multifidelity"])
def test_every_measurement_is_that_of_a_random_start(method: str) -> None:
    examples, model = data(120), module()
    tracker = SpectrumTracker.for_module(
        F.cross_entropy, examples, method=method, mode="reverse-over-reverse", seed=7
    )
    for number in range(3):
        found = tracker(model)
        objective, params = hk.from_module(model, F.cross_entropy)
        H = hk.hessian(objective, params, examples, mode="reverse-over-reverse")
        assert torch.equal(found.vectors, hk.extreme_eigenvalues(H, method=method, seed=7 + number).vectors)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(0.99)


@pytest.mark.parametrize("method", ["lanczos", "multifidelity"])
def test_a_restart_goes_on_to_the_same_bits(tmp_path, method: str) -> None:
    options = {"every": 2, "method": method}
    whole = SpectrumTracker.for_module(F.cross_entropy, data(), **options, path=tmp_path / "whole.jsonl")
    train(module(), range(10), whole)
    path, model = tmp_path / "parts.jsonl", module()
    train(model, range(5), SpectrumTracker.for_module(F.cross_entropy, data(), **options, path=path))
    again = SpectrumTracker.for_module(F.cross_entropy, data(), **options, path=path)
    assert [step for step, _ in again.results] == [0, 2, 4]
    train(model, range(5, 10), again, count=False)
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in again.records]
    assert strip == [{k: v for k, v in entry.items() if k != "seconds"} for entry in whole.records]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert lines[3]["smallest"]["value"] == again.results[3][1].smallest.value


def test_training_that_went_back_replaces_what_came_after(tmp_path) -> None:
    path, model = tmp_path / "run.jsonl", module()
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), path=path)
    train(model, range(5), tracker)
    before = path.read_text().splitlines()
    with pytest.warns(hk.UnsavedWarning, match=r"^path: training has gone back to step 2.* 3 measurements"):
        tracker(model, step=2)
    assert [step for step, _ in tracker.results] == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 3
    again = SpectrumTracker.for_module(F.cross_entropy, data(), path=path)
    with pytest.warns(hk.UnsavedWarning, match="3 measurements"):
        again(model, step=0)
    kept = (tmp_path / "run.jsonl.replaced").read_text().splitlines()
    assert kept[:3] == before[2:]
    assert [json.loads(line)["step"] for line in kept] == [2, 3, 4, 0, 1, 2]


def test_a_budget_keeps_what_was_found_by_then() -> None:
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), max_matvecs=5)
    ex = tracker(module())
    assert ex is not None
    assert ex.status is hk.Status.MAX_MATVECS
    assert ex.num_matvecs <= 5
    assert tracker.records[0]["status"] == "max-matvecs"


def test_monitor_and_method_reach_the_solver() -> None:
    seen: list[hk.Progress] = []
    tracker = SpectrumTracker.for_module(
        F.cross_entropy, data(), method="lanczos", monitor=seen.append, tol=0.1
    )
    ex = tracker(module())
    assert ex is not None
    assert tuple(seen) == ex.history
    assert ex.tol == 0.1


def test_picture_has_both_ends_at_all_steps() -> None:
    tracker = SpectrumTracker.for_module(F.cross_entropy, data(), every=4)
    train(module(), range(9), tracker)
    ax = tracker.plot()
    assert sorted(line.get_label() for line in ax.lines if line.get_label() in ("smallest", "largest")) == [
        "largest",
        "smallest",
    ]
    assert all(list(line.get_xdata()) == [0, 4, 8] for line in ax.lines if line.get_label() == "largest")
    plt.close(ax.figure)


def test_other_parameters_are_refused() -> None:
    tracker = SpectrumTracker(lambda p, batch: (batch @ p) ** 2, torch.randn(20, 3))
    tracker(torch.ones(3))
    tracker_of_two = SpectrumTracker(lambda p, batch: (batch[:, : len(p)] @ p) ** 2, torch.randn(20, 3))
    tracker_of_two(torch.ones(3))
    with pytest.raises(ValueError, match=r"^params has 2 parameters"):
        tracker_of_two(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"every": 0}, ValueError, "every"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"method": "power"}, ValueError, "method"),
        ({"ncv": 0}, ValueError, "ncv"),
        ({"offload": "no"}, TypeError, "offload"),
        ({"path": "/no/such/folder/run.jsonl"}, ValueError, "path"),
        ({"path": "/proc/run.jsonl"}, ValueError, "path"),
        ({"path": "/dev/full"}, ValueError, "path"),
        ({"path": 3}, TypeError, "path"),
    ],
)
def test_bad_argument_is_named(options: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}"):
        SpectrumTracker.for_module(F.cross_entropy, data(), **options)


def test_module_and_nonsense_as_loss_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^loss_fn .*for_module"):
        SpectrumTracker(module(), data())
    with pytest.raises(TypeError, match=r"^loss_fn"):
        SpectrumTracker(3, data())


def tracker_at(path, examples=None, **options) -> SpectrumTracker:
    examples = data() if examples is None else examples
    return SpectrumTracker.for_module(F.cross_entropy, examples, path=path, **options)


def test_a_file_of_another_tracker_is_refused(tmp_path) -> None:
    path, (x, y) = tmp_path / "run.jsonl", data()
    tracker_at(path)(module())
    before = path.read_bytes()
    for options, said in (
        ({"examples": (x + 1e-3, y)}, r"\(data differs\)"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"wrt": "*weight"}, "wrt was None and is"),
        ({"method": "lanczos"}, "method was 'auto' and is 'lanczos'"),
    ):
        with pytest.raises(ValueError, match=rf"^path: .* holds another solve .*{said}"):
            tracker_at(path, **options)
    assert path.read_bytes() == before
    again = tracker_at(path, examples=[(x[:50], y[:50]), (x[50:], y[50:])], tol=1e-4)  # the same question
    assert [step for step, _ in again.results] == [0]


def test_damage_of_a_file_is_never_read_as_another_value(tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    tracker = tracker_at(path)
    tracker(module())
    tracker(module())
    whole, values = path.read_bytes(), [ex.to_dict() for _, ex in tracker.results]
    step = max(1, len(whole) // 60)
    for place in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = tracker_at(path)
        except ValueError as error:
            assert str(error).startswith("path: ")  # noqa: PT017
        else:
            assert [ex.to_dict() for _, ex in found.results] == values
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(ValueError, match=r"^path: line 2 of .* is damaged"):
        tracker_at(path)
    record = json.loads(whole.splitlines()[0])
    del record["checksum"]
    record["tracker"]["format"] = 0
    path.write_text(json.dumps({**record, "checksum": digest(record)}) + "\n")
    with pytest.raises(ValueError, match=r"^path: .* is of another version"):
        tracker_at(path)


def test_a_write_that_fails_is_a_warning_and_the_next_writes_all(tmp_path, monkeypatch) -> None:
    path, model = tmp_path / "run.jsonl", module()
    tracker = tracker_at(path)
    tracker(model)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.warns(
            hk.UnsavedWarning, match=r"^path: .* could not be written \(No space left on device\)"
        ):
            ex = tracker(model)
        with pytest.raises(OSError, match="No space"):
            tracker.save()
    assert ex is not None
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    tracker(model)
    assert [step for step, _ in tracker_at(path).results] == [0, 1, 2]


def test_another_file_is_refused_and_kept(tmp_path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("my notes\n", '{"step": 1}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^path: .* is not a file that SpectrumTracker"):
            SpectrumTracker.for_module(F.cross_entropy, data(), path=path)
        assert path.read_text() == text
