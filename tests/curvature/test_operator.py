"""The algebra of operators of curvature commutes with sampling, and keeps all that they know."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import hvpkit as hk
from oracles import relative_error
from problems import network

PROBLEM = network("conv_layernorm", num_examples=40)
FLOAT64 = torch.float64


def operators(**options: Any) -> tuple[hk.CurvatureOperator, hk.CurvatureOperator, hk.CurvatureOperator]:
    args = (PROBLEM.objective, PROBLEM.params, PROBLEM.data)
    options = {"mode": "reverse-over-reverse", "batch_size": 9} | options
    return hk.hessian(*args, **options), hk.ggn(*args, **options), hk.empirical_fisher(*args, **options)


@cache
def dense() -> tuple[torch.Tensor, ...]:
    """Return the matrices of the operators."""
    return tuple(A @ torch.eye(A.n, dtype=A.dtype) for A in operators())


Expression = Callable[..., hk.LinearOperator]
EXPRESSIONS: dict[str, Expression] = {
    "multiple": lambda H, *_: 2 * H,
    "negative": lambda H, *_: -H,
    "quotient": lambda H, *_: H / 3,
    "shift": lambda H, *_: H.shift(0.1),
    "sum": lambda H, G, _: H + G,
    "sum with itself": lambda H, *_: H + H,
    "difference": lambda H, G, _: H - G,
    "nested": lambda H, G, _: 2 * H.shift(0.1) - G,
    "deeper": lambda H, G, F: -((H - 0.5 * F).shift(-1.0) / 4 + 3 * G.shift(2.0)).shift(0.25),
    "builtin sum": lambda H, G, F: sum([H, G, F]),
}
each = pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)


def vectors(op: hk.LinearOperator, k: int = 2) -> Tensor:
    return torch.randn(op.n, k, dtype=op.dtype, generator=torch.Generator().manual_seed(0))


def score(_: object, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Scores that do not depend on a term: a combination draws the same examples as each of its terms."""
    return batch[0].flatten(1).norm(dim=1)


@each
def test_samples_of_an_expression_are_the_expression_of_samples(expression: Expression) -> None:
    parts = operators()
    op = expression(*parts)
    assert isinstance(op, hk.CurvatureOperator)
    V = vectors(op)
    samplers: list[Callable[[Any], Any]] = [
        lambda A: A.coarsen(12, importance=score, seed=3),
        lambda A: A.coarsen(12, importance=None, seed=3).coarsen(5, importance=None, seed=1),
        lambda A: A.sample(11, 7),
        lambda A: A.subset(torch.tensor([3, 1, 30]), torch.tensor([0.5, 0.2, 0.1])),
    ]
    for sampled in samplers:
        found, expected = sampled(op), expression(*map(sampled, parts))
        assert isinstance(found, hk.CurvatureOperator)
        assert relative_error(found @ V, expected @ V) < 1e-13
        assert found.cost == pytest.approx(expected.cost)
        assert found.num_examples == expected.num_examples
        assert found.name == op.name


@each
def test_an_expression_keeps_what_its_operators_know(expression: Expression) -> None:
    parts = operators()
    op = expression(*parts)
    H = parts[0]
    assert (op.num_examples, op.batch_size, op.mode, op.mode_reason) == (40, 9, H.mode, None)
    assert (op.exact, op.precision, op.layout) == (None, H.precision, H.layout)
    matrices = [hk.aslinearoperator(A) for A in dense()]
    expected = expression(*matrices) @ vectors(op)
    assert relative_error(op @ vectors(op), expected) < 1e-12
    assert relative_error(torch.from_numpy(op.to_scipy() @ vectors(op).numpy()), expected) < 1e-12
    assert relative_error(op.flatten(op @ PROBLEM.params), op @ op.flatten(PROBLEM.params)) == 0


def test_costs_add_up() -> None:
    H, G, F = operators()
    assert [op.cost for op in (2 * H, H.shift(1.0), H - G, H + H, sum([H, G, F]))] == [1, 1, 2, 2, 3]
    assert (H - G).coarsen(10, importance=None).cost == pytest.approx(0.5)
    assert (2 * H).coarsen(10, importance=None).coarsen(4, importance=None).cost == pytest.approx(0.1)


@pytest.mark.parametrize("importance", ["residual", "loss", "gradient"])
def test_scores_of_a_combination_are_those_of_its_terms_by_the_size_of_their_coefficients(
    importance: str,
) -> None:
    loss_fn = hk.Objective(PROBLEM.objective.forward, lambda z, _: z.square().mean(1))
    H, _, _ = operators()
    K = hk.hessian(loss_fn, PROBLEM.params, PROBLEM.data, batch_size=9, mode=H.mode)

    def scores(op: hk.CurvatureOperator) -> Tensor:
        """By the weights of examples that are not certain: one over the number times the score."""
        data = op.coarsen(8, importance=importance, seed=5).data
        return data.weights

    def combined(_: object, batch: tuple[Tensor, Tensor]) -> Tensor:
        one, other = (
            {
                "loss": lambda f: f(PROBLEM.params, batch).abs(),
                "gradient": lambda f: _gradient_norms(f, batch),
                "residual": lambda f: _residual_norms(f, batch),
            }[importance](f)
            for f in (PROBLEM.objective, loss_fn)
        )
        return (2 * one + 0.5 * other) / 2.5

    op = 2 * H.shift(3.0) - 0.5 * K
    by_hand = op.coarsen(8, importance=combined, seed=5)
    assert torch.allclose(scores(op), by_hand.data.weights)


def _gradient_norms(f: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
    gradients = [hk.grad(f, PROBLEM.params, (a[None], b[None])) for a, b in zip(*batch, strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in tree.values()]).norm() for tree in gradients])


def _residual_norms(f: hk.Objective, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = f.forward(PROBLEM.params, batch).detach().requires_grad_()
    return torch.autograd.grad(f.output_loss(z, batch).sum(), z)[0].flatten(1).norm(dim=1)


def test_the_shift_is_not_sampled() -> None:
    H, _, _ = operators()
    S = H.shift(0.3).coarsen(6, seed=2)
    assert relative_error(S @ vectors(S), H.coarsen(6, seed=2) @ vectors(S) + 0.3 * vectors(S)) < 1e-13


def test_standard_errors_of_samples_follow_the_algebra() -> None:
    H, G, _ = operators()
    options = {"importance": score, "seed": 4}
    V = vectors(H)
    single = hk.sampling_error(H.coarsen(12, **options), V)
    assert torch.allclose(hk.sampling_error((-2 * H.shift(5.0)).coarsen(12, **options), V), 2 * single)
    assert hk.sampling_error((H - G).coarsen(12, **options), V).shape == (2,)


# Which data are the same.


def same(one: object, other: object) -> bool:
    def loss_fn(p: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ p - batch[1]) ** 2

    p = torch.ones(3, dtype=FLOAT64)
    total = hk.hessian(loss_fn, p, one) + hk.hessian(loss_fn, 2 * p, other, batch_size=2)
    return isinstance(total, hk.CurvatureOperator)


X, Y = torch.randn(8, 3, dtype=FLOAT64), torch.randn(8, dtype=FLOAT64)


def test_the_same_examples_in_other_batches_are_the_same() -> None:
    data, dataset, batches = hk.as_data((X, Y)), TensorDataset(X, Y), [(X[:5], Y[:5]), (X[5:], Y[5:])]
    assert same(data, data)
    assert same((X, Y), (X.clone(), Y))
    assert same(DataLoader(dataset, batch_size=3), dataset)
    assert same(batches, batches)
    assert same(Subset(dataset, [4, 1, 5]), hk.as_data(Subset(Subset(dataset, [1, 4, 5]), [1, 0, 2])))
    weights = torch.rand(8, dtype=FLOAT64)
    weighted = [hk.as_data(form).subset(torch.arange(8), weights) for form in ((X, Y), dataset, batches)]
    assert all(same(form, form) for form in weighted)


def test_other_examples_order_weights_or_containers_are_not() -> None:
    data, dataset, weights = hk.as_data((X, Y)), TensorDataset(X, Y), torch.full((8,), 1 / 8, dtype=FLOAT64)
    assert not same((X, Y), (X[:7], Y[:7]))
    assert not same((X, Y), (X + 1, Y))
    assert not same((X, Y), (X.flip(0), Y.flip(0)))
    assert not same((X, Y), data.subset(torch.arange(8), weights))
    assert not same(dataset, TensorDataset(X, Y))
    assert not same(dataset, (X, Y))
    assert not same(Subset(dataset, [1, 2]), Subset(dataset, [2, 1]))
    assert not same([(X, Y)], [(X, Y)])


def test_over_other_examples_a_sum_is_no_operator_of_curvature() -> None:
    H, _, _ = operators()
    for other in (H.coarsen(12), hk.aslinearoperator(torch.eye(H.n, dtype=FLOAT64))):
        for op in (H + other, other - H):
            assert type(op) is not hk.CurvatureOperator
            assert op.cost == 1.0 + other.cost
            with pytest.raises(TypeError, match="is not over examples that may be left out"):
                op.coarsen(3)


# What solvers and faults ask of it.


def test_multiples_and_shifts_are_solved_as_the_hessian_is() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 4, generator=g)
    params = torch.randn(1000, generator=g)
    objective = hk.Objective(lambda p, b: b @ p.view(4, 250), lambda z, _: 1 - torch.cos(z).mean(1))
    H = hk.hessian(objective, params, x, batch_size=10_000, mode="reverse-over-reverse")
    G = hk.ggn(objective, params, x, batch_size=10_000, mode="reverse-over-reverse")
    kinds = {}
    for name, op in {"H": H, "2 H": 2 * H, "shift": H.shift(1e-4), "both": -(H / 2).shift(-1e-4)}.items():
        assert op.samples_pay
        found = hk.extreme_eigenvalues(op, tol=0.1)
        kinds[name] = (found.largest.interval.kind, found.smallest.interval.kind)
        assert found.num_matvecs != round(found.num_matvecs)  # a sample took part
    assert set(kinds.values()) == {("random-start", "random-start")}
    assert not G.samples_pay
    assert not (H - G).samples_pay


def test_the_exact_operator_of_a_combination_is_in_native_arithmetic() -> None:
    objective, params = hk.from_module(PROBLEM.model.float(), torch.nn.CrossEntropyLoss())
    PROBLEM.model.double()
    data = (PROBLEM.data[0].float(), PROBLEM.data[1])
    H, low = (hk.hessian(objective, params, data, arithmetic=kind) for kind in ("native", "bf16"))
    op = 2 * (low - H.shift(0.5))
    assert op.precision == low.precision > H.precision
    assert op.exact is not None
    assert op.exact.exact is None
    assert op.exact.name == "2 * (Hessian - (Hessian + 0.5 I))"
    assert relative_error(op.exact @ vectors(op), -vectors(op)) < 1e-6
    mixed = low + hk.aslinearoperator(torch.eye(H.n))
    assert mixed.precision == low.precision
    assert relative_error(mixed.exact @ vectors(H), H @ vectors(H) + vectors(H)) < 1e-6


def test_products_that_are_not_finite_name_the_batch_of_the_term_at_fault() -> None:
    x = torch.ones(12, 2, dtype=FLOAT64)
    x[9] = 0.0
    p = torch.ones(2, dtype=FLOAT64)
    good = hk.hessian(lambda p, b: (b @ p) ** 2, p, x, batch_size=4)
    bad = hk.empirical_fisher(lambda p, b: (b @ p).abs() ** 0.5, p, x, batch_size=4)
    for op in (bad, 2 * bad, good - bad.shift(1.0), bad + hk.aslinearoperator(torch.eye(2, dtype=FLOAT64))):
        with pytest.raises(hk.NonFiniteError, match=r"empirical Fisher product .* first from batch 2 of"):
            op @ torch.ones(2, dtype=FLOAT64)


def test_a_combination_and_its_samples_keep_graphs_within_one_budget() -> None:
    calls = 0

    def forward(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return PROBLEM.objective.forward(params, batch)

    objective = hk.Objective(forward, PROBLEM.objective.output_loss)
    H = hk.hessian(objective, PROBLEM.params, PROBLEM.data, mode="reverse-over-reverse", batch_size=20)
    op = (H + 3 * H).shift(1.0)
    for made in (op, op.sample(30, 0)):
        made @ vectors(op)
        calls = 0
        made @ vectors(op)
        assert calls <= 2, "one term that comes twice has one cache"
        made @ vectors(op)
        assert calls <= 2
