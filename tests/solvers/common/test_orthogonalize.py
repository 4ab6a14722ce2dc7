from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvpkit.operators.space import LOCAL, Space
from hvpkit.solvers.common.orthogonalize import BREAKDOWN, orthonormalise_

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
    coefficients, length, _ = orthonormalise_(Space(reduce), basis, 1, vector, ONE.double())
    assert coefficients.tolist() == [6.0]
    assert length.item() == 8.0
    assert basis[1].tolist() == [0.0, 0.5, 0.0]
    assert calls == [(1,), (1,), ()]
