from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.chebyshev import MAX_DEGREE, Filter, FilterPlan, make_plan, next_term
from hvpkit.solvers.common.request import check_arguments
from problems import matrix

VALUES = [-4.0, -2.5, *torch.linspace(-1, 1, 20, dtype=torch.float64).tolist(), 3.0]
A = matrix(VALUES)
OP = hk.aslinearoperator(A)
ONE = torch.ones((), dtype=torch.float64)
NOTHING = A[:0]


def chebyshev_polynomial(degree: int, x: Tensor) -> Tensor:
    inside = torch.cos(degree * torch.acos(x.clamp(-1, 1)))
    outside = torch.cosh(degree * torch.acosh(x.abs().clamp(min=1))) * x.sign() ** degree
    return torch.where(x.abs() <= 1, inside, outside)


def filtered(
    op: hk.LinearOperator,
    vectors: Tensor,
    degrees: list[int],
    center: float,
    half_width: float,
    locked: Tensor = NOTHING,
) -> Tensor:
    plan = FilterPlan([], [*range(len(degrees))], degrees, center, half_width)
    state = Filter(vectors.clone(), torch.zeros_like(vectors), plan)
    while state.num_left:
        state = next_term(op, state, ONE.to(vectors), locked)
    return state.current


def start(count: int) -> Tensor:
    return torch.randn(count, len(A), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_vector_is_multiplied_by_the_polynomial_of_its_degree() -> None:
    degrees, vectors = [9, 6, 6, 1], start(4)
    values, basis = torch.linalg.eigh(A)
    x = (values - 0.1) / 1.2
    rows = [
        basis @ (chebyshev_polynomial(m, x) * (basis.mT @ v)) for m, v in zip(degrees, vectors, strict=True)
    ]
    expected = torch.stack([row / row.norm() for row in rows])
    assert torch.allclose(filtered(OP, vectors, degrees, 0.1, 1.2), expected, atol=1e-12)


def test_vectors_are_multiplied_as_often_as_their_degrees_say() -> None:
    columns: list[int] = []

    def product(v: Tensor) -> Tensor:
        columns.append(v.shape[1])
        return A @ v

    filtered(hk.LinearOperator(product, len(A), A.dtype, A.device), start(3), [5, 3, 2], 0.0, 1.0)
    assert columns == [3, 3, 2, 1, 1]


def test_locked_vectors_are_out_of_it() -> None:
    basis = torch.linalg.eigh(A).eigenvectors
    locked = basis[:, [0, -1]].mT.contiguous()
    vectors = start(2) - (start(2) @ locked.mT) @ locked
    result = filtered(OP, vectors, [30, 30], 0.0, 1.0, locked)
    assert float((result @ locked.mT).abs().max()) < 1e-13
    assert float((result @ basis[:, 1]).abs().min()) > 1 - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_overflows_however_far_out_a_value_is(dtype: torch.dtype) -> None:
    huge = torch.diag(torch.tensor([*VALUES, 1e12], dtype=dtype))
    vectors = torch.ones(1, len(huge), dtype=dtype)
    result = filtered(hk.aslinearoperator(huge), vectors, [40], 0.0, 1e-3, vectors[:0])
    assert bool(torch.isfinite(result).all())
    assert float(result[0, -1].abs()) == pytest.approx(1.0, rel=1e-5)


def test_vector_that_vanishes_stays_finite() -> None:
    unit = torch.eye(len(A), dtype=torch.float64)
    result = filtered(hk.aslinearoperator(unit), unit[:1], [4], 0.0, 1.0, unit[:1])
    assert bool(torch.isfinite(result).all())


RITZ = torch.tensor([-50.0, -2.0, -1.9, -1.0, 0.0, 0.5, 0.6, 2.0, 3.0], dtype=torch.float64)
NORMS = torch.tensor([1e-6, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1, 0.01, 0.02], dtype=torch.float64)


def planned(
    which: str, k: int = 2, width: int = 2, room: int = 4, values: Tensor = RITZ, norms: Tensor = NORMS
) -> FilterPlan:
    asked = check_arguments(OP, k, which, v0=None, tol=1e-3, max_matvecs=None, time_limit=None, seed=0)
    return make_plan(OP, asked, width, room, 50.0, values, norms)


def interval(plan: FilterPlan) -> tuple[float, float]:
    return plan.center - plan.half_width, plan.center + plan.half_width


def test_interval_ends_at_the_next_value_and_at_the_bound_of_the_other_end() -> None:
    plan = planned("LA")
    assert plan.locked == [0]  # it is accurate, and would make the interval 20 times as wide
    assert plan.filtered == [7, 8]
    assert interval(plan) == pytest.approx((-2.1, 0.6))
    assert interval(planned("SA", values=-RITZ.flip(0), norms=NORMS.flip(0))) == pytest.approx((-0.6, 2.1))


def test_outlier_that_is_not_accurate_is_in_the_interval() -> None:
    rough = NORMS.clone()
    rough[0] = 1.0
    plan = planned("LA", norms=rough)
    assert plan.locked == []
    assert interval(plan) == pytest.approx((-51.0, 0.6))


def test_between_both_ends_the_interval_is_the_bulk() -> None:
    plan = planned("BE", k=4, width=4)
    assert sorted(plan.filtered) == [1, 7, 8]
    assert interval(plan) == pytest.approx((-1.9, 0.6))


def test_value_that_may_be_a_copy_of_one_looked_for_is_not_damped() -> None:
    values = RITZ.clone()
    values[6] = 1.99
    assert interval(planned("LA", values=values)) == pytest.approx((-2.1, 0.5))
    sure = NORMS.clone()
    sure[6] = 0.009
    assert interval(planned("LA", values=values, norms=sure)) == pytest.approx((-2.1, 1.99))


def test_pairs_that_are_done_are_kept_out_if_they_cannot_harm_the_others() -> None:
    norms = NORMS.clone()
    norms[8] = 1e-3  # done; by it the other moves by at most 1e-6
    assert planned("LA", norms=norms).locked == [0, 8]
    near = torch.cat([RITZ[:8], RITZ[7:8] + 0.01])
    norms[8] = 2e-3  # done too; by it the other, which is near, moves by up to 4e-4 of 2e-3
    plan = planned("LA", values=near, norms=norms)
    assert plan.locked == [0]
    assert sorted(plan.filtered) == [7, 8]


def test_no_more_are_locked_than_there_is_room_for() -> None:
    norms = torch.full_like(NORMS, 1e-9)
    norms[8] = 0.1
    assert planned("LA", k=1, width=1, room=3, norms=norms).locked == [0, 6, 7]


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("value", [0.7, 1.5, 3.0])
def test_degree_divides_the_residual_by_what_is_too_much_and_is_hardly_more(tol: float, value: float) -> None:
    values = torch.tensor([-1.0, 0.5, value], dtype=torch.float64)
    norms = torch.tensor([0.0, 0.0, 0.4], dtype=torch.float64)
    asked = check_arguments(OP, 1, "LA", v0=None, tol=tol, max_matvecs=None, time_limit=None, seed=0)
    plan = make_plan(OP, asked, 1, 0, 1.0, values, norms)
    (degree,) = plan.degrees
    x = torch.tensor((value - plan.center) / plan.half_width, dtype=torch.float64)
    ratio = 0.4 / (tol * value)
    assert degree == MAX_DEGREE or 2 * float(chebyshev_polynomial(degree, x)) >= ratio
    assert degree == 1 or float(chebyshev_polynomial(degree - 1, x)) <= ratio


def test_degree_is_bounded_where_nothing_separates() -> None:
    values = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    norms = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    plan = planned("LA", k=1, width=2, values=values, norms=norms)
    assert plan.degrees == [MAX_DEGREE] * 2
    assert plan.half_width > 0
    assert math.isfinite(plan.center)
