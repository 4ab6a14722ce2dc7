"""Digests of data are of the examples and their weights, not of how they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hvpkit.data import as_data, digest_of

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(23, 4, generator=G), torch.arange(23) % 3


def of(data: Any, **options: Any) -> str:
    return digest_of(as_data(data, **options))


def test_batches_are_not_part_of_it() -> None:
    same = {
        of((X, Y)),
        of((X, Y), batch_size=5),
        of((X, Y), batch_size=23),
        of(DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True)),
        of([(X[:4], Y[:4]), (X[4:], Y[4:])]),
        of((X.clone(), Y)),
    }
    assert len(same) == 1


@pytest.mark.parametrize(
    "other",
    [
        (X + 1e-6, Y),
        (X, (Y + 1) % 3),
        (X[:-1], Y[:-1]),
        (X.flip(0), Y.flip(0)),
        (X.double(), Y),
        (X.reshape(23, 2, 2), Y),
        (Y, X),
    ],
    ids=["value", "class", "fewer", "order", "dtype", "shape", "places"],
)
def test_other_examples_have_another(other: Any) -> None:
    assert of(other) != of((X, Y))


def test_weights_are_part_of_it() -> None:
    data = as_data((X, Y))
    whole = torch.arange(23)
    digests = {digest_of(data), *(digest_of(data.subset(whole, torch.full((23,), w))) for w in (0.1, 0.2))}
    assert len(digests) == 3


def test_batches_that_are_read_whole_keep_their_sizes() -> None:
    def size(batch: dict[str, Any]) -> int:
        return batch["size"]

    def batches(first: int, names: list[str]) -> list[dict[str, Any]]:
        return [
            {"x": X[:first], "size": first, "names": names},
            {"x": X[first:], "size": 23 - first, "names": []},
        ]

    found = [
        of(batches(k, names), num_examples=size)
        for k, names in ((5, ["a"]), (5, ["a"]), (6, ["a"]), (5, ["b"]))
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3
