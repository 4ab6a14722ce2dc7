from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hvpkit.results.eigen import Progress, Status
from hvpkit.solvers.driver import Assessment, Limits, Run, run_solver


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
        found = -float(state.num_steps), float(state.num_steps), 0.5, 0.25
        return Assessment(state, *found, Status.CONVERGED if over else None, num_steps)

    return assess


def limits(
    max_matvecs: float = 100, time_limit: float | None = None, reserve: float = 1, minimum: float = 1
) -> Limits:
    return Limits(max_matvecs, time_limit, reserve, minimum)


def run(
    state: Counter, look: Callable[[Counter], Assessment[Counter]], within: Limits, **options: object
) -> Run[Counter]:
    return run_solver(state, advance, look, step_cost=state.cost, limits=within, **options)


class Clock:
    """Seconds that pass with each step, for ``time.perf_counter``."""

    def __init__(self, seconds_a_step: float) -> None:
        self.now, self.seconds_a_step = 1000.0, seconds_a_step

    def step(self, state: Counter) -> Counter:
        self.now += self.seconds_a_step
        return advance(state)


def test_ends_at_the_first_look_that_says_so() -> None:
    found = run(Counter(), looker(until=7, num_steps=3), limits())
    assert found.status is Status.CONVERGED
    assert found.state.num_steps == 9
    assert [entry.num_matvecs for entry in found.history] == [3, 6, 9]


def test_history_holds_what_looks_found_and_nothing_before_the_first_step() -> None:
    found = run(Counter(cost=0.5), looker(until=2), limits())
    assert [(e.num_matvecs, e.smallest, e.largest) for e in found.history] == [(0.5, -1, 1), (1.0, -2, 2)]
    assert {(e.smallest_bound, e.largest_bound) for e in found.history} == {(0.5, 0.25)}
    seconds = [e.seconds for e in found.history]
    assert 0 <= seconds[0] <= seconds[1]


def test_goes_on_from_the_state_that_a_look_returns() -> None:
    def assess(state: Counter) -> Assessment[Counter]:
        moved = Counter(state.num_steps + 10)  # as a restart may
        return Assessment(moved, 0, 0, 0, 0, Status.CONVERGED if moved.num_steps > 25 else None, 1)

    assert run(Counter(), assess, limits()).state.num_steps == 32


@pytest.mark.parametrize("cost", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("reserve", [1, 4])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_budget_is_used_to_its_end_and_never_passed(cost: float, reserve: int, num_steps: int) -> None:
    within = limits(20 * cost, reserve=reserve * cost, minimum=cost)
    found = run(Counter(cost=cost), looker(num_steps=num_steps), within)
    assert found.status is Status.MAX_MATVECS
    assert found.state.num_steps == 20 - reserve
    assert found.history[-1].num_matvecs == found.state.num_matvecs


def test_convergence_at_the_last_step_counts() -> None:
    found = run(Counter(), looker(until=9, num_steps=5), limits(10))
    assert found.status is Status.CONVERGED
    assert found.state.num_steps == 9


def test_a_look_that_finds_nothing_new_makes_no_second_entry() -> None:
    found = run(Counter(), looker(), limits(5))
    passes = [entry.num_matvecs for entry in found.history]
    assert passes == [1, 2, 3, 4]


@pytest.mark.parametrize(("time_limit", "num_steps"), [(10.0, 4), (10.9, 4), (12.0, 5), (0.1, 1)])
def test_time_limit_is_kept_by_the_time_that_steps_took_so_far(
    time_limit: float, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(2.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    within = limits(time_limit=time_limit)
    found = run_solver(Counter(), clock.step, looker(num_steps=3), step_cost=1, limits=within)
    monkeypatch.undo()
    assert found.status is Status.TIME_LIMIT
    assert found.state.num_steps == num_steps
    assert clock.now - 1000 + 2.0 * within.reserve <= max(time_limit, 4.0)


def test_the_minimum_is_done_whatever_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    within = limits(time_limit=1e-9, minimum=6)
    found = run_solver(Counter(), clock.step, looker(), step_cost=1, limits=within)
    monkeypatch.undo()
    assert found.status is Status.TIME_LIMIT
    assert found.state.num_steps == 6


def test_without_a_time_limit_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1e9)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    found = run_solver(Counter(), clock.step, looker(until=50), step_cost=1, limits=limits())
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

    found = run_solver(
        Counter(),
        step,
        looker(until=6, num_steps=2),
        step_cost=1,
        limits=limits(),
        monitor=lambda entry: seen.append((done, entry)),
    )
    assert tuple(entry for _, entry in seen) == found.history
    assert [steps for steps, _ in seen] == [2, 4, 6]


def test_what_a_monitor_returns_is_ignored_and_what_it_raises_is_not() -> None:
    assert run(Counter(), looker(until=3), limits(), monitor=lambda _: False).state.num_steps == 3

    def stop(entry: Progress) -> None:
        raise InterruptedError(f"at {entry.num_matvecs:g}")

    with pytest.raises(InterruptedError, match="at 1"):
        run(Counter(), looker(), limits(), monitor=stop)


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
    assert run(Counter(), looker(), limits(5, reserve=2, minimum=3)).state.num_steps == 3
