from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import hvpkit as hk
from estimators.spread import SPREAD, Counting, calibration, diagonal_operator
from hvpkit.estimators import diagonal as module
from hvpkit.estimators import sketch
from hvpkit.estimators.diagonal import diagonal
from hvpkit.estimators.sampling import make_plan
from oracles import hessian_by_double_backward, relative_error
from problems import SPECTRA, matrix, network

METHODS = ("hutchinson", "xdiag")
EIGENVALUES = [-3.0, *torch.linspace(-1, 1, 27).tolist(), 4.0, 8.0]

each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def over_seeds(A: Tensor, count: int, **options: object) -> tuple[Tensor, Tensor]:
    op = hk.aslinearoperator(A)
    found = [diagonal(op, seed=seed, block_size=100, **options) for seed in range(count)]
    return torch.stack([e.value for e in found]), torch.stack([e.stderr for e in found])


@each_method
def test_unbiased_over_500_seeds_with_calibrated_standard_errors(method: str) -> None:
    A = matrix(EIGENVALUES)
    values, stderrs = over_seeds(A, 500, method=method, num_matvecs=20)
    z = (values.mean(dim=0) - A.diagonal()) / (values.std(dim=0) / 500**0.5)
    assert float(z.abs().max()) < stats.norm.isf(1e-3 / len(A))
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]
    entries = (stderrs.square().mean(dim=0) / values.var(dim=0)).sqrt()
    assert 0.7 < float(entries.min()) < float(entries.max()) < 1.4
    biased = (values.mean(dim=0) + 0.3 * values.std(dim=0) - A.diagonal()) / (values.std(dim=0) / 500**0.5)
    assert float(biased.abs().max()) > stats.norm.isf(1e-3 / len(A))


def test_xdiag_knows_what_its_samples_share() -> None:
    values, stderrs = over_seeds(matrix(SPECTRA["clustered"]), 60, method="xdiag", num_matvecs=90)
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]


@each_method
@each_dtype
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_its_standard_errors_on_every_spectrum(method: str, dtype: torch.dtype, spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    counting, budget = Counting(A), 30 if len(A) > 30 else 14
    found = diagonal(counting.operator(), method=method, num_matvecs=budget)
    truth, norm = A.double().diagonal(), float(torch.linalg.matrix_norm(A.double()))
    assert found.value.shape == found.stderr.shape == (len(A),)
    assert found.value.dtype == dtype
    assert found.samples.shape == (0, len(A))
    error, rounding = found.value.double() - truth, 100 * torch.finfo(dtype).eps * norm
    assert float(error.norm()) <= 3 * float(found.stderr.double().norm()) + rounding
    if method == "hutchinson":
        unlikely = stats.t.isf(1e-6, max(found.num_samples - 1, 1))
        assert bool((error.abs() <= unlikely * found.stderr.double() + rounding).all())
    assert found.num_matvecs == sum(counting.widths) <= budget
    assert found.status is (hk.Status.INVARIANT_SUBSPACE if len(A) <= 14 else hk.Status.COMPLETED)


@each_method
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_operator_does_not_matter(method: str, dtype: torch.dtype, scale: float) -> None:
    A = matrix(SPECTRA["indefinite"])
    plain, scaled = (
        diagonal(hk.aslinearoperator((A * s).to(dtype)), method=method, num_matvecs=20) for s in (1.0, scale)
    )
    for name in ("value", "stderr"):
        ratio = getattr(scaled, name).double() / scale
        assert relative_error(ratio, getattr(plain, name)) < 1e4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("count", [4, 7])
def test_xdiag_is_the_mean_over_the_bases_of_the_other_probes(count: int) -> None:
    A = matrix(EIGENVALUES)
    op = hk.aslinearoperator(A)
    plan = make_plan(op, "xtrace", sketch.COSTS, num_matvecs=14, tol=None, block_size=7, seed=2)
    state = sketch.step(op, plan, sketch.init(op, plan, keep_images=True))
    found = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        basis, _ = torch.linalg.qr(A @ state.probes[others].mT)
        image = A @ state.probes[i]
        left = image - basis @ (basis.mT @ image)
        found.append((basis @ (basis.mT @ A)).diagonal() + state.probes[i] * left)
    mean = module.evaluate_xdiag(op, plan, state, count)
    assert relative_error(float(state.scale) * mean.value, torch.stack(found).mean(dim=0)) < 1e-12


def test_xdiag_is_exact_once_the_basis_spans_the_range() -> None:
    A = matrix(SPECTRA["rank_deficient"])
    found = diagonal(hk.aslinearoperator(A), method="xdiag", num_matvecs=60)
    assert relative_error(found.value, A.diagonal()) < 1e-12
    assert float(found.stderr.max()) < 1e-12


def test_xdiag_beats_signs_by_orders_on_a_decaying_spectrum() -> None:
    A = matrix((0.6 ** torch.arange(80, dtype=torch.float64)).tolist())
    errors = {
        method: (over_seeds(A, 10, method=method, num_matvecs=60)[0] - A.diagonal()).norm()
        for method in METHODS
    }
    assert errors["xdiag"] < 1e-5 * errors["hutchinson"]


def test_diagonal_operator_takes_two_signs() -> None:
    entries = torch.linspace(-3, 5, 50, dtype=torch.float64)
    found = diagonal(diagonal_operator(entries), num_matvecs=2)
    assert torch.allclose(found.value, entries, rtol=1e-14)
    assert float(found.stderr.max()) < 1e-14


@each_method
def test_all_columns_are_multiplied_where_the_budget_has_room(method: str) -> None:
    A = matrix(EIGENVALUES)
    found = diagonal(hk.aslinearoperator(A), method=method, num_matvecs=len(A))
    assert relative_error(found.value, A.diagonal()) < 1e-14
    assert float(found.stderr.max()) == 0
    assert found.converged


def test_entries_that_were_not_reached_are_not_numbers() -> None:
    A = matrix(EIGENVALUES)
    found = diagonal(Counting(A, good=18).operator(), num_matvecs=len(A), block_size=6)
    known = torch.isfinite(found.value)
    assert found.status is hk.Status.NON_FINITE
    assert int(known.sum()) == 18
    assert relative_error(found.value[known], A.diagonal()[known]) < 1e-13
    assert bool(torch.isinf(found.stderr[~known]).all())


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_ends_with_the_value_of_the_probes_before(method: str, bad: float) -> None:
    A, each = matrix(SPECTRA["indefinite"]), {"hutchinson": 1, "xdiag": 2}[method]
    found = diagonal(
        Counting(A, good=8 * each + 1, bad=bad).operator(), method=method, num_matvecs=20 * each, block_size=4
    )
    before = diagonal(hk.aslinearoperator(A), method=method, num_matvecs=8 * each, block_size=4)
    assert found.status is hk.Status.NON_FINITE
    assert found.num_samples == 8
    assert torch.equal(found.value, before.value)
    assert torch.equal(found.stderr, before.stderr)
    nothing = diagonal(Counting(A, good=0, bad=bad).operator(), method=method, num_matvecs=60)
    assert bool(nothing.value.isnan().all())
    assert bool(nothing.stderr.isinf().all())


@each_method
def test_tol_stops_on_the_norm_of_the_standard_errors(method: str) -> None:
    spectra = {
        "hutchinson": 1.0 + 0.1 * torch.linspace(-1, 1, 400, dtype=torch.float64),
        "xdiag": 1 / torch.arange(1, 401, dtype=torch.float64) ** 2,
    }
    A = matrix(spectra[method].tolist())
    found = diagonal(hk.aslinearoperator(A), method=method, tol=0.01, num_matvecs=390)
    assert found.converged
    assert found.num_matvecs < 200
    assert float(found.stderr.norm() / found.value.norm()) <= 0.01
    assert 0.002 < relative_error(found.value, A.diagonal()) < 0.02


@each_method
def test_block_size_changes_passes_and_not_the_value(method: str) -> None:
    A, passes = matrix(SPECTRA["indefinite"]), {}
    found = {}
    for block_size in (1, 4, 100):
        counting = Counting(A)
        found[block_size] = diagonal(
            counting.operator(), method=method, num_matvecs=24, block_size=block_size
        )
        passes[block_size] = len(counting.widths)
    assert passes[1] > passes[4] > passes[100]
    assert relative_error(found[4].value, found[1].value) < 1e-12
    assert relative_error(found[100].stderr, found[1].stderr) < 1e-12


def test_run_that_is_resumed_from_its_state_repeats_exactly() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    options = {"num_matvecs": 12, "tol": None, "block_size": 3, "seed": 7}
    plan = make_plan(op, "hutchinson", {"hutchinson": 1}, **options)
    state = module.step(op, plan, module.init(op))
    saved = copy.deepcopy(state)
    for _ in range(3):
        state, saved = module.step(op, plan, state), module.step(op, plan, saved)
    whole = diagonal(op, **options)
    assert torch.equal(state.mean * state.scale, whole.value)
    assert torch.equal(saved.mean, state.mean)
    assert torch.equal(saved.spread, state.spread)


def test_diagonal_of_a_hessian_as_a_tree_of_parameters() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    dense = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    exact = diagonal(H, num_matvecs=H.n)
    assert relative_error(exact.value, dense.diagonal()) < 1e-12
    assert {name: leaf.shape for name, leaf in H.unflatten(exact.value).items()} == {
        name: leaf.shape for name, leaf in problem.params.items()
    }
    rough = diagonal(H, method="xdiag", num_matvecs=H.n - 3)
    assert relative_error(rough.value, dense.diagonal()) < 0.3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "xtrace"}, "method"),
        ({"num_matvecs": 1}, "num_matvecs"),
        ({"tol": 0.0}, "tol"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        diagonal(hk.aslinearoperator(matrix(EIGENVALUES)), **options)
