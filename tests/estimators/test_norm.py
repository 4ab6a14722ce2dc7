from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import hvpkit as hk
from estimators.spread import SPREAD, Counting, calibration, z_score
from hvpkit.estimators.norm import frobenius_norm
from problems import SPECTRA, matrix

METHODS = ("hutchinson", "xtrace")
PROBES = ("rademacher", "gaussian", "sphere")
EIGENVALUES = [-3.0, *torch.linspace(-1, 1, 37).tolist(), 4.0, 8.0]

each_method = pytest.mark.parametrize("method", METHODS)
each_probe = pytest.mark.parametrize("probe", PROBES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@each_method
@each_probe
def test_square_is_unbiased_and_standard_errors_are_calibrated(method: str, probe: str) -> None:
    A = matrix(EIGENVALUES)
    op, norm = hk.aslinearoperator(A), float(torch.linalg.matrix_norm(A))
    found = [
        frobenius_norm(op, method=method, probe=probe, num_matvecs=24, seed=seed, block_size=100)
        for seed in range(300)
    ]
    values, stderrs = (torch.tensor([getattr(e, name) for e in found]) for name in ("value", "stderr"))
    assert abs(z_score(values.square(), norm**2)) < 3.5
    assert SPREAD[0] < calibration(values, stderrs) < SPREAD[1]
    assert abs(z_score(values.square() + 0.3 * values.square().std(), norm**2)) > 3.5


@each_method
@each_probe
@each_dtype
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_its_standard_error_on_every_spectrum(
    method: str, probe: str, dtype: torch.dtype, spectrum: str
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    counting, budget = Counting(A), 30 if len(A) > 30 else 14
    found = frobenius_norm(counting.operator(), method=method, probe=probe, num_matvecs=budget, seed=1)
    norm = float(torch.linalg.matrix_norm(A.double()))
    unlikely = stats.t.isf(1e-4, found.num_samples - 1) if found.num_samples > 1 else 0.0
    known = (
        float(torch.linalg.matrix_norm(A.double() @ A.double()))
        / (2 * found.num_samples) ** 0.5
        / (norm or 1)
    )
    error = (
        max(found.stderr, known) if method == "hutchinson" else found.stderr
    )  # squares of few samples are skew
    assert abs(found.value - norm) <= unlikely * error + 100 * torch.finfo(dtype).eps * norm
    assert found.num_matvecs == sum(counting.widths) <= budget
    assert float(found.samples.mean()) == pytest.approx(found.value, rel=1e-6)


@each_method
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_operator_does_not_matter(method: str, dtype: torch.dtype, scale: float) -> None:
    A = matrix(SPECTRA["indefinite"])
    plain, scaled = (
        frobenius_norm(hk.aslinearoperator((A * s).to(dtype)), method=method, num_matvecs=20)
        for s in (1.0, scale)
    )
    assert scaled.value / scale == pytest.approx(plain.value, rel=1e4 * torch.finfo(dtype).eps)
    assert scaled.stderr / scale == pytest.approx(plain.stderr, rel=1e4 * torch.finfo(dtype).eps)


def test_xtrace_beats_hutchinson_by_orders_where_outliers_dominate() -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    norm = float(torch.linalg.matrix_norm(A))
    plain, xtrace = (
        frobenius_norm(hk.aslinearoperator(A), method=method, num_matvecs=40) for method in METHODS
    )
    assert abs(plain.value / norm - 1) > 1e-2
    assert abs(xtrace.value / norm - 1) < 1e-4


@each_method
def test_all_columns_are_multiplied_where_the_budget_has_room(method: str) -> None:
    A = matrix(EIGENVALUES)
    found = frobenius_norm(hk.aslinearoperator(A), method=method, num_matvecs=len(A))
    assert found.value == pytest.approx(float(torch.linalg.matrix_norm(A)), rel=1e-14)
    assert found.stderr == 0


@each_method
def test_tol_stops_on_the_standard_error(method: str) -> None:
    op = hk.aslinearoperator(matrix(torch.linspace(-1, 1, 300, dtype=torch.float64).tolist()))
    found = frobenius_norm(op, method=method, tol=0.01, num_matvecs=290)
    assert found.converged
    assert found.num_matvecs < 150
    assert found.stderr <= 0.01 * found.value
    assert found.value == pytest.approx((100 * 301 / 299) ** 0.5, rel=0.03)


@each_method
def test_product_that_is_not_finite_ends_with_the_value_of_the_probes_before(method: str) -> None:
    A, each = matrix(SPECTRA["indefinite"]), METHODS.index(method) + 1
    found = frobenius_norm(
        Counting(A, good=9 * each).operator(), method=method, num_matvecs=20 * each, block_size=4
    )
    before = frobenius_norm(hk.aslinearoperator(A), method=method, num_matvecs=8 * each, block_size=4)
    assert found.status is hk.Status.NON_FINITE
    assert (found.value, found.stderr, found.num_samples) == (before.value, before.stderr, 8)
    assert math.isnan(frobenius_norm(Counting(A, good=0).operator(), method=method, num_matvecs=60).value)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"method": "hutch++"}, "method"), ({"num_matvecs": 3}, "num_matvecs"), ({"probe": "unit"}, "probe")],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        frobenius_norm(hk.aslinearoperator(matrix(EIGENVALUES)), **options)
