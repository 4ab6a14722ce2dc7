import math

import numpy as np
import pytest
import torch

import hvpkit as hk
from hvpkit.solvers.common.bounds import StartPolynomial, kato_temple, uniform_distance
from hvpkit.solvers.common.rayleigh_ritz import select
from hvpkit.solvers.krylov import project, restart, start, step
from problems import SPECTRA, matrix


def krylov(values, num_steps, *, seed=0, capacity=200, restart_at=None, v0=None):
    """A single-vector Krylov state after so many products, restarted once on the way if asked for."""
    dense = torch.tensor(values, dtype=torch.float64)
    op = hk.LinearOperator(lambda v: dense[:, None] * v, len(values), dense.dtype, dense.device)
    state = start(op, capacity, 1, seed, v0)
    first = state.basis[0].clone()
    for number in range(num_steps):
        state = step(op, state)
        if number + 1 == restart_at:
            pairs, lengths = project(op, state)
            state = restart(state, pairs, lengths, select(pairs.values, 4, "BE"))
    return op, state, first


def test_error_bounds_are_those_of_an_isolated_pair_and_residuals_elsewhere():
    values = torch.tensor([-1.0, 0.0, 0.05, 2.0], dtype=torch.float64)
    norms = torch.tensor([0.1, 0.1, 0.1, 0.01], dtype=torch.float64)
    found = kato_temple(values, norms)
    assert found[0] == pytest.approx(0.1**2 / 0.9)  # next interval begins at -0.1
    assert found[1] == found[2] == 0.1  # overlapping intervals: no gap is known
    assert found[3] == pytest.approx(0.01**2 / 1.85)


@pytest.mark.parametrize("seed", range(5))
def test_error_bound_holds_where_the_next_eigenvalue_is_as_far_as_assumed(seed):
    dense = matrix([-1.0, 0.5, 0.6, 0.7, 2.0], seed=seed)
    values, vectors = torch.linalg.eigh(dense)
    g = torch.Generator().manual_seed(seed)
    u = vectors[:, 0] + 0.1 * vectors @ torch.randn(5, generator=g, dtype=torch.float64)
    u = u / u.norm()
    quotient = u @ dense @ u
    residual = (dense @ u - quotient * u).norm()
    pair = kato_temple(torch.stack([quotient, values[1]]), torch.stack([residual, residual * 0]))
    assert 0 <= float(quotient - values[0]) <= float(pair[0]) < float(residual)


@pytest.mark.parametrize("restart_at", [None, 7])
@pytest.mark.parametrize("name", ["indefinite", "clustered", "bulk_with_outliers"])
def test_components_on_the_start_follow_from_those_on_the_basis(name, restart_at):
    values = SPECTRA[name]
    op, state, first = krylov(values, 9, restart_at=restart_at)
    pairs, lengths = project(op, state)
    inside = state.basis[: state.num_rows].square().sum(0).sqrt()  # of unit eigenvectors, as it is diagonal
    for index in (0, 1, len(values) // 2):  # not the largest, which has converged: rounding is all there is
        at = values[index] / float(state.scale)
        component = state.polynomial.log_component(at, pairs.values, pairs.residual_norms, lengths)
        expected = math.exp(component) * float(inside[index])
        assert abs(float(first[index])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_probability_of_a_small_component_is_that_of_random_unit_vectors(n):
    g = torch.Generator().manual_seed(n)
    vectors = torch.randn(20_000, n, generator=g, dtype=torch.float64)
    first = (vectors[:, 0] / vectors.norm(dim=1)).abs()
    polynomial = StartPolynomial.of_start(n, 1.0)
    for size in (0.02, 0.2, 0.5):
        expected = polynomial.probability(math.log(size))
        error = math.sqrt(expected * (1 - expected) / len(first))
        assert abs(float((first <= size).double().mean()) - expected) < 4 * error


def test_a_share_of_randomness_makes_small_components_as_likely_as_larger_ones_of_a_whole():
    half, whole = StartPolynomial.of_start(100, 0.5), StartPolynomial.of_start(100, 1.0)
    assert half.probability(math.log(0.01)) == pytest.approx(whole.probability(math.log(0.02)))
    assert StartPolynomial.of_start(100, 0.0).probability(math.log(1e-9)) == 1.0


@pytest.mark.parametrize("confidence", [0.5, 0.9])
@pytest.mark.parametrize("num_steps", [5, 15])
def test_outer_bound_holds_as_often_as_it_says(confidence, num_steps):
    values, held, trials = SPECTRA["bulk_with_outliers"], 0, 300
    for seed in range(trials):
        op, state, _ = krylov(values, num_steps, seed=seed)
        pairs, lengths = project(op, state)
        arguments = confidence, pairs.values, pairs.residual_norms, lengths
        low = float(pairs.values[0] * state.scale) - state.polynomial.distance(0, *arguments) * float(
            state.scale
        )
        held += low <= min(values)
    share = held / trials
    assert share >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / trials)


def test_outer_bound_shrinks_with_steps_and_grows_with_confidence():
    values = SPECTRA["indefinite"]
    distances = {}
    for num_steps in (4, 7, 10):
        op, state, _ = krylov(values, num_steps)
        pairs, lengths = project(op, state)
        for confidence in (0.9, 0.999):
            arguments = confidence, pairs.values, pairs.residual_norms, lengths
            distances[num_steps, confidence] = state.polynomial.distance(-1, *arguments)
    assert distances[4, 0.9] > distances[7, 0.9] > distances[10, 0.9] > 0
    assert all(distances[steps, 0.999] > distances[steps, 0.9] for steps in (4, 7, 10))


def test_outer_bound_knows_nothing_without_randomness_or_steps():
    values, norms = (
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        torch.tensor([0.1, 0.1], dtype=torch.float64),
    )
    lengths = torch.tensor([0.5], dtype=torch.float64)
    assert StartPolynomial.of_start(10, 0.0).distance(0, 0.99, values, norms, lengths) == math.inf
    assert StartPolynomial.of_start(10, 1.0).distance(0, 0.99, values, norms, lengths[:0]) == math.inf


def test_bound_by_the_number_of_steps_holds_and_is_infinite_when_there_are_few():
    values = torch.linspace(-1, 1, 400, dtype=torch.float64).tolist()
    assert uniform_distance(2.0, 400, 3, 0.99) == math.inf
    for seed in range(20):
        op, state, _ = krylov(values, 60, seed=seed)
        pairs, _ = project(op, state)
        ends = pairs.values[[0, -1]] * state.scale
        reach = uniform_distance(float(ends[1] - ends[0]), 400, 60, 0.99)
        assert ends[1] + reach >= 1.0
        assert ends[0] - reach <= -1.0
        assert reach < 0.1


def test_a_component_is_found_where_numpy_raises_for_underflow() -> None:
    values, norms = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    residuals = torch.tensor([1e-200, 1.0], dtype=torch.float64)
    polynomial = StartPolynomial.of_start(100, 1.0)
    expected = polynomial.log_component(3.0, values, residuals, norms)
    with np.errstate(all="raise"):
        assert polynomial.log_component(3.0, values, residuals, norms) == expected
