from __future__ import annotations

import pytest
import torch

from hvpkit.operators.space import CHUNK, LOCAL
from problems import reducing


@pytest.mark.parametrize("n", [1, 100, CHUNK, CHUNK + 1, 3 * CHUNK + 17, 1_500_000])
@pytest.mark.parametrize("kind", ["equal", "random"])
def test_inner_products_and_norms_keep_their_digits(n: int, kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.ones(3, n) if kind == "equal" else torch.randn(3, n, generator=g)
    exact, allowed = rows.double(), 16 * torch.finfo(torch.float32).eps
    norms = exact.square().sum(dim=1).sqrt()
    assert float((LOCAL.row_norms(rows) / norms - 1).abs().max()) <= allowed
    assert float((LOCAL.norm(rows[0]) / norms[0] - 1).abs()) <= allowed
    size = float(norms[0]) ** 2
    assert float((LOCAL.dots(rows, rows[0]) - exact @ exact[0]).abs().max()) <= allowed * size
    block = LOCAL.dots(rows, rows.mT)
    assert block.shape == (3, 3)
    assert float((block - exact @ exact.mT).abs().max()) <= allowed * size


def test_every_sum_is_reduced() -> None:
    doubled = reducing(lambda total: 4 * total)
    rows = torch.ones(2, 2 * CHUNK)
    assert doubled.dots(rows, rows[0]).tolist() == [8 * CHUNK, 8 * CHUNK]
    assert float(doubled.norm(rows[0])) == pytest.approx((8 * CHUNK) ** 0.5)
    assert float(doubled.row_norms(rows)[0]) == pytest.approx((8 * CHUNK) ** 0.5)


def test_short_vectors_are_added_up_as_blas_does() -> None:
    rows = torch.randn(5, CHUNK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LOCAL.dots(rows, rows[0]), rows @ rows[0])
    assert torch.equal(LOCAL.norm(rows[0]), torch.dot(rows[0], rows[0]).sqrt())
