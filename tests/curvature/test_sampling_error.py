from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit import sampling_error

G = torch.Generator().manual_seed(0)
X = (
    torch.randn(400, 5, generator=G, dtype=torch.float64)
    * torch.rand(400, 1, generator=G, dtype=torch.float64) ** 3
)
H = hk.hessian(lambda p, batch: 0.5 * (batch @ p) ** 2, torch.ones(5, dtype=torch.float64), X)
V = torch.randn(5, 3, generator=G, dtype=torch.float64)
EXACT = torch.einsum("nk,nm,mk->k", V, X.mT @ X / len(X), V)


def form(op: hk.LinearOperator) -> Tensor:
    return torch.einsum("nk,nk->k", V, op @ V)


@pytest.mark.parametrize("importance", [None, "loss"])
def test_standard_errors_are_calibrated_over_seeds(importance: str | None) -> None:
    samples = [H.coarsen(60, importance=importance, seed=seed) for seed in range(400)]
    observed = torch.stack([form(sample) for sample in samples])
    assert bool(((observed.mean(0) - EXACT).abs() < 4 * observed.std(0) / 20).all())
    stated = torch.stack([sampling_error(sample, V, seed=7) for sample in samples]).square().mean(0).sqrt()
    ratio = stated / observed.std(0)
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all()), ratio


def test_examples_that_are_certain_do_not_scatter() -> None:
    large = int((X.norm(dim=1) > 0.3).sum())

    def score(_params: object, batch: Tensor) -> Tensor:
        return (batch.norm(dim=1) > 0.3).double() + 1e-9

    samples = [H.coarsen(large + 40, importance=score, seed=seed) for seed in range(200)]
    spread = torch.stack([form(sample) for sample in samples]).std(0)
    stated = torch.stack([sampling_error(sample, V) for sample in samples]).square().mean(0).sqrt()
    ratio = stated / spread
    assert bool((spread < 0.02 * EXACT).all())
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all()), ratio


def test_same_seed_same_halves() -> None:
    sample = H.coarsen(60, importance=None, seed=3)
    first, again, other = (sampling_error(sample, V, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nested_samples_and_one_vector() -> None:
    sample = H.coarsen(120, importance=None, seed=0).coarsen(40, importance=None, seed=1)
    one = sampling_error(sample, V[:, 0])
    assert one.shape == ()
    assert float(one) == pytest.approx(float(sampling_error(sample, V)[0]))


@pytest.mark.parametrize(
    ("sample", "vectors", "error", "name"),
    [
        (H, V, TypeError, "sample"),
        (hk.aslinearoperator(torch.eye(5, dtype=torch.float64)), V, TypeError, "sample"),
        (H.coarsen(50, importance=None), V[:4], ValueError, "vectors"),
        (H.coarsen(50, importance=None), V.float(), ValueError, "vectors"),
        (H.coarsen(1, importance=None), V, ValueError, "sample"),
    ],
    ids=["whole", "matrix", "shape", "dtype", "one"],
)
def test_bad_argument_is_named(
    sample: hk.LinearOperator, vectors: Tensor, error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=rf"^{name}"):
        sampling_error(sample, vectors)
