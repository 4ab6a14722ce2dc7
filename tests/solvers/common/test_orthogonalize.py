from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.operators.space import LOCAL
from hvpkit.solvers.common.orthogonalize import (
    BREAKDOWN,
    complete_,
    extend_,
    orthonormalise_,
    power_of_two,
    residuals_of,
    rotate_,
    row_norms,
    start_,
)
from problems import matrix, reducing

DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ONE = torch.tensor(1.0)


def orthonormal_rows(rows: int, n: int, dtype: torch.dtype, capacity: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, rows, generator=g, dtype=torch.float64)).Q
    basis = torch.full((capacity, n), 7.0, dtype=dtype)
    basis[:rows] = q.mT.to(dtype)
    return basis


def random_vector(n: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@each_dtype
@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-5])
def test_new_row_is_orthonormal_to_rounding_however_little_is_new(dtype: torch.dtype, share: float) -> None:
    n, rows, eps = 60, 12, torch.finfo(dtype).eps
    basis = orthonormal_rows(rows, n, dtype, rows + 1)
    inside = basis[:rows].mT @ random_vector(rows, dtype, 2)
    vector = inside + share * random_vector(n, dtype)
    norm = torch.linalg.vector_norm(vector)
    coefficients, length, alive = orthonormalise_(LOCAL, basis, rows, vector, norm)
    assert alive.item() == 1
    gram = basis.double() @ basis.double().mT
    assert float((gram - torch.eye(rows + 1)).abs().max()) <= 10 * eps
    rebuilt = basis[:rows].mT @ coefficients + length * basis[rows]
    assert float((rebuilt - vector).abs().max()) <= 10 * eps * float(norm)
    expected = torch.linalg.vector_norm(
        vector.double() - basis[:rows].double().mT @ (basis[:rows].double() @ vector.double())
    )
    assert float(length) == pytest.approx(float(expected), abs=10 * eps * float(norm))


@each_dtype
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_one_pass_is_enough_for_rows_to_which_the_vector_is_orthogonal_but_for_rounding(
    dtype: torch.dtype, share: float
) -> None:
    n, rows, eps = 60, 12, torch.finfo(dtype).eps
    basis = orthonormal_rows(rows, n, dtype, rows + 1)
    new = random_vector(n, dtype)
    new -= basis[:rows].mT @ (basis[:rows] @ new)
    rounding = 4 * eps * basis[:rows].mT @ random_vector(rows, dtype, 3)
    vector = basis[10:rows].mT @ random_vector(2, dtype, 2) + rounding + share * new
    norm = torch.linalg.vector_norm(vector)
    coefficients, length, _ = orthonormalise_(LOCAL, basis, rows, vector, norm, 10)
    gram = basis.double() @ basis.double().mT
    assert float((gram - torch.eye(rows + 1)).abs().max()) <= 10 * eps
    rebuilt = basis[:rows].mT @ coefficients + length * basis[rows]
    assert float((rebuilt - vector).abs().max()) <= 10 * eps * float(norm)


@each_dtype
def test_only_its_row_is_written(dtype: torch.dtype) -> None:
    basis = orthonormal_rows(3, 10, dtype, 6)
    vector, norm = random_vector(10, dtype), ONE.to(dtype)
    before, vector_before = basis.clone(), vector.clone()
    orthonormalise_(LOCAL, basis, 3, vector, norm)
    assert torch.equal(basis[[0, 1, 2, 4, 5]], before[[0, 1, 2, 4, 5]])
    assert not torch.equal(basis[3], before[3])
    assert torch.equal(vector, vector_before)
    assert norm.item() == 1


@each_dtype
def test_first_row_is_the_vector_at_unit_length(dtype: torch.dtype) -> None:
    basis = torch.empty(2, 5, dtype=dtype)
    coefficients, length, alive = orthonormalise_(
        LOCAL, basis, 0, torch.tensor([0, 3, 0, 4, 0], dtype=dtype), ONE.to(dtype)
    )
    assert coefficients.shape == (0,)
    assert (length.item(), alive.item()) == (5, 1)
    assert basis[0].tolist() == pytest.approx([0, 0.6, 0, 0.8, 0])


@each_dtype
@pytest.mark.parametrize("kind", ["inside", "zero"])
def test_nothing_new_leaves_a_row_of_zeros(dtype: torch.dtype, kind: str) -> None:
    basis = orthonormal_rows(4, 30, dtype, 5)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype) * (kind == "inside")
    vector = basis[:4].mT @ weights
    norm = torch.linalg.vector_norm(vector)
    coefficients, length, alive = orthonormalise_(LOCAL, basis, 4, vector, norm)
    assert alive.item() == 0
    assert length.item() <= BREAKDOWN * torch.finfo(dtype).eps * float(norm)
    assert torch.equal(basis[4], torch.zeros(30, dtype=dtype))
    assert coefficients.tolist() == pytest.approx(weights.tolist(), abs=1e-5)


@each_dtype
@pytest.mark.parametrize(("factor", "alive"), [(0.5, 0), (2.0, 1)])
def test_what_counts_as_nothing_is_measured_by_the_norm_given(
    dtype: torch.dtype, factor: float, alive: int
) -> None:
    basis = torch.zeros(2, 8, dtype=dtype)
    basis[0, 0] = 1
    vector = torch.zeros(8, dtype=dtype)
    vector[3] = factor * BREAKDOWN * torch.finfo(dtype).eps * 1e6
    found = orthonormalise_(LOCAL, basis, 1, vector, torch.tensor(1e6, dtype=dtype))
    assert found[2].item() == alive
    assert basis[1, 3].item() == pytest.approx(alive)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_coefficients_and_is_no_direction(
    dtype: torch.dtype, bad: float
) -> None:
    basis = orthonormal_rows(3, 10, dtype, 4)
    vector = random_vector(10, dtype)
    vector[4] = bad
    coefficients, _, alive = orthonormalise_(LOCAL, basis, 3, vector, ONE.to(dtype))
    assert not bool(torch.isfinite(coefficients).all())
    assert alive.item() == 0


def test_inner_products_are_those_of_the_space() -> None:
    calls: list[torch.Size] = []

    def reduce(partial: Tensor) -> Tensor:
        calls.append(partial.shape)
        return 4 * partial  # as on four ranks with equal parts

    basis = torch.zeros(2, 3, dtype=torch.float64)
    basis[0, 0] = 0.5  # unit length where inner products count four times
    vector = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    coefficients, length, _ = orthonormalise_(reducing(reduce), basis, 1, vector, ONE.double())
    assert coefficients.tolist() == [6.0]
    assert length.item() == 8.0
    assert basis[1].tolist() == [0.0, 0.5, 0.0]
    assert calls == [(1,), (1,), ()]


A = matrix([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 4.0, 7.0, 9.0])
OP = hk.aslinearoperator(A)


def random_rows(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_extending_adds_only_what_is_new() -> None:
    rows = torch.empty(7, 9, dtype=torch.float64)
    rows[:2] = torch.linalg.qr(random_rows(2).mT).Q.mT
    new = random_rows(1, seed=5)
    vectors = torch.cat(
        [rows[:1] * 3, new * 1e-200, new * 1e200 + rows[1:2], torch.zeros(1, 9), rows[:2].sum(0)[None]]
    )
    assert extend_(LOCAL, rows, 2, vectors) == 1
    assert torch.allclose(rows[:3] @ rows[:3].mT, torch.eye(3, dtype=torch.float64), atol=1e-15)
    assert torch.linalg.matrix_rank(torch.cat([rows[:3], new]), atol=1e-10) == 3


def test_nearly_dependent_vectors_become_orthonormal() -> None:
    rows = torch.empty(3, 9, dtype=torch.float64)
    base = random_rows(1)
    vectors = torch.cat([base, base + 1e-12 * random_rows(1, 1), base + 1e-9 * random_rows(1, 2)])
    assert extend_(LOCAL, rows, 0, vectors) == 3
    assert torch.allclose(rows @ rows.mT, torch.eye(3, dtype=torch.float64), atol=1e-14)


def test_completion_fills_the_space_and_names_the_streams_it_took() -> None:
    rows = torch.empty(9, 9, dtype=torch.float64)
    assert start_(OP, rows, 2, None, seed=3) == 2
    assert complete_(OP, rows, 2, seed=3, stream=2) == 9
    assert torch.allclose(rows @ rows.mT, torch.eye(9, dtype=torch.float64), atol=1e-14)


def test_start_spans_the_callers_vectors_up_to_noise_of_a_tenth() -> None:
    v0 = random_rows(3).mT
    rows = torch.empty(4, 9, dtype=torch.float64)
    assert start_(OP, rows, 4, v0, seed=0) == 1
    units = v0 / torch.linalg.vector_norm(v0, dim=0)
    outside = units - rows[:3].mT @ (rows[:3] @ units)
    lengths = torch.linalg.vector_norm(outside, dim=0)
    assert 0.01 < float(lengths.max()) <= 0.1 + 1e-12


def test_rotation_is_a_matrix_product_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rotate_.__globals__, "CHUNK", 8)
    rows, C = random_rows(6), random_rows(4)[:, :3]
    expected = C.mT @ rows[:4]
    last = rows[3:].clone()
    rotate_(rows, C)
    assert torch.allclose(rows[:3], expected, atol=1e-14)
    assert torch.equal(rows[3:], last)


def test_residuals_and_norms_are_their_definitions() -> None:
    rows, values = random_rows(3), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    residuals = residuals_of(rows, rows @ A, values)
    assert torch.allclose(residuals, rows @ A - values[:, None] * rows, atol=1e-14)
    assert torch.allclose(row_norms(LOCAL, residuals), residuals.norm(dim=1), atol=1e-14)


@pytest.mark.parametrize(("peak", "expected"), [(5.0, 4.0), (4.0, 4.0), (1e-30, 2.0**-100), (0.0, 1.0)])
def test_power_of_two_is_the_one_below(peak: float, expected: float) -> None:
    assert float(power_of_two(torch.tensor(peak, dtype=torch.float64))) == expected
    assert float(power_of_two(torch.tensor(float("nan")))) == 1.0
