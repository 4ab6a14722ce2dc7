from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.curvature.importance_sampling import inclusion, systematic
from oracles import relative_error
from problems import network

SCORES = ("residual", "loss", "gradient", None)


def operator(name: str = "mlp", num_examples: int = 40) -> tuple[hk.LinearOperator, object]:
    problem = network(name, num_examples=num_examples)
    return hk.hessian(problem.objective, problem.params, problem.data, batch_size=7), problem


@pytest.mark.parametrize("num_examples", [1, 7, 20, 99, 100])
def test_inclusion_probabilities_sum_to_the_size_and_follow_the_scores(num_examples: int) -> None:
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    chances = inclusion(scores, num_examples)
    assert float(chances.sum()) == pytest.approx(num_examples)
    assert bool(((chances > 0) & (chances <= 1)).all())
    order = scores.argsort()
    assert bool((chances[order].diff() >= -1e-12).all())


def test_large_scores_are_included_for_certain() -> None:
    scores = torch.tensor([100.0, 50.0, *[1.0] * 98])
    chances = inclusion(scores, 10)
    assert chances[:2].tolist() == [1.0, 1.0]
    for seed in range(20):
        assert {0, 1} <= set(systematic(chances, seed).tolist())


def test_examples_are_included_as_often_as_their_probability_says() -> None:
    chances = inclusion(torch.arange(1.0, 31.0), 8)
    counts = torch.zeros(30, dtype=torch.float64)
    rounds = 4000
    for seed in range(rounds):
        chosen = systematic(chances, seed)
        assert len(chosen) == len(chosen.unique()) == 8
        counts[chosen] += 1
    errors = (counts / rounds - chances) / (chances * (1 - chances) / rounds).sqrt().clamp(min=1e-9)
    assert float(errors.abs().max()) < 4.5


@pytest.mark.parametrize("importance", SCORES)
def test_a_coarse_operator_is_unbiased(importance: str | None) -> None:
    H, _ = operator(num_examples=20)
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounds = 300
    products = torch.stack([H.coarsen(6, importance=importance, seed=seed) @ v for seed in range(rounds)])
    error = (products.mean(0) - H @ v) / (products.std(0) / rounds**0.5)
    assert float(error.abs().max()) < 4.5


def test_a_sample_of_a_sample_is_nested_and_unbiased() -> None:
    H, _ = operator()
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounds = 300
    products = torch.stack(
        [H.coarsen(20, seed=seed).coarsen(8, seed=1000 + seed) @ v for seed in range(rounds)]
    )
    error = (products.mean(0) - H @ v) / (products.std(0) / rounds**0.5)
    assert float(error.abs().max()) < 4.5
    coarse = H.coarsen(20)
    coarser = coarse.coarsen(8)
    assert coarser.cost == pytest.approx(8 / 40)
    larger, smaller = ({tuple(x.tolist()) for x, _ in rows(op)} for op in (coarse, coarser))
    assert smaller < larger


def test_two_samples_are_independent_and_the_first_is_the_coarse_operator() -> None:
    H, _ = operator()
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact, products = H @ v, []
    for seed in range(200):
        first, other = H.two_samples(6, importance="residual", seed=seed)
        assert torch.equal(first @ v, H.coarsen(6, seed=seed) @ v)
        products.append(
            (
                (first @ v - exact) @ (other @ v - exact),
                (first @ v - exact).norm() * (other @ v - exact).norm(),
            )
        )
    inner, sizes = (torch.stack(list(column)) for column in zip(*products, strict=True))
    assert float(inner.mean() / (inner.std() / len(inner) ** 0.5)) == pytest.approx(0, abs=4)
    assert float((inner.abs() / sizes).max()) < 1  # never the same one


def rows(op: hk.LinearOperator) -> list[tuple[Tensor, Tensor]]:
    assert op.origin is not None
    return [pair for (x, y), *_ in op.origin.data.parts() for pair in zip(x, y, strict=True)]


def test_all_examples_give_the_operator_itself() -> None:
    H, _ = operator()
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = H.coarsen(40)
    assert whole.cost == 1.0
    assert relative_error(whole @ v, H @ v) < 1e-12


def test_residual_scores_are_the_distance_of_probabilities_from_targets() -> None:
    H, problem = operator()
    x, y = problem.data
    outputs = problem.objective.forward(problem.params, (x, y))
    distance = (outputs.softmax(1) - torch.nn.functional.one_hot(y, outputs.shape[1])).norm(dim=1)
    by_hand = H.coarsen(10, importance=lambda p, batch: distance_of(p, batch, problem), seed=3)
    coarse = H.coarsen(10, seed=3)
    v = torch.ones(H.n, dtype=torch.float64)
    assert torch.allclose(by_hand @ v, coarse @ v)
    assert float(distance.max() / distance.min()) > 1.2


def distance_of(params: object, batch: object, problem: object) -> Tensor:
    outputs = problem.objective.forward(params, batch)
    return (outputs.softmax(1) - torch.nn.functional.one_hot(batch[1], outputs.shape[1])).norm(dim=1)


def test_gradient_scores_are_norms_of_each_gradient() -> None:
    H, problem = operator()

    def norms(params: object, batch: object) -> Tensor:
        single = [hk.grad(problem.objective, params, (a[None], b[None])) for a, b in zip(*batch, strict=True)]
        return torch.stack([torch.cat([g.flatten() for g in slope.values()]).norm() for slope in single])

    v = torch.ones(H.n, dtype=torch.float64)
    expected = H.coarsen(10, importance=norms, seed=3) @ v
    assert torch.allclose(H.coarsen(10, importance="gradient", seed=3) @ v, expected)


def test_scores_make_samples_scatter_less() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(0, 2, 200, dtype=torch.float64)[:, None]
    start = torch.ones(3, dtype=torch.float64)
    H = hk.hessian(lambda p, batch: 0.5 * (batch @ p) ** 2, start, x)

    def scatter(importance: str | None) -> float:
        products = [H.coarsen(20, importance=importance, seed=seed) @ start for seed in range(100)]
        return float(torch.stack(products).var(0).sum())

    assert scatter("loss") < 0.3 * scatter(None)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"num_examples": 0}, ValueError, "^num_examples"),
        ({"num_examples": 41}, ValueError, "^num_examples"),
        ({"num_examples": 5, "importance": "luck"}, ValueError, "^importance must be one of"),
        ({"num_examples": 5, "importance": lambda _p, b: -torch.ones(len(b[0]))}, ValueError, "^importance"),
        ({"num_examples": 5, "importance": lambda _p, _b: torch.ones(3)}, ValueError, "^importance"),
        ({"num_examples": 5, "seed": -1}, ValueError, "^seed"),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        operator()[0].coarsen(**arguments)


def test_what_cannot_be_coarsened_is_refused() -> None:
    H, problem = operator()
    A = hk.aslinearoperator(torch.eye(H.n, dtype=H.dtype))
    for op in (A, 2.0 * A, H + A, A - H):
        with pytest.raises(TypeError, match="not over examples"):
            op.coarsen(1)
    raw = hk.hessian(lambda p, b: problem.objective(p, b), problem.params, problem.data)
    with pytest.raises(ValueError, match=r'^importance="residual" needs outputs'):
        raw.coarsen(5)
