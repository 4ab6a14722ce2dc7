"""Every estimator goes on from its checkpoint to the same bits, and from no other's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from problems import SPECTRA, matrix


class Interrupted(Exception):
    pass


@dataclass
class Unreliable:
    """A matrix whose product after ``fails_at`` columns raises, once."""

    A: Tensor
    fails_at: int | None = None
    count: int = 0

    def product(self, v: Tensor) -> Tensor:
        if self.fails_at is not None and self.count >= self.fails_at:
            self.fails_at = None
            raise Interrupted
        self.count += v.shape[1]
        return self.A @ v

    def operator(self) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product)


def density(op: hk.LinearOperator, **options: Any) -> hk.Density:
    return hk.spectral_density(op, **options)


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hutchinson": (hk.trace, {"method": "hutchinson", "num_matvecs": 30, "block_size": 4}),
    "hutch++": (hk.trace, {"num_matvecs": 60, "block_size": 4}),
    "xtrace": (hk.trace, {"method": "xtrace", "num_matvecs": 50, "block_size": 4, "probe": "sphere"}),
    "with a tolerance": (hk.trace, {"method": "xtrace", "num_matvecs": 70, "tol": 1e-9}),
    "all columns": (hk.trace, {"num_matvecs": 200}),
    "diagonal": (hk.diagonal, {"num_matvecs": 30, "block_size": 4}),
    "xdiag": (hk.diagonal, {"method": "xdiag", "num_matvecs": 50, "block_size": 4}),
    "all of the diagonal": (hk.diagonal, {"num_matvecs": 100}),
    "norm": (hk.frobenius_norm, {"num_matvecs": 50, "block_size": 4}),
    "norm by hutchinson": (hk.frobenius_norm, {"method": "hutchinson", "num_matvecs": 30, "block_size": 4}),
    "density": (density, {"num_steps": 12, "num_probes": 4}),
    "density in groups": (density, {"num_steps": 12, "num_probes": 5, "block_size": 2}),
    "exact density": (density, {"num_steps": 40, "num_probes": 4}),
    "chebyshev": (density, {"method": "chebyshev", "num_steps": 12, "num_probes": 4, "block_size": 2}),
    "moments": (lambda op, **options: hk.moments(op, 6, **options), {"num_matvecs": 40}),
}


def same_bits(one: Any, other: Any) -> bool:
    """Return True if two results are the same but for seconds and the matvecs that verified the operator."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor):
            if not torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7)):
                return False
        elif field.name not in ("seconds", "num_matvecs", "history") and repr(mine) != repr(theirs):
            return False
    return len(one.history) == len(other.history)


@pytest.fixture(scope="module")
def A() -> Tensor:
    return matrix(SPECTRA["indefinite"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fails_at", [1, 9, 17, 26, 47, 60])
def test_interrupted_run_goes_on_to_the_same_bits(
    case: str, fails_at: int, A: Tensor, tmp_path: Path
) -> None:
    estimator, options = CASES[case]
    file = tmp_path / "run.pt"
    whole = estimator(hk.aslinearoperator(A), **options)
    if fails_at > whole.num_matvecs - 12:
        pytest.skip("over before")
    unreliable = Unreliable(A, fails_at)
    with pytest.raises(Interrupted):
        estimator(unreliable.operator(), checkpoint=file, **options)
    is_saved = any(tmp_path.iterdir())
    again = estimator(unreliable.operator(), checkpoint=file, **options)
    assert same_bits(again, whole)
    assert again.num_matvecs == whole.num_matvecs + is_saved
    assert unreliable.count >= again.num_matvecs  # a part of a step is lost
    assert [entry.num_matvecs for entry in again.history] == sorted(
        entry.num_matvecs for entry in again.history
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", CASES)
def test_run_that_is_killed_again_and_again_comes_to_the_same_bits(
    case: str, A: Tensor, tmp_path: Path
) -> None:
    estimator, options = CASES[case]
    file, whole, fails = tmp_path / "run.pt", estimator(hk.aslinearoperator(A), **options), 0
    while True:
        try:
            found = estimator(Unreliable(A, 11).operator(), checkpoint=file, **options)
        except Interrupted:
            fails += 1
        else:
            break
    assert fails > 1
    assert same_bits(found, whole)
    assert found.status is whole.status


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fails_at", [12, 26])
def test_run_of_another_operator_is_refused(case: str, fails_at: int, A: Tensor, tmp_path: Path) -> None:
    estimator, options = CASES[case]
    file = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        estimator(Unreliable(A, fails_at).operator(), checkpoint=file, **options)
    other = A + 1e-3 * torch.eye(len(A))
    path = tmp_path / "run.pt.ends" if not file.exists() else file
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^checkpoint.*another operator"):
        estimator(hk.aslinearoperator(other), checkpoint=file, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("case", CASES)
def test_run_with_other_arguments_is_refused(case: str, A: Tensor, tmp_path: Path) -> None:
    estimator, options = CASES[case]
    file = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        estimator(Unreliable(A, 26).operator(), checkpoint=file, **options)
    with pytest.raises(ValueError, match=r"^checkpoint.*another solve \(seed was 0 and is 1"):
        estimator(hk.aslinearoperator(A), checkpoint=file, seed=1, **options)


def test_a_tolerance_may_be_added(A: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        hk.trace(Unreliable(A, 50).operator(), num_matvecs=70, method="hutchinson", checkpoint=file)
    found = hk.trace(hk.aslinearoperator(A), num_matvecs=70, method="hutchinson", tol=0.99, checkpoint=file)
    assert found.status is hk.Status.CONVERGED
    assert not file.exists()


def test_a_time_limit_leaves_a_run_to_go_on_with(
    A: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ticking = tmp_path / "run.pt", Unreliable(A)
    whole = hk.trace(hk.aslinearoperator(A), num_matvecs=60)
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + ticking.count)  # a second for each product
    first = hk.trace(ticking.operator(), num_matvecs=60, time_limit=30, checkpoint=file)
    assert first.status is hk.Status.TIME_LIMIT
    again = hk.trace(ticking.operator(), num_matvecs=60, checkpoint=file)
    assert same_bits(again, whole)


def test_bad_path_is_found_before_the_first_product(A: Tensor) -> None:
    for estimator, options in CASES.values():
        unreliable = Unreliable(A, 0)
        with pytest.raises(ValueError, match=r"^checkpoint: /proc/run\.pt cannot be written"):
            estimator(unreliable.operator(), checkpoint="/proc/run.pt", **options)
