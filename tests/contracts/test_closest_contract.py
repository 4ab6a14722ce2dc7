"""Eigenvalues closest to a point, on every prescribed spectrum, against dense float64 ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from problems import SPECTRA, matrix

F64 = torch.float64
TOL = {torch.float32: 1e-3, F64: 1e-6}

POINTS = {
    "in the middle": lambda values: (values[0] + values[-1]) / 2,
    "at an eigenvalue": lambda values: values[len(values) // 2],
    "in the cluster at the top": lambda values: values[-3:].mean() + 1e-7,
    "outside": lambda values: values[0] - 1.0,
}

each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
each_point = pytest.mark.parametrize("point", POINTS)
each_dtype = pytest.mark.parametrize("dtype", TOL, ids=str)


def diagonal(values: Tensor) -> hk.LinearOperator:
    return replace(
        hk.aslinearoperator(torch.eye(1, dtype=values.dtype)),
        product=lambda v: values[:, None] * v,
        n=len(values),
    )


def closest(truth: Tensor, k: int, sigma: float) -> Tensor:
    return truth[(truth - sigma).abs().argsort(stable=True)[:k]]


def check_intervals(found: hk.EigenResult, truth: Tensor) -> None:
    """What any answer says, complete or not: an eigenvalue lies within the residual of each value."""
    oracle = 1e-13 * float(truth.abs().max())
    for pair in map(found.pair, range(len(found.values))):
        assert pair.interval.kind in ("residual", "exact")
        assert pair.interval.confidence is None
        assert pair.interval.lower <= pair.value - pair.residual_norm
        assert pair.value + pair.residual_norm <= pair.interval.upper
        assert bool(((truth >= pair.interval.lower - oracle) & (truth <= pair.interval.upper + oracle)).any())


def check_values(found: hk.EigenResult, truth: Tensor, k: int, sigma: float, tol: float, eps: float) -> None:
    """Values within the error allowed of the k closest ones; of two at the same distance either is right."""
    wanted, norm = closest(truth, k, sigma), float(truth.abs().max())
    slack = float((tol * wanted.abs()).clamp(min=max(32 * eps, 1e-3 * tol) * norm).max())
    assert len(found.values) == k
    distances = [(values - sigma).abs().sort().values for values in (found.values, wanted)]
    assert float((distances[0] - distances[1]).abs().max()) <= 2 * slack
    assert float((truth[:, None] - found.values).abs().amin(dim=0).max()) <= slack


@each_spectrum
@each_point
@each_dtype
def test_finds_the_closest_eigenvalues_of_every_spectrum(
    spectrum: str, point: str, dtype: torch.dtype
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    truth, eps = torch.linalg.eigvalsh(A.double()), torch.finfo(dtype).eps
    norm, sigma = float(truth.abs().max()), float(POINTS[point](truth))
    for k in (1, 2, 3, 4) if len(A) <= 40 else (1, 3) if dtype == F64 else (2, 4):
        if k > len(A):
            break
        found = hk.top_eigenvalues(A, k, which="CLOSEST", sigma=sigma, tol=TOL[dtype])
        check_values(found, truth, k, sigma, TOL[dtype], eps)
        check_intervals(found, truth)
        out_of_reach = 50 * eps * norm > TOL[dtype] * float(closest(truth, k, sigma).abs().min())
        assert found.converged or (found.status is hk.Status.ROUNDING_LIMITED and out_of_reach)
        residuals = A.double() @ found.vectors.double() - found.vectors.double() * found.values
        assert float((residuals.norm(dim=0) - found.residual_norms).abs().max()) <= 32 * eps * norm
        assert found.num_matvecs <= 2 * len(A) + 2


def hard(kind: int, n: int = 600) -> Tensor:
    g = torch.Generator().manual_seed(kind)
    uniform = torch.rand(n, generator=g, dtype=F64)
    if kind == 0:  # a bulk
        return uniform.mul(2).sub(1).sort().values
    if kind == 1:  # two bands, and little between them
        return torch.cat([-uniform[::2] - 0.2, uniform[1:-2:2] + 0.2, uniform[:1] * 0.2]).sort().values
    if kind == 2:  # clusters of different sizes
        return ((uniform * 10).round() + 0.01 * uniform * (uniform > 0.9)).sort().values
    return torch.cat([uniform * 0.3, torch.linspace(1, 30, 12, dtype=F64)]).sort().values  # outliers


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("ncv", [30, 80])
def test_with_restarts_it_never_converges_to_others(kind: int, ncv: int) -> None:
    truth = hard(kind)
    for seed, k, share in ((0, 1, 0.31), (1, 3, 0.62)):
        sigma = float(truth[0] + share * (truth[-1] - truth[0]))
        found = hk.lanczos(
            diagonal(truth), k, which="CLOSEST", sigma=sigma, tol=1e-3, ncv=ncv, seed=seed, max_matvecs=400
        )
        check_intervals(found, truth)
        assert found.converged or kind < 2
        if found.converged:
            check_values(found, truth, k, sigma, 1e-3, 0.0)
        else:
            assert found.status is hk.Status.MAX_MATVECS
            assert "closer to sigma" in found.message


@pytest.mark.parametrize("seed", [4, 44, 96])
def test_one_that_hides_closer_is_waited_for(seed: int) -> None:
    """Of 150 random spectra and starts, some where another value converges before the closest one appears."""
    g = torch.Generator().manual_seed(0)
    for _ in range(seed + 1):
        outliers, place = 1 + torch.rand(6, generator=g, dtype=F64) / 2, torch.rand(1, generator=g, dtype=F64)
    truth = torch.cat([torch.linspace(-1, 1, 994, dtype=F64), outliers]).sort().values
    sigma = float(1 + (truth[-1] - 1) * place)
    found = hk.lanczos(diagonal(truth), 1, which="CLOSEST", sigma=sigma, tol=1e-2, seed=seed)
    check_values(found, truth, 1, sigma, 1e-2, 0.0)
    check_intervals(found, truth)


def test_at_limits_and_from_a_checkpoint(tmp_path: Path) -> None:
    truth = hard(3)
    op = diagonal(truth)
    options = {"which": "CLOSEST", "sigma": 0.1, "tol": 1e-8}
    path = tmp_path / "closest.pt"
    part = hk.lanczos(op, 2, **options, max_matvecs=60, checkpoint=path)
    assert part.status is hk.Status.MAX_MATVECS
    assert len(part.values) == 2
    check_intervals(part, truth)
    few = hk.lanczos(op, 4, **options, max_matvecs=5)
    assert len(few.values) == 4
    with pytest.raises(ValueError, match="sigma"):
        hk.lanczos(op, 2, **{**options, "sigma": 0.2}, checkpoint=path)
    whole = hk.lanczos(op, 2, **options)
    again = hk.lanczos(op, 2, **options, checkpoint=path)
    assert torch.equal(whole.values, again.values)
    check_values(whole, truth, 2, 0.1, 1e-8, 1e-15)
    assert [entry.largest for entry in whole.history][-1] == pytest.approx(float(whole.values[-1]), abs=1e-6)
    shown = whole.summary().splitlines()
    assert shown[1].split()[-1] == "residual"
    assert "not claimed" in shown[-1]


def test_curvature_of_a_network_and_blocks_of_vectors() -> None:
    from oracles import hessian_by_double_backward
    from problems import network

    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    truth = torch.linalg.eigvalsh(hessian_by_double_backward(problem.objective, problem.params, problem.data))
    sigma = float(truth[-3])
    found = hk.top_eigenvalues(H, 3, which="CLOSEST", sigma=sigma, tol=1e-6)
    check_values(found, truth, 3, sigma, 1e-6, 1e-14)
    found = hk.lanczos(H, 3, which="CLOSEST", sigma=sigma, tol=1e-6, block_size=2)
    check_values(found, truth, 3, sigma, 1e-6, 1e-14)
