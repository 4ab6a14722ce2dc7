from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.baselines.power import accelerated_power, power
from hvpkit.solvers.baselines.scipy_eigs import eigsh, scipy_lobpcg
from hvpkit.solvers.chebyshev import chebyshev
from hvpkit.solvers.lobpcg import lobpcg
from problems import SPECTRA, matrix

ENDS = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class Solver:
    solve: Callable[..., hk.EigenResult]
    which: tuple[str, ...]
    few: tuple[str, ...] = ()  # spectra, and starts, with which a foreign solver is asked for one pair only
    block: Callable[[int, str], int] = lambda *_: 1  # products of a step, for k pairs at these ends
    rate: Callable[[float], float] | None = (
        None  # of a slow method's error in a step, from a ratio of eigenvalues
    )


SOLVERS = {
    "lanczos": Solver(hk.lanczos, ENDS),
    "lobpcg": Solver(lobpcg, ("LA", "SA", "BE"), block=lambda k, which: k + 1 + (which == "BE" and k > 1)),
    "chebyshev": Solver(chebyshev, ("LA", "SA", "BE"), block=lambda k, which: k + (k > 1 + (which == "BE"))),
    "power": Solver(power, ENDS, block=lambda k, _: k, rate=lambda ratio: ratio),
    "accelerated_power": Solver(
        accelerated_power,
        ENDS,
        few=("null",),  # from there it may stop at the next of two neighbours
        block=lambda k, _: k,
        rate=lambda ratio: ratio / (1 + (1 - ratio**2) ** 0.5),
    ),
    # ARPACK finds copies of an eigenvalue by its rounding, if at all.
    "eigsh": Solver(eigsh, ENDS, few=("multiple",)),
    # SciPy's LOBPCG takes thousands of products to tell these apart, and from that start stops at the next one.
    "scipy_lobpcg": Solver(
        scipy_lobpcg,
        ("LA", "SA"),
        few=("clustered", "bulk_with_outliers", "negative_dominant", "unwanted"),
    ),
}
PAIRS = [(name, which) for name, solver in SOLVERS.items() for which in solver.which]
DTYPES = [torch.float32, torch.float64]
TOL = {torch.float32: 1e-3, torch.float64: 1e-6}

each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_pair = pytest.mark.parametrize(("solver", "which"), PAIRS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def wanted_eigenvalues(truth: Tensor, k: int, which: str) -> Tensor:
    n = len(truth)
    if which == "LM":
        return truth[truth.abs().argsort(descending=True)[:k]].sort().values
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([truth[:low], truth[n - (k - low) :]])


def norm_of(truth: Tensor) -> float:
    return float(truth.abs().max())


def rounding(A: Tensor, truth: Tensor) -> float:
    return 32 * torch.finfo(A.dtype).eps * norm_of(truth)


def atol_for(spectrum: str) -> float | None:
    """The default, or 0 where it does not give the digits of values near zero that :func:`check_pairs` asks for."""
    sizes = [abs(value) for value in SPECTRA[spectrum]]
    return 0.0 if min(sizes) <= 1e-5 * max(sizes) else None


def check_pairs(found: hk.EigenResult, A: Tensor, k: int, which: str, tol: float) -> None:
    """Everything that must hold of a complete answer, against the dense spectrum."""
    dense = A.double()
    truth = torch.linalg.eigvalsh(dense)
    norm, wanted = norm_of(truth), wanted_eigenvalues(truth, k, which)
    assert found.values.shape == (k,)
    assert found.values.dtype == torch.float64
    assert found.vectors.shape == (len(A), k)
    assert found.vectors.dtype == A.dtype
    assert bool((found.values.diff() >= 0).all())

    slack = (tol * wanted.abs()).clamp(min=rounding(A, truth))
    if which == "LM":  # ties in magnitude have several right answers
        magnitudes = found.values.abs().sort().values, wanted.abs().sort()
        assert bool(((magnitudes[0] - magnitudes[1].values).abs() <= slack[magnitudes[1].indices]).all())
        num_low = int((found.values < 0).sum())
        wanted = torch.cat([truth[:num_low], truth[len(truth) - (k - num_low) :]])
    assert bool(((found.values - wanted).abs() <= slack).all())
    oracle = 10 * torch.finfo(torch.float64).eps * norm
    for interval, value in zip(found.intervals, wanted.tolist(), strict=True):
        assert interval.lower - oracle <= value <= interval.upper + oracle

    vectors = found.vectors.double()
    gram = vectors.mT @ vectors
    assert float((gram - torch.eye(k)).abs().max()) <= (1e-10 if A.dtype == torch.float64 else 1e-4)
    residuals = dense @ vectors - vectors * found.values
    norms = torch.linalg.vector_norm(residuals / (norm or 1.0), dim=0) * (norm or 1.0)
    assert bool(((norms - found.residual_norms).abs() <= rounding(A, truth)).all())

    out_of_reach = 20 * torch.finfo(A.dtype).eps * norm > tol * float(wanted.abs().min())
    assert found.converged or (found.status is hk.Status.ROUNDING_LIMITED and out_of_reach)
    assert found.message


def in_reach(solver: str, A: Tensor, k: int, which: str, tol: float) -> bool:
    """Whether a slow method has twice the products that it needs by theory."""
    rate = SOLVERS[solver].rate
    if rate is None:
        return True
    truth, steps = torch.linalg.eigvalsh(A.double()), 0.0
    parts = [("SA", k // 2), ("LA", k - k // 2)] if which == "BE" else [(which, k)]
    for end, count in parts:
        if not count:
            continue
        wanted = wanted_eigenvalues(truth, count, end)
        shift = -float(truth[0] if end == "LA" else truth[-1])
        if which != "BE" and torch.equal(wanted, wanted_eigenvalues(truth, count, "LM")):
            shift = 0.0
        others = truth[(truth[:, None] - wanted).abs().amin(dim=1) > rounding(A, truth)]
        if not len(others) or float((others + shift).abs().max()) == 0:
            continue
        ratio = float((others + shift).abs().max() / (wanted + shift).abs().min())
        if ratio > 1 - 1e-9:
            return False
        target = max(tol * float(wanted.abs().min()), rounding(A, truth)) / (norm_of(truth) * len(A) ** 0.5)
        steps = max(steps, math.log(target) / math.log(rate(ratio)))
    return 2 * k * (steps + 24) <= 1000


def check(solver: str, found: hk.EigenResult, A: Tensor, k: int, which: str, tol: float) -> None:
    """A complete answer; of a slow method out of its reach, a partial one will do, if it says so."""
    if found.status is hk.Status.MAX_MATVECS and not in_reach(solver, A, k, which, tol):
        check_partial(found, A, which)
    else:
        check_pairs(found, A, k, which, tol)


@dataclass
class Counting:
    """A matrix whose products are counted, and are not finite once ``good`` columns are through."""

    A: Tensor
    good: float = float("inf")
    bad: float = float("nan")
    columns: int = 0

    def product(self, v: Tensor) -> Tensor:
        self.columns += v.shape[1]
        return self.A @ v if self.columns <= self.good else torch.full_like(v, self.bad)

    def operator(self, cost: float = 1.0) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product, cost=cost)


@each_pair
@each_spectrum
@each_dtype
def test_finds_the_wanted_pairs_of_every_spectrum(
    solver: str, which: str, spectrum: str, dtype: torch.dtype
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    n, op = len(A), hk.aslinearoperator(A)
    ks = {1} if spectrum in SOLVERS[solver].few else {1, min(2, n), min(3, n), *([n] if n <= 40 else [])}
    for k in sorted(ks):
        found = SOLVERS[solver].solve(op, k, which=which, tol=TOL[dtype], atol=atol_for(spectrum))
        check(solver, found, A, k, which, TOL[dtype])


ZERO_ENDS = {
    "rank_deficient": [0.0] * 150 + torch.linspace(1, 10, 50, dtype=torch.float64).tolist(),
    "decaying_to_zero": [*torch.logspace(-8, 0, 199, dtype=torch.float64).tolist(), 0.0],
}


# The budget is too small for power iteration and ARPACK where eigenvalues crowd at zero.
FINDS_ZERO = [
    (solver, spectrum)
    for solver in SOLVERS
    for spectrum in ZERO_ENDS
    if spectrum == "rank_deficient" or solver not in ("power", "eigsh")
]


@pytest.mark.parametrize(("solver", "spectrum"), FINDS_ZERO)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@each_dtype
def test_an_end_that_is_zero_is_found_to_atol_for_no_more_products(
    solver: str, spectrum: str, scale: float, dtype: torch.dtype
) -> None:
    A = (matrix(ZERO_ENDS[spectrum]) * scale).to(dtype)
    truth, solve, op = torch.linalg.eigvalsh(A.double()), SOLVERS[solver].solve, hk.aslinearoperator(A)
    norm, eps = norm_of(truth), torch.finfo(dtype).eps
    found = solve(op, which="SA", tol=1e-2)
    value, bound, interval = float(found.values[0]), float(found.error_bounds[0]), found.intervals[0]
    assert found.status in (hk.Status.ZERO_WITHIN_ATOL, hk.Status.ZERO_TO_ROUNDING)
    assert found.converged
    assert abs(value) <= max(1e-5, 32 * eps) * norm
    assert bound <= max(1e-5, 32 * eps) * norm
    assert interval.lower - 40 * eps * norm <= float(truth[0]) <= interval.upper + 40 * eps * norm
    relative = solve(op, which="SA", tol=1e-2, atol=0.0)
    assert relative.status in (hk.Status.ZERO_TO_ROUNDING, hk.Status.MAX_MATVECS)
    if relative.converged and solver != "scipy_lobpcg":  # whose residuals end far above rounding
        assert abs(float(relative.values[0] - truth[0])) <= 64 * eps * norm
    assert found.num_matvecs <= relative.num_matvecs


@each_pair
@each_spectrum
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_operator_does_not_matter(
    solver: str, which: str, spectrum: str, dtype: torch.dtype, scale: float
) -> None:
    A = (matrix(SPECTRA[spectrum]) * scale).to(dtype)
    k = 1 if spectrum in SOLVERS[solver].few else min(2, len(A))
    found = SOLVERS[solver].solve(
        hk.aslinearoperator(A), k, which=which, tol=TOL[dtype], atol=atol_for(spectrum)
    )
    check(solver, found, A, k, which, TOL[dtype])


@each_pair
def test_same_seed_gives_the_same_bits_and_another_one_the_same_values(solver: str, which: str) -> None:
    A = matrix(SPECTRA["indefinite"])
    op, solve = hk.aslinearoperator(A), SOLVERS[solver].solve
    first, again, other = (solve(op, 2, which=which, tol=1e-6, seed=seed) for seed in (7, 7, 8))
    for name in ("values", "vectors", "residual_norms"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.intervals == again.intervals
    assert first.num_matvecs == again.num_matvecs
    assert not torch.equal(first.vectors, other.vectors)
    check(solver, other, A, 2, which, 1e-6)


@each_solver
def test_seed_may_be_a_generator_and_global_random_state_is_not_touched(solver: str) -> None:
    op, solve = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), SOLVERS[solver].solve
    before = torch.random.get_rng_state()
    first, again = (solve(op, seed=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(torch.random.get_rng_state(), before)


@each_pair
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("cost", [1.0, 0.25, 3.0])
def test_num_matvecs_is_what_was_put_through_the_operator(
    solver: str, which: str, k: int, cost: float
) -> None:
    counting = Counting(matrix(SPECTRA["indefinite"]))
    found = SOLVERS[solver].solve(counting.operator(cost), k, which=which)
    assert found.num_matvecs == pytest.approx(cost * counting.columns)
    assert found.history[-1].num_matvecs <= found.num_matvecs


@each_pair
@pytest.mark.parametrize("start", ["wanted", "unwanted", "several", "opposite", "null"])
@each_dtype
def test_any_start_leads_to_the_wanted_pairs(solver: str, which: str, start: str, dtype: torch.dtype) -> None:
    A = matrix(SPECTRA["indefinite"], dtype=dtype)
    if start == "null":
        A = A - matrix([0.0] * 99 + [20.0 - 1e-3], dtype=dtype)
    vectors = torch.linalg.eigh(A.double()).eigenvectors.to(dtype)
    v0 = {
        "wanted": vectors[:, -1] if which != "SA" else vectors[:, 0],
        "unwanted": vectors[:, 50],
        "several": vectors[:, 40:43] * 1e-20,
        "opposite": torch.stack([vectors[:, 50], -vectors[:, 50]], dim=1),
        "null": torch.linalg.eigh(A.double().square()).eigenvectors[:, 0].to(dtype),
    }[start]
    before = v0.clone()
    k = 1 if start in SOLVERS[solver].few else 2
    found = SOLVERS[solver].solve(hk.aslinearoperator(A), k, which=which, v0=v0, tol=1e-2)
    check(solver, found, A, k, which, 1e-2)
    assert torch.equal(v0, before)


@each_pair
def test_a_start_is_where_the_solve_starts(solver: str, which: str) -> None:
    A = matrix(SPECTRA["clustered"])
    values, vectors = torch.linalg.eigh(A)
    for place in (40, 99):
        found = SOLVERS[solver].solve(hk.aslinearoperator(A), which=which, v0=vectors[:, place] * 1e-3)
        assert found.history[0].largest == pytest.approx(float(values[place]), abs=0.1)


def check_partial(found: hk.EigenResult, A: Tensor, which: str) -> None:
    """What must hold of whatever is known: values inside of the spectrum, next to an eigenvalue."""
    truth = torch.linalg.eigvalsh(A.double())
    slack = 10 * torch.finfo(A.dtype).eps * norm_of(truth)
    values, norms = found.values, found.residual_norms
    assert len(values) == len(found.intervals) == found.vectors.shape[1]
    assert bool((values >= truth[0] - slack).all() & (values <= truth[-1] + slack).all())
    distances = (values[:, None] - truth).abs().amin(dim=1)
    assert bool((distances <= norms + slack).all())
    for interval, value, norm in zip(found.intervals, values.tolist(), norms.tolist(), strict=True):
        assert value in interval
        assert interval.upper - interval.lower >= norm
    if which == "LA":  # a Ritz value is inside of its eigenvalue
        wanted = truth[len(truth) - len(values) :]
        assert all(i.lower <= t + slack for i, t in zip(found.intervals, wanted.tolist(), strict=True))
    if which == "SA":
        assert all(i.upper >= t - slack for i, t in zip(found.intervals, truth.tolist(), strict=False))


@each_pair
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("extra", [0, 1, 5, 16.5])
@pytest.mark.parametrize("cost", [1.0, 0.1])
def test_used_up_budget_gives_the_partial_answer(
    solver: str, which: str, k: int, extra: float, cost: float
) -> None:
    counting = Counting(matrix(SPECTRA["clustered"]))
    budget = (2 * k + extra) * cost
    found = SOLVERS[solver].solve(counting.operator(cost), k, which=which, tol=1e-12, max_matvecs=budget)
    assert found.status is hk.Status.MAX_MATVECS
    assert not found.converged
    assert "max_matvecs" in found.message
    assert len(found.values) == k
    assert found.num_matvecs == pytest.approx(cost * counting.columns)
    step_cost = SOLVERS[solver].block(k, which) * cost
    assert budget - step_cost < found.num_matvecs <= budget * (1 + 1e-12)
    check_partial(found, counting.A, which)


@each_pair
@pytest.mark.parametrize("limit", [1e-3, 7.0, 15.0])
def test_time_limit_gives_the_partial_answer(
    solver: str, which: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(matrix(SPECTRA["clustered"]))
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + counting.columns)  # a second for each product
    found = SOLVERS[solver].solve(counting.operator(), 2, which=which, tol=1e-12, time_limit=limit)
    monkeypatch.undo()
    assert found.status is hk.Status.TIME_LIMIT
    assert "time_limit" in found.message
    block = SOLVERS[solver].block(2, which)
    assert found.seconds == counting.columns <= max(limit, max(block, 2) + 2)
    assert counting.columns >= min(limit - block, 4)
    check_partial(found, counting.A, which)


@each_pair
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_product_that_is_not_finite_keeps_what_came_before(
    solver: str, which: str, k: int, bad: float
) -> None:
    block = SOLVERS[solver].block(k, which)
    counting = Counting(matrix(SPECTRA["indefinite"]), good=block + 1, bad=bad)
    found = SOLVERS[solver].solve(counting.operator(), k, which=which)
    assert found.status is hk.Status.NON_FINITE
    assert not found.converged
    assert "NaN or infinity" in found.message
    assert len(found.values) == min(k, (block + 1) // block * block)
    assert found.num_matvecs == counting.columns
    check_partial(found, counting.A, which)


@each_pair
def test_first_product_not_finite_gives_no_pairs(solver: str, which: str) -> None:
    counting = Counting(matrix(SPECTRA["indefinite"]), good=0)
    found = SOLVERS[solver].solve(counting.operator(), which=which)
    assert found.status is hk.Status.NON_FINITE
    assert found.values.shape == (0,)
    assert found.vectors.shape == (100, 0)
    assert found.intervals == ()
    assert found.num_matvecs == counting.columns


@each_solver
def test_last_product_not_finite_keeps_values_from_before(solver: str) -> None:
    A, which = matrix(SPECTRA["indefinite"]), SOLVERS[solver].which[-1]
    whole = Counting(A)
    expected = SOLVERS[solver].solve(whole.operator(), 2, which=which, tol=1e-6)
    counting = Counting(A, good=whole.columns - 1)
    found = SOLVERS[solver].solve(counting.operator(), 2, which=which, tol=1e-6)
    assert found.status is hk.Status.NON_FINITE
    assert torch.allclose(found.values, expected.values, rtol=1e-6, atol=0)
    assert found.num_matvecs == counting.columns


def skewed(relative: float, seed: int) -> Tensor:
    """A matrix with an antisymmetric part of this share of its norm."""
    A = matrix(SPECTRA["indefinite"], seed=seed)
    g = torch.Generator().manual_seed(seed)
    E = torch.randn(A.shape, generator=g, dtype=A.dtype)
    E = E - E.mT
    return A + relative * torch.linalg.matrix_norm(A, 2) * E / torch.linalg.matrix_norm(E, 2)


@each_pair
@pytest.mark.parametrize(
    ("relative", "dtype"),
    [
        (1.0, torch.float64),
        (1e-3, torch.float64),
        (1e-6, torch.float64),
        (1.0, torch.float32),
        (1e-2, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asymmetric_operator_is_refused(
    solver: str, which: str, relative: float, dtype: torch.dtype, seed: int
) -> None:
    op = hk.aslinearoperator(skewed(relative, seed).to(dtype))
    with pytest.raises(hk.NotSymmetricError, match=r"dense matrix.*not symmetric"):
        SOLVERS[solver].solve(op, 2, which=which, seed=seed)


@each_pair
@each_dtype
def test_asymmetry_of_rounding_is_accepted(solver: str, which: str, dtype: torch.dtype) -> None:
    A = skewed(4 * torch.finfo(dtype).eps, 0).to(dtype)
    found = SOLVERS[solver].solve(hk.aslinearoperator(A), 2, which=which, tol=1e-2)
    symmetric = torch.linalg.eigvalsh((A.double() + A.double().mT) / 2)
    wanted = wanted_eigenvalues(symmetric, 2, which)
    if in_reach(solver, A, 2, which, 1e-2):
        assert bool(((found.values - wanted).abs() <= 1e-2 * wanted.abs()).all())


NAN_START = torch.full((100,), float("nan"), dtype=torch.float64)


@each_solver
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"k": 0}, ValueError, "k"),
        ({"k": -1}, ValueError, "k"),
        ({"k": 101}, ValueError, "k"),
        ({"k": 2.0}, TypeError, "k"),
        ({"k": True}, TypeError, "k"),
        ({"which": "SM"}, ValueError, "which"),
        ({"which": None}, ValueError, "which"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"tol": -1e-3}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"tol": float("inf")}, ValueError, "tol"),
        ({"tol": "small"}, TypeError, "tol"),
        ({"atol": -1e-9}, ValueError, "atol"),
        ({"atol": float("nan")}, ValueError, "atol"),
        ({"atol": float("inf")}, ValueError, "atol"),
        ({"atol": "small"}, TypeError, "atol"),
        ({"atol": True}, TypeError, "atol"),
        ({"max_matvecs": 0}, ValueError, "max_matvecs"),
        ({"max_matvecs": -5}, ValueError, "max_matvecs"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs"),
        ({"k": 3, "max_matvecs": 3}, ValueError, "max_matvecs"),
        ({"max_matvecs": float("nan")}, ValueError, "max_matvecs"),
        ({"time_limit": 0}, ValueError, "time_limit"),
        ({"time_limit": -1.0}, ValueError, "time_limit"),
        ({"time_limit": "1m"}, TypeError, "time_limit"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": None}, TypeError, "seed"),
        ({"v0": torch.ones(99, dtype=torch.float64)}, ValueError, "v0"),
        ({"v0": torch.ones(100, 2, 1, dtype=torch.float64)}, ValueError, "v0"),
        ({"v0": torch.ones(100, 0, dtype=torch.float64)}, ValueError, "v0"),
        ({"v0": [1.0] * 100}, ValueError, "v0"),
        ({"v0": torch.ones(100)}, ValueError, "v0"),
        ({"v0": torch.ones(100, dtype=torch.float64, device="meta")}, ValueError, "v0"),
        ({"v0": torch.zeros(100, dtype=torch.float64)}, ValueError, "v0"),
        ({"v0": torch.eye(100, dtype=torch.float64)[:, :2] * torch.tensor([1.0, 0.0])}, ValueError, "v0"),
        ({"v0": NAN_START}, ValueError, "v0"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:40],
)
def test_bad_argument_is_named(
    solver: str, arguments: dict[str, object], error: type[Exception], name: str
) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    with pytest.raises(error, match=rf"^{name}\b"):
        SOLVERS[solver].solve(op, **arguments)


@each_solver
def test_monitor_sees_each_entry_of_the_history(solver: str) -> None:
    seen: list[hk.Progress] = []
    op = hk.aslinearoperator(matrix(SPECTRA["clustered"]))
    which = SOLVERS[solver].which[-1]
    found = SOLVERS[solver].solve(op, which=which, tol=1e-6, monitor=seen.append)
    assert tuple(seen) == found.history
    passes = [entry.num_matvecs for entry in seen]
    assert passes == sorted(set(passes))


@each_solver
def test_what_a_monitor_raises_ends_the_solve(solver: str) -> None:
    def stop(entry: hk.Progress) -> None:
        if entry.num_matvecs >= 3:
            raise KeyboardInterrupt

    counting = Counting(matrix(SPECTRA["clustered"]))
    with pytest.raises(KeyboardInterrupt):
        SOLVERS[solver].solve(counting.operator(), monitor=stop)
    assert counting.columns == (4 if SOLVERS[solver].block(1, "LA") == 2 else 3)
