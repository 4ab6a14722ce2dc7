from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from finite_sums import mean_of, scattered
from hvpkit.solvers.baselines.momentum_block import Goal, MomentumBlockState, assess, init, step
from hvpkit.solvers.baselines.power import accelerated_power, power
from hvpkit.solvers.common.request import check_arguments
from problems import SPECTRA, matrix
from variants import explained, variant

BOTH = pytest.mark.parametrize("solve", [power, accelerated_power], ids=lambda solve: solve.__name__)


def bulk(n: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, n, dtype=torch.float64).tolist()


def diagonal(values: list[float]) -> hk.LinearOperator:
    return hk.aslinearoperator(torch.diag(torch.tensor(values, dtype=torch.float64)))


def goal_of(op: hk.LinearOperator, k: int, which: str, **options: object) -> Goal:
    asked = check_arguments(
        op, k, which, v0=None, tol=1e-12, max_matvecs=None, time_limit=None, seed=0, block_size=k
    )
    return Goal(**vars(asked), **options)


def after(op: hk.LinearOperator, goal: Goal, num_steps: int) -> MomentumBlockState:
    state = init(op, goal)
    for _ in range(num_steps):
        state = assess(op, goal, step(op, goal, state)).state
    return state


def rates(found: hk.EigenResult, first: int, last: int) -> float:
    """By how much the residual falls in a step, on average over these steps."""
    by_step = {entry.num_matvecs: entry.largest_bound for entry in found.history}
    return (by_step[last] / by_step[first]) ** (1 / (last - first))


def sine(rows: Tensor, expected: Tensor) -> float:
    """Sine of the largest angle between two spans, of rows and of columns."""
    expected = torch.linalg.qr(expected).Q
    return float(torch.linalg.matrix_norm(rows.mT - expected @ (expected.mT @ rows.mT), 2))


@pytest.mark.parametrize("momentum", [0.0, 0.2])
@pytest.mark.parametrize("k", [1, 3])
def test_the_block_spans_what_the_recurrence_without_scaling_spans(momentum: float, k: int) -> None:
    op = hk.aslinearoperator(A := matrix([-0.5, *bulk(18, -0.4, 0.8), 1.0]))
    goal = goal_of(op, k, "LM", momentum=momentum)
    before, now = torch.zeros_like(A[:, :k]), init(op, goal).rows.mT
    for num_steps in range(1, 9):
        assert sine(after(op, goal, num_steps).rows, now) <= 1e-10
        before, now = now, A @ now - momentum * before


@pytest.mark.parametrize(("ratio", "first", "last"), [(0.9, 40, 60), (0.6, 10, 30)])
def test_residuals_fall_by_the_ratio_of_eigenvalues(ratio: float, first: int, last: int) -> None:
    found = power(diagonal([1.0, ratio, *bulk(60, -0.3, 0.3)]), tol=1e-15, max_matvecs=70)
    assert rates(found, first, last) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(("ratio", "first", "last"), [(0.99, 60, 120), (0.9, 20, 50)])
def test_with_the_best_momentum_residuals_fall_as_theory_says(ratio: float, first: int, last: int) -> None:
    op = diagonal([1.0, *bulk(100, -ratio, ratio)])
    found = accelerated_power(op, momentum=ratio**2 / 4, tol=1e-15, max_matvecs=130)
    expected = ratio / (1 + math.sqrt(1 - ratio**2))
    double_root = (last / first) ** (1 / (last - first))  # error t rho^t
    assert rates(found, first, last) == pytest.approx(expected * double_root, rel=0.01)


@pytest.mark.parametrize(("solve", "exponent"), [(power, 1.0), (accelerated_power, 0.5)])
def test_products_grow_with_one_over_the_gap_or_with_its_root(solve: object, exponent: float) -> None:
    counts = []
    for gap in (0.1, 0.01):
        op = diagonal([1.0, *bulk(60, -0.5, 1 - gap)])
        found = [solve(op, tol=1e-6, max_matvecs=10_000, seed=seed) for seed in range(3)]
        assert all(one.converged for one in found)
        counts.append(sum(one.num_matvecs - 1 for one in found))
    assert math.log10(counts[1] / counts[0]) == pytest.approx(exponent, abs=0.12)


@pytest.mark.parametrize("gap", [0.1, 0.01])
@pytest.mark.parametrize("k", [1, 3])
def test_chosen_momentum_is_near_the_best_and_takes_hardly_more_products(gap: float, k: int) -> None:
    wanted = [1.0, 1.1, 1.2][:k]
    op, best = diagonal([*wanted, *bulk(60, -0.5, 1 - gap)]), (1 - gap) ** 2 / 4
    state = after(op, replace(goal_of(op, k, "LM"), momentum=None), 60)
    assert float(state.momentum[0]) * float(state.scale) ** 2 == pytest.approx(best, rel=0.1)
    given = accelerated_power(op, k, momentum=best, tol=1e-6)
    chosen = accelerated_power(op, k, tol=1e-6)
    assert given.converged
    assert chosen.converged
    assert chosen.num_matvecs <= 1.5 * given.num_matvecs


@pytest.mark.parametrize("momentum", [0.01, 1.0, 20.0, 99.0, None])
def test_momentum_does_not_change_the_value_that_is_reported(momentum: float | None) -> None:
    """hessian-eigenthings gave lambda - beta, with residual zero."""
    found = accelerated_power(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), momentum=momentum, tol=1e-6)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(20.0, rel=1e-9)


@pytest.mark.parametrize("momentum", [100.5, 1e4, 1e30])
def test_momentum_that_is_too_large_ends_at_the_limit_and_is_named(momentum: float) -> None:
    A = matrix(SPECTRA["indefinite"])
    found = accelerated_power(hk.aslinearoperator(A), momentum=momentum, max_matvecs=200)
    assert found.status is hk.Status.MAX_MATVECS
    assert "with a momentum above" in found.message
    value, residual = float(found.values[0]), float(found.residual_norms[0])
    assert float((torch.linalg.eigvalsh(A) - value).abs().min()) <= residual
    assert residual > 1e-3 * abs(value)


@BOTH
def test_a_negative_dominant_eigenvalue_keeps_its_sign_and_is_not_found_in_one_step(solve: object) -> None:
    """CoLA divides by the signed value, and stops after one step."""
    A = matrix(SPECTRA["negative_dominant"])
    found = solve(hk.aslinearoperator(A), tol=1e-6)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(-50.0, rel=1e-9)
    assert float((A @ found.vectors + 50 * found.vectors).norm()) <= 1e-6 * 50


@BOTH
@pytest.mark.parametrize(
    "values",
    [
        [-1.0, *bulk(98, -0.5, 0.5), 1.0],
        [-1.0, *[0.98] * 40, *bulk(60, -0.5, 0.5)],
        [-1.05, *[1.0] * 500],
        [-1.0] * 99 + [-0.9],
        bulk(50, -1.0, -0.9),
        bulk(50, 1.0, 2.0),
        [0.0] * 50 + [1.0],
        [1.0, 2.0, 3.0],
    ],
    ids=["same size", "nearly", "outnumbered", "but one", "negative", "positive", "rank one", "three"],
)
@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_each_end_is_found_whichever_is_dominant(solve: object, values: list[float], which: str) -> None:
    truth = torch.tensor(sorted(values), dtype=torch.float64)
    expected = {"LA": truth[-1:], "SA": truth[:1], "BE": truth[[0, -1]]}[which]
    for seed in range(4):
        found = solve(diagonal(values), len(expected), which=which, tol=2e-2, seed=seed)
        assert found.converged
        assert found.num_matvecs <= 110 * len(expected)
        assert bool(((found.values - expected).abs() <= 2e-2 * expected.abs() + 1e-13).all())


@BOTH
@pytest.mark.parametrize("low", [[-1.2] + [-1.0] * 20_000, [-1.0] * 99 + [-0.999]], ids=["late", "narrow"])
def test_the_shift_is_as_large_as_the_other_end_and_stays(solve: object, low: list[float]) -> None:
    entries = torch.tensor(low, dtype=torch.float64)
    op = hk.LinearOperator(
        lambda v: entries[:, None] * v, len(entries), entries.dtype, entries.device, name="diagonal"
    )
    found = solve(op, which="LA", tol=1e-5)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(max(low), rel=1e-5)
    assert found.num_matvecs <= 60


@BOTH
def test_two_dominant_ends_of_the_same_size_are_not_made_into_one(solve: object) -> None:
    found = solve(diagonal([-1.0, *bulk(98, -0.5, 0.5), 1.0]), which="LM", max_matvecs=300)
    assert found.status is hk.Status.MAX_MATVECS
    assert float(found.residual_norms[0]) > 0.01


@BOTH
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_three_pairs_are_deflated_copies_too(solve: object, which: str) -> None:
    A = matrix([-6.0, -6.0, -5.0, *bulk(60, -1, 1), 5.5, 5.5, 6.5])
    expected = {
        "LA": [5.5, 5.5, 6.5],
        "SA": [-6.0, -6.0, -5.0],
        "LM": [-6.0, -6.0, 6.5],
        "BE": [-6.0, 5.5, 6.5],
    }
    found = solve(hk.aslinearoperator(A), 3, which=which, tol=1e-4)
    assert found.converged
    assert found.values.tolist() == pytest.approx(expected[which], rel=1e-6)
    assert float((found.vectors.mT @ found.vectors - torch.eye(3)).abs().max()) <= 1e-12
    assert float((A @ found.vectors - found.vectors * found.values).norm(dim=0).max()) <= 6.5e-4


@BOTH
@pytest.mark.parametrize("spacing", ["uniform", "exponential"])
def test_the_edge_of_a_dense_spectrum_is_within_tol(solve: object, spacing: str) -> None:
    g = torch.Generator().manual_seed(1)
    draws = torch.rand(2000, generator=g, dtype=torch.float64)
    values = 2 * draws - 1 if spacing == "uniform" else 1 + 0.1 * draws.log()
    for seed in range(8):
        found = solve(diagonal(values.tolist()), which="LA", tol=2e-2, seed=seed)
        assert found.converged
        assert 2 * float(found.residual_norms[0]) <= 2e-2 * float(found.values[0])
        assert float(values.max() - found.values[0]) <= 2e-2 * float(values.max())


@BOTH
@pytest.mark.parametrize("k", [1, 2])
def test_intervals_hold_eigenvalues_that_are_not_told_apart(solve: object, k: int) -> None:
    A = matrix([*bulk(97, 0, 0.02), 1.0, 1.0 + 1e-4, 1.0 + 2e-4])
    for seed in range(5):
        found = solve(hk.aslinearoperator(A), k, which="LA", tol=1e-3, seed=seed)
        assert found.converged
        for interval, value in zip(found.intervals, torch.linalg.eigvalsh(A)[-k:].tolist(), strict=True):
            assert value in interval


@BOTH
@pytest.mark.parametrize("relative", [1.0, 1e-3, 1e-6])
def test_asymmetry_shows_in_a_single_vector_too(solve: object, relative: float) -> None:
    skew = torch.triu(torch.ones(100, 100, dtype=torch.float64), 1)
    A = matrix(SPECTRA["indefinite"]) + relative * (skew - skew.mT) * 20 / torch.linalg.matrix_norm(skew, 2)
    with pytest.raises(hk.NotSymmetricError):
        solve(hk.aslinearoperator(A))


@BOTH
@pytest.mark.parametrize("bad", [20, 131, 132, 133])  # later looks are steps apart
def test_the_vector_whose_product_is_not_finite_is_explained(solve: object, bad: int) -> None:
    A, blocks, blamed = matrix(SPECTRA["clustered"]), [], []

    def product(vectors: Tensor) -> Tensor:
        blocks.append(vectors.clone())
        images = A @ vectors
        if len(blocks) == bad:
            images[3, 1] = math.inf
        return images

    op = replace(hk.aslinearoperator(A), product=product)
    op = explained(op, lambda vector: f"{blamed.append(vector)}")
    found = solve(op, 3, which="SA", tol=1e-12)
    assert found.status is hk.Status.NON_FINITE
    assert len(blamed) == 1
    assert torch.equal(blamed[0], blocks[bad - 1][:, 1])


@BOTH
def test_a_published_case_is_as_exact_with_twenty_products(solve: object) -> None:
    """PyHessian (IEEE BigData 2020): 0.3 % off at the top of a 1,000 x 1,000 matrix."""
    g = torch.Generator().manual_seed(0)
    B = torch.randn(1000, 1000, generator=g, dtype=torch.float64)
    A = B @ B.mT / 1000
    A[0, 0] += 8.0  # an outlier, as the top eigenvalues of Hessians are
    found = solve(hk.aslinearoperator(A), tol=1e-6, max_matvecs=20)
    assert found.num_matvecs <= 20
    assert float(found.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), rel=3e-3)


def test_states_are_not_changed_by_later_steps_and_go_on_to_the_bit() -> None:
    op = mean_of(scattered(SPECTRA["negative_dominant"]))
    goal = goal_of(op, 2, "BE", momentum=None, num_examples=64, schedule=lambda _: 8, anchored=True)
    state = after(op, goal, 20)
    kept = {name: value.clone() for name, value in vars(state).items() if isinstance(value, Tensor)}
    ends = []
    for _ in range(2):
        later = state
        for _ in range(10):
            later = assess(op, goal, step(op, goal, later)).state
        ends.append(later)
    assert torch.equal(ends[0].rows, ends[1].rows)
    assert torch.equal(ends[0].images, ends[1].images)
    assert all(torch.equal(getattr(state, name), value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("spectrum", "noise", "which"), [("indefinite", 3.0, "SA"), ("negative_dominant", 0.3, "LA")]
)
def test_variance_reduction_reaches_any_accuracy_for_fewer_products(
    spectrum: str, noise: float, which: str
) -> None:
    matrices = scattered(SPECTRA[spectrum], noise=noise)
    op, truth = mean_of(matrices), torch.linalg.eigvalsh(matrices.mean(0))
    full = accelerated_power(op, which=which, tol=1e-8)
    reduced = accelerated_power(op, which=which, tol=1e-8, variance_reduced=True)
    assert full.converged
    assert reduced.converged
    assert float(reduced.values[0]) == pytest.approx(float(truth[-1 if which == "LA" else 0]), rel=1e-10)
    assert reduced.num_matvecs <= 0.75 * full.num_matvecs


def test_minibatches_that_are_too_small_for_variance_reduction_double() -> None:
    matrices, sizes = scattered(SPECTRA["multiple"], noise=30.0), []
    op = mean_of(matrices)

    def sample(num_examples: int, seed: int) -> hk.LinearOperator:
        sizes.append(num_examples)
        return op.sample(num_examples, seed)

    found = accelerated_power(
        variant(op, sample=sample), which="LA", variance_reduced=True, batch_size=1, tol=1e-4
    )
    assert found.converged
    assert float(found.values[0]) == pytest.approx(3.0, rel=1e-6)
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] > 4


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": float("nan")}, ValueError, "momentum"),
        ({"momentum": "0.1"}, TypeError, "momentum"),
        ({"batch_size": 4}, ValueError, "batch_size=4 is for variance_reduced=True"),
        ({"batch_size": 0, "variance_reduced": True}, ValueError, "batch_size"),
        ({"batch_size": 65, "variance_reduced": True}, ValueError, "batch_size"),
        ({"batch_size": 2.0, "variance_reduced": True}, TypeError, "batch_size"),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        accelerated_power(mean_of(scattered(SPECTRA["n3"])), **arguments)


def test_variance_reduction_without_minibatches_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^op must be able to draw minibatches.*variance_reduced=True needs"):
        accelerated_power(diagonal([1.0, 2.0]), variance_reduced=True)
