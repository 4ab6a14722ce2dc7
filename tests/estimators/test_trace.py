from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

import hvpkit as hk
from estimators.spread import SPREAD, Counting, calibration, diagonal_operator, z_score
from hvpkit.estimators import sketch
from hvpkit.estimators.sampling import make_plan
from hvpkit.estimators.trace import evaluate, trace
from hvpkit.results.estimate import Estimate
from problems import SPECTRA, matrix

METHODS = ("hutchinson", "hutch++", "xtrace")
PROBES = ("rademacher", "gaussian", "sphere")

each_method = pytest.mark.parametrize("method", METHODS)
each_probe = pytest.mark.parametrize("probe", PROBES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

EIGENVALUES = [-3.0, *torch.linspace(-1, 1, 27).tolist(), 4.0, 8.0]


def over_seeds(op: hk.LinearOperator, count: int, **options: object) -> tuple[Tensor, Tensor]:
    found = [trace(op, seed=seed, block_size=100, **options) for seed in range(count)]
    return torch.tensor([e.value for e in found]), torch.tensor([e.stderr for e in found])


@each_method
@each_probe
def test_unbiased_over_500_seeds_with_calibrated_standard_errors(method: str, probe: str) -> None:
    op = hk.aslinearoperator(matrix(EIGENVALUES))
    values, stderrs = over_seeds(op, 500, method=method, probe=probe, num_matvecs=24)
    assert abs(z_score(values, sum(EIGENVALUES))) < 3.5
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]


def test_the_two_checks_above_see_a_bias_and_a_wrong_error() -> None:
    op = hk.aslinearoperator(matrix(EIGENVALUES))
    values, stderrs = over_seeds(op, 500, method="hutchinson", num_matvecs=24)
    assert abs(z_score(values + 0.3 * values.std(), sum(EIGENVALUES))) > 3.5
    assert calibration(values, stderrs / 2) < SPREAD[0]


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_xtrace_knows_what_its_samples_share(decay: float) -> None:
    op = diagonal_operator(decay ** torch.arange(100, dtype=torch.float64))
    values, stderrs = over_seeds(op, 300, method="xtrace", probe="gaussian", num_matvecs=40)
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]


@each_method
@each_probe
@each_dtype
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_its_standard_error_on_every_spectrum(
    method: str, probe: str, dtype: torch.dtype, spectrum: str
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    budget = 30 if len(A) > 30 else 14
    counting = Counting(A)
    found = trace(counting.operator(), method=method, probe=probe, num_matvecs=budget, seed=3)
    rounding = 30 * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(A.double())) * len(A) ** 0.5
    unlikely = stats.t.isf(1e-4, found.num_samples - 1) if found.num_samples > 1 else 0.0
    assert abs(found.value - float(A.double().trace())) <= unlikely * found.stderr + rounding
    assert found.num_matvecs == sum(counting.widths) <= budget
    assert found.status is (hk.Status.INVARIANT_SUBSPACE if len(A) <= 14 else hk.Status.COMPLETED)
    assert found.message
    if len(A) > 14:
        assert found.samples.shape == (found.num_samples,)
        assert float(found.samples.mean()) == pytest.approx(found.value, rel=1e-6, abs=rounding)


@each_method
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("spectrum", ["indefinite", "rank_deficient", "n1", "zero"])
def test_scale_of_the_operator_does_not_matter(
    method: str, dtype: torch.dtype, scale: float, spectrum: str
) -> None:
    A = matrix(SPECTRA[spectrum])
    plain, scaled = (
        trace(hk.aslinearoperator((A * s).to(dtype)), method=method, probe="sphere", num_matvecs=14)
        for s in (1.0, scale)
    )
    size = abs(float(A.trace())) + plain.stderr
    assert scaled.value / scale == pytest.approx(plain.value, abs=1e5 * torch.finfo(dtype).eps * size)
    assert scaled.stderr / scale == pytest.approx(plain.stderr, abs=1e5 * torch.finfo(dtype).eps * size)


def root_mean_square_error(method: str, num_matvecs: int, eigenvalues: Tensor) -> float:
    values, _ = over_seeds(
        diagonal_operator(eigenvalues), 40, method=method, probe="gaussian", num_matvecs=num_matvecs
    )
    return float((values - eigenvalues.sum()).square().mean().sqrt())


@pytest.mark.parametrize(("method", "order"), [("hutchinson", 0.5), ("hutch++", 1.0), ("xtrace", 1.0)])
def test_error_falls_with_the_promised_order_on_an_algebraic_spectrum(method: str, order: float) -> None:
    eigenvalues = 1 / torch.arange(1, 1001, dtype=torch.float64)
    few, many = (root_mean_square_error(method, m, eigenvalues) for m in (24, 192))
    assert math.log(few / many) / math.log(8) == pytest.approx(order, abs=0.2)


def test_hutchpp_and_xtrace_beat_hutchinson_by_orders_on_a_decaying_spectrum() -> None:
    eigenvalues = 0.7 ** torch.arange(200, dtype=torch.float64)
    plain, plus, xtrace = (root_mean_square_error(method, 60, eigenvalues) for method in METHODS)
    assert plus < 1e-2 * plain
    assert xtrace < 1e-1 * plus


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@each_probe
def test_exact_once_the_basis_spans_the_range(method: str, probe: str) -> None:
    A = matrix(SPECTRA["rank_deficient"])
    found = trace(hk.aslinearoperator(A), method=method, probe=probe, num_matvecs=60)
    assert found.value == pytest.approx(float(A.trace()), rel=1e-12)
    assert found.stderr < 1e-12 * float(A.trace())


@each_method
def test_all_columns_are_multiplied_where_the_budget_has_room(method: str) -> None:
    A, counting = matrix(EIGENVALUES), Counting(matrix(EIGENVALUES))
    found = trace(counting.operator(), method=method, num_matvecs=30, block_size=7)
    assert found.value == pytest.approx(float(A.trace()), rel=1e-13)
    assert found.stderr == 0
    assert found.converged
    assert counting.widths == [2, 7, 7, 7, 7]


def test_some_columns_alone_are_an_unbiased_estimate_with_their_error() -> None:
    A = matrix(EIGENVALUES)
    found = [
        trace(Counting(A, good=20).operator(), num_matvecs=30, block_size=5, seed=seed) for seed in range(200)
    ]
    values, stderrs = (torch.tensor([getattr(e, name) for e in found]) for name in ("value", "stderr"))
    assert {e.num_samples for e in found} == {20}
    assert abs(z_score(values, float(A.trace()))) < 3.5
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]


@each_method
@pytest.mark.parametrize("cost", [0.3, 1.0, 2.0])
def test_budget_in_full_data_products_is_spent_and_never_exceeded(method: str, cost: float) -> None:
    for budget in (20.0, 23.7):
        counting = Counting(matrix(SPECTRA["bulk_with_outliers"]))
        found = trace(counting.operator(cost), method=method, num_matvecs=budget, block_size=4)
        assert found.num_matvecs == pytest.approx(sum(counting.widths) * cost)
        assert budget - 3 * cost < found.num_matvecs <= budget


@each_method
def test_probes_of_a_block_share_products_and_its_size_does_not_change_the_value(method: str) -> None:
    A = matrix(SPECTRA["indefinite"])
    found = {}
    for block_size in (1, 4, 100):
        counting, budget = Counting(A), 12 * sketch.COSTS[method]
        found[block_size] = trace(
            counting.operator(), method=method, num_matvecs=budget, block_size=block_size
        )
        columns = {"hutchinson": [1], "hutch++": [1, 2], "xtrace": [1, 1]}[method]
        width = min(block_size, 12)
        assert counting.widths == [c * width for c in columns] * (12 // width)
    assert found[1].value == pytest.approx(found[4].value, rel=1e-10)
    assert found[1].value == pytest.approx(found[100].value, rel=1e-10)


@each_method
def test_tol_stops_on_a_standard_error_that_holds(method: str) -> None:
    eigenvalues, tol = torch.linspace(0.5, 1.5, 2000, dtype=torch.float64), 4e-3
    found = [
        trace(
            diagonal_operator(eigenvalues),
            method=method,
            probe="gaussian",
            tol=tol,
            num_matvecs=1500,
            seed=seed,
        )
        for seed in range(20)
    ]
    errors = torch.tensor([e.value for e in found]) / eigenvalues.sum() - 1
    assert all(e.converged and e.stderr <= tol * abs(e.value) for e in found)
    assert all(e.num_matvecs < 900 for e in found)
    assert float(errors.square().mean().sqrt()) < 1.3 * tol
    assert float(errors.abs().max()) > 0.2 * tol


def test_tol_that_the_budget_does_not_allow_is_a_status() -> None:
    found = trace(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), tol=1e-6, num_matvecs=60)
    assert found.status is hk.Status.MAX_MATVECS
    assert "raise num_matvecs or tol" in found.message
    assert not found.converged
    without = trace(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), num_matvecs=60)
    assert without.status is hk.Status.COMPLETED
    assert not without.converged
    assert without.value == found.value
    assert found.stderr > 1e-6 * abs(found.value)


def test_samples_that_agree_by_chance_do_not_stop_before_ten() -> None:
    A = torch.eye(100, dtype=torch.float64)
    A[:2, :2] = torch.tensor([[1.0, 40.0], [40.0, 1.0]])
    first = [
        trace(hk.aslinearoperator(A), method="hutchinson", num_matvecs=3, seed=seed) for seed in range(20)
    ]
    assert any(e.stderr == 0 and abs(e.value - 100) > 70 for e in first)
    for seed in range(20):
        found = trace(
            hk.aslinearoperator(A), method="hutchinson", tol=0.1, num_matvecs=90, block_size=3, seed=seed
        )
        assert found.num_samples >= 10
        assert abs(found.value - 100) <= 5 * found.stderr


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_ends_with_the_value_of_the_probes_before(method: str, bad: float) -> None:
    A, each = matrix(SPECTRA["indefinite"]), sketch.COSTS[method]
    counting = Counting(A, good=8 * each + 3, bad=bad)
    found = trace(counting.operator(), method=method, num_matvecs=20 * each, block_size=4)
    before = trace(hk.aslinearoperator(A), method=method, num_matvecs=8 * each, block_size=4)
    assert found.status is hk.Status.NON_FINITE
    assert "NaN or infinity" in found.message
    assert (found.value, found.stderr, found.num_samples) == (before.value, before.stderr, 8)
    nothing = trace(Counting(A, good=0, bad=bad).operator(), method=method, num_matvecs=60)
    assert math.isnan(nothing.value)
    assert nothing.stderr == math.inf


@each_method
def test_same_seed_gives_the_same_bits_and_leaves_the_global_generator(method: str) -> None:
    op, state = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), torch.get_rng_state()
    one, same, other = (trace(op, method=method, num_matvecs=30, seed=seed).value for seed in (5, 5, 6))
    assert one == same != other
    drawn = [
        trace(op, method=method, num_matvecs=30, seed=torch.Generator().manual_seed(1)).value
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_run_that_is_resumed_from_its_state_repeats_exactly(method: str) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    options = {"num_matvecs": 36, "tol": None, "block_size": 2, "seed": 7}
    plan = make_plan(op, method, sketch.COSTS, **options)
    state = sketch.init(op, plan)
    for _ in range(2):
        state = sketch.step(op, plan, state)
    resumed = copy.deepcopy(state)
    while state.num_probes < plan.num_probes:
        state, resumed = sketch.step(op, plan, state), sketch.step(op, plan, resumed)
    whole = trace(op, method=method, **options)
    for end in (state, resumed):
        found = evaluate(op, plan, end, plan.num_probes)
        assert float(found.value) * float(end.scale) == whole.value


def test_monitor_sees_the_value_with_its_error_and_what_it_cost() -> None:
    seen: list[hk.EstimateProgress] = []
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    found = trace(op, num_matvecs=90, block_size=2, monitor=seen.append)
    assert tuple(seen) == found.history
    assert all(a.num_matvecs < b.num_matvecs for a, b in itertools.pairwise(seen))
    assert (seen[-1].value, seen[-1].stderr) == (found.value, found.stderr)
    assert seen[-1].num_matvecs == found.num_matvecs


@pytest.mark.parametrize(("time_limit", "num_samples"), [(0.5, 2), (10.0, 6), (29.0, 6), (30.0, 10)])
def test_time_limit_is_a_status_with_what_was_found_until_then(
    time_limit: float, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, spent = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), 0

    def product(v: Tensor) -> Tensor:
        nonlocal spent
        spent += v.shape[1]
        return op.product(v)

    ticking = replace(op, product=product)
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + spent)  # a second for each product
    found = trace(ticking, num_matvecs=90, block_size=4, time_limit=time_limit)
    monkeypatch.undo()
    assert found.status is hk.Status.TIME_LIMIT
    assert found.num_samples == num_samples
    assert math.isfinite(found.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "hutch"}, "method"),
        ({"probe": "normal"}, "probe"),
        ({"num_matvecs": 0}, "num_matvecs"),
        ({"num_matvecs": 5}, "num_matvecs"),
        ({"num_matvecs": math.nan}, "num_matvecs"),
        ({"tol": 0.0}, "tol"),
        ({"tol": -1.0}, "tol"),
        ({"block_size": 0}, "block_size"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], name: str) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match=rf"^{name}"):
        trace(op, **options)


def test_what_is_no_operator_or_no_number_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"A must be a tensor.*got float"):
        trace(3.0)
    assert trace(torch.eye(3)).value == pytest.approx(3)
    with pytest.raises(TypeError, match=r"^block_size"):
        trace(hk.aslinearoperator(torch.eye(3)), block_size=1.5)


def test_repr_says_value_error_and_cost() -> None:
    found: Estimate[float] = trace(hk.aslinearoperator(torch.eye(3)))
    assert repr(found) == "<Estimate: 3 ± 0, invariant-subspace, 3 samples, 3 products>"
