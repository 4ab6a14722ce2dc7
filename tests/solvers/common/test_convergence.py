from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

import hvpkit as hk
from hvpkit.solvers.common.convergence import (
    attainable_accuracy,
    check_pairs,
    final_status,
    is_converged,
    rounding,
)
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.common.request import check_arguments
from hvpkit.solvers.driver import completed
from problems import matrix, reducing
from variants import explained

EPS = torch.finfo(torch.float64).eps
VALUES = [-3.0, -1.0, 0.0, 0.5, 2.0, 7.0]
A = matrix(VALUES)
OP = hk.aslinearoperator(A)
ONE = torch.ones((), dtype=torch.float64)


def checked(
    places: list[int],
    *,
    op: hk.LinearOperator = OP,
    shift: float = 0.0,
    status: hk.Status = hk.Status.CONVERGED,
) -> hk.EigenResult:
    """The result for eigenvectors, or for such that are ``shift`` away from them, with what was believed wrong."""
    vectors = torch.linalg.eigh(A).eigenvectors
    vectors = torch.linalg.qr(vectors[:, places] + shift * vectors[:, [2]]).Q
    found = RitzPairs(torch.full((len(places),), 5.0), vectors, torch.full((len(places),), 9.0))
    request = check_arguments(
        op, len(places), "LA", v0=None, tol=1e-3, max_matvecs=None, time_limit=None, seed=0
    )
    return check_pairs(op, request, found, ONE, 7.0, status=status, num_matvecs=4.0)


def test_done_is_what_is_within_tol_or_within_rounding() -> None:
    values = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0, 1e-13], dtype=torch.float64)
    norms = torch.tensor([0.9e-3, 0.9e-3, 1.1e-3, 1e-15, 1e-3, 1e-15], dtype=torch.float64)
    allowed = 1e-3 * values.abs()
    assert is_converged(OP, allowed, 1.0, norms).tolist() == [True, True, False, True, False, True]
    assert is_converged(OP, allowed, 1e11, norms).tolist() == [False, False, False, True, False, True]
    assert attainable_accuracy(OP, 2.0) == 64 * EPS
    assert rounding(OP, 2.0) == 16 * EPS


@pytest.mark.parametrize(
    ("value", "bound", "expected"),
    [
        (1.0, 1e-2, "converged"),
        (3e-4, 2.9e-6, "converged"),
        (3e-4, 1e-5, "rounding-limited"),  # clearly not zero: a bound within atol is not enough
        (5e-3, 2e-3, "rounding-limited"),
        (1e-5, 1e-4, "zero-within-atol"),
        (-1e-4, 1e-4, "zero-within-atol"),
        (0.0, 1e-4, "zero-within-atol"),
        (1e-5, 1e-8, "converged"),
        (0.0, 1e-7, "zero-to-rounding"),
        (1e-8, 1e-7, "zero-to-rounding"),
        (1e-3, 1.0, "zero-to-rounding"),  # a bound that rounding keeps large
    ],
)
def test_value_without_relative_accuracy_is_zero_or_within_atol_or_limited_by_rounding(
    value: float, bound: float, expected: str
) -> None:
    request = check_arguments(
        OP, 2, "LA", v0=None, tol=1e-2, atol=1e-4, max_matvecs=None, time_limit=None, seed=0
    )
    values, bounds = (torch.tensor(pair, dtype=torch.float64) for pair in ([value, 1.0], [bound, 1e-9]))
    assert final_status(hk.Status.CONVERGED, request, 1.0, 1e-6, values, bounds) == expected


def test_worst_value_decides_the_status() -> None:
    request = check_arguments(
        OP, 3, "LA", v0=None, tol=1e-2, atol=1e-4, max_matvecs=None, time_limit=None, seed=0
    )

    def status(*pairs: tuple[float, float]) -> hk.Status:
        values, bounds = torch.tensor(pairs, dtype=torch.float64).mT
        return final_status(hk.Status.CONVERGED, request, 1.0, 1e-6, values, bounds)

    good, rounded, zero, bad = (1.0, 1e-9), (0.0, 1e-7), (0.0, 1e-5), (1e-2, 5e-3)
    assert status(good, rounded) is hk.Status.ZERO_TO_ROUNDING
    assert status(good, rounded, zero) is hk.Status.ZERO_WITHIN_ATOL
    assert status(rounded, zero, bad) is hk.Status.ROUNDING_LIMITED


def test_checked_pairs_are_ascending_with_true_residuals() -> None:
    found = checked([5, 0, 4])
    assert found.values.tolist() == pytest.approx([-3.0, 2.0, 7.0], rel=1e-14)
    residuals = torch.linalg.vector_norm(A @ found.vectors - found.vectors * found.values, dim=0)
    assert torch.allclose(found.residual_norms, residuals, rtol=0, atol=1e-14)
    assert found.num_matvecs == 7.0
    assert found.status is hk.Status.CONVERGED


def test_pairs_that_the_check_finds_less_accurate_are_not_converged() -> None:
    found = checked([5], shift=1e-2)
    assert float(found.residual_norms[0]) == pytest.approx(7e-2, rel=1e-3)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert not found.converged
    assert checked([5], shift=1e-2, status=hk.Status.TIME_LIMIT).status is hk.Status.TIME_LIMIT


def test_sums_go_through_the_space() -> None:
    calls: list[torch.Size] = []

    def doubled(partial: torch.Tensor) -> torch.Tensor:
        calls.append(partial.shape)
        return 2 * partial

    found = checked([5], op=replace(OP, space=reducing(doubled)))  # as if two ranks held the same half
    assert len(calls) == 3
    assert found.values.tolist() == pytest.approx([7.0], rel=1e-14)
    assert float(torch.linalg.vector_norm(found.vectors)) == pytest.approx(0.5**0.5)


def test_check_that_is_not_finite_leaves_what_was_believed() -> None:
    bad = replace(OP, product=lambda v: torch.full_like(v, torch.nan))
    found = checked([4, 5], op=bad)
    assert found.status is hk.Status.NON_FINITE
    assert found.values.tolist() == [5.0, 5.0]
    assert found.num_matvecs == 6.0
    assert checked([4, 5], op=bad, status=hk.Status.NON_FINITE).num_matvecs == 4.0


def test_check_and_completion_name_the_vectors_at_fault() -> None:
    blamed: list[torch.Tensor] = []

    def explain(vector: torch.Tensor) -> str:
        blamed.append(vector)
        return "batch 3 is at fault"

    op = explained(replace(OP, product=lambda v: v * torch.nan), explain)
    history = (hk.Progress(1.0, 0.5, -1.0, 1.0, 0.1, 0.1),)
    began = time.perf_counter() - 100.0
    by_check = checked([5], op=op)
    assert by_check.message == f"{hk.Status.NON_FINITE.advice}; batch 3 is at fault"
    assert torch.equal(blamed[-1], by_check.vectors[:, 0])
    found = completed(checked([5]), op, history, began, A[3:4].mT)
    assert found.message.endswith("; batch 3 is at fault")
    assert torch.equal(blamed[-1], A[3])
    assert found.history == history
    assert 100.0 <= found.seconds < 1000.0
    assert completed(checked([5]), OP, history, began, None).message == hk.Status.CONVERGED.advice
