"""Losses that depend on parameters beside their arguments, or write to buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.autodiff.references import references
from oracles import hessian_by_double_backward, relative_error

X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
BATCH = (X, Y)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def plain(m: nn.Module, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(functional_call(m, params, (batch[0],)), batch[1], reduction="none")


def penalised(m: nn.Module) -> Callable:
    return lambda p, batch: plain(m, p, batch) + 0.05 * sum(w.square().sum() for w in m.parameters())


def one_weight(m: nn.Module) -> Callable:
    weight = m[0].weight
    return lambda p, batch: plain(m, p, batch) + 0.05 * weight.square().sum()


class Task:
    def __init__(self, m: nn.Module) -> None:
        self.net, self.critic = m, net()

    def loss(self, p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return plain(self.net, p, batch) + self.critic(functional_call(self.net, p, (batch[0],)) @ M).sum(1)


M = torch.ones(2, 3, dtype=torch.float64)

CAPTURING: dict[str, tuple[Callable[[nn.Module], Callable], str]] = {
    "closure": (penalised, r"'m\.0\.bias', 'm\.0\.weight', 'm\.2\.bias', 'm\.2\.weight', which"),
    "one parameter": (one_weight, r"'m\.0\.weight', which"),
    "discriminator": (lambda m: Task(m).loss, r"'critic\.0\.bias', 'critic\.0\.weight', 'critic\.2"),
    "objective": (
        lambda m: hk.Objective(partial(forward, m), lambda z, b: z[:, 0] * m[2].bias.sum() + 0 * b[1]),
        r"'m\.2\.bias', which",
    ),
}


def forward(m: nn.Module, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional_call(m, params, (batch[0],))


@pytest.mark.parametrize("kind", CAPTURING)
def test_parameters_beside_params_are_named_in_a_warning(kind: str) -> None:
    make, names = CAPTURING[kind]
    m = net()
    params = {name: p.detach() for name, p in m.named_parameters()}
    with pytest.warns(hk.CapturedParameterWarning, match=f"loss_fn depends on {names}"):
        hk.hessian(make(m), params, BATCH)


def assert_right(loss_fn: Callable, params: dict[str, Tensor], **options: Any) -> None:
    """Compare the Hessian, made without a warning, with double backward."""
    H = hk.hessian(loss_fn, params, BATCH, batch_size=len(BATCH[0]), **options)
    expected = hessian_by_double_backward(loss_fn, params, BATCH)
    assert relative_error(H @ torch.eye(H.n, dtype=H.dtype), expected) < 1e-12


@pytest.mark.parametrize("kind", ["closure", "discriminator"])
def test_the_remedies_end_the_warning(kind: str) -> None:
    m = net()
    params = {name: p.detach().clone() for name, p in m.named_parameters()}
    if kind == "discriminator":
        task = Task(m)
        task.critic.requires_grad_(False)
        loss_fn: Callable = task.loss
    else:
        loss_fn = lambda p, batch: plain(m, p, batch) + 0.05 * m[0].weight.detach().square().sum()  # noqa: E731
    assert_right(loss_fn, params)


class Physics:
    """Its loss differentiates the network by inputs, which are leaves of the graph too."""

    def __init__(self) -> None:
        self.net = net()
        self.weight = torch.ones(8, dtype=torch.float64)

    def loss(self, p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().clone().requires_grad_()
            u = functional_call(self.net, p, (x,))
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.square().sum(1) + u.square().sum(1)


@pytest.mark.parametrize("mode", ["reverse-over-reverse"])
def test_inputs_that_a_loss_differentiates_by_are_no_parameters(mode: str) -> None:
    task = Physics()
    params = {name: p.detach() for name, p in task.net.named_parameters()}
    assert_right(task.loss, params, mode=mode)


def normalised() -> nn.Module:
    return nn.Sequential(net()[0], nn.BatchNorm1d(4).double(), nn.Linear(4, 2).double())


def test_a_loss_that_writes_to_buffers_is_refused_and_the_buffers_are_put_back() -> None:
    m = normalised().train()
    params = {name: p.detach() for name, p in m.named_parameters()}
    before = [b.clone() for b in m.buffers()]
    message = r"loss_fn writes to the buffers 'm\.1\.running_mean', .* call model\.eval\(\)"
    for loss_fn in (
        lambda p, batch: plain(m, p, batch),
        partial(lambda m, p, batch: plain(m, p, batch), m=m),
    ):
        if isinstance(loss_fn, partial):
            call: Callable = lambda p, batch, f=loss_fn: f(p=p, batch=batch)  # noqa: E731
        else:
            call = loss_fn
        with pytest.raises(ValueError, match=message):
            hk.hessian(call, params, BATCH)
    assert all(torch.equal(b, c) for b, c in zip(m.buffers(), before, strict=True))


def test_the_remedies_for_written_buffers_are_accepted() -> None:
    m = normalised().train()
    params = {name: p.detach() for name, p in m.named_parameters()}

    def with_copies(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        buffers = {name: b.clone() for name, b in m.named_buffers()}
        return plain(m, {**p, **buffers}, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(with_copies, params)
        m.eval()
        assert_right(lambda p, batch: plain(m, p, batch), params)


def test_references_are_named_and_visited_once() -> None:
    m = net()
    numbers = {"a": [m, m], "b": 3}
    cyclic: list[object] = [numbers]
    cyclic.append(cyclic)

    def function() -> object:
        return cyclic, numbers, later

    found = [*references(function)]
    assert [name for name, thing in found if thing is m] == ["numbers.a.0"]
    assert len({id(thing) for _, thing in found}) == len(found)
    assert any(thing is m[0].weight for _, thing in found)
    later = None
    assert later is None


@pytest.mark.filterwarnings("ignore::hvpkit.CapturedParameterWarning")
def test_check_finds_parameters_beside_params() -> None:
    m = net()
    params = {name: p.detach() for name, p in m.named_parameters()}
    report = hk.check(hk.hessian(one_weight(m), params, BATCH))
    assert [finding.check for finding in report.findings if finding.verdict == "failed"] == ["constants"]
    assert report.findings[-1].suspects == ("m.0.weight",)
    assert "params argument" in report.findings[-1].mend
    assert hk.check(hk.hessian(lambda p, batch: plain(m, p, batch), params, BATCH)).ok
