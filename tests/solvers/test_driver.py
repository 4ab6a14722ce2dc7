from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import hvpkit as hk
from hvpkit._utils.deadline import DeadlineReached, check_deadline, deadline
from hvpkit.results.eigen import Progress, Status
from hvpkit.solvers.driver import Assessment, Limits, conclude, iterate, run
from variants import explained


@dataclass(frozen=True)
class Counter:
    """A state that counts its steps, of ``cost`` each."""

    num_steps: int = 0
    cost: float = 1.0

    @property
    def num_matvecs(self) -> float:
        return self.num_steps * self.cost


def advance(state: Counter) -> Counter:
    return Counter(state.num_steps + 1, state.cost)


def looker(until: int | None = None, num_steps: int = 1) -> Callable[[Counter], Assessment[Counter]]:
    def assess(state: Counter) -> Assessment[Counter]:
        over = until is not None and state.num_steps >= until
        progress = hk.Progress(0.0, 0.0, -float(state.num_steps), float(state.num_steps), 0.5, 0.25)
        return Assessment(state, progress, num_steps, Status.CONVERGED if over else None)

    return assess


def limits(
    max_matvecs: float = 100, time_limit: float | None = None, reserve: float = 1, minimum: float = 1
) -> Limits:
    return Limits(max_matvecs, time_limit, reserve, minimum)


@dataclass(frozen=True)
class Counting:
    """A solver that takes steps and finds nothing."""

    assess: Callable[[Counter], Assessment[Counter]]
    limits: Limits
    start: Counter = Counter()
    step: Callable[[Counter], Counter] = advance
    op: hk.LinearOperator = field(default_factory=lambda: hk.aslinearoperator(torch.eye(1)))

    @property
    def step_cost(self) -> float:
        return self.start.cost

    def init(self) -> Counter:
        return self.start

    def finalize(self, state: Counter, status: Status) -> hk.EigenResult:
        nothing = torch.zeros(0)
        return hk.EigenResult(
            nothing, nothing, nothing, nothing, (), state.num_matvecs, 0.0, status, status.advice, ()
        )


class Clock:
    """Seconds that pass with each step, for ``time.perf_counter``."""

    def __init__(self, seconds_a_step: float) -> None:
        self.now, self.seconds_a_step = 1000.0, seconds_a_step

    def step(self, state: Counter) -> Counter:
        self.now += self.seconds_a_step
        return advance(state)


def test_run_gives_the_result_with_history_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = run(Counting(looker(until=4), limits(), step=clock.step))
    monkeypatch.undo()
    assert (found.status, found.num_matvecs, found.seconds) == (Status.CONVERGED, 4.0, 8.0)
    assert [entry.seconds for entry in found.history] == [2.0, 4.0, 6.0, 8.0]
    assert found.message == Status.CONVERGED.advice


def test_vectors_of_a_non_finite_matvec_are_blamed() -> None:
    suspect = torch.full((1, 1), 7.0)

    def assess(state: Counter) -> Assessment[Counter]:
        return Assessment(state, hk.Progress(), 1, Status.NON_FINITE if state.num_steps else None, suspect)

    op = explained(
        replace(hk.aslinearoperator(torch.eye(1)), product=lambda v: v * torch.nan),
        lambda v: f"{v.item():g} is at fault",
    )
    assert run(Counting(assess, limits(), op=op)).message.endswith("; 7 is at fault")


@pytest.mark.parametrize("budget", [5, 100])
def test_a_handover_comes_before_a_limit_and_needs_a_status(budget: int) -> None:
    def assess(state: Counter) -> Assessment[Counter]:
        return Assessment(state, hk.Progress(), 1, handover=state.num_steps == 4)

    solver = Counting(assess, limits(budget))
    ended = iterate(solver)
    assert (ended.status, ended.state.num_steps) == (None, 4)
    assert conclude(solver, ended, Status.TIME_LIMIT).status is Status.TIME_LIMIT


def test_ends_at_the_first_assessment_that_says_so() -> None:
    found = iterate(Counting(looker(until=7, num_steps=3), limits()))
    assert found.status is Status.CONVERGED
    assert found.state.num_steps == 9
    assert [entry.num_matvecs for entry in found.history] == [3, 6, 9]


def test_history_holds_what_assessments_found_and_nothing_before_the_first_step() -> None:
    found = iterate(Counting(looker(until=2), limits(), Counter(cost=0.5)))
    assert [(e.num_matvecs, e.smallest, e.largest) for e in found.history] == [(0.5, -1, 1), (1.0, -2, 2)]
    assert {(e.smallest_bound, e.largest_bound) for e in found.history} == {(0.5, 0.25)}
    seconds = [e.seconds for e in found.history]
    assert 0 <= seconds[0] <= seconds[1]


def test_goes_on_from_the_state_that_a_assessment_returns() -> None:
    def assess(state: Counter) -> Assessment[Counter]:
        moved = Counter(state.num_steps + 10)  # as a restart may
        return Assessment(moved, hk.Progress(), 1, Status.CONVERGED if moved.num_steps > 25 else None)

    assert iterate(Counting(assess, limits())).state.num_steps == 32


@pytest.mark.parametrize("cost", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("reserve", [1, 4])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_budget_is_used_to_its_end_and_never_passed(cost: float, reserve: int, num_steps: int) -> None:
    within = limits(20 * cost, reserve=reserve * cost, minimum=cost)
    found = iterate(Counting(looker(num_steps=num_steps), within, Counter(cost=cost)))
    assert found.status is Status.MAX_MATVECS
    assert found.state.num_steps == 20 - reserve
    assert found.history[-1].num_matvecs == found.state.num_matvecs


def test_convergence_at_the_last_step_counts() -> None:
    found = iterate(Counting(looker(until=9, num_steps=5), limits(10)))
    assert found.status is Status.CONVERGED
    assert found.state.num_steps == 9


def test_a_assessment_that_finds_nothing_new_makes_no_second_entry() -> None:
    found = iterate(Counting(looker(), limits(5)))
    passes = [entry.num_matvecs for entry in found.history]
    assert passes == [1, 2, 3, 4]


@pytest.mark.parametrize(("time_limit", "num_steps"), [(10.0, 4), (10.9, 4), (12.0, 5), (0.1, 1)])
def test_time_limit_is_kept_by_the_time_that_steps_took_so_far(
    time_limit: float, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(2.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    within = limits(time_limit=time_limit)
    found = iterate(Counting(looker(num_steps=3), within, step=clock.step))
    monkeypatch.undo()
    assert found.status is Status.TIME_LIMIT
    assert found.state.num_steps == num_steps
    assert clock.now - 1000 + 2.0 * within.reserve <= max(time_limit, 4.0)


@pytest.mark.parametrize(
    ("time_limit", "num_steps"), [(1e-9, 1), (100.0, 1), (350.0, 4), (599.0, 6), (1e3, 9)]
)
def test_until_the_minimum_no_time_is_kept_back_for_the_check(
    time_limit: float, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = iterate(Counting(looker(), limits(time_limit=time_limit, minimum=6), step=clock.step))
    monkeypatch.undo()
    assert found.status is Status.TIME_LIMIT
    assert found.state.num_steps == num_steps


def test_a_step_that_runs_past_the_limit_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(10.0)

    def step(state: Counter) -> Counter:
        for _ in range(5 if state.num_steps == 2 else 1):  # the third one is slow
            check_deadline()
            state = replace(clock.step(state), num_steps=state.num_steps)
        return advance(state)

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = run(Counting(looker(), limits(time_limit=45.0), step=step))
    monkeypatch.undo()
    assert (found.status, found.num_matvecs, found.seconds) == (Status.TIME_LIMIT, 2.0, 50.0)


def test_the_deadline_of_a_caller_goes_through_a_solve_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(10.0)

    def step(state: Counter) -> Counter:
        check_deadline()
        return clock.step(state)

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    with pytest.raises(DeadlineReached), deadline(1035.0):
        run(Counting(looker(), limits(), step=step))
    assert clock.now == 1040.0
    check_deadline()  # there is none any more
    monkeypatch.undo()


def test_without_a_time_limit_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1e9)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = iterate(Counting(looker(until=50), limits(), step=clock.step))
    monkeypatch.undo()
    assert found.status is Status.CONVERGED
    assert [entry.seconds for entry in found.history] == [1e9 * i for i in range(1, 51)]


def test_monitor_gets_the_entries_of_the_history_as_they_come() -> None:
    seen: list[tuple[int, Progress]] = []
    done = 0

    def step(state: Counter) -> Counter:
        nonlocal done
        done += 1
        return advance(state)

    solver = Counting(looker(until=6, num_steps=2), limits(), step=step)
    found = iterate(solver, monitor=lambda entry: seen.append((done, entry)))
    assert tuple(entry for _, entry in seen) == found.history
    assert [steps for steps, _ in seen] == [2, 4, 6]


def test_what_a_monitor_returns_is_ignored_and_what_it_raises_is_not() -> None:
    assert iterate(Counting(looker(until=3), limits()), monitor=lambda _: False).state.num_steps == 3

    def stop(entry: Progress) -> None:
        raise InterruptedError(f"at {entry.num_matvecs:g}")

    with pytest.raises(InterruptedError, match="at 1"):
        run(Counting(looker(), limits()), monitor=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_matvecs": 0}, "max_matvecs must be a positive finite number, got 0"),
        ({"max_matvecs": float("inf")}, "max_matvecs must be a positive"),
        ({"max_matvecs": 4.9, "reserve": 2, "minimum": 3}, "max_matvecs must be at least 5.*got 4.9"),
        ({"time_limit": 0}, "time_limit must be a positive finite number, got 0"),
        ({"time_limit": float("nan")}, "time_limit must be"),
    ],
)
def test_limits_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        limits(**arguments)


def test_least_budget_is_accepted() -> None:
    assert iterate(Counting(looker(), limits(5, reserve=2, minimum=3))).state.num_steps == 3


@pytest.mark.parametrize(
    ("within", "num_left", "seconds_left"),
    [
        ({}, 30.0, 60.0),
        ({}, math.inf, math.inf),
        ({"max_matvecs": 20.0}, 30.0, 20.0),
        ({"time_limit": 25.0}, 30.0, 5.0),
        ({"time_limit": 25.0}, math.inf, 5.0),
        ({"time_limit": 15.0}, 30.0, 0.0),
    ],
)
def test_time_left_ends_at_a_limit(within: dict[str, float], num_left: float, seconds_left: float) -> None:
    assert limits(**within).seconds_left(num_left, 10.0, 20.0) == seconds_left


def test_entries_say_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2.0)

    def assess(state: Counter) -> Assessment[Counter]:
        status = Status.CONVERGED if state.num_steps == 5 else None
        return Assessment(state, hk.Progress(), 1, status, num_left=5.0 - state.num_steps)

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = iterate(Counting(assess, limits(), step=clock.step))
    monkeypatch.undo()
    assert [entry.seconds_left for entry in found.history] == [8.0, 6.0, 4.0, 2.0, 0.0]


@pytest.mark.parametrize("estimate", [hk.trace, hk.spectral_density, hk.extreme_eigenvalues])
def test_methods_know_about_how_much_is_left(estimate: Callable[..., Any]) -> None:
    op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 1500, dtype=torch.float64)))
    entries: list[Any] = []
    found = estimate(op, monitor=entries.append)
    assert all(math.isfinite(entry.seconds_left) for entry in entries)
    assert entries[-1].seconds_left == 0
    if estimate is not hk.extreme_eigenvalues:  # their matvecs are known
        for entry in entries:
            left = (found.num_matvecs - entry.num_matvecs) * entry.seconds / entry.num_matvecs
            assert entry.seconds_left == pytest.approx(left, rel=0.05, abs=1e-9)
