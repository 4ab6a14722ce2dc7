"""Intervals contain the exact value as often as they say, over matrices with outliers and over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

import hvpkit as hk
from problems import SPECTRA, matrix

NUM_MATRICES, NUM_SEEDS = 48, 3


@cache
def matrices() -> list[tuple[hk.LinearOperator, Tensor]]:
    """Operators with their eigenvalues: bulks of three shapes, none to six outliers of 5 to 100 times their size."""
    found, g = [], torch.Generator().manual_seed(3)
    for i in range(NUM_MATRICES):
        n, count, size = (60, 100, 140)[i % 3], (0, 1, 1, 2, 3, 6)[i % 6], (5, 20, 50, 100)[i // 6 % 4]
        even = torch.linspace(0, 1, n - count, dtype=torch.float64)
        bulk = (2 * even - 1, even, torch.exp(-4 * even))[i % 5 % 3]
        outliers = size * (0.3 + 0.7 * torch.rand(count, generator=g, dtype=torch.float64))
        outliers[: i % 2] *= -1
        eigenvalues = torch.cat([bulk, outliers])
        found.append((hk.aslinearoperator(matrix(eigenvalues.tolist(), seed=i)), eigenvalues))
    return found


def misses(
    estimate: Callable[[hk.LinearOperator, int], hk.Estimate[float]], truth: Callable[[Tensor], float]
) -> int:
    """The number of 95 % intervals that do not contain the exact value, of all matrices and seeds."""
    count = 0
    for number, (op, eigenvalues) in enumerate(matrices()):
        for seed in range(NUM_SEEDS):
            lower, upper = estimate(op, 1000 * number + seed).interval(0.95)
            exact, rounding = truth(eigenvalues), 1e-11 * float(eigenvalues.abs().sum())
            count += not lower - rounding <= exact <= upper + rounding
    return count


def trace(method: str, num_matvecs: int) -> Callable[[hk.LinearOperator, int], hk.Estimate[float]]:
    return lambda op, seed: hk.trace(op, method=method, num_matvecs=num_matvecs, seed=seed, block_size=50)


def stopped(op: hk.LinearOperator, seed: int) -> hk.Estimate[float]:
    tol = (0.05, 0.1, 0.2, 0.4)[seed % 4]
    return hk.trace(op, method="hutchinson", num_matvecs=op.n - 1, tol=tol, seed=seed)


def norm(op: hk.LinearOperator, seed: int) -> hk.Estimate[float]:
    return hk.frobenius_norm(op, num_matvecs=20, seed=seed, block_size=50)


def mean_of(power: int, num_probes: int) -> Callable[[hk.LinearOperator, int], hk.Estimate[float]]:
    def estimate(op: hk.LinearOperator, seed: int) -> hk.Estimate[float]:
        d = hk.spectral_density(op, num_steps=12, num_probes=num_probes, seed=seed)
        return d.expectation(lambda x: x**power)

    return estimate


ESTIMATES = {
    "hutchinson": (trace("hutchinson", 10), lambda x: float(x.sum())),
    "hutchinson, by tol": (stopped, lambda x: float(x.sum())),
    "hutch++": (trace("hutch++", 30), lambda x: float(x.sum())),
    "xtrace": (trace("xtrace", 40), lambda x: float(x.sum())),
    "frobenius": (norm, lambda x: float(x.norm())),
    "density, two probes": (mean_of(1, 2), lambda x: float(x.mean())),
    "density, four probes": (mean_of(2, 4), lambda x: float(x.square().mean())),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_95_percent_intervals_fail_in_about_5_percent(name: str) -> None:
    total = NUM_MATRICES * NUM_SEEDS
    assert misses(*ESTIMATES[name]) <= stats.binom.isf(1e-3, total, 0.06)


def test_the_check_above_sees_normal_intervals_of_few_probes() -> None:
    """Of the raw weights of four probes, with the quantiles of a normal distribution."""
    count = 0
    for number, (op, eigenvalues) in enumerate(matrices()):
        for seed in range(NUM_SEEDS):
            d = hk.spectral_density(op, num_steps=12, num_probes=4, seed=1000 * number + seed)
            samples = d.probe_weights @ d.nodes**2
            error = abs(float(samples.mean()) - float(eigenvalues.square().mean()))
            count += error > 1.96 * float(samples.std()) / 2 + 1e-11
    assert count > stats.binom.isf(1e-3, NUM_MATRICES * NUM_SEEDS, 0.06)


def test_interval_is_students_where_samples_are_symmetric() -> None:
    samples = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    stderr = float(samples.std()) / 5**0.5
    found = hk.Estimate(3.0, stderr, samples, 5, 5.0, 0.0, hk.Status.COMPLETED, "", ())
    expected = stats.t.interval(0.9, 4, loc=3.0, scale=stderr)
    assert found.interval(0.9) == pytest.approx(expected, rel=1e-12)


def test_interval_of_skewed_samples_inverts_halls_transformation() -> None:
    samples = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 8.0], dtype=torch.float64)
    k, mean, stderr = 6, float(samples.mean()), float(samples.std()) / 6**0.5
    found = hk.Estimate(mean, stderr, samples, k, 6.0, 0.0, hk.Status.COMPLETED, "", ())
    lower, upper = found.interval(0.95)
    t, gamma = stats.t.isf(0.025, k - 1), float(stats.skew(samples.numpy(), bias=False))
    assert lower == pytest.approx(mean - t * stderr)  # Student's reaches further to this side

    def transformed(x: float) -> float:
        return x + gamma * x**2 / 3 + gamma**2 * x**3 / 27 + gamma / (6 * k)

    x = (mean - upper) / stderr / k**0.5
    assert transformed(x) == pytest.approx(-t / k**0.5)
    assert upper > mean + t * stderr


def test_interval_of_what_is_exact_is_a_point_and_of_one_sample_infinite() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    exact = hk.trace(op, num_matvecs=100)
    assert exact.interval() == (exact.value, exact.value)
    one = hk.spectral_density(op, num_steps=10).expectation(lambda x: x)
    assert one.interval() == (-math.inf, math.inf)
    assert "± unknown" in repr(one)


def test_intervals_of_tensors_are_tensors_of_each_entry() -> None:
    A = matrix(SPECTRA["indefinite"])
    found = hk.diagonal(hk.aslinearoperator(A), num_matvecs=20)
    lower, upper = found.interval(0.99)
    reach = stats.t.isf(0.005, 19) * found.stderr
    assert torch.allclose(lower, found.value - reach)
    assert torch.allclose(upper, found.value + reach)
    inside = float(((lower <= A.diagonal()) & (A.diagonal() <= upper)).double().mean())
    assert inside > 0.95
    moments = hk.moments(hk.aslinearoperator(A), 3, num_matvecs=24)
    lower, upper = moments.interval()
    assert lower.shape == upper.shape == (4,)
    assert bool((lower <= upper).all())


def test_confidence_is_refused_by_name() -> None:
    found = hk.trace(hk.aslinearoperator(torch.eye(3)))
    for confidence in (0.0, 1.0, math.nan, 95):
        with pytest.raises(ValueError, match=r"^confidence"):
            found.interval(confidence)
