from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit._utils import memory
from oracles import relative_error
from problems import network

REVERSE = "reverse-over-reverse"
KINDS: dict[str, Callable[..., hk.LinearOperator]] = {
    "hessian": hk.hessian,
    "ggn": hk.ggn,
    "empirical fisher": hk.empirical_fisher,
    "fisher": lambda *a, **k: hk.fisher(*a, num_samples=2, **k),
}


class Counted:
    """A loss function that counts the examples that go forward through it."""

    def __init__(self, objective: hk.Objective) -> None:
        self.examples = 0
        self.objective = hk.Objective(self.forward, objective.output_loss)
        self._forward = objective.forward

    def forward(self, params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        self.examples += len(batch[0])
        return self._forward(params, batch)


def vectors(H: hk.LinearOperator, k: int) -> Tensor:
    return torch.randn(H.n, k, dtype=H.dtype, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "gru", "encoder_layer", "tied_weights"])
def test_products_of_kept_graphs_are_the_same_to_the_bit(name: str, kind: str) -> None:
    problem = network(name)
    options = {"mode": REVERSE, "batch_size": 5}
    fresh = KINDS[kind](problem.objective, problem.params, problem.data, memory_limit=0, **options)
    kept = KINDS[kind](problem.objective, problem.params, problem.data, **options)
    for k in (1, 3, 2, 1):
        assert torch.equal(kept @ vectors(kept, k), fresh @ vectors(fresh, k))


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_third_product_on_no_example_goes_forward(kind: str) -> None:
    problem = network("mlp")
    counted, size = Counted(problem.objective), len(problem.data[0])
    H = KINDS[kind](counted.objective, problem.params, problem.data, mode=REVERSE, batch_size=5)
    passes = []
    for k in (1, 2, 1, 3):
        counted.examples = 0
        H @ vectors(H, k)
        passes.append(counted.examples / size)
    assert passes == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "options",
    [{"memory_limit": 0, "mode": REVERSE}, {"mode": "forward-over-reverse"}, {"mode": "finite-difference"}],
)
def test_nothing_is_kept_without_memory_or_where_products_share_nothing(options: dict) -> None:
    problem = network("mlp")
    counted = Counted(problem.objective)
    H = hk.hessian(counted.objective, problem.params, problem.data, **options)
    for _ in range(4):
        counted.examples = 0
        H @ vectors(H, 1)
        assert counted.examples >= len(problem.data[0])


def test_as_many_batches_are_kept_as_fit() -> None:
    problem = network("mlp")
    x, y = problem.data
    counted = Counted(problem.objective)
    point = [p.clone().requires_grad_() for p in problem.params.values()]
    with memory.Allocations() as made:  # what one batch of five takes
        loss = problem.objective(dict(zip(problem.params, point, strict=True)), (x[:5], y[:5])).mean()
        slopes = torch.autograd.grad(loss, point, create_graph=True)
        ends = [torch.autograd.graph.get_gradient_edge(slope) for slope in slopes]
        del loss, slopes
    limit = 2.2 * made.now
    H = hk.hessian(counted.objective, problem.params, (x, y), mode=REVERSE, batch_size=5, memory_limit=limit)
    fresh = hk.hessian(problem.objective, problem.params, (x, y), mode=REVERSE, batch_size=5, memory_limit=0)
    left = []
    for k in (1, 1, 2, 1):
        counted.examples = 0
        assert torch.equal(H @ vectors(H, k), fresh @ vectors(H, k))
        left.append(counted.examples)
    assert left[:2] == [len(x), len(x)]
    assert left[2] == left[3] == len(x) - 10, "two batches of five fit"
    assert len(ends)


def test_samples_share_the_limit_and_give_back_what_they_held() -> None:
    problem = network("mlp")
    x, y = problem.data
    counted = Counted(problem.objective)

    def forward_passes(H: hk.LinearOperator) -> int:
        for _ in range(2):
            H @ vectors(H, 1)
        counted.examples = 0
        H @ vectors(H, 1)
        return counted.examples

    with memory.Allocations() as made:
        whole = hk.hessian(counted.objective, problem.params, (x, y), mode=REVERSE, batch_size=len(x))
        for _ in range(2):
            whole @ vectors(whole, 1)
    H = hk.hessian(
        counted.objective,
        problem.params,
        (x, y),
        mode=REVERSE,
        batch_size=len(x),
        memory_limit=1.3 * made.now,
    )
    first = H.sample(len(x) - 1, 0)
    assert forward_passes(first) == 0
    assert forward_passes(H.sample(len(x) - 1, 1)) == len(x) - 1, "no room beside the first"
    del first
    assert forward_passes(H.sample(len(x) - 1, 1)) == 0


def test_graphs_go_with_the_operator() -> None:
    problem = network("mlp")
    with memory.Allocations() as made:
        H = hk.hessian(problem.objective, problem.params, problem.data, mode=REVERSE)
        H @ vectors(H, 1)
        once = made.now
        H @ vectors(H, 1)
        assert made.now > once + 1000
        del H
    assert made.now < once


@pytest.mark.parametrize("limit", [-1.0, float("nan"), "2 GB", True])
def test_a_memory_limit_that_is_none_is_refused(limit: float) -> None:
    problem = network("mlp")
    with pytest.raises(ValueError, match="memory_limit must be"):
        hk.hessian(problem.objective, problem.params, problem.data, memory_limit=limit)


def test_a_solve_passes_forward_twice() -> None:
    problem = network("mlp")
    counted = Counted(problem.objective)
    H = hk.hessian(counted.objective, problem.params, problem.data, mode=REVERSE)
    counted.examples = 0
    ex = hk.extreme_eigenvalues(H)
    assert ex.num_matvecs > 5
    assert counted.examples == 2 * len(problem.data[0])
    dense = H @ torch.eye(H.n, dtype=H.dtype)
    assert relative_error(torch.tensor([ex.largest.value]), torch.linalg.eigvalsh(dense)[-1:]) < 1e-2


@pytest.mark.parametrize("batch_size", [8, 2, 1])
def test_a_product_holds_two_and_a_half_vectors_however_many_batches(batch_size: int) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(200, 200), torch.nn.Tanh(), torch.nn.Linear(200, 200, bias=False)
    )
    x, y = torch.ones(8, 200), torch.arange(8)
    objective, params = hk.from_module(model, torch.nn.CrossEntropyLoss())
    H = hk.hessian(objective, params, (x, y), mode=REVERSE, batch_size=batch_size)
    v = vectors(H, 1)
    for _ in range(4):  # without a graph, keeping it, and from it
        with memory.Allocations() as made:
            image = H.product(v)
        vector_bytes = image.numel() * image.itemsize
        assert made.peak < 3 * vector_bytes
        assert made.now < 1.3 * vector_bytes, "the product, and a graph without slopes"
