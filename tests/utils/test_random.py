"""Random vectors are drawn in parts with the numbers of the whole."""

import pytest
import torch

from hvpkit._utils import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 79, 80, 81, 200, 1003])
def test_a_part_has_the_numbers_of_the_whole(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "CHUNK", 64)
    options = {"dtype": dtype, "device": torch.device("cpu"), "seed": 3, "stream": 1}
    whole = random.normal_vector(n, **options)
    for part in (slice(0, n), slice(0, n // 3), slice(n // 3, n), slice(n // 2, n // 2)):
        assert torch.equal(random.normal_vector(n, **options, part=part), whole[part])


def test_a_part_of_a_long_vector_has_the_numbers_of_the_whole() -> None:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
    whole = random.normal_vector(2 * random.CHUNK + 5, **options)
    part = slice(random.CHUNK - 7, 2 * random.CHUNK + 5)
    assert torch.equal(random.normal_vector(len(whole), **options, part=part), whole[part])
