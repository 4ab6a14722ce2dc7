from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch

from hvpkit._utils.checkpoints import digest, read, write


class Method(StrEnum):
    ONE = "one"


CONTENT = {"state": {"x": torch.arange(6.0).reshape(2, 3)[:, 1:], "k": 3}, "history": [1.5, None, True]}


def test_content_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert read(path, {}) is None
    write(path, {"method": Method.ONE, "k": np.int64(3)}, CONTENT)
    found = read(path, {"method": "one", "k": 3})
    assert found is not None
    assert torch.equal(found["state"]["x"], CONTENT["state"]["x"])
    assert found["history"] == CONTENT["history"]


def test_other_identity_says_which_part(tmp_path: Path) -> None:
    path, data = tmp_path / "a.pt", {"data": digest(torch.ones(2)), "k": 1, "old": 1}
    write(path, data, CONTENT)
    with pytest.raises(
        ValueError, match=r"^file: .* another solve \(data differs, k was 1 and is 2, old was 1 and is None\)"
    ):
        read(path, {"data": digest(torch.zeros(2)), "k": 2}, name="file")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(1), torch.ones(())),
        (torch.zeros(2), -torch.zeros(2)),
        (1, 1.0),
        (1, True),
        (["ab"], ["a", "b"]),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"b": 1}),
        (None, "None"),
    ],
)
def test_different_values_have_different_digests(one: object, other: object) -> None:
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def test_layout_in_memory_is_not_part_of_a_digest() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert digest(x.mT) == digest(x.mT.contiguous())
    assert digest(torch.ones(3, requires_grad=True)) == digest(torch.ones(3))
    for dtype in (torch.bfloat16, torch.bool, torch.int8, torch.complex64):
        assert digest(torch.ones(3, dtype=dtype)) == digest(torch.ones(3, dtype=dtype))


def test_object_without_a_digest_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no digest"):
        digest(object())
