from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.chebyshev import (
    MAX_DEGREE,
    TERMS_PER_ASSESSMENT,
    Chebyshev,
    ChebyshevState,
    FilterPlan,
    chebyshev,
)
from hvpkit.solvers.common.request import check_arguments
from hvpkit.solvers.driver import Assessment
from problems import SPECTRA, matrix, network

EACH_END = pytest.mark.parametrize("which", ["LA", "SA", "BE"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def bulk(n: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, n, dtype=torch.float64).tolist()


def wanted(truth: Tensor, k: int, which: str) -> Tensor:
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([truth[:low], truth[len(truth) - (k - low) :]])


def diagonal(values: Tensor, blocks: list[Tensor], good: float = float("inf")) -> hk.LinearOperator:
    """An operator that keeps what it is multiplied with, NaN in the columns after the first ``good``."""

    def product(v: Tensor) -> Tensor:
        before = sum(block.shape[1] for block in blocks)
        blocks.append(v.clone())
        fine = torch.arange(before, before + v.shape[1]) < good
        return torch.where(fine, values[:, None] * v, torch.nan)

    return hk.LinearOperator(product, len(values), values.dtype, values.device)


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[ChebyshevState], None]) -> None:
    """Show ``see`` the state after each assessment of a solve."""
    original = Chebyshev.assess

    def watched(solver: Chebyshev, state: ChebyshevState) -> Assessment[ChebyshevState]:
        found = original(solver, state)
        see(found.state)
        return found

    monkeypatch.setattr(Chebyshev, "assess", watched)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[FilterPlan]:
    """The plans of the filters of a solve, over the operator's norm."""
    seen: list[FilterPlan] = []

    def see(state: ChebyshevState) -> None:
        if state.filter is not None and not state.filter.num_terms:
            plan = state.filter.plan
            center, half_width = plan.center / state.norm, plan.half_width / state.norm
            seen.append(replace(plan, center=center, half_width=half_width))

    watch(monkeypatch, see)
    return seen


LARGE: dict[str, Tensor] = {
    "bulk": torch.tensor([-1.1, -1.05, *bulk(1495, -1, 1), 1.04, 1.07, 1.1], dtype=torch.float64),
    "outliers": torch.tensor([-0.5, -0.45, *bulk(1488, -0.1, 1), *bulk(10, 20, 100)], dtype=torch.float64),
    "copies": torch.tensor([-1.2] * 3 + bulk(1494, -1, 1) + [1.2] * 3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", LARGE)
@EACH_END
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("block_size", [None, 6])
def test_ends_of_large_operators(
    name: str, which: str, k: int, block_size: int | None, plans: list[FilterPlan]
) -> None:
    blocks: list[Tensor] = []
    found = chebyshev(diagonal(LARGE[name], blocks), k, which=which, tol=1e-5, block_size=block_size)
    true = wanted(LARGE[name].sort().values, k, which)
    assert found.status is hk.Status.CONVERGED
    assert bool(((found.values - true).abs() <= 1e-5 * true.abs()).all())
    assert found.num_matvecs == sum(block.shape[1] for block in blocks)
    assert plans or name != "bulk"
    if block_size is not None:
        assert max(block.shape[1] for block in blocks) == block_size == blocks[0].shape[1]


@EACH_END
@pytest.mark.parametrize("n", [*range(1, 13), 40])
def test_any_k_of_a_small_matrix(n: int, which: str) -> None:
    A = matrix(
        torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist(), seed=n
    )
    truth = torch.linalg.eigvalsh(A)
    for k in sorted({*range(1, min(n, 12) + 1), n}):
        for tol in (0.1, 1e-10):
            found = chebyshev(hk.aslinearoperator(A), k, which=which, tol=tol, seed=k)
            true = wanted(truth, k, which)
            assert bool(((found.values - true).abs() <= tol * true.abs() + 1e-14).all())


def test_each_vector_is_multiplied_as_often_as_its_degree_says(plans: list[FilterPlan]) -> None:
    blocks: list[Tensor] = []
    found = chebyshev(diagonal(LARGE["bulk"], blocks), 3, tol=1e-8)
    widths = [block.shape[1] for block in blocks]
    expected: list[int] = []
    for plan in plans:
        expected += [sum(degree > term for degree in plan.degrees) for term in range(max(plan.degrees))]
        expected += [len(plan.degrees)]
    assert widths == [4] * 8 + expected + [3]
    assert found.num_matvecs == sum(widths)
    assert any(len(set(plan.degrees)) > 1 for plan in plans)
    assert max(degree for plan in plans for degree in plan.degrees) <= MAX_DEGREE


@EACH_END
def test_the_last_interval_holds_what_is_not_wanted_and_no_more(which: str, plans: list[FilterPlan]) -> None:
    truth = LARGE["bulk"].sort().values
    found = chebyshev(diagonal(truth, []), 2, which=which, tol=1e-6, block_size=2)
    assert found.converged
    low, high = {"LA": (-1.1, truth[-3]), "SA": (truth[2], 1.1), "BE": (truth[1], truth[-2])}[which]
    center, half_width = plans[-1].center * 1.1, plans[-1].half_width * 1.1
    assert center - half_width == pytest.approx(float(low), abs=0.02)
    assert center + half_width == pytest.approx(float(high), abs=0.02)


def test_outliers_at_the_other_end_do_not_widen_the_interval(plans: list[FilterPlan]) -> None:
    values = torch.tensor([-0.05, -0.045, *bulk(1995, -0.02, 0.3), 50.0, 80.0], dtype=torch.float64)
    found = chebyshev(diagonal(values, []), 2, which="SA", tol=1e-4)
    assert found.values.tolist() == pytest.approx([-0.05, -0.045], rel=1e-4)
    assert plans
    assert all(len(plan.locked) >= 2 and plan.half_width * 80 < 0.17 for plan in plans)
    assert found.num_matvecs < 250


def test_locked_rows_stay_orthogonal_to_what_is_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = LARGE["outliers"], []

    def see(state: ChebyshevState) -> None:
        if state.filter is not None and state.filter.num_terms and state.filter.plan.locked:
            overlaps = state.rows[: len(state.filter.plan.locked)] @ state.filter.current.mT
            seen.append(float(overlaps.abs().max()))

    watch(monkeypatch, see)
    assert chebyshev(diagonal(values, []), 3, which="SA", tol=1e-8).converged
    assert len(seen) > 10
    assert max(seen) < 1e-13


def test_rows_are_orthonormal_ritz_vectors_with_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    values, counts = LARGE["bulk"], []

    def see(state: ChebyshevState) -> None:
        rows = state.rows[: state.num_rows + state.num_new]
        assert torch.allclose(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-13)
        images = rows[: state.num_rows] * values / state.scale
        assert torch.allclose(state.images[: state.num_rows], images, rtol=0, atol=1e-13)
        assert len(state.rows) == len(state.images) == 32 + 4
        counts.append(state.num_rows)

    watch(monkeypatch, see)
    assert chebyshev(diagonal(values, []), 3, tol=1e-8).converged
    assert 32 < max(counts) <= 36
    assert len(counts) > 10


@EACH_END
def test_values_never_get_worse_and_the_history_shows_it(which: str) -> None:
    history: list[hk.Progress] = []
    found = chebyshev(diagonal(LARGE["bulk"], []), 2, which=which, tol=1e-8, monitor=history.append)
    lows, highs = ([getattr(entry, end) for entry in history] for end in ("smallest", "largest"))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(lows))
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(highs))
    assert found.history == tuple(history)
    assert len(history) > 12
    ends = {"LA": [(-1, highs)], "SA": [(0, lows)], "BE": [(0, lows), (-1, highs)]}[which]
    assert all(float(found.values[place]) == pytest.approx(seen[-1], rel=1e-10) for place, seen in ends)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [100, 1500])
def test_no_member_of_a_cluster_is_skipped(seed: int, n: int) -> None:
    cluster = [1.0, 1.0 + 1e-4, 1.0 + 2e-4, 1.0 + 3e-4]
    values = torch.tensor(bulk(n - 4, 0, 0.5) + cluster, dtype=torch.float64)
    found = chebyshev(diagonal(values, []), 4, tol=1e-8, seed=seed)
    assert found.converged
    assert found.values.tolist() == pytest.approx(cluster, rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("k", "which"), [(2, "BE"), (2, "SA"), (3, "LA"), (4, "BE"), (6, "BE")])
@pytest.mark.parametrize("name", ["multiple", "copies"])
def test_copies_of_a_multiple_eigenvalue_are_found(name: str, k: int, which: str, seed: int) -> None:
    values = {"multiple": torch.tensor(SPECTRA["multiple"], dtype=torch.float64), "copies": LARGE["copies"]}[
        name
    ]
    for tol in (0.1, 1e-3, 1e-6):
        found = chebyshev(diagonal(values, []), k, which=which, tol=tol, seed=seed)
        true = wanted(values.sort().values, k, which)
        assert found.converged
        assert bool(((found.values - true).abs() <= tol * true.abs()).all())


@pytest.mark.parametrize("seed", range(20))
@EACH_END
def test_nothing_near_the_end_is_missed_at_a_loose_tol(seed: int, which: str) -> None:
    values = torch.tensor(SPECTRA["indefinite"], dtype=torch.float64)
    for tol in (1e-1, 1e-2):
        found = chebyshev(diagonal(values, []), 3, which=which, tol=tol, seed=seed)
        true = wanted(values, 3, which)
        assert bool(((found.values - true).abs() <= tol * true.abs()).all())


@pytest.mark.parametrize("seed", range(5))
def test_start_next_to_no_eigenvector_but_with_a_small_residual_is_not_believed(seed: int) -> None:
    values = torch.ones(2000, dtype=torch.float64)
    values[7] = 1.5
    found = chebyshev(diagonal(values, []), tol=1e-1, seed=seed)
    assert found.values.tolist() == pytest.approx([1.5], rel=1e-1)


def test_warm_start_needs_fewer_products() -> None:
    values = LARGE["bulk"]
    g = torch.Generator().manual_seed(0)
    v0 = torch.eye(1500, dtype=torch.float64)[:, -4:] + 0.01 * torch.randn(
        1500, 4, generator=g, dtype=torch.float64
    )
    cold, warm = (chebyshev(diagonal(values, []), 3, tol=1e-3, v0=start) for start in (None, v0))
    assert warm.converged
    assert warm.num_matvecs < cold.num_matvecs


@EACH_DTYPE
@pytest.mark.parametrize("exponent", [-90, 90])
def test_powers_of_two_change_nothing_but_the_scale(exponent: int, dtype: torch.dtype) -> None:
    values = LARGE["bulk"].to(dtype)
    plain, scaled = (chebyshev(diagonal(values * 2.0**e, []), 3, which="BE") for e in (0, exponent))
    assert torch.equal(scaled.vectors, plain.vectors)
    assert torch.equal(scaled.values, plain.values * 2.0**exponent)
    assert scaled.num_matvecs == plain.num_matvecs


@pytest.mark.parametrize("budget", [*range(4, 12), *range(40, 75, 3), 150])
@EACH_END
def test_every_budget_is_kept_and_no_filter_is_begun_in_vain(budget: int, which: str) -> None:
    blocks: list[Tensor] = []
    values = LARGE["bulk"]
    found = chebyshev(diagonal(values, blocks), 2, which=which, tol=1e-12, max_matvecs=budget, block_size=2)
    assert found.status is hk.Status.MAX_MATVECS
    assert budget - 4 < found.num_matvecs == sum(block.shape[1] for block in blocks) <= budget
    quotients = [
        (torch.linalg.eigvalsh(Q.mT @ (values[:, None] * Q)))
        for Q in (torch.linalg.qr(block).Q for block in blocks)
    ]  # had a filter been begun in vain, its last vectors would be better than the answer
    assert which == "SA" or found.values[-1] >= max(theta[-1] for theta in quotients) - 1e-12
    assert which == "LA" or found.values[0] <= min(theta[0] for theta in quotients) + 1e-12
    residuals = torch.linalg.vector_norm(
        values[:, None] * found.vectors - found.vectors * found.values, dim=0
    )
    assert torch.allclose(found.residual_norms, residuals, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("limit", [20.0, 45.0, 60.0, 100.0])
def test_time_limit_is_kept_within_a_filter(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []
    op = diagonal(LARGE["bulk"], blocks)
    monkeypatch.setattr("time.perf_counter", lambda: float(sum(block.shape[1] for block in blocks)))
    found = chebyshev(op, 3, tol=1e-10, time_limit=limit)
    monkeypatch.undo()
    assert found.status is hk.Status.TIME_LIMIT
    assert limit - 4 < found.num_matvecs <= limit
    assert len(found.values) == 3


@pytest.mark.parametrize("good", [1, 5, 30, 34, 45, 52, 60])
def test_not_finite_product_leaves_the_best_of_those_before(good: int) -> None:
    values, blocks = LARGE["bulk"], []
    history: list[hk.Progress] = []
    found = chebyshev(diagonal(values, blocks, good), 2, tol=1e-12, monitor=history.append)
    assert found.status is hk.Status.NON_FINITE
    assert len(found.values) == min(good, 2)
    assert found.num_matvecs == sum(block.shape[1] for block in blocks)
    assert found.num_matvecs < good + 3 * (TERMS_PER_ASSESSMENT + 1)  # seen soon, also within a filter
    assert float(found.values[-1]) >= max((entry.largest for entry in history), default=-2.0) - 1e-12
    residuals = torch.linalg.vector_norm(
        values[:, None] * found.vectors - found.vectors * found.values, dim=0
    )
    assert torch.allclose(found.residual_norms, residuals, atol=1e-12)


def test_not_finite_product_in_a_filter_names_the_batch() -> None:
    problem, calls = network("mlp"), [0]

    def loss_fn(params: object, batch: object) -> Tensor:
        calls[0] += 1
        return problem.objective(params, batch) / (0.0 if calls[0] > 40 else 1.0)

    found = chebyshev(
        hk.hessian(loss_fn, problem.params, problem.data, batch_size=5, memory_limit=0), tol=1e-9
    )
    assert found.status is hk.Status.NON_FINITE
    assert "batch 0" in found.message


@pytest.mark.parametrize("place", [3, 9, 14, 30])
def test_state_continues_to_the_bit(place: int) -> None:
    op = diagonal(LARGE["bulk"], [])
    asked = check_arguments(op, 2, "BE", v0=None, tol=1e-9, max_matvecs=None, time_limit=None, seed=0)
    solver = Chebyshev(op, asked, width=2, max_rows=16)
    state, kept = solver.init(), None
    filtering = set()

    def onwards(state: ChebyshevState) -> ChebyshevState:
        found = solver.assess(state)
        state = found.state
        for _ in range(found.num_steps):
            state = solver.step(state)
        return state

    for count in range(35):
        state = onwards(state)
        filtering.add(state.filter is not None)
        if count == place:
            kept = deepcopy(state)
    assert kept is not None
    for _ in range(34 - place):
        kept = onwards(kept)
    assert filtering == {True, False}
    assert kept.num_matvecs == state.num_matvecs
    assert torch.equal(kept.rows[: kept.num_rows], state.rows[: state.num_rows])
    assert torch.equal(kept.best.values, state.best.values)


def test_zero_operator_is_zero_at_once() -> None:
    found = chebyshev(hk.aslinearoperator(torch.zeros(1000, 1000)))
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.values.tolist() == [0.0]
    assert found.num_matvecs == 2


@EACH_DTYPE
def test_zero_end_of_a_large_semidefinite_operator_is_zero_to_rounding(dtype: torch.dtype) -> None:
    values = torch.cat([torch.zeros(1000), torch.linspace(1, 10, 200)]).to(dtype)
    found = chebyshev(diagonal(values, []), 2, which="SA", atol=0.0)
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.num_matvecs < 400
    assert all(0.0 in interval for interval in found.intervals)


@EACH_DTYPE
def test_tol_below_eps_stops_at_rounding_and_says_so(dtype: torch.dtype) -> None:
    values = LARGE["bulk"].to(dtype)
    found = chebyshev(diagonal(values, []), 2, which="BE", tol=1e-300)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.values.tolist() == pytest.approx([-1.1, 1.1], abs=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("level", [1e-13, 1e-10])
def test_noise_in_products_is_seen_and_kept_out_of_the_digits(level: float) -> None:
    A, g = matrix(SPECTRA["indefinite"]), torch.Generator().manual_seed(0)

    def product(v: Tensor) -> Tensor:
        return A @ v + 2 * level * torch.randn(v.shape, generator=g, dtype=v.dtype)

    with pytest.warns(hk.AsymmetryWarning) if level > 1e-11 else nullcontext():
        found = chebyshev(replace(hk.aslinearoperator(A), product=product), 2, which="BE", tol=1e-15)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.num_matvecs <= 120
    assert found.values.tolist() == pytest.approx([-5.0, 20.0], rel=0, abs=100 * level)


@pytest.mark.parametrize("block_size", [2, 101, 3.0])
def test_block_holds_all_pairs_and_no_more_than_the_space(block_size: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^block_size must be"):
        chebyshev(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), 3, block_size=block_size)


def test_slight_asymmetry_is_said() -> None:
    A = matrix(SPECTRA["indefinite"])
    A[3] += 1e-9 * A[50]
    with pytest.warns(hk.AsymmetryWarning, match="dense matrix.*slightly asymmetric"):
        found = chebyshev(hk.aslinearoperator(A), 2, which="BE", tol=1e-4)
    assert found.values.tolist() == pytest.approx([-5.0, 20.0], rel=1e-4)


def test_magnitude_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"^which must be one of 'LA', 'SA', 'BE'"):
        chebyshev(hk.aslinearoperator(torch.eye(3)), which="LM")
