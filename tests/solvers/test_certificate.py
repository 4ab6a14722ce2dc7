from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hvpkit as hk
from hvpkit.solvers import certificate
from hvpkit.solvers.certificate import Verdict
from hvpkit.solvers.congruence import congruent_operator, make_metric
from hvpkit.solvers.sample_space import sample_space

VALUES = torch.cat([torch.tensor([-1.0, -0.9, 5.0, 10.0]), torch.linspace(-0.4, 1.0, 400)]).double()


def run(
    lacks: tuple[int, ...],
    known: int,
    sigma: float,
    seed: int,
    *,
    known_well: bool,
    error: float = 0.01,
    failure: float = 0.01,
    values: torch.Tensor = VALUES,
) -> Verdict:
    """Certify the low end of a diagonal operator, with a likeness that has 0 at some places."""
    like = values.clone()
    like[list(lacks)] = 0.0
    op, likeness = hk.aslinearoperator(torch.diag(values)), hk.aslinearoperator(torch.diag(like))
    sample = sample_space(likeness, 2, "BE", v0=None, num_steps=40, seed=1000 + seed)
    unit = float(sample.scale)
    scaled = replace(likeness, product=lambda v: likeness.product(v) / unit)
    vectors = torch.eye(len(values), dtype=torch.float64)[[known]]
    P = make_metric(
        scaled,
        sample,
        vectors,
        values[[known]] / unit,
        sigma / unit,
        1.0,
        10 / unit,
        lifted=known_well,
    )
    B = congruent_operator(op, P, sigma / unit, 1.0, sample.scale, 10 / unit)
    running = certificate.begin(B, 0, sigma / unit, known=known_well, seed=seed).step()
    while True:
        running = running.step()
        verdict = certificate.judge(running, error / unit, 2 * error / unit, failure)
        running = verdict.certificate
        if verdict.poor or verdict.bound is not None or verdict.vector is not None:
            bound = None if verdict.bound is None else verdict.bound * unit
            image = None if verdict.image is None else verdict.image * unit
            return replace(verdict, bound=bound, error=verdict.error * unit, image=image)


def quotient(vector: torch.Tensor, values: torch.Tensor = VALUES) -> float:
    return float((vector * values) @ vector / (vector @ vector))


@pytest.mark.parametrize("lacks", [(), (1,), (1, 7, 50)])
def test_certificate_of_a_right_value(lacks: tuple[int, ...]) -> None:
    for seed in range(20):
        verdict = run(lacks, 0, -1.02, seed, known_well=True)
        assert verdict.bound == pytest.approx(-1.02)
        assert verdict.vector is None


@pytest.mark.parametrize("lacks", [(), (0,)])
@pytest.mark.parametrize("low", [-0.911, -0.915])
def test_value_beside_the_end_is_certified_and_the_end_handed_over(
    low: float, lacks: tuple[int, ...]
) -> None:
    values = VALUES.clone()
    values[0] = low  # the known value, -0.9, is an eigenvalue further in, by less than what may be missed
    found = 0
    for seed in range(20):
        verdict = run(lacks, 1, -0.918, seed, known_well=True, values=values)
        if verdict.vector is not None:
            found += abs(quotient(verdict.vector, values) - low) < 0.005
            assert verdict.bound == pytest.approx(-0.918)
            assert verdict.image is not None
            torch.testing.assert_close(verdict.image, values * verdict.vector)
    assert found >= 18


def test_certificate_of_an_inner_value_is_refuted() -> None:
    missed, num_seeds = 0, 300
    for seed in range(num_seeds):
        verdict = run((0,), 1, -0.918, seed, known_well=True)
        missed += verdict.vector is None
        assert verdict.vector is None or quotient(verdict.vector) < -0.918
    assert missed <= 0.01 * num_seeds + 3 * (0.01 * num_seeds) ** 0.5  # by the start


def test_probability_of_missing_what_the_likeness_lacks_is_as_stated() -> None:
    missed = sum(
        run((0,), 1, -0.918, seed, known_well=True, failure=0.3).vector is None for seed in range(200)
    )
    assert 0 < missed <= 0.3 * 200 + 3 * (200 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("sigma", [-1.2, -1.05, -0.95])
def test_search_finds_the_vector_that_the_likeness_lacks(sigma: float) -> None:
    bounds = 0
    for seed in range(20):
        verdict = run((0,), 1, sigma, seed, known_well=False)
        assert verdict.vector is not None
        value = quotient(verdict.vector)
        assert verdict.image is not None
        torch.testing.assert_close(verdict.image, VALUES * verdict.vector)
        assert (verdict.error < 0.01) == (verdict.bound is not None)  # it is not promised without a bound
        if verdict.bound is not None:
            bounds += 1
            assert value == pytest.approx(-1.0, abs=0.01)
            # the lowest vector of B is that of H as far as the metric is even: here the error is a millionth of 0.01
            assert value - verdict.error - 1e-7 <= -1.0
            assert verdict.bound == pytest.approx(value - 0.02)
    assert bounds == {-1.2: bounds, -1.05: 20, -0.95: 0}[sigma]


def test_no_bound_of_a_search_holds_back_an_eigenvalue() -> None:
    """The lowest vector of B is not that of H where the shift is far out and the metric uneven."""
    values = torch.cat([torch.tensor([-1.0, -0.96, 10.0]), torch.linspace(-0.4, 1.0, 300)]).double()
    like = values.clone()
    like[1], like[0] = 0.6, -1.0
    op, likeness = hk.aslinearoperator(torch.diag(values)), hk.aslinearoperator(torch.diag(like))
    sample = sample_space(likeness, 2, "BE", v0=None, num_steps=40, seed=5)
    unit = float(sample.scale)
    scaled = replace(likeness, product=lambda v: likeness.product(v) / unit)
    vectors = torch.eye(len(values), dtype=torch.float64)[[2]]
    for sigma in (-1.03, -1.1, -1.3, -2.0, -4.0):
        P = make_metric(
            scaled,
            sample,
            vectors,
            torch.tensor([10 / unit], dtype=torch.float64),
            sigma / unit,
            1.0,
            10 / unit,
            lifted=False,
        )
        B = congruent_operator(op, P, sigma / unit, 1.0, sample.scale, 10 / unit)
        for seed in range(10):
            running = certificate.begin(B, 0, sigma / unit, known=False, seed=seed).step()
            verdict = certificate.judge(running.step(), 0.01 / unit, 0.02 / unit, 1e-4)
            while verdict.vector is None and not verdict.poor:
                verdict = certificate.judge(verdict.certificate.step(), 0.01 / unit, 0.02 / unit, 1e-4)
            assert verdict.bound is None or verdict.bound * unit <= -1.0


def test_poor_likeness_is_seen() -> None:
    op = hk.aslinearoperator(torch.diag(VALUES))
    useless = hk.aslinearoperator(torch.diag(VALUES.flip(0)))
    sample = sample_space(useless, 2, "BE", v0=None, num_steps=40, seed=0)
    unit = float(sample.scale)
    scaled = replace(useless, product=lambda v: useless.product(v) / unit)
    vectors = torch.eye(len(VALUES), dtype=torch.float64)[[0]]
    P = make_metric(
        scaled,
        sample,
        vectors,
        torch.tensor([-1.0 / unit], dtype=torch.float64),
        -1.02 / unit,
        1.0,
        10 / unit,
        lifted=True,
    )
    B = congruent_operator(op, P, -1.02 / unit, 1.0, sample.scale, 10 / unit)
    running = certificate.begin(B, 0, -1.02 / unit, known=True, seed=0).step()
    verdict = certificate.judge(running.step(), 0.01 / unit, 0.02 / unit, 0.01)
    for _ in range(8):
        if not verdict.poor:
            verdict = certificate.judge(verdict.certificate.step(), 0.01 / unit, 0.02 / unit, 0.01)
    assert verdict.poor
    assert verdict.bound is None


def test_product_that_is_not_finite_is_handed_back() -> None:
    op = hk.aslinearoperator(torch.diag(VALUES))
    sample = sample_space(op, 2, "BE", v0=None, num_steps=40, seed=0)
    unit = float(sample.scale)
    scaled = replace(op, product=lambda v: op.product(v) / unit)
    vectors = torch.eye(len(VALUES), dtype=torch.float64)[[0]]
    P = make_metric(
        scaled,
        sample,
        vectors,
        torch.tensor([-1.0 / unit], dtype=torch.float64),
        -1.02 / unit,
        1.0,
        10 / unit,
        lifted=True,
    )
    broken = replace(op, product=lambda v: torch.full_like(v, float("nan")))
    B = congruent_operator(broken, P, -1.02 / unit, 1.0, sample.scale, 10 / unit)
    running = certificate.begin(B, 0, -1.02 / unit, known=True, seed=0).step()
    verdict = certificate.judge(running.step(), 0.01, 0.02, 0.01)
    assert verdict.suspect is not None
    assert verdict.suspect.shape == (len(VALUES), 1)
