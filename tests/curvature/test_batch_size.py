from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

import hvpkit as hk
from hvpkit.curvature.batch_size import best_size
from hvpkit.curvature.batches import Leaves
from problems import network

MODE = "reverse-over-reverse"


class Machine:
    """Time and memory that products take: ``seconds(size)`` and ``bytes_each`` an example."""

    def __init__(self, seconds: Callable[[int], float], bytes_each: int = 8) -> None:
        self.now, self.seconds, self.bytes_each, self.tried = 0.0, seconds, bytes_each, []

    def batch_of(self, size: int) -> SimpleNamespace:
        self.tried.append(size)

        def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:  # noqa: ARG001
            self.now += self.seconds(size)
            torch.zeros(size * self.bytes_each, dtype=torch.uint8)
            return [[2.0 * leaf for leaf in vector] for vector in vectors]

        return SimpleNamespace(linearize=lambda _mode: matvecs)


@pytest.mark.parametrize(
    ("seconds", "largest", "chosen"),
    [
        (lambda size: 1.0 + 0.01 * size, 1000, 1000),  # a fixed cost: the more at once the better
        (lambda size: 0.01 * size, 1000, 16),  # no difference: the least memory
        (lambda size: 0.01 * size * (1 + abs(size / 128 - 1)), 1000, 128),  # a cache that overflows
        (lambda size: 0.01 * size * (2.0 if size == 32 else 1.0) + 0.1, 1000, 256),  # one slow trial is noise
        (lambda size: 0.01 * size, 5, 5),  # fewer examples than the smallest size
    ],
)
def test_the_smallest_of_the_nearly_fastest_sizes_is_taken(
    seconds: Callable[[int], float], largest: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(seconds)
    monkeypatch.setattr("time.perf_counter", lambda: machine.now)
    size = best_size(machine.batch_of, [torch.ones(3)], MODE, largest, 1e12)
    rates = {tried: seconds(tried) / tried for tried in machine.tried}
    assert size == chosen
    assert rates[size] <= 1.1 * min(rates.values())


def test_no_size_is_tried_that_would_pass_the_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda _: 1.0, bytes_each=1000)
    monkeypatch.setattr("time.perf_counter", lambda: machine.now)
    assert best_size(machine.batch_of, [torch.ones(3)], MODE, 10**6, 100_000) == 64
    assert machine.tried == [16, 32, 64]
    assert best_size(machine.batch_of, [torch.ones(3)], MODE, 10**6, 10) == 16


@pytest.mark.parametrize("form", ["tensors", "dataset", "batches"])
def test_auto_is_recorded_and_changes_no_product(form: str) -> None:
    problem = network("mlp")
    x, y = problem.data
    data = {
        "tensors": (x, y),
        "dataset": torch.utils.data.TensorDataset(x, y),
        "batches": [(x[:7], y[:7]), (x[7:], y[7:])],
    }[form]
    H = hk.hessian(problem.objective, problem.params, data, batch_size="auto")
    assert 1 <= H.batch_size <= len(x)
    assert H.origin.data.batch_size == H.batch_size
    if form == "batches":
        assert H.batch_size <= 7
    v = torch.randn(H.n, 2, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(H @ v, hk.hessian(problem.objective, problem.params, (x, y)) @ v)


def test_a_size_that_is_none_is_refused() -> None:
    problem = network("mlp")
    with pytest.raises(ValueError, match="batch_size must be a number of examples or 'auto', got "):
        hk.hessian(problem.objective, problem.params, problem.data, batch_size="big")


def test_auto_is_refused_where_the_batches_are_part_of_the_question() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    objective, params = hk.from_module(model, torch.nn.CrossEntropyLoss(), batchnorm="batch")
    data = (torch.randn(20, 3), torch.arange(20) % 2)
    with pytest.raises(ValueError, match=r"batch_size='auto'.*name their size"):
        hk.hessian(objective, params, data, batch_size="auto")
