from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor

import hvpkit as hk
from hvpkit.operators.space import LOCAL
from hvpkit.solvers import pairs
from hvpkit.solvers.congruence import congruent_operator, deflated, make_metric
from hvpkit.solvers.sample_space import sample_space

N = 60


def spectrum(scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    bulk = 0.4 * torch.randn(N - 6, generator=g, dtype=torch.float64)
    return (
        scale
        * torch.cat([torch.tensor([-2.0, -1.9, 8.0, 9.0, 12.0, 20.0], dtype=torch.float64), bulk]).sort()[0]
    )


def pair(
    noise: float, dtype: torch.dtype = torch.float64
) -> tuple[hk.LinearOperator, hk.LinearOperator, Tensor]:
    """An operator, a likeness with symmetric noise, and the matrix of the first."""
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))[0]
    A, E = Q @ torch.diag(spectrum()) @ Q.mT, torch.randn(N, N, generator=g, dtype=torch.float64)
    S = A + noise * (E + E.mT) / 2
    return hk.aslinearoperator(A.to(dtype)), replace(hk.aslinearoperator(S.to(dtype)), cost=0.1), A


def dense(B) -> Tensor:
    """B by its definition, with the root of the dense metric."""
    identity = torch.eye(N, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(B.metric(identity.to(B.dtype)).double())
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    return root @ B.image(identity.to(B.dtype)).double() @ root


def congruence_of(
    noise: float, sigma: float, sign: float, *, lifted: bool, dtype: torch.dtype = torch.float64
):
    op, likeness, A = pair(noise, dtype)
    sample = sample_space(likeness, 2, "BE", v0=None, num_steps=40, seed=0)
    scaled = replace(likeness, product=lambda v: likeness.product(v) / sample.scale)
    values, vectors = torch.linalg.eigh(A)
    exact = vectors[:, [0, -1]].mT.to(dtype)
    unit = float(sample.scale)
    known = values[[0, -1]] / unit
    P = make_metric(scaled, sample, exact, known, sigma / unit, sign, 20 / unit, lifted=lifted)
    return congruent_operator(op, P, sigma / unit, sign, sample.scale, 20 / unit), P, A, unit


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3, 3.0])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize(
    ("sigma", "sign"), [(-2.5, 1.0), (-1.95, 1.0), (-0.5, 1.0), (21.0, -1.0), (10.0, -1.0)]
)
def test_as_many_negative_eigenvalues_as_the_operator_has_beyond_the_shift(
    noise: float, lifted: bool, sigma: float, sign: float
) -> None:
    B, P, A, _ = congruence_of(noise, sigma, sign, lifted=lifted)
    metric = P(torch.eye(N, dtype=torch.float64))
    torch.testing.assert_close(metric, metric.mT, rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.eigvalsh(metric)[0]) > 0
    image = dense(B)
    beyond = int((sign * (torch.linalg.eigvalsh(A) - sigma) < 0).sum())
    assert int((torch.linalg.eigvalsh((image + image.mT) / 2) < 0).sum()) == beyond


@pytest.mark.parametrize(("sigma", "sign", "place"), [(-2.04, 1.0, 0), (20.4, -1.0, -1)])
def test_a_lifted_vector_has_the_quotient_one_and_others_are_clamped(
    sigma: float, sign: float, place: int
) -> None:
    for lifted in (False, True):
        B, P, A, unit = congruence_of(0.02, sigma, sign, lifted=lifted)
        vector = torch.linalg.eigh(A)[1][:, [place]]
        quotient = float((vector.mT @ dense(B) @ vector)[0, 0])
        distance = sign * (float(torch.linalg.eigvalsh(A)[place]) - sigma)
        clamp = (1.0 if sign > 0 else 0.1) * abs(sigma)
        assert quotient == pytest.approx(1.0 if lifted else distance / clamp, rel=1e-6)
        assert float(torch.linalg.eigvalsh(P(torch.eye(N, dtype=torch.float64)))[-1]) <= P.norm * 1.001
        assert unit > 0


def test_a_good_likeness_makes_the_spectrum_near_one() -> None:
    spreads = []
    for noise in (0.0, 0.3, 3.0):
        B, *_ = congruence_of(noise, -2.04, 1.0, lifted=True)
        values = torch.linalg.eigvalsh(dense(B))
        spreads.append(float(values[-1] / values[0]))
    assert spreads == sorted(spreads)
    assert spreads[0] < 20  # 1 to 0.05 at the second eigenvalue, which is near the shift


def test_cost_counts_the_products_of_the_likeness() -> None:
    op, likeness, _ = pair(0.02)
    B, P, *_ = congruence_of(0.02, -2.04, 1.0, lifted=True)
    degree = len(P.coefficients) - 1
    assert degree
    assert B.cost == pytest.approx(1 + degree * 0.1)
    counted = []
    product = P.likeness.product
    P = replace(P, likeness=replace(P.likeness, product=lambda v: counted.append(v.shape[1]) or product(v)))
    P(torch.ones(N, 1, dtype=torch.float64))
    assert sum(counted) == pytest.approx(P.cost / 0.1)
    counted.clear()
    P.random_pair(0)
    assert sum(counted) == pytest.approx(P.start_cost / 0.1)
    assert op.n == likeness.n == B.n // 2


@pytest.mark.parametrize(("sigma", "sign"), [(-2.5, 1.0), (-0.5, 1.0), (21.0, -1.0)])
def test_a_pair_is_the_root_and_its_inverse_of_one_vector(sigma: float, sign: float) -> None:
    B, P, *_ = congruence_of(0.3, sigma, sign, lifted=True)
    start, _ = P.random_pair(1)
    u, w = pairs.halves(start)
    torch.testing.assert_close(P(w[:, None])[:, 0], u)
    assert float(pairs.length(LOCAL, start)) == pytest.approx(float((u @ w).sqrt()))
    image = B.product(start[:, None])[:, 0]
    root = torch.linalg.eigh(P(torch.eye(N, dtype=torch.float64)))
    y = root[1] @ ((root[1].mT @ u) / root[0].sqrt())
    torch.testing.assert_close(root[1] @ ((root[1].mT @ image[:N]) / root[0].sqrt()), dense(B) @ y)


@pytest.mark.parametrize(("sigma", "sign"), [(-2.5, 1.0), (-2.04, 1.0), (-0.5, 1.0), (21.0, -1.0)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_a_random_start_has_at_least_its_share_along_any_vector(
    noise: float, sigma: float, sign: float
) -> None:
    """Its covariance is at least the least value times the identity, also where the likeness differs much."""
    _, P, *_ = congruence_of(noise, sigma, sign, lifted=False)
    values, vectors = torch.linalg.eigh(P(torch.eye(N, dtype=torch.float64)))
    ys, shares = [], []
    for seed in range(4000):
        start, share = P.random_pair(seed)
        ys.append(vectors.mT @ pairs.halves(start)[1] * values.sqrt())
        shares.append(share)
    covariance = torch.stack(ys).mT @ torch.stack(ys) / len(ys)
    low = float(torch.linalg.eigvalsh(covariance)[0])
    assert low >= P.start.least * (1 - 2 * (N / len(ys)) ** 0.5 - 0.03)  # Marchenko and Pastur's edge
    assert min(shares) > 0.05
    assert max(shares) <= 1


def test_polynomials_are_positive_everywhere() -> None:
    for noise in (0.0, 0.3, 3.0):
        for sigma, sign in ((-2.5, 1.0), (-2.04, 1.0), (-0.5, 1.0), (21.0, -1.0), (10.0, -1.0)):
            _, P, *_ = congruence_of(noise, sigma, sign, lifted=True)
            z = np.linspace(-30, 30, 100_001)
            p = Chebyshev(P.coefficients)(z)
            assert p.min() > 0
            r = (P.start.slope * z + P.start.constant) ** 2 + P.start.floor**2
            assert (p * r).min() >= P.start.least * (1 - 1e-9)


def test_precision_says_that_rounding_is_magnified() -> None:
    B, P, _, unit = congruence_of(0.02, -2.04, 1.0, lifted=True, dtype=torch.float32)
    assert B.precision >= torch.finfo(torch.float32).eps * 20 / unit * float(P.factors.max()) * 0.99
    assert B.precision < 1e-2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_deflation_leaves_at_most_as_many_more_beyond_any_number(sign: float) -> None:
    g = torch.Generator().manual_seed(3)
    A = torch.diag(spectrum())
    rows = torch.linalg.qr(torch.randn(N, 3, generator=g, dtype=torch.float64))[0].mT
    amounts = sign * torch.tensor([0.5, 3.0, 30.0], dtype=torch.float64)
    identity = torch.eye(N, dtype=torch.float64)
    rest = deflated(hk.aslinearoperator(A), rows, amounts)
    assert torch.allclose(rest.product(identity), A - rows.mT @ torch.diag(amounts) @ rows)
    for at in (-1.95, -0.5, 0.0, 0.5, 8.5, 15.0):
        more = [int((sign * (torch.linalg.eigvalsh(B) - at) > 0).sum()) for B in (A, rest.product(identity))]
        assert more[1] <= more[0] <= more[1] + 3
    op = hk.aslinearoperator(A)
    assert deflated(op, rows[:0], amounts[:0]) is op
