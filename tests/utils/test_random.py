"""Random vectors are drawn in parts with the numbers of the whole."""

from typing import Any

import pytest
import torch

from hvpkit._utils import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 79, 80, 81, 200, 1003])
def test_a_part_has_the_numbers_of_the_whole(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "PIECE", 64)
    options = {"dtype": dtype, "device": torch.device("cpu"), "seed": 3, "stream": 1}
    whole = random.normal_vector(n, **options)
    assert whole.unique().numel() > 0.9 * n or dtype == torch.bfloat16  # no piece has the numbers of another
    for part in (slice(0, n), slice(0, n // 3), slice(n // 3, n), slice(n // 2, n // 2)):
        assert torch.equal(random.normal_vector(n, **options, part=part), whole[part])


def test_a_part_takes_few_numbers_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
    n, drawn, randn = 4 * random.PIECE + 5, [], torch.randn

    def counting(size: int, **given: Any) -> torch.Tensor:
        drawn.append(size)
        return randn(size, **given)

    monkeypatch.setattr(torch, "randn", counting)
    whole = random.normal_vector(n, **options)
    assert sum(drawn) == n
    drawn.clear()
    part = slice(2 * random.PIECE - 7, n)
    assert torch.equal(random.normal_vector(n, **options, part=part), whole[part])
    assert sum(drawn) == n - random.PIECE


def test_a_short_vector_is_the_first_draw_of_its_generator() -> None:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 5, "stream": 2}
    expected = torch.randn(random.PIECE, generator=random.generator(5, 2))
    assert torch.equal(random.normal_vector(random.PIECE, **options), expected)
    assert torch.equal(random.normal_vector(random.PIECE + 20, **options)[: random.PIECE], expected)


def test_entries_of_a_long_vector_are_normal_and_independent() -> None:
    v = random.normal_vector(2**20 + 5, dtype=torch.float64, device=torch.device("cpu"), seed=1)
    root = len(v) ** 0.5
    assert abs(float(v.mean())) * root < 4
    assert abs(float(v.square().mean()) - 1) * root < 4 * 2**0.5
    for lag in (1, random.PIECE, 2 * random.PIECE):
        assert abs(float(v[lag:] @ v[:-lag])) < 4 * root
