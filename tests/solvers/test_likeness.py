"""Whether samples are likely to save passes, against operators whose ends are known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.likeness import NUM_STEPS, may_save_passes

N = 300
BULK = torch.linspace(0, 0.05, N, dtype=torch.float64)


def diagonal(values: Tensor, cost: float = 0.05) -> hk.LinearOperator:
    return replace(hk.aslinearoperator(torch.diag(values)), cost=cost)


def with_ends(low: float, high: float, place: int = 0) -> hk.LinearOperator:
    values = BULK.clone()
    values[place], values[-1] = low, high
    return diagonal(values)


def never(_: Tensor) -> Tensor:
    raise AssertionError("the other sample is multiplied in vain")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_samples_that_agree_about_a_small_negative_end_are_worth_it(factor: float, seed: int) -> None:
    likely, cost = may_save_passes(with_ends(-0.1, 10.0), with_ends(-0.1 * factor, 10.0), seed)
    assert likely
    assert cost == pytest.approx((NUM_STEPS + 1) * 0.05)


@pytest.mark.parametrize("other", [with_ends(-0.06, 10.0), with_ends(-0.16, 10.0), with_ends(-0.1, 10.0, 7)])
def test_an_end_of_one_sample_alone_is_not(other: hk.LinearOperator) -> None:
    assert not may_save_passes(with_ends(-0.1, 10.0), other, 0)[0]


def test_large_low_end_is_seen_in_a_few_steps() -> None:
    sample = with_ends(-1.0, 10.0)
    likely, cost = may_save_passes(sample, replace(sample, product=never), 0)
    assert not likely
    assert 0.05 < cost < 0.05 * NUM_STEPS / 2


@pytest.mark.parametrize("values", [BULK, BULK * 0, BULK * torch.nan], ids=["positive", "zero", "nan"])
def test_nothing_negative_or_finite_is_not_worth_it(values: Tensor) -> None:
    sample = replace(diagonal(BULK), product=lambda v: values[:, None] * v)
    assert not may_save_passes(sample, replace(sample, product=never), 0)[0]
