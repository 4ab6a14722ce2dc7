"""Traces of functions against dense spectra: values, and standard errors that hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hvpkit as hk
from problems import SPECTRA, matrix

F64 = torch.float64


def diagonal(values: torch.Tensor) -> hk.LinearOperator:
    """A diagonal operator: random starts make it as good as any other."""
    return hk.LinearOperator(
        lambda v: values[:, None] * v, len(values), values.dtype, values.device, name="diagonal"
    )


SPREAD: dict[str, torch.Tensor] = {
    "even": torch.linspace(0, 1, 1500, dtype=F64),
    "outliers": torch.cat([torch.linspace(0, 0.1, 1494, dtype=F64), torch.linspace(1, 9, 6, dtype=F64)]),
    "decaying": torch.logspace(-6, 0, 1500, dtype=F64),
    "low rank": torch.cat([torch.zeros(1400, dtype=F64), torch.linspace(0.1, 2, 100, dtype=F64)]),
}
QUESTIONS: dict[str, tuple[Callable[..., hk.Estimate[float]], Callable[[torch.Tensor], torch.Tensor]]] = {
    "logdet": (partial(hk.logdet, damping=1e-3), lambda x: (x + 1e-3).log().sum()),
    "effective dimension": (partial(hk.effective_dimension, damping=1e-2), lambda x: (x / (x + 1e-2)).sum()),
    "count": (
        partial(hk.count_eigenvalues, lower=0.05, upper=5.0),
        lambda x: ((x > 0.05) & (x <= 5)).double().sum(),
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("num_steps", [12, 40])
def test_standard_errors_hold(question: str, num_steps: int) -> None:
    """Over spectra and seeds, the 95 % interval fails in a few cases, and none is off by many standard errors."""
    ask, exact = QUESTIONS[question]
    outside, total = 0, 0
    for values in SPREAD.values():
        truth = float(exact(values))
        for seed in range(6):
            found = ask(diagonal(values), num_steps=num_steps, num_probes=5, seed=seed)
            assert found.num_matvecs <= 5 * num_steps
            low, high = found.interval(0.95)
            outside += not low - 1e-9 * abs(truth) <= truth <= high + 1e-9 * abs(truth)
            total += 1
            assert abs(found.value - truth) <= 8 * found.stderr + 1e-9 * abs(truth)
    assert outside <= 0.15 * total


@pytest.mark.parametrize("question", QUESTIONS)
def test_interrupted_traces_continue_to_the_same_bits(question: str, tmp_path: Path) -> None:
    ask, file = QUESTIONS[question][0], tmp_path / "trace.pt"
    options: Any = {"num_steps": 20, "num_probes": 12, "checkpoint": file}
    whole = ask(diagonal(SPREAD["outliers"]), num_steps=20, num_probes=12)

    def stop(entry: hk.Progress) -> None:
        if entry.num_matvecs > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(diagonal(SPREAD["outliers"]), monitor=stop, **options)
    with pytest.raises(ValueError, match="another operator"):
        ask(diagonal(SPREAD["even"]), **options)
    found = ask(diagonal(SPREAD["outliers"]), **options)
    assert (found.value, found.stderr) == (whole.value, whole.stderr)
    assert found.num_matvecs == whole.num_matvecs + 1
    assert not file.exists()


def test_error_of_the_quadrature_is_in_the_standard_error() -> None:
    """With few steps and little damping the quadrature is off by more than probes differ."""
    values = SPREAD["decaying"]
    found = hk.logdet(diagonal(values), damping=1e-6, num_steps=8, num_probes=5)
    truth, spread = float((values + 1e-6).log().sum()), float(found.samples.std()) / 5**0.5
    assert abs(found.value - truth) > 3 * spread
    assert abs(found.value - truth) <= 3 * found.stderr


@pytest.mark.parametrize("spectrum", ["decaying", "bulk_with_outliers", "rank_deficient", "n3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_matrices_are_exact(spectrum: str, dtype: torch.dtype) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    op, values = hk.aslinearoperator(A), torch.linalg.eigvalsh(A.double())
    digits = 1e-9 if dtype == F64 else 1e-3
    found = hk.logdet(op, damping=0.5)
    assert found.value == pytest.approx(float((values + 0.5).log().sum()), rel=digits)
    assert (found.stderr, found.converged) == (0, True)
    assert hk.effective_dimension(op, damping=0.5).value == pytest.approx(
        float((values / (values + 0.5)).sum()), rel=digits
    )
    cut = float(values[:-1].mean() + values[-1]) / 2
    assert hk.count_eigenvalues(op, cut, math.inf).value == pytest.approx(float((values > cut).sum()))
    assert hk.count_eigenvalues(op, -math.inf, math.inf).value == pytest.approx(len(A))


def test_log_determinant_is_numpys() -> None:
    A = matrix(SPECTRA["clustered"]) + 0.1 * torch.eye(100, dtype=F64)
    assert hk.logdet(hk.aslinearoperator(A)).value == pytest.approx(np.linalg.slogdet(A.numpy())[1])


def test_outliers_are_counted_exactly() -> None:
    found = hk.count_eigenvalues(diagonal(SPREAD["outliers"]), 0.5, 100.0, num_probes=3)
    assert found.value == pytest.approx(6, abs=1e-6)
    assert found.stderr < 1e-6


@pytest.mark.parametrize("num_probes", [2, 8])
def test_eigenvalues_between_nodes_are_in_the_standard_error(num_probes: int) -> None:
    """No node falls into a short interval inside of a bulk, and probes agree on nothing."""
    values = SPREAD["even"]
    for lower in (0.2, 0.31, 0.42, 0.53, 0.64):
        found = hk.count_eigenvalues(
            diagonal(values), lower, lower + 0.02, num_steps=10, num_probes=num_probes
        )
        truth = float(((values > lower) & (values <= lower + 0.02)).sum())
        assert abs(found.value - truth) <= 3 * found.stderr
        assert found.stderr > 20  # of 30


@pytest.mark.parametrize("exact", [True, False])
def test_eigenvalues_at_an_end_are_in_the_standard_error(exact: bool) -> None:
    """Zeros are counted on either side, as rounding has them, and are known to be."""
    A = matrix([0.0] * 40 + torch.linspace(1, 2, 60).tolist())
    steps = 100 if exact else 30
    found = hk.count_eigenvalues(hk.aslinearoperator(A), 0.0, math.inf, num_steps=steps, num_probes=2)
    assert found.stderr == pytest.approx(40, rel=0.5)
    assert 60 - 3 <= found.value <= 100 + 3
    apart = hk.count_eigenvalues(hk.aslinearoperator(A), 0.5, math.inf, num_steps=steps, num_probes=2)
    assert apart.value == pytest.approx(60, abs=1e-6 if exact else 20)
    assert apart.stderr < (1e-6 if exact else 20)


def test_rounding_is_in_the_standard_error_where_it_is_amplified() -> None:
    A = matrix(torch.logspace(-7, 0, 50).tolist(), dtype=torch.float32)
    truth = float((torch.linalg.eigvalsh(A.double()) + 1e-7).log().sum())
    found = hk.logdet(hk.aslinearoperator(A), damping=1e-7)
    assert found.stderr > 0.1
    assert abs(found.value - truth) < 10 * found.stderr


def test_what_is_not_positive_definite_is_refused_with_the_ritz_value() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match=r"damping must make .* Ritz value of -5 .*damping is 1"):
        hk.logdet(op, damping=1.0)
    with pytest.raises(ValueError, match=r"Ritz value of -5"):
        hk.effective_dimension(op, damping=1.0)
    assert hk.logdet(op, damping=6.0).converged


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda op: hk.logdet(op, damping=-1.0), "damping"),
        (lambda op: hk.effective_dimension(op, damping=0.0), "damping"),
        (lambda op: hk.count_eigenvalues(op, 1.0, 1.0), "lower"),
        (lambda op: hk.count_eigenvalues(op, float("nan"), 1.0), "lower"),
        (lambda op: hk.logdet(op, num_steps=0), "num_steps"),
        (lambda op: hk.logdet(op, num_probes=1), "num_probes"),
        (lambda op: hk.logdet(op, time_limit=0.0), "time_limit"),
    ],
)
def test_bad_argument_is_named(ask: Callable[[hk.LinearOperator], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ask(hk.aslinearoperator(torch.eye(4)))


@pytest.mark.parametrize("question", QUESTIONS)
def test_nothing_is_known_of_what_is_not_finite(question: str) -> None:
    op = hk.LinearOperator(lambda v: v * math.nan, 50, F64, torch.device("cpu"))
    found = QUESTIONS[question][0](op)
    assert found.status is hk.Status.NON_FINITE
    assert math.isnan(found.value)
    assert found.stderr == math.inf


def test_same_seed_gives_the_same_bits() -> None:
    op = diagonal(SPREAD["even"])
    one, two, other = (hk.logdet(op, damping=0.1, num_steps=10, seed=seed) for seed in (3, 3, 4))
    assert one.value == two.value != other.value
