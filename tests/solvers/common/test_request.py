from __future__ import annotations

import pytest
import torch

import hvpkit as hk
from hvpkit.solvers.common.request import Request, check_arguments


def asked(n: int = 50, cost: float = 1.0, dtype: torch.dtype = torch.float64, **given: object) -> Request:
    op = hk.LinearOperator(lambda v: v, n, dtype, torch.device("cpu"), cost=cost)
    usual = {
        "k": 1,
        "which": "LA",
        "v0": None,
        "tol": 1e-3,
        "max_matvecs": None,
        "time_limit": None,
        "seed": 0,
    }
    return check_arguments(op, **(usual | given))


@pytest.mark.parametrize(("k", "cost", "expected"), [(1, 1.0, 1000), (50, 3.0, 1500), (1, 0.1, 1000)])
def test_default_budget_is_a_thousand_products_or_ten_for_each_pair(
    k: int, cost: float, expected: float
) -> None:
    assert asked(k=k, cost=cost).limits.max_matvecs == expected


def test_both_ends_of_one_pair_are_the_high_end() -> None:
    assert asked(which="BE").which == "LA"
    assert asked(which="BE", k=2).which == "BE"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tol_is_at_least_eps(dtype: torch.dtype) -> None:
    assert asked(tol=1e-300, dtype=dtype).tol == torch.finfo(dtype).eps
    assert asked(tol=0.5, dtype=dtype).tol == 0.5


@pytest.mark.parametrize(
    ("tol", "atol", "expected"),
    [(1e-2, None, 1e-5), (0.5, None, 1e-5), (1e-6, None, 1e-9), (1e-2, 0, 0.0), (1e-6, 1e-3, 1e-3)],
)
def test_atol_is_a_thousandth_of_tol_and_at_most_a_hundred_thousandth(
    tol: float, atol: float | None, expected: float
) -> None:
    assert asked(tol=tol, atol=atol).atol == pytest.approx(expected, rel=1e-15)


def test_errors_allowed_are_relative_to_values_that_are_not_near_zero() -> None:
    values = torch.tensor([-10.0, -1.001e-2, -1e-2, -1e-4, 0.0, 9.99e-3, 3e-2, 1.0], dtype=torch.float64)
    allowed = asked(tol=1e-2, atol=1e-3).allowed(values, 10.0)
    assert allowed.tolist() == pytest.approx([0.1, 1.001e-4, 1e-2, 1e-2, 1e-2, 1e-2, 3e-4, 1e-2])
    assert allowed.dtype == torch.float64
    relative = asked(tol=1e-2, atol=0.0).allowed(values, 10.0)
    assert relative.tolist() == pytest.approx((1e-2 * values.abs()).tolist())


@pytest.mark.parametrize(
    ("atol", "error"),
    [(-1e-9, ValueError), (float("inf"), ValueError), (float("nan"), ValueError), ("0", TypeError)],
)
def test_bad_atol_is_named(atol: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^atol must be"):
        asked(atol=atol)


def test_words_for_which_are_those_that_are_offered() -> None:
    assert asked(which="LM").which == "LM"
    with pytest.raises(ValueError, match=r"^which must be one of 'LA', 'SA', got 'LM'"):
        asked(which="LM", offered=("LA", "SA"))


@pytest.mark.parametrize(
    ("given", "least"),
    [({"k": 3}, 6), ({"k": 3, "block_size": 2}, 7), ({"k": 3, "num_checks": 1}, 4), ({"cost": 0.1}, 0.2)],
    ids=str,
)
def test_budget_pays_for_an_estimate_of_each_value_and_its_check(
    given: dict[str, object], least: float
) -> None:
    assert asked(max_matvecs=least, **given).limits.max_matvecs == least
    with pytest.raises(ValueError, match=rf"^max_matvecs must be at least {least:g}"):
        asked(max_matvecs=least * 0.99, **given)


def test_what_is_left_keeps_the_check_back() -> None:
    assert asked(k=3, cost=0.5, max_matvecs=10.0).limits.remaining(2.0) == pytest.approx(10.0 - 1.5 - 2.0)


def test_start_is_columns_and_apart_from_the_callers_graph() -> None:
    v0 = torch.ones(50, dtype=torch.float64, requires_grad=True)
    start = asked(v0=v0).start
    assert start is not None
    assert start.shape == (50, 1)
    assert not start.requires_grad
    assert asked(v0=torch.eye(50, dtype=torch.float64)[:, :4]).start.shape == (50, 4)
