from __future__ import annotations

import pytest
import torch

import hvpkit as hk
from hvpkit.operators.space import LOCAL
from hvpkit.solvers.common.orthogonalize import (
    complete_,
    extend_,
    power_of_two,
    residuals_of,
    rotate_,
    row_norms,
    start_,
)
from problems import matrix

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
