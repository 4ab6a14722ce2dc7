from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.baselines.recording_operator import MAX_GROWTH, Recorder, Stop
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.common.request import check_arguments
from problems import SPECTRA, matrix

EPS = torch.finfo(torch.float64).eps


def recorder(
    A: Tensor, k: int = 1, which: str = "LA", *, capacity: int = 20, depth: float = math.inf, tol: float = 0.0
) -> Recorder:
    op = hk.aslinearoperator(A)
    goal = check_arguments(op, k, which, v0=None, tol=1e-3, max_matvecs=None, time_limit=None, seed=0)
    return Recorder(op, goal, 0.0, None, capacity, depth, tol)


def vectors(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def krylov(A: Tensor, m: int) -> Tensor:
    """Orthonormal columns of a Krylov space, by QR at each step."""
    basis = vectors(len(A), 1)
    for _ in range(m - 1):
        basis = torch.cat([torch.linalg.qr(basis).Q, A @ torch.linalg.qr(basis).Q[:, -1:]], dim=1)
    return torch.linalg.qr(basis).Q


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_products_are_the_operators_over_a_power_of_two(scale: float) -> None:
    A = matrix(SPECTRA["indefinite"]) * scale
    seen, v = recorder(A), vectors(100, 3)
    products = [seen.product(v), seen.product(v[:, :1])]
    assert math.log2(float(seen.scale)).is_integer()
    assert torch.allclose(products[0] * seen.scale, A @ v, rtol=1e-12, atol=1e-14 * scale)
    assert torch.allclose(products[1], products[0][:, :1], rtol=1e-12, atol=1e-14)
    assert seen.num_products == len(seen.history) == 4


@pytest.mark.parametrize(("which", "k"), [("LA", 2), ("SA", 3), ("LM", 2), ("BE", 3)])
def test_pairs_are_those_of_rayleigh_ritz_on_what_was_multiplied(which: str, k: int) -> None:
    A, v = matrix(SPECTRA["indefinite"]), vectors(100, 12)
    seen = recorder(A, k, which)
    seen.product(3.0 * v)
    basis = torch.linalg.qr(v).Q
    truth = torch.linalg.eigvalsh(basis.mT @ A @ basis)
    places = {"LA": [-2, -1], "SA": [0, 1, 2], "BE": [0, -2, -1], "LM": truth.abs().argsort()[-2:].tolist()}
    found = seen.pairs()
    assert torch.allclose(found.values * seen.scale, truth[places[which]].sort().values, atol=1e-12)
    residuals = A @ found.vectors / seen.scale - found.vectors * found.values
    assert torch.allclose(torch.linalg.vector_norm(residuals, dim=0), found.residual_norms, atol=1e-13)
    assert seen.history[-1].smallest == pytest.approx(float(truth[0]))
    assert seen.history[-1].largest == pytest.approx(float(truth[-1]))


def test_a_restart_keeps_half_of_the_basis_and_its_rounding() -> None:
    A, v = matrix(SPECTRA["indefinite"]), vectors(100, 5)
    seen = recorder(A, capacity=4)
    seen.product(v[:, :1] + 0.2 * v[:, 1:])  # each with little that the others lack
    assert seen.num_rows == 4
    before = seen.growth.clone()
    assert float(before.max()) > 5.0
    seen.product(vectors(100, 1, seed=1))
    assert seen.num_rows == 3
    assert 1.5 < float(seen.growth[:2].max()) <= float(before.max())


def test_bounds_in_the_history_include_rounding() -> None:
    seen = recorder(4.0 * torch.eye(100, dtype=torch.float64))
    seen.product(vectors(100, 3))
    assert 4.0 * 8 * EPS <= seen.history[-1].largest_bound < 4.0 * 64 * EPS
    assert 4.0 * 8 * EPS <= seen.history[-1].smallest_bound < 4.0 * 64 * EPS


def test_restarts_keep_the_best_and_residuals_stay_true() -> None:
    A, v = matrix(SPECTRA["indefinite"]), vectors(100, 500)
    seen = recorder(A, 2, "SA")
    best = math.inf
    for column in v.split(1, dim=1):
        seen.product(column)
        found = seen.pairs()
        assert float(found.values[0]) <= best + 1e-14
        best = float(found.values[0])
    residuals = A @ found.vectors / seen.scale - found.vectors * found.values
    assert torch.allclose(
        torch.linalg.vector_norm(residuals, dim=0), found.residual_norms, atol=MAX_GROWTH * 32 * EPS
    )
    assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert float(seen.growth[: seen.num_rows].max()) <= MAX_GROWTH


@pytest.mark.parametrize("share", [0.0, 1e-12, 1e-3])
def test_a_vector_with_little_new_in_it_is_multiplied_but_not_kept(share: float) -> None:
    A, v = matrix(SPECTRA["indefinite"]), vectors(100, 4)
    seen = recorder(A)
    seen.product(v[:, :3])
    before = seen.pairs().values
    near = v[:, :1] + share * v[:, 3:]
    assert torch.allclose(seen.product(near) * seen.scale, A @ near)
    assert seen.num_rows == 3
    assert torch.equal(seen.pairs().values, before)


def test_rounding_in_images_of_dependent_vectors_does_not_look_like_asymmetry() -> None:
    A = matrix(SPECTRA["negative_dominant"], dtype=torch.float32)
    seen, v = recorder(A), vectors(100, 1).float()
    for _ in range(60):  # each nearly the one before
        v = v + 0.1 * (seen.product(v) / 50)
        v = v / torch.linalg.vector_norm(v)
    norms = torch.linalg.vector_norm(
        A @ seen.pairs().vectors / seen.scale - seen.pairs().vectors * seen.pairs().values, dim=0
    )
    assert float((norms - seen.pairs().residual_norms).abs().max()) <= MAX_GROWTH * 1e-6 * seen.norm


def test_recorded_pairs_end_the_solve_by_tol_not_before_depth() -> None:
    A = matrix(SPECTRA["indefinite"])
    seen, basis = recorder(A, depth=25, tol=1e-2), krylov(A, 30)
    with pytest.raises(Stop) as stop:
        seen.product(basis)
    assert stop.value.status is hk.Status.CONVERGED
    assert seen.num_products == 25
    found = seen.pairs()
    assert float(found.residual_norms[0]) <= 1e-2 * float(found.values[0])


def test_without_tol_recorded_pairs_end_the_solve_when_exact_to_rounding() -> None:
    A, v = matrix(SPECTRA["indefinite"]), vectors(100, 10)
    seen, top = recorder(A, depth=5), torch.linalg.eigh(A).eigenvectors[:, -1:]
    seen.product(v[:, 1:])
    seen.product(top + 1e-6 * v[:, :1])
    with pytest.raises(Stop):
        seen.product(v[:, :1])


def test_a_small_space_is_kept_whole_and_no_pair_ends_it() -> None:
    A = torch.diag(torch.arange(40.0, dtype=torch.float64))
    seen = recorder(A, capacity=20, depth=1, tol=0.5)
    seen.product(torch.eye(40, dtype=torch.float64))  # every one of them an eigenvector
    assert float(seen.pairs().values) * float(seen.scale) == pytest.approx(39.0)


@pytest.mark.parametrize(
    ("which", "shift", "beyond"),
    [
        ("LA", [0.0, 0.0, 0.0], False),
        ("LA", [0.0, 0.0, -0.1], True),
        ("LA", [0.0, 0.0, 0.1], False),
        ("LA", [-0.1, 0.0, 0.0], True),
        ("LA", [-1e-4, 0.0, 0.0], False),
        ("SA", [0.1, 0.0, 0.0], True),
        ("SA", [-0.1, -0.1, -0.1], False),
        ("BE", [0.1, 0.0, 0.0], True),
        ("BE", [0.0, 0.0, -0.1], True),
        ("BE", [-0.1, 0.1, 0.1], False),
        ("LM", [0.5, 0.0, 0.0], True),
        ("LM", [-0.5, 0.1, 0.1], False),
    ],
)
def test_values_further_in_than_recorded_ones_leave_one_out(
    which: str, shift: list[float], beyond: bool
) -> None:
    A = matrix(SPECTRA["indefinite"])
    seen = recorder(A, 3, which)
    seen.product(torch.linalg.eigh(A).eigenvectors[:, [0, 1, 2, 50, 97, 98, 99]])
    found, error = seen.pairs(), torch.full((3,), 1e-3, dtype=torch.float64)
    values = (found.values + torch.tensor(shift, dtype=torch.float64) / seen.scale).sort().values
    assert seen.shows_beyond(RitzPairs(values, found.vectors, error / seen.scale)) is beyond
