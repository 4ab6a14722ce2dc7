"""Estimators with a basis are exact to rounding where it spans the range: rank + 1 probes are enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from estimators.spread import SPREAD, calibration, diagonal_operator, z_score
from hvpkit.estimators.leave_one_out import left_out

TOLERANCE = 50.0
"""Units of eps and of the nuclear norm (trace) or Frobenius norm; 16 was the most seen in 10 times as many solves."""


def low_rank(n: int, rank: int, spectrum: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=torch.float64)).Q
    uniform = torch.rand(rank, generator=g, dtype=torch.float64)
    eigenvalues = {"flat": 1 + 9 * uniform, "indefinite": 4 * uniform - 2, "spread": 10 ** (-3 * uniform)}
    A = (basis * eigenvalues[spectrum]) @ basis.mT
    return (A + A.mT) / 2


CASES = [
    (n, rank, extra, spectrum)
    for n, rank in ((30, 3), (60, 10), (150, 10), (150, 25), (300, 7))
    for extra, spectrum in ((1, "flat"), (1, "indefinite"), (2, "spread"), (3, "flat"))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "rank", "extra", "spectrum"), CASES)
def test_exact_to_rounding_with_few_more_probes_than_the_rank(
    n: int, rank: int, extra: int, spectrum: str, dtype: torch.dtype
) -> None:
    A = low_rank(n, rank, spectrum, seed=n + rank + extra).to(dtype)
    op, dense, budget = hk.aslinearoperator(A), A.double(), 2 * (rank + extra)
    rounding, norm = TOLERANCE * torch.finfo(dtype).eps, float(torch.linalg.matrix_norm(dense))
    nuclear = float(torch.linalg.eigvalsh(dense).abs().sum())
    for probe in ("rademacher", "gaussian", "sphere"):
        trace = hk.trace(op, method="xtrace", num_matvecs=budget, probe=probe)
        assert abs(trace.value - float(dense.trace())) <= rounding * nuclear
        assert trace.stderr <= rounding * nuclear
        frobenius = hk.frobenius_norm(op, num_matvecs=budget, probe=probe)
        assert abs(frobenius.value - norm) <= rounding * norm
        assert frobenius.stderr <= rounding * norm
    diagonal = hk.diagonal(op, method="xdiag", num_matvecs=budget)
    assert float((diagonal.value.double() - dense.diagonal()).norm()) <= rounding * norm
    assert float(diagonal.stderr.norm()) <= rounding * norm


@pytest.mark.parametrize("decay", [0.7, 0.95])
def test_estimates_of_full_rank_stay_calibrated(decay: float) -> None:
    eigenvalues = decay ** torch.arange(60, dtype=torch.float64)
    found = [
        hk.trace(diagonal_operator(eigenvalues), method="xtrace", probe="gaussian", num_matvecs=30, seed=seed)
        for seed in range(100)
    ]
    values, stderrs = (
        torch.tensor([getattr(e, name) for e in found], dtype=torch.float64) for name in ("value", "stderr")
    )
    assert abs(z_score(values, float(eigenvalues.sum()))) < 3.5
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]


def test_column_that_others_span_with_a_small_coefficient_leaves_out_nothing() -> None:
    R = torch.eye(3, 4, dtype=torch.float64)
    R[:, 3] = torch.tensor([1.0, 1.0, 1e-6])  # column 2 is a combination of the others, by 1e6 times column 3
    assert left_out(R, 1e-15).abs().max() == 0
    R[2, 3] = 0.0
    assert left_out(R, 1e-15)[:, 2].tolist() == [0, 0, 1]
