from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.monitoring import advance, monitored
from hvpkit.train import SpectrumTracker

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
PARAMS = {
    "w": torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5),
    "v": torch.linspace(1, -1, 10, dtype=torch.float64).reshape(5, 2),
}


def forward(params: Any, batch: Any) -> torch.Tensor:
    return torch.tanh(batch[0] @ params["w"]) @ params["v"]


OBJECTIVE = hk.Objective(forward, lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"))


class Log:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __call__(self, entry: Any) -> None:
        self.told.append(("entry", entry))

    def begin(self) -> None:
        self.told.append(("begin",))

    def end(self) -> None:
        self.told.append(("end",))

    def advance(self, num_passes: float, stage: str) -> None:
        self.told.append(("advance", num_passes, stage))

    def expect(self, num_passes: float) -> None:
        self.told.append(("expect", num_passes))

    def values(self, name: str) -> list[Any]:
        return [entry[1] for entry in self.told if entry[0] == name]


def hessian(batch_size: int = 20, data: Any = (X, Y)) -> hk.CurvatureOperator:
    return hk.hessian(OBJECTIVE, PARAMS, data, batch_size=batch_size)


SOLVES: dict[str, Callable[..., Any]] = {
    "extremes": hk.extreme_eigenvalues,
    "top": lambda H, **options: hk.top_eigenvalues(H, 2, **options),
    "lobpcg": hk.lobpcg,
    "trace": lambda H, **options: hk.trace(H, num_matvecs=12, **options),
    "diagonal": lambda H, **options: hk.diagonal(H, num_matvecs=12, **options),
    "density": lambda H, **options: hk.spectral_density(H, num_steps=6, num_probes=2, **options),
    "chebyshev density": lambda H, **options: hk.spectral_density(
        H, method="chebyshev", num_steps=6, **options
    ),
    "solve": lambda H, **options: hk.solve(H, torch.ones(H.n, dtype=H.dtype), damping=1.0, **options),
    "logdet": lambda H, **options: hk.logdet(H, damping=10.0, num_steps=6, **options),
    "eigsh": hk.eigsh,
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES.keys())
def test_a_monitor_is_told_of_begin_batches_and_end_of_every_solve(solve: Callable[..., Any]) -> None:
    log, plain, H = Log(), [], hessian()
    found = solve(H, monitor=log)
    names = [entry[0] for entry in log.told]
    assert names[0] == "begin"
    assert names[-1] == "end"
    assert names.count("begin") == names.count("end") == 1
    assert names.index("advance") < names.index("entry"), "news before the first entry"
    # 60 examples in batches of 20: each advances a third of a pass, for each column
    assert sum(log.values("advance")) == pytest.approx(found.num_matvecs)
    assert {entry[2] for entry in log.told if entry[0] == "advance"} == {"full data"}
    assert len(log.values("entry")) >= 1
    solve(H, monitor=plain.append)  # a function of entries gets what it always got
    assert [entry.num_matvecs for entry in plain] == [entry.num_matvecs for entry in log.values("entry")]


def test_samples_are_another_stage() -> None:
    log, H = Log(), hessian()
    found = hk.multifidelity([H.coarsen(30), H], monitor=log)
    shares = {"sample": 0.0, "full data": 0.0}
    for entry in log.told:
        if entry[0] == "advance":
            shares[entry[2]] += entry[1]
    assert min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(found.num_matvecs, rel=1e-6)


def test_scores_of_a_sample_are_news_before_the_first_matvec() -> None:
    log = Log()
    with monitored(log):
        hessian().coarsen(30)
    assert [entry[2] for entry in log.told if entry[0] == "advance"] == ["sampling"] * 3


def test_passes_to_expect_are_known_from_the_start_and_stay_within_the_budget() -> None:
    log = Log()
    hk.extreme_eigenvalues(hessian(), monitor=log, max_matvecs=7, tol=1e-12)
    assert log.told[1] == ("expect", 7.0)
    assert all(0 <= value <= 7 for value in log.values("expect"))
    log = Log()
    hk.trace(hessian(), num_matvecs=12, monitor=log)
    assert log.values("expect")[0] == 12
    assert log.values("expect")[-1] == 0


def test_a_stream_counts_whole_passes_once_their_batches_are_known() -> None:
    log = Log()
    H = hk.hessian(OBJECTIVE, PARAMS, [(X[:25], Y[:25]), (X[25:], Y[25:])])
    first = torch.ones(H.n, dtype=H.dtype)
    with monitored(log):
        H @ first
        H @ first
    assert log.values("advance") == [0.0, 0.0, 0.5, 0.5]


def test_the_end_is_told_whatever_ends_a_solve() -> None:
    class Stopping(Log):
        def __call__(self, entry: Any) -> None:
            super().__call__(entry)
            raise KeyboardInterrupt

    log = Stopping()
    with pytest.raises(KeyboardInterrupt):
        hk.extreme_eigenvalues(hessian(), monitor=log)
    assert log.told[-1] == ("end",)
    advance(1.0, "after it")
    assert log.told[-1] == ("end",)


def shown(screen: io.StringIO) -> list[str]:
    """Return the last state of each bar."""
    return [re.split(r"\r", line)[-1].rstrip() for line in screen.getvalue().split("\n") if line.strip()]


def test_a_bar_for_each_solve_shows_stage_passes_values_and_closes() -> None:
    screen = io.StringIO()
    bar = hk.progress_bar(file=screen, mininterval=0, ncols=100, desc="H")
    H = hessian()
    ex = hk.extreme_eigenvalues(H, monitor=bar)
    found = hk.trace(H, num_matvecs=12, monitor=bar)
    first, second = shown(screen)
    passes = ex.num_matvecs
    assert first.startswith("H: |##########| ")
    assert f"0, {passes:.1f}/{passes:.0f} passes, " in first
    assert f"{ex.smallest.value:.3g} ± " in first
    assert f" … {ex.largest.value:.3g} ± " in first
    assert f"{found.num_matvecs:.1f}/12 passes, {found.history[-1]}" in second
    states = screen.getvalue().split("\r")
    assert any("0.3/" in state for state in states), "news after the first of three batches"


def test_a_bar_says_which_stage_a_solve_with_a_sample_is_in() -> None:
    screen, H = io.StringIO(), hessian()
    hk.multifidelity(
        [H.coarsen(30), H], monitor=hk.progress_bar(file=screen, mininterval=0, ncols=100, ascii=True)
    )
    for stage in ("sample, ", "full data, "):
        assert f"0, {stage}" in screen.getvalue()


def test_a_bar_works_for_a_tracker() -> None:
    screen = io.StringIO()
    tracker = SpectrumTracker(
        OBJECTIVE, (X, Y), monitor=hk.progress_bar(file=screen, mininterval=0, ncols=100)
    )
    for step in range(3):
        tracker(PARAMS, step=step)
    assert len(shown(screen)) == 3


def test_a_bar_of_a_continued_solve_counts_the_time_before() -> None:
    bar = hk.progress_bar(file=io.StringIO(), ncols=100)
    bar.begin()
    bar(hk.Progress(20.0, 3600.0, -1.0, 2.0, 0.1, 0.1, seconds_left=1800.0))
    assert bar._bar.format_dict["elapsed"] >= 3600
    assert bar._bar.n == pytest.approx(2 / 3)
    bar.end()


def test_unknown_ends_and_passes_are_not_shown_as_numbers() -> None:
    screen = io.StringIO()
    bar = hk.progress_bar(file=screen, mininterval=0, ncols=100)
    bar.begin()
    bar(hk.Progress(3.0, 1.0))
    bar.end()
    assert "3.0 passes]" in f"{shown(screen)[-1]}]"
    assert "nan" not in screen.getvalue()
    assert math.isinf(hk.Progress().seconds_left)
