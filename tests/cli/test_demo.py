import copy
import json
import math
from functools import partial

import matplotlib.image
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn import functional as F
from typer.testing import CliRunner

import hvpkit as hk
from hvpkit import plots
from hvpkit.cli import app
from hvpkit.cli.demo import train_and_solve, write_files
from hvpkit.plots.landscape import loss_along
from hvpkit.zoo import digits, digits_cnn, train_classifier
from oracles import product_by_double_backward


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return what the demonstration gives, and the network that it has trained."""
    folder = tmp_path_factory.mktemp("demo")
    epochs, entries, models = [], [], []

    def kept(model, *args, **options):
        models.append(model)
        return train_classifier(model, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvpkit.cli.demo.train_classifier", kept)
        ex, problem, draw = train_and_solve(
            training_monitor=lambda epoch, loss: epochs.append((epoch, loss)),
            solver_monitor=entries.append,
        )
    write_files(folder, ex, problem, draw)
    return folder, ex, problem, epochs, entries, models[0]


def test_demo_finds_both_ends_of_the_float64_hessian_to_its_tolerance(demo):
    _, ex, problem, *_, trained = demo
    model, (images, classes) = copy.deepcopy(trained), digits()
    objective, params = hk.from_module(model.double(), F.cross_entropy)
    n, batch = problem["num_parameters"], (images.double(), classes)

    def product(v):
        return product_by_double_backward(objective, params, batch, torch.from_numpy(v)).numpy()

    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    operator = LinearOperator((n, n), product, dtype=float)
    truth = eigsh(operator, k=2, which="BE", tol=1e-6, ncv=60, v0=start)[0]
    for pair, value in zip((ex.smallest, ex.largest), truth.tolist(), strict=True):
        assert abs(pair.value - value) <= 1e-2 * abs(value)
        assert value in pair.interval


def test_demo_trains_to_a_low_loss_and_reports_each_epoch(demo):
    _, ex, problem, epochs, entries, _ = demo
    assert [epoch for epoch, _ in epochs] == list(range(1, len(epochs) + 1))
    assert epochs[-1][1] <= 0.01
    assert problem["mean_loss"] < 0.02
    passes = [entry.num_matvecs for entry in entries]
    assert passes == sorted(set(passes))
    assert entries == list(ex.history)
    assert passes[-1] == ex.num_matvecs - 1  # the last matvec verifies the residuals


def test_demo_writes_strict_json_that_says_what_was_computed(demo):
    folder, ex, problem, *_ = demo

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads((folder / "extremes.json").read_text(), parse_constant=refuse)
    assert written == {**ex.to_dict(), "problem": problem}
    assert problem["num_examples"] == 1797
    assert problem["batchnorm"] == "eval"


def test_demo_draws_a_picture_that_is_not_blank(demo):
    image = matplotlib.image.imread(demo[0] / "extremes.png")
    assert min(image.shape[:2]) > 800
    assert image[..., :3].std() > 0.05
    assert sorted(path.name for path in demo[0].iterdir()) == ["extremes.json", "extremes.png"]


def test_command_prints_the_table_and_what_was_computed(demo, tmp_path, monkeypatch):
    *_, epochs, _, trained = demo

    def as_before(model, data, *, seed, monitor):
        assert (len(data[0]), seed) == (1797, 0)
        model.load_state_dict(trained.state_dict())
        for epoch, loss in epochs:
            monitor(epoch, loss)

    monkeypatch.setattr("hvpkit.cli.demo.train_classifier", as_before)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--tol", "0.1"])
    assert result.exit_code == 0, result.output
    for text in (
        "smallest",
        "largest",
        "residual norm",
        "passes",
        "1,797 examples",
        "BatchNorm by its running",
    ):
        assert text in result.output
    assert (tmp_path / "out" / "extremes.json").exists()


def test_command_refuses_bad_arguments_by_name(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--tol", "-1"])
    assert result.exit_code == 2
    assert "tol" in result.output


def test_loss_along_a_quadratic_is_its_parabola():
    center = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss_fn = lambda p, batch: ((p - center) ** 2 * batch).sum(-1)  # noqa: E731
    data = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    distances = [-1.0, 0.0, 0.5]
    found = loss_along(loss_fn, center, data, torch.tensor([1.0, 0.0], dtype=torch.float64), distances)
    assert found.tolist() == pytest.approx([2.0, 0.0, 0.5])
    with pytest.raises(ValueError, match="direction"):
        loss_along(loss_fn, center, data, torch.ones(3, dtype=torch.float64), distances)


def test_pictures_show_the_quadratic_that_they_are_given():
    matplotlib.use("agg")
    diagonal = torch.tensor([-2.0, 1.0, 6.0], dtype=torch.float64)
    loss_fn = lambda p, batch: (p * p * diagonal).sum() / 2 + 5 + 0 * batch.sum(-1)  # noqa: E731
    point, data = torch.zeros(3, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    ex = hk.extreme_eigenvalues(hk.hessian(loss_fn, point, data))
    for pair in (ex.smallest, ex.largest):
        ax = plots.loss_along_eigenvector(loss_fn, point, data, pair)
        loss, parabola = (torch.as_tensor(line.get_ydata()) for line in ax.get_lines())
        torch.testing.assert_close(loss, parabola, atol=1e-12, rtol=1e-9)
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    ax = plots.convergence(ex, "largest")
    values = ax.get_lines()[0].get_ydata()
    assert math.isclose(values[-1], 6.0, rel_tol=1e-9)
    matplotlib.pyplot.close("all")


def test_training_and_the_network_repeat_and_leave_random_state_alone():
    data = tuple(part[:200] for part in digits())
    before = torch.get_rng_state()
    losses = [train_classifier(digits_cnn(4, seed=3), data, max_epochs=2, seed=5) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(before, torch.get_rng_state())
    criterion = partial(F.cross_entropy, reduction="none")
    assert len(hk.from_module(digits_cnn(4), criterion)[1]) == 8
