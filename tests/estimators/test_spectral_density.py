from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

import hvpkit as hk
from estimators.spread import SPREAD, Counting, calibration, diagonal_operator, z_score
from hvpkit.estimators import kernel_polynomials, quadrature
from hvpkit.estimators.spectral_density import moments, spectral_density
from hvpkit.estimators.trace import trace
from hvpkit.results.density import Density
from oracles import relative_error
from problems import SPECTRA, matrix

METHODS = ("lanczos", "chebyshev")
EIGENVALUES = [-3.0, *torch.linspace(-1, 1, 57).tolist(), 4.0, 8.0]
ENDS = kernel_polynomials.END_MATVECS
UNIT_BAND = kernel_polynomials.Ends(kernel_polynomials.Band(0.0, 1.0))

each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def wasserstein(d: Density, eigenvalues: Tensor) -> float:
    """The area between both distribution functions."""
    points = torch.cat([d.nodes, eigenvalues]).sort().values
    middles = (points[1:] + points[:-1]) / 2
    truth = torch.searchsorted(eigenvalues.sort().values, middles, right=True) / len(eigenvalues)
    return float(((d.cdf(middles) - truth).abs() * points.diff()).sum())


def over_seeds(f: Callable[[Tensor], Tensor], count: int, **options: object) -> tuple[Tensor, Tensor]:
    op = hk.aslinearoperator(matrix(EIGENVALUES))
    found = [spectral_density(op, seed=seed, **options).expectation(f) for seed in range(count)]
    return torch.tensor([e.value for e in found]), torch.tensor([e.stderr for e in found])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "cube": lambda x: x**3,
    "effective_dimension": lambda x: x**2 / (x**2 + 1),
}


@each_method
@pytest.mark.parametrize("function", FUNCTIONS)
def test_unbiased_over_500_seeds_with_calibrated_standard_errors(method: str, function: str) -> None:
    f = FUNCTIONS[function]
    count = 500 if (method, function) == ("lanczos", "identity") else 60
    num_steps = 2 if function == "identity" else 12
    values, stderrs = over_seeds(f, count, method=method, num_steps=num_steps, num_probes=4)
    truth = float(f(torch.tensor(EIGENVALUES, dtype=torch.float64)).mean())
    slack = {"identity": 1e-9, "cube": 1e-9, "effective_dimension": 2e-3}[function]  # of the quadrature
    assert abs(float(values.mean()) - truth) < 3.5 * float(values.std()) / count**0.5 + slack
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]
    assert abs(z_score(values + values.std(), truth)) > 3.5


@each_method
@each_dtype
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_moments_are_traces_of_powers_within_standard_errors(
    method: str, dtype: torch.dtype, spectrum: str
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    counting, n, num_probes = Counting(A), len(A), 7
    num_steps = max(1, min(6, (n - 1) // num_probes))
    d = spectral_density(
        counting.operator(), method=method, num_steps=num_steps, num_probes=num_probes, seed=1
    )
    truth, norm = torch.linalg.eigvalsh(A.double()), float(torch.linalg.matrix_norm(A.double(), 2))
    unlikely = stats.t.isf(1e-4, num_probes - 1)
    for power in range(2 * num_steps):
        found = d.expectation(lambda x, p=power: x**p)
        rounding = 1e3 * torch.finfo(dtype).eps * norm**power + 1e-30
        assert abs(found.value - float((truth**power).mean())) <= unlikely * found.stderr + rounding
    exact = n <= num_steps * num_probes
    assert d.status is (hk.Status.INVARIANT_SUBSPACE if exact else hk.Status.COMPLETED)
    assert d.num_matvecs == sum(counting.widths)
    assert d.num_matvecs <= num_steps * num_probes + (ENDS if method == "chebyshev" else 0)
    assert bool((d.nodes.diff() >= 0).all())
    assert float(d.masses.min()) >= 0
    assert float(d.weights.sum()) == pytest.approx(1, abs=1e-5)
    assert float(torch.trapezoid(d.values, d.grid)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_nodes_and_weights_are_a_gauss_rule_for_each_probe(num_probes: int) -> None:
    A, num_steps = matrix(EIGENVALUES), 5
    op = hk.aslinearoperator(A)
    goal = quadrature.Goal(num_steps, (num_probes,), num_probes, 4)
    starts = quadrature.init(op, goal).krylov.basis[:num_probes]
    d = spectral_density(op, num_steps=num_steps, num_probes=num_probes, seed=4)
    for power in range(2 * num_steps):
        forms = (starts @ torch.linalg.matrix_power(A, power) * starts).sum(dim=1)
        assert relative_error(d.probe_weights @ d.nodes**power, forms) < 1e-10


def test_chebyshev_weights_have_the_moments_of_each_probe() -> None:
    A, num_steps = matrix(EIGENVALUES), 5
    op = hk.aslinearoperator(A)
    goal = quadrature.Goal(num_steps, (3,), 3, 4)
    starts = kernel_polynomials.init(op, goal, UNIT_BAND).start
    d = spectral_density(op, method="chebyshev", num_steps=num_steps, num_probes=3, seed=4)
    for power in range(2 * num_steps + 1):
        forms = (starts @ torch.linalg.matrix_power(A, power) * starts).sum(dim=1)
        assert relative_error(d.probe_weights @ d.nodes**power, forms) < 1e-9


def test_jackson_damping_widens_a_peak_as_it_should_and_makes_nothing_negative() -> None:
    entries = torch.full((2000,), 0.2, dtype=torch.float64)
    entries[0], entries[1] = -1, 1
    d = spectral_density(diagonal_operator(entries), method="chebyshev", num_steps=50)
    half, count, near = float(d.nodes[-1] - d.nodes[0]) / 2, 101, (d.nodes - 0.2).abs() < 0.4
    spread = float((d.masses * (d.nodes - 0.2) ** 2)[near].sum()) ** 0.5
    assert spread == pytest.approx(math.pi * half / count, rel=0.1)
    assert float(d.masses.min()) >= 0
    assert float(d.weights.min()) < -1e-3


@each_method
@pytest.mark.parametrize("shape", ["uniform", "two_bulks"])
def test_wasserstein_distance_falls_as_one_over_steps(method: str, shape: str) -> None:
    uniform = torch.linspace(-1, 1, 20000, dtype=torch.float64)
    eigenvalues = uniform if shape == "uniform" else torch.where(uniform < 0, uniform, 1 + 0.2 * uniform)
    op, span = diagonal_operator(eigenvalues), float(eigenvalues.max() - eigenvalues.min())
    distances = [
        wasserstein(spectral_density(op, method=method, num_steps=m, num_probes=2), eigenvalues)
        for m in (4, 16)
    ]
    assert distances[0] < span * math.pi / (2 * 4)
    assert distances[1] < span * math.pi / (2 * 16)
    assert math.log(distances[0] / distances[1]) / math.log(4) > 0.75


def test_wasserstein_distance_of_many_steps_falls_as_one_over_the_root_of_n_and_probes() -> None:
    def distance(n: int, num_probes: int) -> float:
        eigenvalues = torch.linspace(-1, 1, n, dtype=torch.float64)
        found = [
            spectral_density(
                diagonal_operator(eigenvalues), num_steps=150, num_probes=num_probes, seed=seed, block_size=1
            )
            for seed in range(6)
        ]
        return sum(wasserstein(d, eigenvalues) for d in found) / len(found)

    one = distance(1001, 1)
    assert one / distance(4004, 1) == pytest.approx(2, rel=0.35)
    assert one / distance(1001, 4) == pytest.approx(2, rel=0.35)


@each_method
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectrum_is_exact_where_the_products_pay_for_all_columns(method: str, spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum])
    counting = Counting(A)
    d = spectral_density(counting.operator(), method=method, num_steps=100, num_probes=3)
    truth = torch.linalg.eigvalsh(A)
    assert relative_error(d.nodes, truth) < 1e-13
    assert float((d.weights * len(A) - 1).abs().max()) < 1e-10
    assert d.status is hk.Status.INVARIANT_SUBSPACE
    assert sum(counting.widths) == len(A)
    assert float(d.stderr.max()) == 0
    assert float(d.cdf(truth[-1] + 1)) == pytest.approx(1)
    assert d.expectation(torch.cos).value == pytest.approx(float(truth.cos().mean()), rel=1e-12)


@each_method
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("spectrum", ["indefinite", "rank_deficient", "zero"])
def test_scale_of_the_operator_does_not_matter(
    method: str, dtype: torch.dtype, scale: float, spectrum: str
) -> None:
    A = matrix(SPECTRA[spectrum])
    plain, scaled = (
        spectral_density(hk.aslinearoperator((A * s).to(dtype)), method=method, num_steps=4, num_probes=3)
        for s in (1.0, scale)
    )
    size, eps = float(A.abs().max()) or 1.0, torch.finfo(dtype).eps
    for name in ("value", "stderr"):
        for power in (1, 2):
            found = getattr(scaled.expectation(lambda x, p=power: (x / scale) ** p), name)
            expected = getattr(plain.expectation(lambda x, p=power: x**p), name)
            assert found == pytest.approx(expected, abs=1e5 * eps * size**power)
    points = torch.linspace(-size, size, 100, dtype=torch.float64) + 0.01
    assert (
        float((scaled.cdf(scale * points) - plain.cdf(points)).abs().mean()) < 0.05
    )  # the band has rounding in it


def test_log_determinant_effective_dimension_and_counts() -> None:
    eigenvalues = torch.cat(
        [10.0 ** torch.linspace(-4, 0, 3000, dtype=torch.float64), torch.tensor([5.0, 30.0])]
    )
    d = spectral_density(diagonal_operator(eigenvalues), num_steps=60, num_probes=12)
    shift = 1e-2
    for f in (
        lambda x: torch.log(x + shift),
        lambda x: x / (x + shift),
        lambda x: x > 2,
        lambda x: (x > 0.1) & (x <= 1),
    ):
        found, truth = d.expectation(f), float(f(eigenvalues).double().mean())
        assert abs(found.value - truth) <= stats.t.isf(1e-3, 11) * found.stderr + 1e-3 * truth
    assert float(d.cdf(0.1)) == pytest.approx(0.75, abs=0.03)


@each_method
def test_columns_of_a_block_share_a_pass_within_the_products_asked_for(method: str) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    for block_size, widths in ((2, {1, 2}), (5, {5}), (None, {8, 5} if method == "lanczos" else {5})):
        counting = Counting(A)
        goal = {"num_steps": 6, "num_probes": 5, "block_size": block_size, "method": method}
        d = spectral_density(counting.operator(0.5), **goal)
        ends = ENDS if method == "chebyshev" else 0
        assert sum(counting.widths) <= 30 + ends
        assert d.num_matvecs == pytest.approx(0.5 * sum(counting.widths))
        last = counting.widths[-6:] if method == "chebyshev" else counting.widths
        assert set(last) <= widths
        assert len(d.probe_weights) == 5


def test_last_pass_is_cut_to_the_products_that_are_left() -> None:
    counting = Counting(matrix(SPECTRA["bulk_with_outliers"]))
    d = spectral_density(counting.operator(), num_steps=3, num_probes=10)
    assert counting.widths == [8, 8, 8, 6]
    assert len(d.probe_weights) == 10


@each_method
def test_groups_of_probes_are_measured_one_after_another(method: str) -> None:
    op = diagonal_operator(torch.linspace(-1, 2, 3000, dtype=torch.float64))
    goal = {"num_steps": 8, "num_probes": 5, "method": method}
    together, apart = (spectral_density(op, block_size=size, **goal) for size in (5, 2))
    for d in (together, apart):
        assert len(d.probe_weights) == 5
        assert float(d.probe_weights.sum(dim=1).sub(1).abs().max()) < 1e-10
        found = d.expectation(lambda x: x**2)
        assert abs(found.value - 1.0) < stats.t.isf(1e-4, 4) * found.stderr
        assert len(set(found.samples.tolist())) == 5


def test_trace_of_a_narrow_spectrum_is_as_published_for_twenty_products() -> None:
    spread = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    A = matrix(
        (1 + 0.12 * 3**0.5 * spread).tolist()
    )  # 12 % of the mean: what errors of 0.1 and 0.4 % speak of
    op, errors = hk.aslinearoperator(A), []
    for seed in range(100):
        plain = trace(op, method="hutchinson", num_matvecs=20, block_size=20, seed=seed).value
        density = 1000 * spectral_density(op, num_steps=20, seed=seed).expectation(lambda x: x).value
        errors.append([abs(plain / 1000 - 1), abs(density / 1000 - 1)])
    medians = torch.tensor(errors).median(dim=0).values
    assert float(medians[0]) < 1e-3
    assert float(medians[1]) < 4e-3


def test_krylov_space_that_ends_early_takes_no_more_products() -> None:
    entries = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).repeat(500)
    d = spectral_density(diagonal_operator(entries), num_steps=50)
    assert d.num_matvecs < 10
    assert d.nodes.tolist() == pytest.approx([-1, 0.5, 2])
    both = spectral_density(diagonal_operator(entries), num_steps=50, num_probes=4, block_size=2)
    assert both.expectation(torch.abs).value == pytest.approx(7 / 6, rel=0.1)


def test_outliers_are_single_eigenvalues_beside_the_bulk() -> None:
    bulk = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-2, 2)
    entries = torch.cat([bulk, torch.tensor([-9.0, 12.0, 40.0, 40.0, 70.0], dtype=torch.float64)])
    d = spectral_density(diagonal_operator(entries), num_steps=60, num_probes=2)
    values, masses = d.outliers()
    assert values.tolist() == pytest.approx([-9, 12, 40, 70], rel=1e-6)
    assert float(masses.sum()) < 30 / 3005
    assert spectral_density(diagonal_operator(bulk), num_steps=30).outliers()[0].tolist() == []
    assert spectral_density(diagonal_operator(entries), method="chebyshev").outliers()[0].tolist() == []


def test_log_density_integrates_over_decades_to_the_shares_of_both_signs() -> None:
    entries = 10.0 ** torch.linspace(-6, 0, 360, dtype=torch.float64)
    entries[::3] *= -1
    d = spectral_density(
        diagonal_operator(torch.cat([entries, torch.zeros(40, dtype=torch.float64)])), num_steps=400
    )
    sizes, up, down = d.log_density()
    assert float(torch.trapezoid(up, sizes.log10())) == pytest.approx(0.6, abs=1e-3)
    assert float(torch.trapezoid(down, sizes.log10())) == pytest.approx(0.3, abs=1e-3)
    middle = (sizes > 1e-5) & (sizes < 1e-1)
    assert float((up[middle] - 0.1).abs().max()) < 5e-3


def test_values_are_a_density_with_standard_errors_over_probes() -> None:
    eigenvalues = torch.linspace(-1, 1, 2000, dtype=torch.float64)
    found = [
        spectral_density(
            diagonal_operator(eigenvalues), num_steps=20, num_probes=4, seed=seed, method="chebyshev"
        )
        for seed in range(30)
    ]
    middle = [int((d.grid - 0.1).abs().argmin()) for d in found]
    values = torch.tensor([float(d.values[at]) for d, at in zip(found, middle, strict=True)])
    stderrs = torch.tensor([float(d.stderr[at]) for d, at in zip(found, middle, strict=True)])
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.7 < calibration(values, stderrs) < 1.4
    alone = spectral_density(diagonal_operator(eigenvalues), num_steps=20)
    assert bool(torch.isinf(alone.stderr).all())
    assert alone.expectation(torch.cos).stderr == math.inf


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_ends_with_what_was_known(method: str, bad: float) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    before = ENDS if method == "chebyshev" else 0
    goal = {"method": method, "num_steps": 20, "num_probes": 2, "block_size": 2}
    d = spectral_density(Counting(A, good=before + 13, bad=bad).operator(), **goal)
    assert d.status is hk.Status.NON_FINITE
    assert "NaN or infinity" in d.message
    truth = float(A.trace()) / len(A)
    assert d.expectation(lambda x: x).value == pytest.approx(truth, rel=0.7)
    first = spectral_density(Counting(A, good=before + 45, bad=bad).operator(), **{**goal, "num_probes": 4})
    whole = spectral_density(hk.aslinearoperator(A), **goal)
    assert first.status is hk.Status.NON_FINITE
    assert torch.equal(first.nodes, whole.nodes)
    nothing = spectral_density(Counting(A, good=0, bad=bad).operator(), **goal)
    assert nothing.status is hk.Status.NON_FINITE
    assert len(nothing.nodes) == len(nothing.grid) == 0
    assert math.isnan(nothing.expectation(torch.cos).value)
    assert bool(nothing.cdf(torch.tensor([-1.0, 1.0])).isnan().all())


def test_spectrum_that_is_cut_off_is_still_an_estimate() -> None:
    A = matrix(EIGENVALUES)
    found = [
        spectral_density(Counting(A, good=40).operator(), num_steps=60, block_size=5, seed=seed)
        for seed in range(60)
    ]
    assert {d.status for d in found} == {hk.Status.NON_FINITE}
    values = torch.tensor([d.expectation(lambda x: x).value for d in found])
    stderrs = torch.tensor([d.expectation(lambda x: x).stderr for d in found])
    assert abs(z_score(values, sum(EIGENVALUES) / 60)) < 3.5
    assert 0.7 < calibration(values, stderrs) < 1.4


@each_method
@pytest.mark.parametrize("time_limit", [0.5, 4.5, 45.0])
def test_time_limit_is_a_status_with_what_was_found_until_then(
    method: str, time_limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, spent = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])), 0

    def product(v: Tensor) -> Tensor:
        nonlocal spent
        spent += v.shape[1]
        return op.product(v)

    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + spent)  # a second for each product
    d = spectral_density(
        replace(op, product=product), method=method, num_steps=20, num_probes=3, time_limit=time_limit
    )
    monkeypatch.undo()
    assert d.status is hk.Status.TIME_LIMIT
    assert bool(len(d.nodes)) == (method == "lanczos" or time_limit > 1)  # Chebyshev needs both ends first
    if len(d.nodes):
        assert float(d.weights.sum()) == pytest.approx(1)


def test_eigenvalues_outside_of_the_band_widen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    eigenvalues = torch.linspace(-1, 1, 2000, dtype=torch.float64)
    narrow = kernel_polynomials.Band(0.0, 0.8)
    monkeypatch.setattr(kernel_polynomials.Band, "around", lambda *_: narrow)
    d = spectral_density(diagonal_operator(eigenvalues), method="chebyshev", num_steps=40, num_probes=2)
    assert float(d.nodes[-1]) > 1
    assert d.expectation(lambda x: x**2).value == pytest.approx(1 / 3, rel=0.1)
    assert d.num_matvecs <= 80 + ENDS


def test_operator_that_is_not_symmetric_is_refused() -> None:
    A = matrix(SPECTRA["indefinite"])
    A[3, 7] += 5.0
    for method in METHODS:
        with pytest.raises(hk.NotSymmetricError):
            spectral_density(hk.aslinearoperator(A), method=method, num_steps=20, num_probes=2)


@each_method
def test_same_seed_gives_the_same_bits(method: str) -> None:
    op, state = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), torch.get_rng_state()
    one, same, other = (
        spectral_density(op, method=method, num_steps=8, num_probes=2, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(one.nodes, same.nodes)
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.weights, other.weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_run_that_is_resumed_from_its_state_repeats_exactly() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"]))
    goal = quadrature.Goal(num_steps=8, sizes=(2,), width=2, seed=1)
    ends = kernel_polynomials.Ends(kernel_polynomials.Band(40.0, 50.0))
    lanczos, chebyshev = quadrature.init(op, goal), kernel_polynomials.init(op, goal, ends)
    for _ in range(3):
        lanczos, chebyshev = quadrature.step(op, goal, lanczos), kernel_polynomials.step(op, chebyshev)
    ends = []
    for one, other in ((lanczos, chebyshev), (copy.deepcopy(lanczos), copy.deepcopy(chebyshev))):
        for _ in range(5):
            one, other = quadrature.step(op, goal, one), kernel_polynomials.step(op, other)
        ends.append(quadrature.measures(op, goal, one)[0] + kernel_polynomials.measures(other))
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine.nodes, theirs.nodes)
        assert torch.equal(mine.weights, theirs.weights)


def test_monitor_sees_both_ends_and_what_they_cost() -> None:
    seen: list[hk.Progress] = []
    op = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"]))
    d = spectral_density(op, num_steps=30, monitor=seen.append)
    assert tuple(seen) == d.history
    assert seen[-1].num_matvecs == d.num_matvecs == 30
    assert (seen[-1].smallest, seen[-1].largest) == pytest.approx((-0.05, 80.0))
    assert seen[-1].largest_bound < 1e-6


def test_moments_are_those_of_the_spectrum() -> None:
    A = matrix(EIGENVALUES)
    truth = torch.stack([torch.tensor(EIGENVALUES, dtype=torch.float64).pow(p).mean() for p in range(7)])
    exact = moments(hk.aslinearoperator(A), 6)
    assert relative_error(exact.value, truth) < 1e-12
    counting = Counting(A)
    found = moments(counting.operator(), 6, num_matvecs=50)
    assert found.num_matvecs == sum(counting.widths) == 48
    assert bool(((found.value - truth).abs() <= stats.t.isf(1e-4, 11) * found.stderr + 1e-12).all())
    assert found.samples.shape == (12, 7)
    values = torch.stack(
        [moments(hk.aslinearoperator(A), 3, num_matvecs=20, seed=seed).value for seed in range(100)]
    )
    assert all(abs(z_score(values[:, p], float(truth[p]))) < 3.5 for p in (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "slq"}, "method"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_probes": 0}, "num_probes"),
        ({"block_size": 0}, "block_size"),
        ({"time_limit": -1.0}, "time_limit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        spectral_density(hk.aslinearoperator(torch.eye(3)), **options)


def test_bad_orders_and_functions_are_refused_by_name() -> None:
    op = hk.aslinearoperator(matrix(EIGENVALUES))
    with pytest.raises(ValueError, match=r"^order"):
        moments(op, 0)
    with pytest.raises(ValueError, match=r"^num_matvecs"):
        moments(op, 10, num_matvecs=5)
    d = spectral_density(op, num_steps=5)
    with pytest.raises(ValueError, match=r"^f gave NaN"):
        d.expectation(torch.log)
    with pytest.raises(ValueError, match=r"^f must return"):
        d.expectation(lambda x: x.sum())
    with pytest.raises(ValueError, match=r"^op has dtype torch.bfloat16"):
        spectral_density(hk.aslinearoperator(torch.eye(3, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="no eigenvalue that is not zero"):
        spectral_density(hk.aslinearoperator(torch.zeros(3, 3))).log_density()


def test_operator_cost_counts_in_full_data_products() -> None:
    op = replace(hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])), cost=2.0)
    assert spectral_density(op, num_steps=7, num_probes=2).num_matvecs == 28
