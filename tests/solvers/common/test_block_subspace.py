from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.common.block_subspace import (
    BlockSubspace,
    drop_non_finite,
    extend,
    finalize,
    multiply,
    rayleigh_ritz,
    start,
    status_of,
)
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.common.request import Request, check_arguments
from problems import matrix

A = matrix([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 4.0, 7.0, 9.0])
OP = hk.aslinearoperator(A)


def request(op: hk.LinearOperator = OP, k: int = 2, max_matvecs: float | None = None) -> Request:
    return check_arguments(
        op, k, "LA", v0=None, tol=1e-3, atol=0.0, max_matvecs=max_matvecs, time_limit=None, seed=0
    )


def random_rows(m: int, seed: int = 0) -> Tensor:
    return torch.randn(m, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(state: BlockSubspace) -> Tensor:
    return state.rows[: state.num_rows + state.num_new]


def test_ritz_pairs_do_not_depend_on_how_orthonormal_the_rows_are() -> None:
    rows = random_rows(4)
    Q = torch.linalg.qr(rows.mT).Q.mT
    expected = torch.linalg.eigvalsh(Q @ A @ Q.mT)
    pairs = rayleigh_ritz(OP, rows, rows @ A)
    assert torch.allclose(pairs.values, expected, rtol=0, atol=1e-13)
    vectors = (pairs.to_rows @ pairs.vectors).mT @ rows
    assert torch.allclose(vectors @ vectors.mT, torch.eye(4, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(vectors @ A @ vectors.mT, torch.diag(expected), atol=1e-12)


def test_first_coordinates_span_the_first_rows() -> None:
    rows = random_rows(5)
    pairs = rayleigh_ritz(OP, rows, rows @ A)
    chosen = pairs.to_rows[:, :2].mT @ rows
    assert torch.linalg.matrix_rank(torch.cat([rows[:2], chosen]), atol=1e-10) == 2
    assert torch.allclose(chosen @ chosen.mT, torch.eye(2, dtype=torch.float64), atol=1e-13)


def test_norm_is_that_of_the_largest_value_or_product() -> None:
    rows = torch.eye(9, dtype=torch.float64)[:2]
    swap = torch.zeros(9, 9, dtype=torch.float64)
    swap[0, 5] = swap[5, 0] = 3.0
    assert rayleigh_ritz(hk.aslinearoperator(swap), rows, rows @ swap).norm == 3.0
    Q = torch.linalg.qr(random_rows(9)).Q
    assert rayleigh_ritz(OP, Q, Q @ A).norm == pytest.approx(9.0, rel=1e-14)


def test_noise_beyond_rounding_raises_the_norm_to_what_explains_it() -> None:
    Q = torch.linalg.qr(random_rows(9)).Q
    noisy = rayleigh_ritz(OP, Q, Q @ A + 1e-10 * random_rows(9, seed=1))
    assert 1e-11 <= 8 * torch.finfo(torch.float64).eps * noisy.norm <= 1e-8


def test_asymmetry_is_measured_against_the_norm_and_refused_beyond_rounding() -> None:
    rows = torch.eye(9, dtype=torch.float64)
    nearly = A.clone()
    nearly[0, 1] += 9e-9
    assert rayleigh_ritz(OP, rows, rows @ nearly.mT).asymmetry == pytest.approx(1e-9, rel=1e-5)
    rows = random_rows(3)
    skewed = A.clone()
    skewed[0, 1] += 1e-3
    with pytest.raises(hk.NotSymmetricError, match="not symmetric"):
        rayleigh_ritz(OP, rows, rows @ skewed.mT)


def test_multiplying_takes_new_rows_a_block_at_a_time() -> None:
    op = replace(hk.aslinearoperator(A * 1e10), cost=0.5)
    state = start(op, request(op), 3, 6)
    assert (state.num_rows, state.num_new, state.num_random) == (0, 3, 3)
    for expected in ((2, 2, 1, 1.0), (3, 3, 0, 1.5)):
        state = multiply(op, state, 2)
        assert (state.num_rows, state.num_fresh, state.num_new, state.num_matvecs) == expected
    assert torch.allclose(state.images[:3] * state.scale, state.rows[:3] @ A * 1e10, rtol=1e-14)
    assert 0.5 < float(state.images[:2].abs().max()) < 2


def test_extension_is_orthonormal_and_random_where_nothing_is_new() -> None:
    state = multiply(OP, start(OP, request(), 2, 9), 2)
    state = extend(OP, request(), state, torch.cat([state.rows[:1] * 2, random_rows(1)]))
    assert state.num_new == 1
    assert torch.linalg.matrix_rank(torch.cat([used(state), random_rows(1)]), atol=1e-10) == 3
    state = extend(OP, request(), multiply(OP, state, 2), state.rows[:2] * 2)
    assert state.num_new == 1
    assert state.num_random == 3
    assert torch.allclose(used(state) @ used(state).mT, torch.eye(4, dtype=A.dtype), atol=1e-14)


@pytest.mark.parametrize(("spent", "budget", "num_new"), [(8, 17, 1), (9, 17, 1), (9, 18, 7)])
def test_all_that_is_missing_is_new_once_as_much_was_spent(spent: int, budget: int, num_new: int) -> None:
    asked = request(k=2, max_matvecs=budget)  # two of them are for the check
    state = replace(multiply(OP, start(OP, asked, 2, 9), 2), num_matvecs=float(spent))
    state = extend(OP, asked, state, random_rows(1))
    assert state.num_new == num_new
    assert torch.allclose(used(state) @ used(state).mT, torch.eye(2 + num_new, dtype=A.dtype), atol=1e-14)


def test_a_large_space_is_never_filled_and_has_no_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(start.__globals__, "MAX_WHOLE_SPACE", 8)
    state = start(OP, request(), 2, 5)
    assert len(state.rows) == 5
    state = extend(OP, request(), replace(multiply(OP, state, 2), num_matvecs=99.0), random_rows(1))
    assert state.num_new == 1


def test_rows_whose_products_are_not_finite_go_and_the_first_is_kept_as_suspect() -> None:
    state = multiply(OP, start(OP, request(), 5, 9), 5)
    state = replace(state, num_fresh=3)
    rows, images = state.rows.clone(), state.images.clone()
    state.images[2, 0], state.images[4, 1] = torch.nan, torch.inf
    state = drop_non_finite(OP, state)
    assert state.num_rows == 3
    assert state.num_fresh == 0
    assert torch.equal(state.rows[:3], rows[[0, 1, 3]])
    assert torch.equal(state.images[:3], images[[0, 1, 3]])
    assert state.suspect is not None
    assert torch.equal(state.suspect, rows[2:3].mT)


@pytest.mark.parametrize(
    ("values", "done", "whole", "expected"),
    [
        ([1.0, 2.0], [True, False], False, None),
        ([1.0, 2.0], [True, True], False, hk.Status.CONVERGED),
        ([1.0, 2.0], [True, True], True, hk.Status.INVARIANT_SUBSPACE),
        ([0.0, 2.0], [True, True], True, hk.Status.ZERO_TO_ROUNDING),
        ([1e-12, 2.0], [False, True], True, hk.Status.ROUNDING_LIMITED),
        ([2.0], [True], False, None),
    ],
)
def test_it_is_over_when_all_wanted_pairs_are_done(
    values: list[float], done: list[bool], whole: bool, expected: hk.Status | None
) -> None:
    state = replace(start(OP, request(), 2, 9), norm=10.0)
    found = RitzPairs(
        torch.tensor(values, dtype=A.dtype), A[:, : len(values)], torch.full((len(values),), 1e-15)
    )
    assert status_of(OP, request(), state, found, torch.tensor(done), whole=whole) is expected
    bad = replace(state, suspect=A[0])
    assert status_of(OP, request(), bad, found, torch.tensor(done), whole=whole) is hk.Status.NON_FINITE


def test_final_result_is_measured_again_at_unit_norm() -> None:
    values, vectors = torch.linalg.eigh(A)
    state = start(OP, request(), 2, 9)
    best = RitzPairs(torch.tensor([9.0, 7.0]) / 2, vectors[:, [8, 7]] * 1.001, torch.ones(2))
    state = replace(state, best=best, scale=torch.tensor(2.0, dtype=A.dtype), norm=4.5, num_matvecs=5.0)
    found = finalize(OP, request(), state, hk.Status.CONVERGED)
    assert torch.allclose(found.values, values[7:], rtol=1e-14)
    assert torch.allclose(torch.linalg.vector_norm(found.vectors, dim=0), torch.ones(2, dtype=A.dtype))
    assert float(found.residual_norms.max()) < 1e-13
    assert found.num_matvecs == 7.0
