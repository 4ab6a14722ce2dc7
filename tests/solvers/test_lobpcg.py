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
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.common.request import check_arguments
from hvpkit.solvers.driver import Assessment
from hvpkit.solvers.lobpcg import Lobpcg, LobpcgState, lobpcg
from problems import SPECTRA, matrix, network

EPS = torch.finfo(torch.float64).eps
EACH_END = pytest.mark.parametrize("which", ["LA", "SA", "BE"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def bulk(n: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, n, dtype=torch.float64).tolist()


def wanted(truth: Tensor, k: int, which: str) -> Tensor:
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([truth[:low], truth[len(truth) - (k - low) :]])


def recorded(A: Tensor, blocks: list[Tensor], good: float = float("inf")) -> hk.LinearOperator:
    """A matrix that keeps what it is multiplied with, NaN in the columns after the first ``good``."""

    def product(v: Tensor) -> Tensor:
        before = sum(block.shape[1] for block in blocks)
        blocks.append(v.clone())
        fine = torch.arange(before, before + v.shape[1]) < good
        return torch.where(fine, A @ v, torch.nan)

    return replace(hk.aslinearoperator(A), product=product)


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[LobpcgState], None]) -> None:
    """Show ``see`` the state after each assessment of a solve."""
    original = Lobpcg.assess

    def watched(solver: Lobpcg, state: LobpcgState) -> Assessment[LobpcgState]:
        found = original(solver, state)
        see(found.state)
        return found

    monkeypatch.setattr(Lobpcg, "assess", watched)


@EACH_END
@pytest.mark.parametrize("n", range(1, 13))
def test_any_k_of_a_small_matrix(n: int, which: str) -> None:
    g = torch.Generator().manual_seed(n)
    A = matrix(torch.randn(n, generator=g, dtype=torch.float64).tolist(), seed=n)
    truth = torch.linalg.eigvalsh(A)
    for k in range(1, n + 1):
        for tol in (0.1, 1e-10):
            found = lobpcg(hk.aslinearoperator(A), k, which=which, tol=tol, seed=k)
            true = wanted(truth, k, which)
            assert bool(((found.values - true).abs() <= tol * true.abs() + 1e-14).all())
            assert found.num_matvecs <= 2 * n + 2 * k + 6


def test_the_three_blocks_are_orthonormal_and_their_products_are_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A = matrix([*bulk(297, -1, 1), 1.02, 1.04, 1.05])
    seen: list[tuple[int, int, int]] = []

    def check(state: LobpcgState) -> None:
        old, used = state.num_rows, state.num_rows + state.num_new
        rows = state.rows[:used]
        assert torch.allclose(rows @ rows.mT, torch.eye(used, dtype=A.dtype), rtol=0, atol=1e-13)
        images = rows[:old] @ A / state.scale
        assert torch.allclose(state.images[:old], images, rtol=0, atol=1e-13)
        seen.append((state.num_block, old - state.num_block, state.num_new))

    watch(monkeypatch, check)
    found = lobpcg(hk.aslinearoperator(A), 3, tol=1e-9)
    assert found.converged
    assert len(seen) > 20
    assert (4, 4, 4) in seen  # three full blocks at some time


def test_only_new_directions_are_multiplied_and_converged_pairs_have_none() -> None:
    blocks: list[Tensor] = []
    A = matrix([*bulk(400, -1, 1), 1.02, 30.0, 40.0])
    found = lobpcg(recorded(A, blocks), 3, tol=1e-10)
    widths = [block.shape[1] for block in blocks]
    assert found.converged
    assert found.num_matvecs == sum(widths)
    assert widths[0] == 4  # one guard
    assert max(widths) == 4
    assert widths[-2] <= 2  # the outliers are done long before
    assert widths[-1] == 3  # the final check


def test_new_directions_are_orthogonal_to_those_before() -> None:
    blocks: list[Tensor] = []
    lobpcg(recorded(matrix(bulk(400, -1, 1)), blocks), 3, max_matvecs=30)
    for first, second in itertools.pairwise(blocks[:-1]):
        assert float((first.mT @ second).abs().max()) < 1e-13


def test_values_never_get_worse_and_the_history_shows_it() -> None:
    history: list[hk.Progress] = []
    op = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"]))
    found = lobpcg(op, 2, which="BE", tol=1e-10, monitor=history.append)
    lows, highs = ([getattr(entry, end) for entry in history] for end in ("smallest", "largest"))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(lows))
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(highs))
    assert found.history == tuple(history)
    assert found.values.tolist() == pytest.approx([lows[-1], highs[-1]], rel=1e-10)


@EACH_END
def test_the_best_block_is_kept_and_not_the_last(which: str) -> None:
    op = hk.aslinearoperator(torch.eye(9, dtype=torch.float64))
    asked = check_arguments(op, 2, which, v0=None, tol=1e-3, max_matvecs=None, time_limit=None, seed=0)
    solver = Lobpcg(op, asked, width=2)
    inner = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    outward = torch.tensor({"LA": [1, 1], "SA": [-1, -1], "BE": [-1, 1]}[which], dtype=torch.float64)

    def block(shift: float, residual: float) -> RitzPairs:
        vectors = torch.full((9, 2), shift, dtype=torch.float64)
        return RitzPairs(inner + shift * outward, vectors, torch.full((2,), residual))

    def kept(first: RitzPairs, second: RitzPairs) -> Tensor:
        state = replace(solver.init(), norm=1.0)
        for pairs in (first, second):
            state = solver._keep_best(state, pairs)
        return state.best.vectors[0, 0]

    assert kept(block(0.0, 1e-6), block(0.1, 1.0)) == 0.1  # further out, whatever the residual
    assert kept(block(0.1, 1e-3), block(0.0, 1e-2)) == 0.1
    assert kept(block(0.0, 1e-6), block(1e-16, 1e-3)) == 0.0  # as far out: the smaller residual
    assert kept(block(0.0, 1e-3), block(1e-16, 1e-6)) == 1e-16


def test_preconditioner_saves_most_of_the_products() -> None:
    diagonal = torch.linspace(1, 1e4, 1200, dtype=torch.float64)
    near = torch.randn(1200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 50
    dense = torch.diag(diagonal) + near @ near.mT
    truth = torch.linalg.eigvalsh(dense)[:2]
    shapes: list[tuple[int, ...]] = []

    def precondition(residuals: Tensor) -> Tensor:
        shapes.append(tuple(residuals.shape))
        return residuals / diagonal[:, None]

    op = hk.aslinearoperator(dense)
    plain = lobpcg(op, 2, which="SA", tol=1e-6, max_matvecs=5000)
    helped = lobpcg(op, 2, which="SA", tol=1e-6, preconditioner=precondition)
    for found in (plain, helped):
        assert found.converged
        assert bool(((found.values - truth).abs() <= 1e-6 * truth).all())
    assert helped.num_matvecs <= plain.num_matvecs / 8
    assert {shape[0] for shape in shapes} == {1200}
    assert sum(shape[1] for shape in shapes) == helped.num_matvecs - 3 - 2  # all but start and check


@pytest.mark.parametrize(
    ("preconditioner", "error", "match"),
    [
        (3.0, TypeError, "^preconditioner must be a function"),
        (lambda r: r[:, :0], ValueError, r"^preconditioner must return a tensor \[100, 2\]"),
        (lambda r: r.float(), ValueError, "^preconditioner must return .* got .*float32"),
        (lambda _: None, ValueError, "^preconditioner must return .* got NoneType"),
        (lambda r: r * torch.nan, ValueError, "^preconditioner returned NaN"),
    ],
)
def test_bad_preconditioner_is_named(preconditioner: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lobpcg(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), preconditioner=preconditioner)


def test_preconditioner_does_not_get_the_solvers_memory() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    plain, scribbled = (
        lobpcg(op, 2, tol=1e-8, preconditioner=f) for f in (torch.clone, lambda r: r.mul_(3.0))
    )
    assert scribbled.converged
    assert torch.allclose(plain.values, scribbled.values, rtol=1e-12)


def test_preconditioner_that_gives_nothing_new_does_not_stop_it() -> None:
    A = matrix(bulk(30, -1, 1))
    found = lobpcg(hk.aslinearoperator(A), tol=1e-8, preconditioner=torch.zeros_like)
    assert found.converged
    assert found.values.tolist() == pytest.approx([1.0], rel=1e-8)


@pytest.mark.parametrize("name", ["decaying", "clustered"])
def test_hard_small_problems_end_exactly_for_another_n_products(name: str) -> None:
    A = matrix(SPECTRA[name])
    found = lobpcg(hk.aslinearoperator(A), which="SA", tol=1e-3, atol=0.0)
    assert abs(float(found.values[0]) - min(SPECTRA[name])) <= 32 * EPS
    assert found.num_matvecs <= 2 * len(A) + 3
    short = lobpcg(hk.aslinearoperator(A), which="SA", tol=1e-3, atol=0.0, max_matvecs=2 * len(A) - 10)
    assert short.status is hk.Status.MAX_MATVECS


def test_time_limit_is_kept_on_the_way_to_the_whole_space(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []
    op = recorded(matrix(SPECTRA["clustered"]), blocks)
    monkeypatch.setattr("time.perf_counter", lambda: float(sum(block.shape[1] for block in blocks)))
    found = lobpcg(op, which="SA", time_limit=150.0)
    monkeypatch.undo()
    assert found.status is hk.Status.TIME_LIMIT
    assert 147 <= found.num_matvecs <= 150
    assert max(block.shape[1] for block in blocks) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [100, 400])
def test_no_member_of_a_cluster_is_skipped(seed: int, n: int) -> None:
    cluster = [1.0, 1.0 + 1e-4, 1.0 + 2e-4, 1.0 + 3e-4]
    A = matrix(bulk(n - 4, 0, 0.5) + cluster, seed=seed)
    found = lobpcg(hk.aslinearoperator(A), 4, tol=1e-8, seed=seed)
    assert found.converged
    assert found.values.tolist() == pytest.approx(cluster, rel=1e-8)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("k", "which"), [(2, "SA"), (3, "LA"), (3, "SA"), (4, "BE"), (6, "BE")])
def test_copies_of_a_multiple_eigenvalue_are_found(k: int, which: str, seed: int) -> None:
    A = matrix(SPECTRA["multiple"])
    for tol in (0.1, 1e-3):
        found = lobpcg(hk.aslinearoperator(A), k, which=which, tol=tol, seed=seed)
        true = wanted(torch.linalg.eigvalsh(A), k, which)
        assert bool(((found.values - true).abs() <= tol * true.abs()).all())


@pytest.mark.parametrize("seed", range(5))
def test_start_next_to_no_eigenvector_but_with_a_small_residual_is_not_believed(seed: int) -> None:
    values = torch.ones(2000, dtype=torch.float64)
    values[7] = 1.5
    found = lobpcg(hk.aslinearoperator(torch.diag(values)), tol=1e-1, seed=seed)
    assert found.values.tolist() == pytest.approx([1.5], rel=1e-1)


def test_warm_start_needs_fewer_products() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    vectors = torch.linalg.eigh(A + 1e-3 * matrix(bulk(300, -1, 1), seed=1)).eigenvectors
    op = hk.aslinearoperator(A)
    cold = lobpcg(op, 2, which="BE", tol=1e-2)
    warm = lobpcg(op, 2, which="BE", tol=1e-2, v0=vectors[:, [0, 1, 298, 299]])
    assert warm.converged
    assert warm.num_matvecs < cold.num_matvecs


@EACH_DTYPE
@pytest.mark.parametrize("exponent", [-90, 90])
def test_powers_of_two_change_nothing_but_the_scale(exponent: int, dtype: torch.dtype) -> None:
    A = matrix(SPECTRA["indefinite"], dtype=dtype)
    plain, scaled = (lobpcg(hk.aslinearoperator(A * 2.0**e), 3, which="BE") for e in (0, exponent))
    assert torch.equal(scaled.vectors, plain.vectors)
    assert torch.equal(scaled.values, plain.values * 2.0**exponent)
    assert torch.equal(scaled.residual_norms, plain.residual_norms * 2.0**exponent)
    assert scaled.num_matvecs == plain.num_matvecs


@pytest.mark.parametrize("budget", [*range(4, 12), 45])
@EACH_END
def test_every_budget_is_kept_and_used_to_the_last_block(budget: int, which: str) -> None:
    blocks: list[Tensor] = []
    A = matrix(SPECTRA["clustered"])
    found = lobpcg(recorded(A, blocks), 2, which=which, tol=1e-12, max_matvecs=budget)
    assert found.status is hk.Status.MAX_MATVECS
    width = blocks[0].shape[1]
    assert width == min(4 if which == "BE" else 3, budget - 2)
    assert budget - width < found.num_matvecs == sum(block.shape[1] for block in blocks) <= budget
    residuals = torch.linalg.vector_norm(A @ found.vectors - found.vectors * found.values, dim=0)
    assert torch.allclose(found.residual_norms, residuals, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("place", [1, 4, 20])
def test_state_continues_to_the_bit(place: int) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["clustered"]))
    asked = check_arguments(op, 2, "BE", v0=None, tol=1e-9, max_matvecs=None, time_limit=None, seed=0)
    solver = Lobpcg(op, asked, width=4)
    state, kept = solver.init(), None
    for count in range(25):
        state = solver.step(solver.assess(state).state)
        if count == place:
            kept = deepcopy(state)
    assert kept is not None
    for _ in range(24 - place):
        kept = solver.step(solver.assess(kept).state)
    assert torch.equal(kept.rows[: kept.num_rows], state.rows[: state.num_rows])
    assert torch.equal(kept.best.values, state.best.values)


def test_budget_smaller_than_the_block_starts_with_what_it_allows() -> None:
    blocks: list[Tensor] = []
    found = lobpcg(recorded(matrix(SPECTRA["indefinite"]), blocks), 3, max_matvecs=6)
    assert [block.shape[1] for block in blocks] == [3, 3]
    assert len(found.values) == 3


@pytest.mark.parametrize("good", [1, 4, 11, 18])
def test_not_finite_product_leaves_the_best_of_those_before(good: int) -> None:
    A, blocks = matrix(SPECTRA["indefinite"]), []
    history: list[hk.Progress] = []
    found = lobpcg(recorded(A, blocks, good), 2, tol=1e-12, monitor=history.append)
    assert found.status is hk.Status.NON_FINITE
    assert not found.converged
    assert len(found.values) == min(good, 2)
    assert found.num_matvecs == sum(block.shape[1] for block in blocks)
    Q = torch.linalg.qr(torch.cat(blocks, dim=1)[:, :good]).Q
    best = torch.linalg.eigvalsh(Q.mT @ A @ Q)[-1]  # of all that was known; LOBPCG keeps three blocks of it
    assert float(found.values[-1]) <= float(best) + 1e-12
    assert float(found.values[-1]) >= max(entry.largest for entry in history) - 1e-12
    residuals = torch.linalg.vector_norm(A @ found.vectors - found.vectors * found.values, dim=0)
    assert torch.allclose(found.residual_norms, residuals, atol=1e-12)


def test_not_finite_product_with_a_hessian_names_the_batch() -> None:
    problem, calls = network("mlp"), [0]

    def loss_fn(params: object, batch: object) -> Tensor:
        calls[0] += 1
        return problem.objective(params, batch) / (0.0 if calls[0] > 12 else 1.0)

    data, mode = problem.data, "reverse-over-reverse"  # "auto" calls it as often as timing asks for
    found = lobpcg(hk.hessian(loss_fn, problem.params, data, batch_size=5, mode=mode, memory_limit=0))
    assert found.status is hk.Status.NON_FINITE
    assert "batch 0" in found.message


def test_zero_operator_is_zero_at_once() -> None:
    found = lobpcg(hk.aslinearoperator(torch.zeros(1000, 1000)))
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.values.tolist() == [0.0]
    assert found.num_matvecs == 3


@EACH_DTYPE
def test_zero_end_of_a_large_semidefinite_operator_is_zero_to_rounding(dtype: torch.dtype) -> None:
    diagonal = torch.cat([torch.zeros(1000), torch.linspace(1, 10, 200)]).to(dtype)
    found = lobpcg(hk.aslinearoperator(torch.diag(diagonal)), which="SA", atol=0.0)
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.num_matvecs < 200
    assert 0.0 in found.intervals[0]


@EACH_DTYPE
@pytest.mark.parametrize("tol", [1e-300, 1e-17])
def test_tol_below_eps_stops_at_rounding_and_says_so(dtype: torch.dtype, tol: float) -> None:
    A = matrix(SPECTRA["indefinite"], dtype=dtype)
    found = lobpcg(hk.aslinearoperator(A), 2, which="BE", tol=tol)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.num_matvecs <= 100
    truth = torch.linalg.eigvalsh(A.double())[[0, -1]]
    assert bool(((found.values - truth).abs() <= 40 * torch.finfo(dtype).eps * 20).all())


@pytest.mark.parametrize("level", [1e-13, 1e-10])
def test_noise_in_products_is_seen_and_kept_out_of_the_digits(level: float) -> None:
    A, g = matrix(SPECTRA["indefinite"]), torch.Generator().manual_seed(0)

    def product(v: Tensor) -> Tensor:
        return A @ v + 2 * level * torch.randn(v.shape, generator=g, dtype=v.dtype)

    with pytest.warns(hk.AsymmetryWarning) if level > 1e-11 else nullcontext():
        found = lobpcg(replace(hk.aslinearoperator(A), product=product), 2, which="BE", tol=1e-15)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.num_matvecs <= 120
    assert found.values.tolist() == pytest.approx([-5.0, 20.0], rel=0, abs=100 * level)


def test_both_ends_of_one_pair_are_the_high_end() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["negative_dominant"]))
    assert torch.equal(lobpcg(op, which="BE").vectors, lobpcg(op, which="LA").vectors)


def test_slight_asymmetry_is_said() -> None:
    A = matrix(SPECTRA["indefinite"])
    A[3] += 1e-9 * A[50]
    with pytest.warns(hk.AsymmetryWarning, match="dense matrix.*slightly asymmetric"):
        found = lobpcg(hk.aslinearoperator(A), 2, which="BE", tol=1e-4)
    assert found.values.tolist() == pytest.approx([-5.0, 20.0], rel=1e-4)


def test_magnitude_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"^which must be one of 'LA', 'SA', 'BE'"):
        lobpcg(hk.aslinearoperator(torch.eye(3)), which="LM")
