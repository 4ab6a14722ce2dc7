from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from finite_sums import Tally, mean_of, scattered
from hvpkit.solvers.baselines.oja import oja
from hvpkit.solvers.baselines.power import accelerated_power
from hvpkit.solvers.baselines.stochastic_power import stochastic_power
from problems import SPECTRA
from variants import explained

ENDS = ("LA", "SA", "LM", "BE")
SOLVERS: dict[str, tuple[Callable[..., hk.EigenResult], tuple[str, ...]]] = {
    "stochastic_power": (stochastic_power, ENDS),
    "variance_reduced": (partial(accelerated_power, variance_reduced=True), ENDS),
    "oja": (oja, ("LA", "SA", "BE")),
}
PAIRS = [(name, which) for name, (_, offered) in SOLVERS.items() for which in offered]
OUTLIERS = {
    ("indefinite", "LA"),
    ("negative_dominant", "SA"),
    ("bulk_with_outliers", "LA"),
    ("multiple", "LA"),
}
BUDGET = 60

each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_pair = pytest.mark.parametrize(("solver", "which"), PAIRS)


@cache
def matrices(spectrum: str, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> Tensor:
    return scattered(SPECTRA[spectrum], noise=noise, dtype=dtype)


def check(found: hk.EigenResult, A: Tensor, k: int, which: str, tol: float) -> None:
    """True residuals and orthonormal vectors always; the wanted values where it says so."""
    dense, eps = A.double(), torch.finfo(A.dtype).eps
    truth = torch.linalg.eigvalsh(dense)
    rounding = 64 * eps * float(truth.abs().max())
    assert found.values.shape == (k,)
    vectors = found.vectors.double()
    assert float((vectors.mT @ vectors - torch.eye(k)).abs().max()) <= 1e3 * eps
    residuals = torch.linalg.vector_norm(dense @ vectors - vectors * found.values, dim=0)
    assert bool(((residuals - found.residual_norms).abs() <= rounding).all())
    if which == "LM":
        picked = truth[truth.abs().argsort(descending=True)[:k]].sort().values
    else:
        low = {"LA": 0, "SA": k, "BE": k // 2}[which]
        picked = torch.cat([truth[:low], truth[len(truth) - k + low :]])
    if found.converged:
        values = found.values
        if which == "LM":  # of two that are as large either is right
            values, picked = values.abs().sort().values, picked.abs().sort().values
        assert bool(((values - picked).abs() <= (tol * picked.abs()).clamp(min=rounding)).all())
    else:
        assert found.status in (hk.Status.MAX_MATVECS, hk.Status.ROUNDING_LIMITED)
        assert bool(((found.values >= truth[0] - rounding) & (found.values <= truth[-1] + rounding)).all())


@each_pair
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_answers_are_right_or_say_that_they_are_not(
    solver: str, which: str, spectrum: str, dtype: torch.dtype
) -> None:
    parts = matrices(spectrum, dtype)
    k = min(len(parts[0]), 2 if which == "BE" else 1)
    found = SOLVERS[solver][0](mean_of(parts), k, which=which, tol=1e-2, atol=0.0, max_matvecs=BUDGET)
    check(found, parts.mean(0), k, which, 1e-2)
    if (spectrum, which) in OUTLIERS:
        assert found.converged
        assert found.num_matvecs <= 20


@each_pair
@pytest.mark.parametrize("k", [1, 3])
def test_minibatches_count_by_their_share_and_the_budget_holds(solver: str, which: str, k: int) -> None:
    for budget in (2 * k, 2 * k + 1.5, 17.0 * k):
        tally = Tally(mean_of(matrices("clustered")))
        found = SOLVERS[solver][0](tally.operator(), k, which=which, tol=1e-12, max_matvecs=budget)
        assert found.status is hk.Status.MAX_MATVECS
        assert found.num_matvecs == pytest.approx(tally.cost)
        assert budget - k < found.num_matvecs <= budget * (1 + 1e-12)
        check(found, matrices("clustered").mean(0), k, which, 1e-12)


@each_pair
def test_the_same_seed_gives_the_same_bits_and_each_minibatch_another_one(solver: str, which: str) -> None:
    op, solve = mean_of(matrices("indefinite")), SOLVERS[solver][0]
    tallies = [Tally(op) for _ in range(3)]
    first, again, other = (
        solve(tally.operator(), which=which, seed=seed, tol=1e-9, max_matvecs=30)
        for tally, seed in zip(tallies, (7, 7, 8), strict=True)
    )
    assert torch.equal(first.vectors, again.vectors)
    assert first.values.tolist() == again.values.tolist()
    assert first.num_matvecs == again.num_matvecs
    assert not torch.equal(first.vectors, other.vectors)
    assert tallies[0].seeds == tallies[1].seeds
    assert len(set(tallies[0].seeds + tallies[2].seeds)) == len(tallies[0].seeds + tallies[2].seeds) > 10


@each_pair
@pytest.mark.parametrize("bad", [1, 2, 5, 20, 40])
@pytest.mark.parametrize("once", [False, True])
def test_nan_in_a_minibatch_or_not_ends_with_what_came_before(
    solver: str, which: str, bad: int, once: bool
) -> None:
    tally = Tally(mean_of(matrices("clustered")), bad=lambda n: n == bad or (n > bad and not once))
    blamed: list[Tensor] = []
    op = explained(tally.operator(), lambda vector: f"batch {blamed.append(vector)}")
    found = SOLVERS[solver][0](op, 2, which=which, tol=1e-12, max_matvecs=200)
    assert found.status is hk.Status.NON_FINITE
    assert found.message == f"{hk.Status.NON_FINITE.advice}; batch None"
    if solver == "variance_reduced":  # minibatches are multiplied by another vector
        assert torch.isfinite(blamed[0]).all()
    else:
        assert torch.equal(blamed[0], tally.suspects[0])
    assert len(found.values) == (2 if bad > 1 else 0)
    truth = torch.linalg.eigvalsh(matrices("clustered").mean(0))
    distances = (found.values[:, None] - truth).abs().min(dim=1).values
    assert bool((distances <= found.residual_norms + 1e-12).all())


@each_solver
def test_time_limit_gives_the_partial_answer(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(mean_of(matrices("clustered")))
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + tally.cost)  # a second for each full-data product
    found = SOLVERS[solver][0](tally.operator(), which="SA", tol=1e-12, time_limit=15.0)
    monkeypatch.undo()
    assert found.status is hk.Status.TIME_LIMIT
    assert 12 <= found.seconds <= 15
    assert found.num_matvecs == pytest.approx(found.seconds)


@each_solver
def test_only_full_data_is_looked_at(solver: str) -> None:
    seen: list[hk.Progress] = []
    tally = Tally(mean_of(matrices("clustered")))
    found = SOLVERS[solver][0](tally.operator(), which="SA", tol=1e-12, max_matvecs=40, monitor=seen.append)
    assert tuple(seen) == found.history
    num_full = sum(examples == 64 for examples, _ in tally.products)
    assert len(seen) in (
        num_full - 1,
        num_full,
    )  # the last is the check; a limit may come before a look is due


@each_solver
def test_asymmetric_minibatches_are_refused(solver: str) -> None:
    parts = matrices("indefinite").clone()
    parts[:, 0, 1] += 3.0
    with pytest.raises(hk.NotSymmetricError, match="not symmetric"):
        SOLVERS[solver][0](mean_of(parts), 2, which="SA", tol=1e-6)


@each_solver
def test_an_operator_without_minibatches_is_refused(solver: str) -> None:
    with pytest.raises(TypeError, match=r"^op must be able to draw minibatches of itself"):
        SOLVERS[solver][0](hk.aslinearoperator(matrices("n3")[0]))


@each_solver
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"k": 0}, "k"),
        ({"which": "SM"}, "which"),
        ({"tol": 0.0}, "tol"),
        ({"max_matvecs": 1}, "max_matvecs"),
        ({"v0": torch.zeros(3, dtype=torch.float64)}, "v0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_argument_is_named(solver: str, arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SOLVERS[solver][0](mean_of(matrices("n3")), **arguments)
