from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from finite_sums import Tally, mean_of, scattered
from hvpkit.solvers.baselines.oja import oja
from problems import SPECTRA

VALUES = [-2.0, *torch.linspace(-0.5, 0.5, 17).tolist(), 1.2, 2.4]


def span(rows: Tensor) -> Tensor:
    """The projector on the span of orthonormal columns."""
    return rows @ rows.mT


def vectors_after(num_products: int, k: int, which: str, **options: object) -> Tensor:
    """With minibatches of all data: the block after the steps that so many products allow for."""
    op = mean_of(scattered(VALUES))
    found = oja(op, k, which=which, batch_size=64, tol=1e-15, max_matvecs=(num_products + 1) * k, **options)
    assert found.num_matvecs == (num_products + 1) * k
    return found.vectors


def recursion(num_products: int, k: int, which: str, eta: object) -> Tensor:
    """The rule as it is written down, from the same start, on the dense mean; eta from a number and A W's norms."""
    A, sign = scattered(VALUES).mean(0), 1.0 if which == "LA" else -1.0
    W, lengths = vectors_after(1, k, which), []
    for number in range(num_products - 1):
        lengths.append(float(torch.linalg.matrix_norm(A @ W)) / k**0.5)
        W = torch.linalg.qr(W + sign * eta(number, lengths) * (A @ W)).Q
    return W


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [1, 2])
def test_steps_are_those_of_the_rule_with_the_stated_step_size(which: str, k: int) -> None:
    for num_products in (2, 3, 7):
        W = recursion(num_products, k, which, lambda _, lengths: 1 / math.hypot(*lengths))
        found = vectors_after(num_products, k, which)
        assert float((span(found) - span(W)).abs().max()) <= 1e-9


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("step_size", [0.3, lambda number: 0.5 / (1 + number)], ids=["number", "function"])
def test_a_step_size_of_the_callers_is_used(which: str, step_size: object) -> None:
    eta = step_size if callable(step_size) else lambda _: step_size
    W = recursion(6, 2, which, lambda number, _: eta(number))
    found = vectors_after(6, 2, which, step_size=step_size)
    assert float((span(found) - span(W)).abs().max()) <= 1e-9


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("step_size", [None, 0.3])
def test_the_default_step_size_follows_the_scale_of_the_operator(
    scale: float, step_size: float | None
) -> None:
    solve = partial(oja, max_matvecs=10, tol=1e-15)
    once = solve(mean_of(scattered(VALUES)), step_size=step_size)
    scaled = solve(mean_of(scattered(VALUES) * scale), step_size=step_size and step_size / scale)
    assert float(scaled.values[0]) == pytest.approx(scale * float(once.values[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("step_size", "exponent"),
    [(None, -0.5), (lambda number: 2 / (1.2 * (4 + number)), -1.0)],
    ids=["default", "1/t"],
)
def test_squared_errors_fall_as_theory_says(step_size: object, exponent: float) -> None:
    op, residuals = mean_of(scattered(VALUES, noise=2.0)), []
    for seed in range(6):
        tally = Tally(op)
        oja(tally.operator(), seed=seed, tol=1e-15, max_matvecs=115, step_size=step_size)
        residuals.append(tally.residuals[:37])  # a look at each third product
    squares = torch.tensor(residuals).square().mean(dim=0)
    slope = math.log(float(squares[33:37].mean() / squares[3:7].mean())) / math.log(35 / 5)
    assert slope == pytest.approx(exponent, abs=0.25)


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_pairs_at_each_end_are_found(which: str) -> None:
    matrices = scattered(VALUES)
    truth = torch.linalg.eigvalsh(matrices.mean(0))
    expected = {"LA": truth[-2:], "SA": truth[:1], "BE": truth[[0, -1]]}[which]
    found = oja(mean_of(matrices), len(expected), which=which, tol=0.05)
    assert found.converged
    assert found.values.tolist() == pytest.approx(expected.tolist(), rel=1e-2)


def test_the_best_block_of_all_looks_is_the_result() -> None:
    op = mean_of(scattered(VALUES, noise=5.0))
    found = oja(op, tol=1e-12, max_matvecs=60, step_size=10.0)  # never settles
    assert found.status is hk.Status.MAX_MATVECS
    tops = [entry.largest for entry in found.history]
    assert tops == sorted(tops)
    assert float(found.values[0]) == pytest.approx(tops[-1], rel=1e-12)


def test_batch_size_is_what_is_drawn_and_a_sixteenth_by_default() -> None:
    for batch_size, drawn in ((None, 4), (5, 5)):
        tally = Tally(mean_of(scattered(SPECTRA["clustered"])))
        oja(tally.operator(), 2, batch_size=batch_size, tol=1e-12, max_matvecs=20)
        assert set(tally.products) == {(drawn, 2), (64, 2)}


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"which": "LM"}, ValueError, "which"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 65}, ValueError, "batch_size"),
        ({"batch_size": "all"}, TypeError, "batch_size"),
        ({"step_size": 0.0}, ValueError, "step_size"),
        ({"step_size": "small"}, TypeError, "step_size"),
        ({"step_size": lambda number: 1.0 - number}, ValueError, r"step_size\(1\)"),
        ({"step_size": lambda _: None}, TypeError, r"step_size\(0\)"),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}"):
        oja(mean_of(scattered(SPECTRA["clustered"])), **arguments)
