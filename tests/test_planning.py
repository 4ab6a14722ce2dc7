from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit import planning
from hvpkit._utils.memory import Allocations
from hvpkit.curvature.batch_trials import time_batches
from hvpkit.planning import Figures, plan_extremes
from hvpkit.results.cost_plan import time_in_words
from hvpkit.solvers.common.expected import RESTARTED, expected_passes, matvecs_left, slowed_by_restarts
from hvpkit.zoo import digits
from problems import SPECTRA, matrix, network

GB = 1e9


def perceptron(width: int, num_steps: int) -> tuple[hk.Objective, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """A network on digits after so many steps of Adam, in float64."""
    x, y = digits()
    data = x.flatten(1).double()[:600], y[:600]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(width)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    objective, params = hk.from_module(model, F.cross_entropy)
    return objective, params, data


@pytest.mark.parametrize("width", [12, 30])
@pytest.mark.parametrize("num_steps", [0, 10, 100])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_passes_of_networks_are_in_the_range(width: int, num_steps: int, tol: float) -> None:
    H = hk.hessian(*perceptron(width, num_steps), mode="reverse-over-reverse", batch_size=600)
    planned = hk.plan(H, tol=tol, max_seconds=0.01)
    assert hk.extreme_eigenvalues(H, tol=tol).num_matvecs in planned.task("extremes").passes


@pytest.mark.parametrize(
    "spectrum", ["indefinite", "clustered", "multiple", "bulk_with_outliers", "decaying"]
)
def test_passes_of_matrices_are_in_the_range(spectrum: str) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA[spectrum]))
    passes = hk.plan(op, max_seconds=0.01).task("extremes").passes
    assert hk.extreme_eigenvalues(op).num_matvecs in passes
    assert passes.high <= op.n + 1


def test_passes_to_an_end_that_is_zero_are_in_the_range() -> None:
    G = hk.ggn(*perceptron(20, 5), batch_size=600)
    passes = hk.plan(G, max_seconds=0.01).task("extremes").passes
    assert passes.low >= 100
    assert hk.extreme_eigenvalues(G).num_matvecs in passes
    assert hk.plan(2 * G, max_seconds=0.01).task("extremes").passes == passes
    for other in (G.shift(1.0), -G, G - hk.hessian(*perceptron(20, 5), batch_size=600)):
        assert hk.plan(other, max_seconds=0.01).task("extremes").passes.low < 100


@pytest.mark.parametrize("method", ["hutch++", "every column"])
def test_passes_of_density_and_trace_are_exact(method: str) -> None:
    op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 300 if method == "hutch++" else 90)))
    planned = hk.plan(op, num_steps=30, num_probes=3, num_matvecs=95, max_seconds=0.01)
    assert planned.task("trace").method == method
    assert hk.trace(op, num_matvecs=95).num_matvecs == planned.task("trace").passes.expected
    density = hk.spectral_density(op, num_steps=30, num_probes=3)
    assert density.num_matvecs == planned.task("density").passes.expected
    for task in planned.tasks[1:]:
        assert task.passes.low == task.passes.high


class Sleepy:
    """A network whose forward pass takes a known time, of a clock that all else hardly moves."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.num_calls, self.now = seconds, 0, 1e6
        monkeypatch.setattr("time.perf_counter", self.clock)
        self.problem = network("mlp", num_examples=40)

    def clock(self) -> float:
        self.now += 1e-5
        return self.now

    def forward(self, params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        self.num_calls += 1
        self.now += self.seconds
        return self.problem.objective.forward(params, batch)

    def hessian(self, **options: object) -> hk.CurvatureOperator:
        objective = hk.Objective(self.forward, self.problem.objective.output_loss)
        options = {"batch_size": 4, "mode": "forward-over-reverse", **options}
        return hk.hessian(objective, self.problem.params, self.problem.data, **options)


def test_times_are_right_to_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    H = Sleepy(0.02, monkeypatch).hessian()
    planned = hk.plan(H, num_matvecs=12, num_steps=3, num_probes=2)
    assert planned.num_batches == 5
    trace = hk.trace(H, num_matvecs=12, block_size=1)
    assert trace.seconds == pytest.approx(planned.task("trace").seconds.expected, rel=0.5)
    assert trace.seconds in planned.task("trace").seconds
    ex = hk.extreme_eigenvalues(H, max_matvecs=10)
    assert ex.seconds / ex.num_matvecs in planned.later_pass


def test_graphs_that_are_kept_make_later_passes_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy = Sleepy(0.02, monkeypatch)
    kept = hk.plan(sleepy.hessian(mode="reverse-over-reverse"))
    assert kept.graphs_kept == 1
    assert kept.later_pass.expected < 0.5 * kept.first_pass.expected
    assert kept.graph_bytes > 0
    whole = sleepy.hessian(mode="reverse-over-reverse")
    for _ in range(3):
        whole @ torch.ones(whole.n, dtype=whole.dtype)
    assert kept.graph_bytes == pytest.approx(whole.terms[0][1].cache.num_bytes, rel=0.2)
    half = hk.plan(sleepy.hessian(mode="reverse-over-reverse", memory_limit=0.5 * kept.graph_bytes))
    assert half.graphs_kept == pytest.approx(0.5, abs=0.02)
    none = hk.plan(sleepy.hessian(mode="reverse-over-reverse", memory_limit=0))
    assert (none.graphs_kept, none.graph_bytes) == (0, 0)
    assert none.later_pass == none.first_pass


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
def test_memory_of_a_matvec_is_that_of_its_largest_batch(mode: str) -> None:
    objective, params, data = perceptron(30, 0)
    H = hk.hessian(objective, params, data, batch_size=200, mode=mode, memory_limit=0)
    v = torch.ones(H.n, 1, dtype=H.dtype)
    with Allocations() as made:
        H.product(v)
    assert hk.plan(H).product_bytes == pytest.approx(made.peak, rel=0.35)


def test_trials_read_few_batches_and_leave_the_operator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy = Sleepy(0.0, monkeypatch)
    H = sleepy.hessian(batch_size=1)
    sleepy.num_calls = 0
    trials = time_batches(H.terms[0][1], 10.0, 0)
    assert len(trials.fresh) == len(trials.kept) == 5
    assert sleepy.num_calls <= 12
    assert not H.terms[0][1].cache.num_bytes
    slow = Sleepy(0.05, monkeypatch).hessian(batch_size=1)
    assert len(time_batches(slow.terms[0][1], 0.01, 0).fresh) == 1
    assert len(time_batches(sleepy.hessian(batch_size=40).terms[0][1], 1.0, 0).fresh) == 1


def figures(n: int, **changes: float | None) -> Figures:
    known = Figures(n, 4, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, free_bytes=1000 * GB)
    return replace(known, **changes)


def test_the_cost_model_follows_its_figures() -> None:
    passes = hk.Range(10, 30, 85)
    task = plan_extremes(figures(10_000), "lanczos", passes)
    assert task.seconds.expected == 2 * 2 + 28 * 1
    assert (task.seconds.low, task.seconds.high) == pytest.approx((0.6 * 12, 1.7 * 87))
    rows = plan_extremes(figures(10_000, row_seconds=0.1), "lanczos", passes, ncv=20)
    slowed = slowed_by_restarts(20)
    assert rows.passes == hk.Range(10, 30 * slowed, 85 * slowed)
    count = 30 * slowed
    assert rows.seconds.expected == pytest.approx(count + 2 + 0.1 * (20**2 / 2 + (count - 20) * 20))
    levels = plan_extremes(figures(10_000), "multifidelity", passes)
    assert (levels.passes, levels.num_vectors) == (passes, 6 * 60 + 32)


@pytest.mark.parametrize(
    ("changes", "offload", "num_vectors", "remedy"),
    [
        ({}, False, 72, None),
        ({"free_bytes": 50 * GB}, False, 62, None),  # half of the memory
        ({"free_bytes": 7 * GB}, False, 19, "of 19 vectors there is room for 17: take fewer parameters"),
        ({"free_bytes": 20 * GB, "product_bytes": 1 * GB}, False, 37, None),
        (
            {"free_bytes": 20 * GB, "product_bytes": 18 * GB},
            False,
            37,
            "room for 5: take a smaller ncv",
        ),
        (
            {"free_bytes": 20 * GB, "graph_bytes": 18 * GB},
            False,
            37,
            "room for 5: take memory_limit=0",
        ),
        ({"free_bytes": 4 * GB, "host_bytes": 100 * GB}, False, 19, "offload=True"),
        ({"free_bytes": 4 * GB, "host_bytes": 100 * GB}, True, 72, None),
        ({"free_bytes": 4 * GB, "host_bytes": 5 * GB}, True, 19, "wrt="),
    ],
)
def test_what_does_not_fit_comes_with_a_remedy(
    changes: dict[str, float], offload: bool, num_vectors: int, remedy: str | None
) -> None:
    task = plan_extremes(figures(100_000_000, **changes), "lanczos", hk.Range(10, 30, 85), offload=offload)
    assert task.num_vectors == num_vectors
    assert task.num_bytes == num_vectors * 4e8
    if remedy is None:
        assert task.remedy is None
    else:
        assert task.remedy is not None
        assert re.search(remedy, task.remedy)


def test_a_plan_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, params, data = perceptron(30, 0)
    H = hk.hessian(objective, params, data, batch_size=200, mode="reverse-over-reverse", memory_limit=0)
    assert hk.plan(H).fits
    monkeypatch.setattr(planning, "free_memory", lambda _: 1e5)
    short = hk.plan(H)
    assert not short.fits
    assert "a matvec does not fit: take a smaller batch_size, about" in short.summary()
    assert "trace does not fit" in short.summary()
    assert "!" in short.summary()


def test_figures_of_another_machine_may_be_given() -> None:
    op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 5000)))
    planned = hk.plan(op, seconds_a_pass=100.0, free_bytes=1e6)
    assert planned.task("trace").seconds.expected == pytest.approx(9900, rel=0.01)
    assert planned.free_bytes == 1e6
    assert planned.task("trace").remedy is not None  # 146 vectors of 20 kB
    with pytest.raises(ValueError, match="seconds_a_pass must be a positive"):
        hk.plan(op, seconds_a_pass=0.0)


def test_a_plan_is_text_and_plain_numbers() -> None:
    planned = hk.plan(hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 500))), max_seconds=0.01)
    text = planned.summary()
    for words in (
        "extremes",
        "lanczos",
        "30 (10-85)",
        "density",
        "trace",
        "hutch++",
        "free",
        "vectors in memory",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 90
    plain = planned.to_dict()
    assert plain["tasks"][0]["call"] == "extremes"
    assert plain["tasks"][0]["passes"] == {"low": 10.0, "expected": 30.0, "high": 85.0}
    assert "extremes" in repr(planned)
    with pytest.raises(ValueError, match="call must be one of 'extremes', 'density', 'trace'"):
        planned.task("norm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol must be"),
        ({"method": "arnoldi"}, "method must be"),
        ({"max_seconds": -1.0}, "max_seconds must be"),
        ({"tol": 1.0}, "tol must be"),
        ({"ncv": 0}, "ncv must be"),
        ({"ncv": 6}, "ncv must be at least 7"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_probes": 0}, "num_probes must be"),
        ({"num_matvecs": 1}, "num_matvecs must be"),
        ({"free_bytes": -1.0}, "free_bytes must be"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 500)))
    with pytest.raises(ValueError, match=message):
        hk.plan(op, **options)


def test_expected_passes_rise_with_accuracy() -> None:
    def passes(tol: float, **options: object) -> hk.Range:
        known = {"atol": 1e-3 * tol, "certify": False, "n": 10**6}
        return expected_passes("lanczos", tol=tol, **{**known, **options})

    ranges = [passes(tol) for tol in (0.3, 1e-1, 1e-2, 1e-3, 1e-6)]
    for place in ("low", "expected", "high"):
        values = [getattr(found, place) for found in ranges]
        assert values == sorted(values)
    assert passes(1e-2, certify=True).high > passes(1e-2).high
    assert passes(1e-2, n=20).high == 21
    zero = passes(1e-2, zero_end=True)
    assert passes(1e-3, zero_end=True).expected == pytest.approx(1.9 * zero.expected)
    assert slowed_by_restarts(5) == max(RESTARTED.values())


def test_time_left_falls_and_then_is_unknown() -> None:
    expected = hk.Range(10, 30, 85)
    left = [matvecs_left(expected, spent) for spent in range(90)]
    assert left == sorted(left[:85], reverse=True) + [math.inf] * 5
    assert left[0] == 30


def test_times_in_words() -> None:
    assert [time_in_words(x) for x in (0.001, 59, 600, 86400, math.inf)] == [
        "0.001 s",
        "59 s",
        "10 min",
        "1 days",
        "unknown",
    ]
