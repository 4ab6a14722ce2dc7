from __future__ import annotations

import contextlib
import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.driver import Assessment
from hvpkit.solvers.lanczos import Lanczos, LanczosState
from problems import SPECTRA, matrix, network

EPS = torch.finfo(torch.float64).eps


def bulk(n: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, n, dtype=torch.float64).tolist()


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_many_restarts_in_little_memory_still_converge(
    block_size: int, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [*bulk(250, -1, 1), 1.05, 1.1, -1.05, -1.15]
    A, k, ncv = matrix(values), 2, block_size + 7
    original, bases, rows = Lanczos.assess, set(), []

    def watched(solver: Lanczos, state: LanczosState) -> Assessment[LanczosState]:
        bases.add((*state.basis.shape, state.basis.data_ptr()))
        rows.append(state.num_multiplied)
        return original(solver, state)

    monkeypatch.setattr(Lanczos, "assess", watched)
    found = hk.lanczos(
        hk.aslinearoperator(A), k, which=which, tol=1e-8, ncv=ncv, block_size=block_size, check_copies=False
    )
    expected = {"LA": [1.05, 1.1], "SA": [-1.15, -1.05], "LM": [-1.15, 1.1], "BE": [-1.15, 1.1]}[which]
    assert found.converged
    assert found.values.tolist() == pytest.approx(expected, rel=1e-8)
    assert sum(after <= before for before, after in itertools.pairwise(rows)) >= 8  # restarts
    assert [shape[:2] for shape in bases] == [(ncv + block_size, len(A))]


def test_smallest_ncv_with_copies_wanted_converges() -> None:
    values = [*bulk(150, -1, 1), 3.0, 3.0, 2.5]
    found = hk.lanczos(hk.aslinearoperator(matrix(values)), 3, ncv=9, tol=1e-8)
    assert found.converged
    assert found.values.tolist() == pytest.approx([2.5, 3, 3], rel=1e-8)


@pytest.mark.parametrize("ncv", [None, 9])
def test_search_for_copies_does_not_stall_on_close_values(ncv: int | None) -> None:
    values = (10.0 ** (12 - 0.06 * torch.arange(400, dtype=torch.float64))).tolist()
    A = matrix(values, dtype=torch.float32)
    found = hk.lanczos(hk.aslinearoperator(A), 3, ncv=ncv, tol=0.1, max_matvecs=300)
    assert found.converged
    assert found.values.tolist() == pytest.approx(sorted(values[:3]), rel=0.1)


@pytest.mark.parametrize("block_size", [2, 3])
@pytest.mark.parametrize("n", [4, 5, 100])
def test_blocks_put_their_columns_into_one_product(block_size: int, n: int) -> None:
    A = matrix([*bulk(n - 1, -1, 1), 2.0])
    widths: list[int] = []

    def product(v: Tensor) -> Tensor:
        widths.append(v.shape[1])
        return A @ v

    op = replace(hk.aslinearoperator(A), product=product)
    found = hk.lanczos(op, block_size=block_size, tol=1e-8)
    assert found.values.tolist() == pytest.approx([2.0], rel=1e-8)
    assert set(widths[: (n - 1) // block_size][:5]) == {block_size}
    assert found.num_matvecs == sum(widths)


@pytest.mark.parametrize("block_size", [2, 3])
def test_block_that_starts_in_an_invariant_subspace_leaves_it(block_size: int) -> None:
    A = matrix(SPECTRA["indefinite"])
    vectors = torch.linalg.eigh(A).eigenvectors
    for which, value in [("LA", 20.0), ("SA", -5.0)]:
        found = hk.lanczos(
            hk.aslinearoperator(A), which=which, v0=vectors[:, 40:43], block_size=block_size, tol=1e-6
        )
        assert found.values.tolist() == pytest.approx([value], rel=1e-6)


@pytest.mark.parametrize("block_size", [2, 3])
def test_block_that_starts_in_the_null_space_is_scaled_by_the_operator(block_size: int) -> None:
    A = matrix([0.0] * 50 + bulk(50, 1, 2)).to(torch.float32) * 1e30
    null = torch.linalg.eigh(A.double() / 1e30).eigenvectors[:, :3].float()
    found = hk.lanczos(hk.aslinearoperator(A), v0=null, block_size=block_size)
    assert found.converged
    assert found.values.tolist() == pytest.approx([2e30], rel=1e-3)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("spectrum", ["multiple", "identity"])
@pytest.mark.parametrize("ncv", [None, 12])
def test_copies_of_a_multiple_eigenvalue_are_found(
    which: str, k: int, spectrum: str, ncv: int | None
) -> None:
    A = matrix(SPECTRA[spectrum])
    expected = {"multiple": {"LA": 3.0, "SA": -2.0}[which], "identity": 1.0}[spectrum]
    found = hk.lanczos(hk.aslinearoperator(A), k, which=which, tol=1e-8, ncv=ncv)
    assert found.converged
    assert found.values.tolist() == pytest.approx([expected] * k, rel=1e-8)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_triple_eigenvalue_of_a_large_matrix_is_found_with_all_its_copies(
    k: int, gap: float, seed: int
) -> None:
    values = [*bulk(396, -1, 1), 1.2, 2.0, 2.0 + gap, 2.0 + 2 * gap]
    found = hk.lanczos(hk.aslinearoperator(matrix(values)), k, tol=1e-6, seed=seed)
    assert found.converged
    assert found.values.tolist() == pytest.approx(sorted(values)[-k:], rel=1e-6)


def test_without_the_check_copies_are_missed_for_fewer_products() -> None:
    entries = torch.tensor([*bulk(1096, -1, 1), 2.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    op = hk.LinearOperator(lambda v: entries[:, None] * v, len(entries), entries.dtype, entries.device)
    checked = hk.lanczos(op, 2, tol=1e-3)
    plain = hk.lanczos(op, 2, tol=1e-3, check_copies=False)
    assert checked.values.tolist() == pytest.approx([3.0, 3.0])
    assert plain.values.tolist() == pytest.approx([2.0, 3.0])
    assert plain.converged
    assert plain.num_matvecs < 0.6 * checked.num_matvecs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("ncv", [None, 20])
def test_no_member_of_a_cluster_is_skipped(seed: int, n: int, ncv: int | None) -> None:
    cluster = [1.0, 1.0 + 1e-4, 1.0 + 2e-4, 1.0 + 3e-4]
    A = matrix(bulk(n - 4, 0, 0.5) + cluster, seed=seed)
    found = hk.lanczos(hk.aslinearoperator(A), 4, tol=1e-8, seed=seed, ncv=ncv)
    assert found.converged
    assert found.values.tolist() == pytest.approx(cluster, rel=1e-8)


@pytest.mark.parametrize(
    ("values", "k", "products"),
    [([1.0] * 50, 1, 2), ([-2.0] * 25 + [5.0] * 25, 1, 3), ([7.0, 1.0, 2.0], 3, 4)],
)
def test_invariant_subspace_ends_the_solve_exactly(values: list[float], k: int, products: int) -> None:
    found = hk.lanczos(hk.aslinearoperator(matrix(values)), k)
    assert found.status is hk.Status.INVARIANT_SUBSPACE
    assert found.values.tolist() == pytest.approx(sorted(values)[-k:], rel=20 * EPS)
    assert [interval.kind for interval in found.intervals] == ["exact"] * k
    assert found.num_matvecs == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["SA", "BE"])
@pytest.mark.parametrize("values", [[0.0] * 270 + bulk(30, 1, 10), [*bulk(298, 1e-09, 1), 30.0, 0.0]])
def test_zero_end_of_a_semidefinite_operator_is_zero_to_rounding(
    dtype: torch.dtype, which: str, values: list[float]
) -> None:
    A = matrix(values, dtype=dtype)
    eps, norm = torch.finfo(dtype).eps, max(values)
    k = 2 if which == "BE" else 1
    found = hk.lanczos(hk.aslinearoperator(A), k, which=which, atol=0.0, max_matvecs=10_000)
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.converged
    assert "zero to the rounding" in found.message
    assert abs(float(found.values[0])) <= 40 * eps * norm
    assert found.intervals[0].lower <= 0 <= found.intervals[0].upper
    assert found.intervals[0].upper <= 80 * eps * norm
    assert found.num_matvecs <= 302


def lehmer(n: int) -> Tensor:
    i = torch.arange(1.0, n + 1, dtype=torch.float64)
    return torch.minimum(i[:, None], i) / torch.maximum(i[:, None], i)


@pytest.mark.parametrize("n", [40, 80])
def test_small_end_keeps_its_relative_digits_from_starts_with_little_of_its_vector_too(n: int) -> None:
    # n = 80: an end of 1.5e-4 of the norm; from seed 0 the start has a third of the usual component along its vector
    A = lehmer(n)
    truth = torch.linalg.eigvalsh(A)
    for seed in range(20):
        for found in (
            hk.lanczos(hk.aslinearoperator(A), which="SA", tol=1e-2, seed=seed),
            hk.lanczos(hk.aslinearoperator(A), 2, which="BE", tol=1e-2, seed=seed),
        ):
            assert found.status is hk.Status.CONVERGED
            assert float(found.values[0]) == pytest.approx(float(truth[0]), rel=2e-2)


def diagonal(values: Tensor) -> hk.LinearOperator:
    return hk.LinearOperator(
        lambda v: values[:, None] * v, len(values), values.dtype, values.device, name="diagonal"
    )


def hidden_end(n: int, share: float, seed: int) -> Tensor:
    """A matrix with the largest eigenvalue 2.1, whose vector this seed's start has almost no component along.

    As small a one as in this share of random starts; without it the next eigenvalue, 2, has converged long before.
    """
    columns: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        columns.append(v[:, 0].clone())
        return v

    hk.lanczos(hk.LinearOperator(product, n, torch.float64, torch.device("cpu"), name="identity"), seed=seed)
    start = columns[0] / torch.linalg.vector_norm(columns[0])
    other = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other -= start * (start @ other)
    component = beta.ppf(share, 0.5, (n - 1) / 2) ** 0.5
    x = component * start + (1 - component**2) ** 0.5 * other / torch.linalg.vector_norm(other)
    inner = torch.diag(torch.tensor([*bulk(n - 3, -1, 1), 1.6, 1.8, 2.0], dtype=torch.float64))
    P = torch.eye(n, dtype=torch.float64) - torch.outer(x, x)
    return P @ inner @ P + 2.1 * torch.outer(x, x)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 2e-3),
        ({"which": "LM"}, 2e-3),
        ({"k": 3, "check_copies": False}, 1e-8),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [100, 600])
def test_end_that_few_starts_hide_is_found_at_a_confidence_that_counts_them(
    options: dict[str, Any], share: float, n: int
) -> None:
    missed = 0
    for seed in range(4):
        op = hk.aslinearoperator(hidden_end(n, share, seed))
        sure = hk.lanczos(op, tol=1e-2, seed=seed, confidence=1 - share / 2, **options)
        assert sure.converged
        assert abs(float(sure.values[-1]) - 2.1) <= 2e-2 * 2.1
        hasty = hk.lanczos(op, tol=1e-2, seed=seed, confidence=0.9, **options)
        assert hasty.num_matvecs <= sure.num_matvecs
        missed += float(hasty.values[-1]) < 2.05
    assert missed == 4


def test_certify_keeps_values_within_what_is_allowed_and_intervals_as_narrow() -> None:
    values = torch.linspace(1, 2, 200, dtype=torch.float64)
    for seed in range(20):
        plain, certified = (
            hk.lanczos(diagonal(values), 2, which="BE", tol=1e-2, certify=certify, seed=seed)
            for certify in (False, True)
        )
        assert plain.num_matvecs <= certified.num_matvecs
        for value, truth, interval in zip(
            certified.values.tolist(), (1.0, 2.0), certified.intervals, strict=True
        ):
            assert abs(value - truth) <= 1e-2 * truth
            assert interval.upper - interval.lower <= 1.0001e-2 * truth


def test_zero_operator_is_zero_at_once() -> None:
    found = hk.lanczos(hk.aslinearoperator(torch.zeros(1000, 1000)))
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.values.tolist() == [0.0]
    assert 0.0 in found.intervals[0]
    assert found.num_matvecs == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tol", [1e-300, 1e-17])
@pytest.mark.parametrize("ncv", [None, 10])
def test_tol_below_eps_stops_at_rounding_and_says_so(dtype: torch.dtype, tol: float, ncv: int | None) -> None:
    A = matrix(SPECTRA["indefinite"], dtype=dtype)
    found = hk.lanczos(hk.aslinearoperator(A), 2, which="BE", tol=tol, ncv=ncv)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert not found.converged
    assert "float64" in found.message
    assert found.num_matvecs <= 200
    truth = torch.linalg.eigvalsh(A.double())[[0, -1]]
    assert bool(((found.values - truth).abs() <= 40 * torch.finfo(dtype).eps * 20).all())


@pytest.mark.parametrize("small", [1e-3, -1e-3])
def test_value_near_rounding_but_not_zero_is_rounding_limited(small: float) -> None:
    A = matrix([small, *bulk(50, 1, 2), 100.0], dtype=torch.float32)
    truth = float(torch.linalg.eigvalsh(A.double())[0])
    op = hk.aslinearoperator(A)
    fine, coarse = (hk.lanczos(op, which="SA", tol=tol) for tol in (1e-3, 0.9))
    assert fine.status is hk.Status.ROUNDING_LIMITED
    assert not fine.converged
    assert truth in fine.intervals[0]
    assert coarse.converged
    assert coarse.status is not hk.Status.ZERO_TO_ROUNDING


@pytest.mark.parametrize("level", [1e-13, 1e-10])
def test_noise_in_products_is_seen_and_kept_out_of_the_digits(level: float) -> None:
    A = matrix(SPECTRA["indefinite"])
    g = torch.Generator().manual_seed(0)

    def product(v: Tensor) -> Tensor:
        return A @ v + 20 * level * torch.randn(v.shape, generator=g, dtype=v.dtype) / 10

    with pytest.warns(hk.AsymmetryWarning) if level > 1e-11 else contextlib.nullcontext():
        found = hk.lanczos(replace(hk.aslinearoperator(A), product=product), 2, which="BE", tol=1e-15)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.num_matvecs <= 120
    for interval, value, truth in zip(found.intervals, found.values.tolist(), (-5.0, 20.0), strict=True):
        assert truth in interval
        assert value == pytest.approx(truth, rel=0, abs=100 * level)


@pytest.mark.parametrize("values", [[1e12, 1e-12, *bulk(20, 1, 2)], [-1e12, -1e-12]])
def test_tiny_value_beside_a_huge_one_is_not_given_digits(values: list[float]) -> None:
    found = hk.lanczos(
        hk.aslinearoperator(torch.diag(torch.tensor(values, dtype=torch.float64))), 2, which="BE", atol=0.0
    )
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    for interval, truth in zip(found.intervals, (min(values), max(values)), strict=True):
        assert truth in interval
        assert interval.upper - interval.lower >= 4 * EPS * 1e12


@pytest.mark.parametrize("peak", [1e-36, 2e38])
def test_range_of_the_dtype_is_usable_to_its_ends(peak: float) -> None:
    A = (torch.diag(torch.linspace(-0.5, 1, 40, dtype=torch.float64)) * peak).float()
    found = hk.lanczos(hk.aslinearoperator(A), 2, which="BE", tol=1e-2)
    truth = torch.linalg.eigvalsh(A.double() / peak) * peak
    assert found.converged
    assert found.values.tolist() == pytest.approx([float(truth[0]), float(truth[-1])], rel=1e-2, abs=0)


@pytest.mark.parametrize("n", range(25, 31))
def test_values_that_converge_when_the_basis_is_full(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    A = matrix(torch.randn(n, generator=g, dtype=torch.float64).tolist(), seed=n)
    truth = torch.linalg.eigvalsh(A)
    for k in (2, 3, 4, n // 2):
        for block_size in (1, 2):
            for tol in (1e-2, 1e-6, 1e-12):
                found = hk.lanczos(hk.aslinearoperator(A), k, block_size=block_size, tol=tol)
                wanted = truth[n - k :]
                assert bool(((found.values - wanted).abs() <= tol * wanted.abs() + 1e-13).all())


@pytest.mark.parametrize("n", range(1, 13))
def test_any_k_of_a_small_matrix_with_any_block(n: int) -> None:
    A = matrix(
        torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist(), seed=n
    )
    truth = torch.linalg.eigvalsh(A)
    for k in range(1, n + 1):
        for block_size in range(1, min(n, 4) + 1):
            for tol in (0.1, 1e-10):
                found = hk.lanczos(hk.aslinearoperator(A), k, block_size=block_size, tol=tol, seed=k)
                assert bool(
                    ((found.values - truth[n - k :]).abs() <= tol * truth[n - k :].abs() + 1e-14).all()
                )


def normalised(A: Tensor) -> hk.LinearOperator:
    """A product that scales its vector first, as differences of a gradient do: NaN for a vector of zeros."""

    def product(v: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(v, dim=0)
        return A @ (v / lengths) * lengths

    return replace(hk.aslinearoperator(A), product=product)


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_directions_that_vanish_between_looks_do_not_count(
    block_size: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = matrix([-1.0, 0.5, 2.0, 3.0] * 8)
    original = Lanczos.assess
    monkeypatch.setattr(Lanczos, "assess", lambda *arguments: replace(original(*arguments), num_steps=10))
    found = hk.lanczos(normalised(A), k, block_size=block_size, tol=1e-10)
    assert found.converged
    assert found.values.tolist() == pytest.approx([2.0] * (k - 8) + [3.0] * min(k, 8), rel=1e-12)


def test_not_finite_product_leaves_the_ritz_values_of_those_before() -> None:
    A = matrix(SPECTRA["indefinite"])
    given: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        given.append(v.clone())
        return A @ v if len(given) <= 5 else v * torch.nan

    found = hk.lanczos(replace(hk.aslinearoperator(A), product=product), 2, which="BE")
    Q = torch.cat(given[:5], dim=1)
    ritz_values = torch.linalg.eigvalsh(Q.mT @ A @ Q)
    assert found.status is hk.Status.NON_FINITE
    assert found.values.tolist() == pytest.approx([float(ritz_values[0]), float(ritz_values[-1])], rel=1e-12)
    residuals = A @ found.vectors - found.vectors * found.values
    assert torch.linalg.vector_norm(residuals, dim=0).tolist() == pytest.approx(found.residual_norms.tolist())


def test_not_finite_product_with_a_hessian_names_the_batch() -> None:
    problem = network("mlp")
    calls = {"num": 0}

    def loss_fn(params: Any, batch: Any) -> Tensor:
        calls["num"] += 1
        return problem.objective(params, batch) / (0.0 if calls["num"] > allowed else 1.0)

    allowed = 1000.0
    H = hk.hessian(loss_fn, problem.params, problem.data, batch_size=5, memory_limit=0)
    before = calls["num"]  # which of the modes is the faster takes more trials or less
    H @ torch.ones(H.n, dtype=H.dtype)
    allowed = 2 * calls["num"] - before
    found = hk.lanczos(H)
    assert found.status is hk.Status.NON_FINITE
    assert len(found.values) == 1
    assert "batch 0" in found.message


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"ncv": 4}, "ncv"),
        ({"ncv": 0}, "ncv"),
        ({"k": 3, "ncv": 8}, "ncv"),
        ({"block_size": 3, "ncv": 6}, "ncv"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 101}, "block_size"),
        ({"block_size": 3, "max_matvecs": 3}, "max_matvecs"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], name: str) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        hk.lanczos(op, **arguments)


def test_block_larger_than_the_budget_allows_stays_within_it() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    found = hk.lanczos(op, 2, block_size=3, max_matvecs=9, tol=1e-12)
    assert found.status is hk.Status.MAX_MATVECS
    assert len(found.values) == 2
    assert found.num_matvecs <= 9


def test_many_pairs_have_a_budget_by_default() -> None:
    values = bulk(520, 1, 2)
    found = hk.lanczos(hk.aslinearoperator(torch.diag(torch.tensor(values, dtype=torch.float64))), 520)
    assert found.converged
    assert found.values.tolist() == pytest.approx(values)


def test_positive_values_of_largest_magnitude_lie_above_their_ritz_values() -> None:
    A = matrix(bulk(60, 1, 2))
    found = hk.lanczos(hk.aslinearoperator(A), 2, which="LM", max_matvecs=4, tol=1e-12)
    assert found.status is hk.Status.MAX_MATVECS
    for interval, value, norm in zip(
        found.intervals, found.values.tolist(), found.residual_norms.tolist(), strict=True
    ):
        assert interval.lower == pytest.approx(value, rel=1e-14)
        assert interval.upper == pytest.approx(value + norm, rel=1e-14)


@pytest.mark.parametrize(("relative", "warned"), [(1e-12, False), (1e-9, True)])
def test_asymmetry_above_rounding_and_below_refusal_is_a_warning(relative: float, warned: bool) -> None:
    A = matrix(SPECTRA["indefinite"])
    skew = torch.randn(A.shape, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    op = hk.aslinearoperator(A + relative * 20 * (skew - skew.mT) / torch.linalg.matrix_norm(skew, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hk.lanczos(op, tol=1e-6)
    assert float(found.values[0]) == pytest.approx(20, rel=1e-6)
    assert [warning.category for warning in caught] == [hk.AsymmetryWarning] * warned
