from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.certified_davidson import CertifiedDavidson, CertifiedDavidsonState
from hvpkit.solvers.common.rayleigh_ritz import select
from hvpkit.solvers.multifidelity import multifidelity, solve_levels
from problems import SPECTRA, matrix, network

TOL = {torch.float32: 1e-2, torch.float64: 1e-4}


def near(A: Tensor, noise: float, cost: float = 0.05, seed: int = 1) -> hk.LinearOperator:
    """A cheap likeness: the matrix with symmetric noise of this share of its norm."""
    g = torch.Generator().manual_seed(seed)
    E = torch.randn(A.shape, generator=g, dtype=torch.float64)
    E = (E + E.mT) / torch.linalg.matrix_norm(E + E.mT, 2)
    scale = noise * float(torch.linalg.matrix_norm(A.double(), 2))
    return replace(hk.aslinearoperator((A.double() + scale * E).to(A.dtype)), cost=cost)


def check(found: hk.EigenResult, A: Tensor, tol: float, k: int = 2, which: str = "BE") -> None:
    truth = torch.linalg.eigvalsh(A.double())
    norm = float(truth.abs().max())
    wanted = truth[select(truth, k, which)]
    rounding = 64 * torch.finfo(A.dtype).eps * norm
    assert found.converged or found.status is hk.Status.ROUNDING_LIMITED
    assert bool(((found.values - wanted).abs() <= (tol * wanted.abs()).clamp(min=rounding)).all())
    vectors = found.vectors.double()
    residuals = torch.linalg.vector_norm(A.double() @ vectors - vectors * found.values, dim=0)
    assert bool(((residuals - found.residual_norms).abs() <= rounding).all())
    gram = vectors.mT @ vectors - torch.eye(len(wanted))
    assert float(gram.abs().max()) <= (1e-10 if A.dtype == torch.float64 else 1e-4)
    for interval, value in zip(found.intervals, found.values.tolist(), strict=True):
        assert interval.lower <= value <= interval.upper


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0, None])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_both_ends_of_every_spectrum_however_good_the_cheap_level(
    spectrum: str, dtype: torch.dtype, noise: float | None, scale: float
) -> None:
    A = (matrix(SPECTRA[spectrum]) * scale).to(dtype)
    levels = [hk.aslinearoperator(A)] if noise is None else [near(A, noise), hk.aslinearoperator(A)]
    check(multifidelity(levels, tol=TOL[dtype], atol=0.0), A, TOL[dtype])


def test_a_good_cheap_level_saves_products_and_a_bad_one_costs_few() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    op = hk.aslinearoperator(A)
    alone = hk.extreme_eigenvalues(op, tol=1e-2).num_matvecs
    assert multifidelity([near(A, 1e-5), op]).num_matvecs < 0.6 * alone
    assert multifidelity([near(A, 5.0), op]).num_matvecs < alone + 10
    assert multifidelity([near(A, 0.5), op]).num_matvecs < 2 * alone


@pytest.mark.parametrize(("which", "place"), [("SA", 0), ("LA", -1)])
@pytest.mark.parametrize("noise", [1e-3, 5.0])
def test_one_end_alone(which: str, place: int, noise: float) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    op, truth = hk.aslinearoperator(A), torch.linalg.eigvalsh(A)[place]
    found = multifidelity([near(A, noise), op], which=which)
    assert found.converged
    assert len(found.values) == 1
    assert float(found.values[0]) == pytest.approx(float(truth), rel=1e-2)
    assert found.intervals[0].lower <= found.values[0] <= found.intervals[0].upper
    both = multifidelity([near(A, noise), op])
    useless = noise > 1  # then it is seen sooner at one end than at the other
    assert found.num_matvecs <= both.num_matvecs + 2 * useless


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize(("k", "which"), [(3, "LA"), (3, "SA"), (5, "BE")])
@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_several_pairs_of_every_spectrum(
    spectrum: str, noise: float, k: int, which: str, dtype: torch.dtype
) -> None:
    A = matrix(SPECTRA[spectrum]).to(dtype)
    if len(A) < k:
        pytest.skip("fewer values than asked for")
    levels, tol = [near(A, noise), hk.aslinearoperator(A)], TOL[dtype]
    found = multifidelity(levels, k, which=which, tol=tol, atol=0.0)
    check(
        found, A, 2 * tol, k, which
    )  # the promise: inside of a bulk the error bounds, estimates, may be short
    truth = torch.linalg.eigvalsh(A.double())
    for interval, exact in zip(found.intervals, truth[select(truth, k, which)].tolist(), strict=True):
        assert exact in interval


def test_certificate_of_several_values_is_of_all_of_them() -> None:
    """Also where a value is multiple, and where the likeness lacks one among them."""
    values = torch.cat([torch.tensor([10.0, 9.0, 9.0, 7.0, 6.0]), torch.linspace(-1.0, 1.0, 600)]).double()
    op, missed, certified = hk.aslinearoperator(torch.diag(values)), 0, 0
    for lacks in (0, 1, 3):
        like = values.clone()
        like[lacks] = 0.0
        cheap = replace(hk.aslinearoperator(torch.diag(like)), cost=0.05)
        for seed in range(20):
            found = multifidelity([cheap, op], 5, which="LA", seed=seed)
            assert found.converged
            right = found.values.flip(0) == pytest.approx(values[:5], rel=1e-2)
            missed += not right
            certified += all(one.kind == "random-start" and one.confidence == 0.99 for one in found.intervals)
            for interval, value, exact in zip(
                found.intervals, found.values.tolist(), values[:5].flip(0).tolist(), strict=True
            ):
                assert (exact in interval) >= right
                assert interval.upper - value <= 0.02 * value * (1 + 1e-6)
    assert missed <= 2  # one of a hundred is allowed
    assert certified >= 54  # the others continued by Lanczos


def test_after_levels_that_do_not_help_bounds_are_those_of_lanczos() -> None:
    A = matrix(SPECTRA["indefinite"])
    seen: list[hk.Progress] = []
    found = solve_levels(
        [near(A, 5.0), hk.aslinearoperator(A)], spent=0.5, confidence=0.9, monitor=seen.append
    )
    assert [interval.kind for interval in found.intervals] == ["random-start", "random-start"]
    assert found.intervals[0].confidence == 0.9
    assert tuple(seen) == found.history
    assert {entry.level for entry in found.history} == {0, 1}
    passes = [entry.num_matvecs for entry in found.history]
    assert passes == sorted(passes)
    assert passes[0] > 0.5
    assert found.num_matvecs == passes[-1] + 1  # that verifies


@pytest.mark.parametrize("limit", ["max_matvecs", "time_limit"])
def test_limits_reach_into_what_follows_the_levels(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(SPECTRA["clustered"])
    levels = [near(A, 5.0), hk.aslinearoperator(A)]
    if limit == "max_matvecs":
        left = multifidelity(levels, tol=1e-6).history
        begin = next(entry.num_matvecs for entry in left if entry.level == 1)
        for budget in (begin + 1, begin + 20):
            found = multifidelity(levels, tol=1e-6, max_matvecs=budget)
            assert found.status is hk.Status.MAX_MATVECS
            assert budget - 6 < found.num_matvecs <= budget
    else:
        spent = 0.0

        def ticking(op: hk.LinearOperator) -> hk.LinearOperator:
            def product(v: Tensor) -> Tensor:
                nonlocal spent
                spent += v.shape[1] * op.cost
                return op.product(v)

            return replace(op, product=product)

        levels = [ticking(level) for level in levels]
        monkeypatch.setattr("time.perf_counter", lambda: 1e6 + spent)  # a second for each product
        found = multifidelity(levels, tol=1e-6, time_limit=40.0)
        monkeypatch.undo()
        assert found.status is hk.Status.TIME_LIMIT
        assert found.history[-1].level == 1
        assert 35 < found.num_matvecs <= 40
    assert len(found.values) == 2


def test_levels_are_left_where_they_do_not_help() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    costs = [0, 0]

    def counted(place: int, op: hk.LinearOperator) -> hk.LinearOperator:
        def product(v: Tensor) -> Tensor:
            costs[place] += v.shape[1]
            return op.product(v)

        return replace(op, product=product)

    useless, good = counted(0, near(A, 0.5, 0.02)), counted(1, near(A, 1e-5, 0.1))
    found = multifidelity([useless, good, hk.aslinearoperator(A)], tol=1e-6)
    check(found, A, 1e-6)
    assert costs[1] > 0
    assert found.num_matvecs == pytest.approx(
        0.02 * costs[0] + 0.1 * costs[1] + round(found.num_matvecs - 0.02 * costs[0] - 0.1 * costs[1])
    )


def test_products_of_all_levels_are_counted_by_their_cost_and_within_the_budget() -> None:
    A, counts = matrix(SPECTRA["clustered"]), [0, 0]

    def counted(place: int, op: hk.LinearOperator) -> hk.LinearOperator:
        def product(v: Tensor) -> Tensor:
            counts[place] += v.shape[1]
            return op.product(v)

        return replace(op, product=product)

    levels = [counted(0, near(A, 1e-2)), counted(1, hk.aslinearoperator(A))]
    for budget in (6.0, 9.5, 20.0):
        counts[:] = [0, 0]
        found = multifidelity(levels, tol=1e-12, max_matvecs=budget)
        assert found.status is hk.Status.MAX_MATVECS
        assert found.num_matvecs == pytest.approx(0.05 * counts[0] + counts[1])
        assert budget - 3 < found.num_matvecs <= budget
        assert len(found.values) == 2
        assert "max_matvecs" in found.message


def test_an_earlier_result_is_a_start_that_loses_nothing() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    first = multifidelity([near(A, 1e-3, cost=0.5), hk.aslinearoperator(A)])
    moved = A + 1e-4 * near(A, 1.0, seed=2).product(torch.eye(len(A), dtype=A.dtype)) / 80
    again = [near(moved, 1e-3, cost=0.5), hk.aslinearoperator(moved)]
    warm = [multifidelity(again, v0=first, seed=seed) for seed in range(8)]
    for found in warm:
        check(found, moved, 1e-2)
    same = multifidelity(again, v0=first.vectors)
    assert torch.equal(same.vectors, warm[0].vectors)
    assert not torch.equal(multifidelity(again).vectors, warm[0].vectors)


def test_level_that_costs_nothing() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    found = multifidelity([near(A, 1e-3, cost=0.0), hk.aslinearoperator(A)])
    check(found, A, 1e-2)
    assert found.num_matvecs == round(found.num_matvecs) > 2


def test_samples_of_a_network() -> None:
    problem = network("mlp", num_examples=400)
    H = hk.hessian(problem.objective, problem.params, problem.data)
    truth = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=torch.float64))
    for seed in range(5):
        coarse = H.coarsen(100, seed=seed)
        found = multifidelity([coarse.coarsen(50, seed=seed), coarse, H], tol=1e-2, seed=seed)
        assert found.converged
        assert found.values.tolist() == pytest.approx([float(truth[0]), float(truth[-1])], rel=1e-2)


@pytest.mark.parametrize("good", [0, 1, 4])
def test_product_that_is_not_finite_keeps_what_came_before(good: int) -> None:
    A, count = matrix(SPECTRA["indefinite"]), [0]

    def product(v: Tensor) -> Tensor:
        count[0] += v.shape[1]
        return A @ v if count[0] <= good else torch.full_like(v, float("nan"))

    op = replace(hk.aslinearoperator(A), product=product)
    found = multifidelity([near(A, 0.1), op], tol=1e-10)
    assert found.status is hk.Status.NON_FINITE
    assert "NaN or infinity" in found.message
    assert len(found.values) == min(good, 2)


def test_cheap_level_that_is_not_finite_is_done_without() -> None:
    A = matrix(SPECTRA["indefinite"])
    broken = replace(near(A, 0.1), product=lambda v: torch.full_like(v, float("nan")))
    check(multifidelity([broken, hk.aslinearoperator(A)], tol=1e-4), A, 1e-4)


def test_basis_that_is_full_is_cut_and_the_solve_goes_on() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    check(multifidelity([near(A, 0.3), hk.aslinearoperator(A)], tol=1e-4, ncv=10), A, 1e-4)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_intervals_rest_on_random_starts_and_are_as_narrow_as_promised(certify: bool, noise: float) -> None:
    A = matrix(SPECTRA["indefinite"])
    levels, truth = [near(A, noise), hk.aslinearoperator(A)], torch.linalg.eigvalsh(A)
    for seed in range(10):
        found = multifidelity(levels, tol=1e-2, certify=certify, confidence=0.95, seed=seed)
        assert found.converged
        for interval, value, exact in zip(
            found.intervals, found.values.tolist(), truth[[0, -1]].tolist(), strict=True
        ):
            assert (interval.kind, interval.confidence) == ("random-start", 0.95)
            assert exact in interval
            outside = max(value - interval.lower, interval.upper - value)
            assert outside <= (1 if certify else 2) * 1e-2 * abs(value) * (1 + 1e-6)


def lacking(low: float, next_low: float) -> tuple[hk.LinearOperator, hk.LinearOperator]:
    """An operator, and a likeness that has 0 where the operator has its lowest eigenvalue."""
    values = torch.cat([torch.tensor([low, next_low, 5.0, 10.0]), torch.linspace(-0.4, 1.0, 600)]).double()
    lacks = values.clone()
    lacks[0] = 0.0
    return replace(hk.aslinearoperator(torch.diag(lacks)), cost=0.05), hk.aslinearoperator(torch.diag(values))


@pytest.mark.parametrize(("low", "next_low"), [(-1.0, -0.95), (-1.0, -0.7), (-1.0, -0.45)])
def test_what_the_likeness_lacks_is_found_with_the_probability_stated(low: float, next_low: float) -> None:
    levels, wrong = lacking(low, next_low), 0
    for seed in range(40):
        found = multifidelity(levels, seed=seed)
        assert found.converged
        right = abs(float(found.values[0]) - low) <= 1e-2 * abs(low)
        assert (low in found.intervals[0]) >= right
        wrong += not right
    assert wrong <= 1  # one of a hundred is allowed


@pytest.mark.parametrize("noise", [0.007, 0.014])
@pytest.mark.parametrize("gap", [0.01, 0.017, 0.03])
def test_outermost_of_eigenvalues_that_are_near_each_other(gap: float, noise: float) -> None:
    low = -1 + gap * torch.arange(8, dtype=torch.float64)
    A = matrix([*low.tolist(), *torch.linspace(-0.6, 1, 389).tolist(), 8.0, 12.0, 30.0])
    off = 0
    for seed in range(10):
        found = multifidelity([near(A, noise, seed=seed), hk.aslinearoperator(A)], seed=seed)
        assert found.converged
        assert -1.0 in found.intervals[0]
        off += float(found.values[0]) > -0.99
    assert off <= 1  # by the start


@pytest.mark.parametrize("values", [[-1.0, 8.0], [-1.0, 30.0]])
def test_large_low_end_of_a_sample_is_left_to_lanczos(values: list[float], tmp_path: Path) -> None:
    A = matrix([*torch.linspace(-0.6, 0.8, 200).tolist(), *values])
    op, file = hk.aslinearoperator(A), tmp_path / "solve.pt"
    found = solve_levels([near(A, 1e-3), op], large_end=0.1, spent=0.5)
    check(found, A, 1e-2)
    is_large = -values[0] > 0.1 * values[1]
    assert (found.history[-1].level == 1) == is_large
    if is_large:  # no full-data matvec was in vain
        alone = hk.lanczos(op, 2, which="BE", tol=1e-2)
        assert 0.5 < found.num_matvecs - alone.num_matvecs < 0.5 + 60 * 0.05
        torch.testing.assert_close(found.values, alone.values)

    def interrupted(entry: hk.Progress) -> None:
        if entry.num_matvecs > found.num_matvecs / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve_levels([near(A, 1e-3), op], large_end=0.1, spent=0.5, checkpoint=file, monitor=interrupted)
    again = solve_levels([near(A, 1e-3), op], large_end=0.1, spent=0.5, checkpoint=file)
    torch.testing.assert_close(again.values, found.values, rtol=0, atol=0)


def test_direction_that_gains_more_than_predicted_leaves_as_much_more_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, short = CertifiedDavidson._update, []

    def watched(solver: CertifiedDavidson, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        after, place = update(solver, state), state.target
        if place is not None and state.expected > 0:
            moved = abs(after.ends[place].value - state.ends[place].value)
            factor, known = max(1.0, moved / state.expected), state.ends[place].error
            if moved < known < float("inf"):
                assert after.ends[place].error <= factor * known - moved + 1e-12
                short.append(after.ends[place].error > known - moved + 1e-12)
        return after

    monkeypatch.setattr(CertifiedDavidson, "_update", watched)
    A = matrix(SPECTRA["bulk_with_outliers"])
    for seed in range(6):
        assert multifidelity([near(A, 0.03, seed=seed), hk.aslinearoperator(A)], seed=seed).converged
    assert any(short)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_monitor_is_told_of_begin_and_end_whatever_the_levels(num_levels: int) -> None:
    class Bar:
        def __init__(self) -> None:
            self.told: list[str] = []

        def __call__(self, _: hk.Progress) -> None:
            self.told.append("entry")

        def begin(self) -> None:
            self.told.append("begin")

        def end(self) -> None:
            self.told.append("end")

    A, bar = matrix(SPECTRA["indefinite"]), Bar()
    levels = [near(A, 5.0), hk.aslinearoperator(A)][-num_levels:]
    found = multifidelity(levels, monitor=bar)
    assert bar.told == ["begin", *["entry"] * len(found.history), "end"]


def test_message_says_that_the_bound_is_an_estimate() -> None:
    A = matrix(SPECTRA["indefinite"])
    assert "estimate" in multifidelity([near(A, 1e-3), hk.aslinearoperator(A)]).message
    assert "estimate" not in multifidelity([hk.aslinearoperator(A)]).message


def test_same_seed_gives_the_same_bits() -> None:
    A = matrix(SPECTRA["indefinite"])
    levels = [near(A, 0.1), hk.aslinearoperator(A)]
    first, again, other = (multifidelity(levels, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_asymmetric_operator_is_refused() -> None:
    A = matrix(SPECTRA["indefinite"])
    B = A + 0.1 * torch.triu(torch.ones_like(A), 1)
    with pytest.raises(hk.NotSymmetricError):
        multifidelity([near(A, 0.1), hk.aslinearoperator(B)])


@pytest.mark.parametrize(
    ("levels", "error"),
    [
        ([], TypeError),
        ([torch.eye(3)], TypeError),
        (hk.aslinearoperator(torch.eye(3)), TypeError),
        ([hk.aslinearoperator(torch.eye(2)), hk.aslinearoperator(torch.eye(3))], ValueError),
        (
            [replace(hk.aslinearoperator(torch.eye(3)), cost=2.0), hk.aslinearoperator(torch.eye(3))],
            ValueError,
        ),
    ],
    ids=str,
)
def test_bad_levels_are_named(levels: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^levels"):
        multifidelity(levels)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ncv": 2},
        {"ncv": 13, "k": 5, "which": "LA"},
        {"k": 0},
        {"num_inner": 0},
        {"tol": -1.0},
        {"v0": torch.ones(2)},
        {"confidence": 7.0},
        {"which": "LM"},
    ],
    ids=str,
)
def test_bad_argument_is_named(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}"):
        multifidelity([hk.aslinearoperator(torch.eye(30))], **arguments)
