"""0-d losses that are no mean over examples are refused where batches are cut from the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error

f64 = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, dtype=f64, generator=G)
Y = torch.randint(0, 2, (24,), generator=G)
TIMES = torch.rand(24, dtype=f64, generator=G)
MASK = (torch.rand(24, generator=G) < 0.6).double()
DATA = (X, Y, TIMES, MASK)
PARAMS = {"a": torch.randn(3, 4, dtype=f64, generator=G), "b": torch.randn(4, 2, dtype=f64, generator=G)}
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def outputs(p: dict[str, Tensor], batch: Batch) -> Tensor:
    return torch.tanh(batch[0] @ p["a"]) @ p["b"]


def mean(p: dict[str, Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(outputs(p, batch), batch[1])


def total(p: dict[str, Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(outputs(p, batch), batch[1], reduction="sum")


def contrastive(p: dict[str, Tensor], batch: Batch) -> Tensor:
    z = outputs(p, batch)
    scores = (
        (z @ z.mT).fill_diagonal_(-10.0) if not z.requires_grad else z @ z.mT - 10 * torch.eye(len(z)).to(z)
    )
    same = (batch[1][:, None] == batch[1]) & ~torch.eye(len(z), dtype=torch.bool)
    return -(scores.log_softmax(1) * same).sum() / len(z)


def cox(p: dict[str, Tensor], batch: Batch) -> Tensor:
    risk = outputs(p, batch)[:, 0]
    order = batch[2].argsort(descending=True)
    return (risk[order].logcumsumexp(0) - risk[order]).mean()


def token_mean(p: dict[str, Tensor], batch: Batch) -> Tensor:
    losses = F.cross_entropy(outputs(p, batch), batch[1], reduction="none")
    return (losses * batch[3]).sum() / batch[3].sum()


def batch_statistics(p: dict[str, Tensor], batch: Batch) -> Tensor:
    z = F.batch_norm(outputs(p, batch), None, None, training=True)
    return F.cross_entropy(z, batch[1])


COUPLED = (contrastive, cox, token_mean, batch_statistics)


def dense(H: hk.LinearOperator) -> Tensor:
    return H @ torch.eye(H.n, dtype=f64)


@pytest.mark.parametrize("loss_fn", COUPLED)
def test_losses_of_batches_are_refused_where_data_is_cut(loss_fn: Callable) -> None:
    loader = DataLoader(TensorDataset(*DATA), batch_size=8)
    for data, options in ((DATA, {"batch_size": 8}), (loader, {}), (DATA, {"batch_size": "auto"})):
        with pytest.raises(ValueError, match=r"0-d loss that is no mean over examples: .*batch_size=len"):
            hk.hessian(loss_fn, PARAMS, data, **options)


@pytest.mark.parametrize("loss_fn", COUPLED)
def test_the_remedies_give_the_hessian_that_is_meant(loss_fn: Callable) -> None:
    H = hk.hessian(loss_fn, PARAMS, DATA, batch_size=len(X))
    assert relative_error(dense(H), hessian_by_double_backward(loss_fn, PARAMS, DATA)) < 1e-12
    batches = [tuple(part[i : i + 8] for part in DATA) for i in (0, 8, 16)]

    def over_batches(p: dict[str, Tensor], _: object) -> Tensor:
        return torch.stack([loss_fn(p, batch) for batch in batches]).mean()

    H = hk.hessian(loss_fn, PARAMS, batches)
    assert relative_error(dense(H), hessian_by_double_backward(over_batches, PARAMS, None)) < 1e-12


@pytest.mark.parametrize("data", [DATA, [DATA], DataLoader(TensorDataset(*DATA), batch_size=8)])
def test_sums_are_refused_with_their_own_message(data: object) -> None:
    with pytest.raises(ValueError, match=r"loss_fn returns a sum over its batch, .* too large by the number"):
        hk.hessian(total, PARAMS, data)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("shift", [0.0, 1e3, -1e3])
def test_means_pass_in_any_batches(dtype: torch.dtype, shift: float) -> None:
    params = {name: p.to(dtype) for name, p in PARAMS.items()}
    data = tuple(part.to(dtype) if part.is_floating_point() else part for part in DATA)
    loss_fn = lambda p, batch: mean(p, batch) + shift  # noqa: E731
    for options in ({"batch_size": 5}, {"batch_size": 1}, {}):
        H = hk.hessian(loss_fn, params, data, **options)
        assert H.num_examples == 24


def test_a_mean_of_zero_passes() -> None:
    H = hk.hessian(lambda p, batch: 0 * mean(p, batch), PARAMS, DATA, batch_size=8)
    assert not dense(H).any()


def test_declared_batches_and_whole_batches_are_kept() -> None:
    objective = hk.Objective(outputs, lambda z, b: F.cross_entropy(z - z.mean(0), b[1]), batchnorm="batch")
    hk.hessian(objective, PARAMS, DATA, batch_size=8)
    whole = hk.as_data([DATA, DATA], num_examples=lambda batch: len(batch[0]))
    H = hk.hessian(contrastive, PARAMS, whole)
    assert relative_error(dense(H), hessian_by_double_backward(contrastive, PARAMS, DATA)) < 1e-12


def sorted_by_class(p: dict[str, Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(outputs(p, batch), batch[1], weight=torch.tensor([0.2, 3.0], dtype=f64))


def padded(p: dict[str, Tensor], batch: Batch) -> Tensor:
    return (outputs(p, batch)[:, 0] * batch[3]).sum() / batch[3].sum()


ORDER = Y.argsort(stable=True)
SORTED = tuple(part[ORDER] for part in DATA)


@pytest.mark.parametrize(
    ("loss_fn", "data"),
    [
        (sorted_by_class, SORTED),  # the first batch has one class, and its weighted mean is the mean
        (
            padded,
            (*DATA[:3], torch.cat([torch.ones(16, dtype=f64), MASK[16:]])),
        ),  # the first batches are full
        (
            padded,
            (*DATA[:3], torch.tensor([1.0, 1, 0, 1] * 6, dtype=f64)),
        ),  # the halves of a batch weigh the same
        (
            padded,
            (*DATA[:3], torch.tensor([1.0] * 20 + [0.0] * 4, dtype=f64)),
        ),  # the mean of the last ones is NaN
    ],
)
def test_weighted_means_are_refused_though_the_first_batch_is_a_mean(loss_fn: Callable, data: Batch) -> None:
    loader = DataLoader(TensorDataset(*data), batch_size=8)
    message = "0-d loss that is no mean over examples"
    for examples in (hk.as_data(data, batch_size=8), loader):
        for ask in (hk.hessian, hk.grad, hk.loss, hk.train.keskar_sharpness):
            with pytest.raises(ValueError, match=message):
                ask(loss_fn, PARAMS, examples)
        with pytest.raises(ValueError, match=message):
            hk.train.absa(loss_fn, PARAMS, examples, hk.train.absa_init(8, 0.1), num_epochs=1)
    assert hk.loss(loss_fn, PARAMS, data) == loss_fn(PARAMS, data)
    assert hk.hessian(loss_fn, PARAMS, data, batch_size=24).num_examples == 24


def test_sums_are_refused_by_losses_and_gradients_too() -> None:
    for ask in (hk.grad, hk.loss, hk.train.keskar_sharpness):
        with pytest.raises(ValueError, match="loss_fn returns a sum over its batch"):
            ask(total, PARAMS, DATA)
