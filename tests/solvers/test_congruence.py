from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.congruence import congruent_operator, deflated, make_congruence
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
    C = make_congruence(scaled, sample, exact, known, sigma / unit, sign, 20 / unit, lifted=lifted)
    return congruent_operator(op, C, sigma / unit, sign, sample.scale, 20 / unit), C, A, unit


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3, 3.0])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize(
    ("sigma", "sign"), [(-2.5, 1.0), (-1.95, 1.0), (-0.5, 1.0), (21.0, -1.0), (10.0, -1.0)]
)
def test_as_many_negative_eigenvalues_as_the_operator_has_beyond_the_shift(
    noise: float, lifted: bool, sigma: float, sign: float
) -> None:
    B, C, A, _ = congruence_of(noise, sigma, sign, lifted=lifted)
    identity = torch.eye(N, dtype=torch.float64)
    dense_C = C(identity)
    torch.testing.assert_close(dense_C, dense_C.mT, rtol=1e-10, atol=1e-10)
    image = B.product(identity)
    torch.testing.assert_close(image, image.mT, rtol=1e-9, atol=1e-9)
    beyond = int((sign * (torch.linalg.eigvalsh(A) - sigma) < 0).sum())
    assert int((torch.linalg.eigvalsh((image + image.mT) / 2) < 0).sum()) == beyond


@pytest.mark.parametrize(("sigma", "sign", "place"), [(-2.04, 1.0, 0), (20.4, -1.0, -1)])
def test_a_lifted_vector_has_the_quotient_one_and_others_are_clamped(
    sigma: float, sign: float, place: int
) -> None:
    for lifted in (False, True):
        B, C, A, unit = congruence_of(0.02, sigma, sign, lifted=lifted)
        vector = torch.linalg.eigh(A)[1][:, [place]]
        quotient = float((vector.mT @ B.product(vector))[0, 0])
        distance = sign * (float(torch.linalg.eigvalsh(A)[place]) - sigma)
        clamp = (1.0 if sign > 0 else 0.1) * abs(sigma)
        assert quotient == pytest.approx(1.0 if lifted else distance / clamp, rel=1e-6)
        assert float(torch.linalg.eigvalsh(C(torch.eye(N, dtype=torch.float64)))[-1]) <= C.norm * 1.001
        assert unit > 0


def test_a_good_likeness_makes_the_spectrum_near_one() -> None:
    identity = torch.eye(N, dtype=torch.float64)
    spreads = []
    for noise in (0.0, 0.3, 3.0):
        B, *_ = congruence_of(noise, -2.04, 1.0, lifted=True)
        values = torch.linalg.eigvalsh(B.product(identity))
        spreads.append(float(values[-1] / values[0]))
    assert spreads == sorted(spreads)
    assert spreads[0] < 20  # 1 to 0.05 at the second eigenvalue, which is near the shift


def test_cost_counts_the_products_of_the_likeness() -> None:
    B, C, *_ = congruence_of(0.02, -2.04, 1.0, lifted=True)
    degree = len(C.coefficients) - 1
    assert B.cost == pytest.approx(1 + 2 * degree * 0.1)


def test_precision_says_that_rounding_is_magnified() -> None:
    B, C, _, unit = congruence_of(0.02, -2.04, 1.0, lifted=True, dtype=torch.float32)
    assert B.precision >= torch.finfo(torch.float32).eps * 20 / unit * float(C.factors.max()) ** 2 * 0.99
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
