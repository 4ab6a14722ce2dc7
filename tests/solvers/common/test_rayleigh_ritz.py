from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpkit.solvers.common.rayleigh_ritz import WHICH, most_at_one_end, num_at_low_end, ritz, select
from problems import matrix

VALUES = [-4.0, -2.5, -1.0, 0.0, 0.5, 1.5, 3.0, 5.0]


def split_basis(n: int, m: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    return q[:, :m], q[:, m:]


@pytest.mark.parametrize("m", [1, 3, 8])
def test_residual_norms_are_those_of_the_ritz_vectors(m: int) -> None:
    A = matrix(VALUES)
    V, F = split_basis(8, m)
    pairs = ritz(V.mT @ A @ V, F.mT @ A @ V)
    vectors = V @ pairs.vectors
    residuals = A @ vectors - vectors * pairs.values
    expected = torch.linalg.vector_norm(residuals, dim=0)
    assert pairs.residual_norms.tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    assert pairs.values.tolist() == pytest.approx(np.linalg.eigvalsh((V.mT @ A @ V).numpy()).tolist())
    assert torch.allclose(vectors.mT @ vectors, torch.eye(m, dtype=torch.float64), atol=1e-14)
    assert pairs.asymmetry <= 1e-14
    assert pairs.norm == float(pairs.values.abs().max())


def test_asymmetry_is_the_largest_difference_from_the_transpose() -> None:
    projected = torch.tensor([[1.0, 0.2, 0.0], [0.1, 2.0, -0.3], [0.0, 0.4, 3.0]], dtype=torch.float64)
    pairs = ritz(projected, torch.zeros(0, 3, dtype=torch.float64))
    assert pairs.asymmetry == pytest.approx(0.7)
    expected = np.linalg.eigvalsh((projected + projected.mT).numpy() / 2)
    assert pairs.values.tolist() == pytest.approx(expected.tolist())
    assert pairs.residual_norms.tolist() == [0.0, 0.0, 0.0]


def test_an_empty_basis_has_no_pairs() -> None:
    pairs = ritz(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64))
    assert pairs.values.shape == pairs.residual_norms.shape == (0,)
    assert pairs.asymmetry == pairs.norm == 0.0


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_which_means_what_it_means_in_scipy(which: str, k: int) -> None:
    if which == "BE" and k == 1:
        expected = np.array([5.0])  # SciPy refuses it
    else:
        expected = scipy.sparse.linalg.eigsh(matrix(VALUES).numpy(), k=k, which=which, v0=np.ones(8))[0]
    values = torch.tensor(VALUES)
    chosen = select(values, k, which)
    assert chosen == sorted(set(chosen))
    assert values[chosen].tolist() == pytest.approx(sorted(expected.tolist()))


@pytest.mark.parametrize("which", WHICH)
def test_more_than_there_are_selects_all(which: str) -> None:
    assert select(torch.tensor([1.0, 2.0]), 5, which) == [0, 1]
    assert select(torch.tensor([]), 5, which) == []


def test_ties_in_magnitude_are_broken_the_same_way_each_time() -> None:
    values = torch.tensor([-3.0, -3.0, 1.0, 3.0, 3.0])
    first = select(values, 3, "LM")
    assert all(select(values, 3, "LM") == first for _ in range(5))
    assert {abs(float(values[i])) for i in first} == {3.0}
    assert len(set(first)) == 3


def test_pairs_at_each_end_are_counted() -> None:
    assert [num_at_low_end(k, "BE") for k in (1, 2, 3, 4)] == [0, 1, 1, 2]
    assert [num_at_low_end(3, which) for which in ("LA", "SA")] == [0, 3]
    assert [most_at_one_end(k, "BE") for k in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert [most_at_one_end(3, which) for which in ("LA", "SA", "LM")] == [3, 3, 3]


def test_unknown_which_is_refused() -> None:
    with pytest.raises(ValueError, match="which must be one of 'LA', 'SA', 'LM', 'BE', got 'SM'"):
        select(torch.tensor([1.0, 2.0]), 1, "SM")
