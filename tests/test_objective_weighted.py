"""Weighted means: the sum of w l over the sum of w, over all data, as training on all of it at once has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error

G = torch.Generator().manual_seed(0)
X = torch.randn(11, 3, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 1, 2, 1, 0, 0, 1, 1, 2, 1])
IGNORED = torch.where(torch.arange(11) % 3 == 1, -100, Y)
WEIGHT = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)
WORDS = torch.randint(0, 3, (11, 4), generator=G)
PADDED = torch.where(torch.arange(4) < 1 + torch.arange(11).unsqueeze(1) % 4, WORDS, -100)
BY_CLASS = partial(F.cross_entropy, weight=WEIGHT)
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
f64 = torch.float64


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Words(nn.Module):
    """Scores ``[B, classes, T]`` of four words each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 12), nn.Unflatten(1, (3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Tensor]] = {
    "weight": (net, nn.CrossEntropyLoss(WEIGHT), Y),
    "function": (net, partial(F.cross_entropy, weight=WEIGHT), Y),
    "smoothed": (net, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), Y),
    "ignored": (net, nn.CrossEntropyLoss(), IGNORED),
    "ignored and weight": (net, nn.CrossEntropyLoss(WEIGHT), IGNORED),
    "ignored class": (net, nn.CrossEntropyLoss(ignore_index=1), Y),
    "nll": (lambda: nn.Sequential(net(), nn.LogSoftmax(1)), nn.NLLLoss(WEIGHT, ignore_index=0), Y),
    "padded words": (lambda: Words().double(), nn.CrossEntropyLoss(), PADDED),
    "padded words and weight": (lambda: Words().double(), nn.CrossEntropyLoss(WEIGHT), PADDED),
    "words": (lambda: Words().double(), nn.CrossEntropyLoss(), WORDS),
    "probabilities": (net, nn.CrossEntropyLoss(WEIGHT), F.one_hot(Y, 3).double() * 0.9 + 0.1 / 3),
}


def trained(model: nn.Module, criterion: Callable, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and dense Hessian of the criterion over all data, by double backward."""
    params = list(model.parameters())
    loss = criterion(model(X), y)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    rows = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        for g in parameters_to_vector(grads)
    ]
    hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    return loss.detach(), parameters_to_vector(grads).detach(), hessian


def trained_ggn(model: nn.Module, criterion: Callable, y: Tensor) -> Tensor:
    params, z = list(model.parameters()), model(X)
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in z.flatten()]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    H = torch.autograd.functional.hessian(lambda z: criterion(z, y), z.detach())
    return J.mT @ H.reshape(z.numel(), z.numel()) @ J


def dense(H: hk.LinearOperator) -> Tensor:
    return H @ torch.eye(H.n, dtype=f64)


@pytest.mark.parametrize("name", CASES)
def test_everything_is_of_the_loss_that_is_trained(name: str) -> None:
    make, criterion, y = CASES[name]
    model = make()
    objective, params = hk.from_module(model, criterion)
    loss, gradient, hessian = trained(model, criterion, y)
    data = hk.as_data((X, y), batch_size=4)
    assert torch.allclose(hk.loss(objective, params, data), loss, rtol=1e-13)
    for mode in MODES:
        H = hk.hessian(objective, params, data, mode=mode)
        assert relative_error(dense(H), hessian) < (1e-6 if mode == "finite-difference" else 1e-12)
    assert relative_error(H.flatten(hk.grad(objective, params, data)), gradient) < 1e-12
    v = torch.randn(H.n, dtype=f64)
    tree, batch = H.unflatten(v), (X, y)
    assert relative_error(H.flatten(hk.hvp(objective, params, batch, tree)), hessian @ v) < 1e-12
    form = hk.quadratic_form(objective, params, batch, tree)
    assert torch.allclose(form.mean(), v @ hessian @ v, rtol=1e-10)
    ggn = trained_ggn(model, criterion, y)
    for mode in MODES:
        found = hk.ggn(objective, params, data, mode=mode)
        assert relative_error(dense(found), ggn) < (1e-6 if mode == "finite-difference" else 1e-12)
    assert relative_error(H.flatten(hk.ggnvp(objective, params, batch, tree)), ggn @ v) < 1e-12
    if name not in ("nll", "smoothed", "probabilities"):
        assert relative_error(dense(hk.fisher(objective, params, data)), ggn) < 1e-12


@pytest.mark.parametrize("name", ["weight", "ignored", "padded words and weight"])
def test_operators_pass_the_check(name: str) -> None:
    make, criterion, y = CASES[name]
    objective, params = hk.from_module(make(), criterion)
    for constructor in (hk.hessian, hk.ggn, hk.empirical_fisher):
        report = hk.check(constructor(objective, params, (X, y), batch_size=4))
        assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)


@pytest.mark.parametrize("name", ["weight", "padded words and weight"])
def test_samples_are_unbiased_with_the_constant_of_all_data(name: str) -> None:
    make, criterion, y = CASES[name]
    model = make()
    objective, params = hk.from_module(model, criterion)
    hessian = trained(model, criterion, y)[2]
    H = hk.hessian(objective, params, (X, y), batch_size=4)
    v = torch.randn(H.n, dtype=f64)
    singles = [H.subset(torch.tensor([i]), torch.tensor([1 / 11], dtype=f64)) @ v for i in range(11)]
    assert relative_error(torch.stack(singles).sum(0), hessian @ v) < 1e-12
    for draw in (lambda seed: H.sample(5, seed), lambda seed: H.coarsen(5, seed=seed)):
        forms = torch.stack([v @ (draw(seed) @ v) for seed in range(60)])
        error = float(forms.mean() - v @ hessian @ v) / float(forms.std() / 60**0.5)
        assert abs(error) < 4
    wrt = hk.hessian(objective, params, (X, y), wrt=next(iter(params)), batch_size=4)
    assert relative_error(dense(wrt), hessian[: wrt.n, : wrt.n]) < 1e-12
    both = hk.hessian(objective, params, (X, y)) - hk.ggn(objective, params, (X, y))
    assert relative_error(both @ v, hessian @ v - trained_ggn(model, criterion, y) @ v) < 1e-11


def test_batches_padded_to_different_lengths_weigh_their_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(tokens)).cumsum(1)).mT

    model = Tokens().double()
    lengths = [[2, 5, 3], [1, 1], [7, 4, 2, 6]]
    batches = []
    for rows in lengths:
        x = torch.randint(0, 5, (len(rows), max(rows)))
        y = torch.randint(0, 3, x.shape)
        batches.append((x, torch.where(torch.arange(max(rows)) < torch.tensor(rows).unsqueeze(1), y, -100)))
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())

    def loss_fn(params: dict[str, Tensor], _: object) -> Tensor:
        losses = [
            F.cross_entropy(torch.func.functional_call(model, params, (x,)), y, reduction="sum")
            for x, y in batches
        ]
        return torch.stack(losses).sum() / sum(map(sum, lengths))

    oracle = hessian_by_double_backward(loss_fn, params, None)
    assert relative_error(dense(hk.hessian(objective, params, batches)), oracle) < 1e-12
    assert torch.allclose(hk.loss(objective, params, batches), loss_fn(params, None))


def masked(model: nn.Module) -> hk.Objective:
    """Squared errors of the entries that a mask keeps, written by hand."""
    return hk.Objective(
        lambda params, batch: torch.func.functional_call(model, params, (batch["x"],)),
        lambda z, batch: (batch["mask"] * (z - batch["y"]).square()).sum(1),
        lambda batch: batch["mask"].sum(1),
    )


def test_weights_by_hand() -> None:
    model = net()
    mask = (torch.rand(11, 3, generator=G) < 0.4).double()
    y = torch.randn(11, 3, dtype=f64, generator=G)
    params = {name: p.detach() for name, p in model.named_parameters()}
    data = {"x": X, "y": y, "mask": mask}
    criterion = lambda z, y: (z - y)[mask > 0].square().mean()  # noqa: E731
    loss, gradient, hessian = trained(model, criterion, y)
    objective = masked(model)
    H = hk.hessian(objective, params, data, batch_size=3)
    assert relative_error(dense(H), hessian) < 1e-12
    assert torch.allclose(hk.loss(objective, params, hk.as_data(data, batch_size=3)), loss)
    assert relative_error(H.flatten(hk.grad(objective, params, data)), gradient) < 1e-12
    assert (
        relative_error(dense(hk.ggn(objective, params, data, batch_size=5)), trained_ggn(model, criterion, y))
        < 1e-12
    )
    chosen = hk.as_data(data).subset([1, 4, 5])
    part = (1 / mask[[1, 4, 5]].sum()) * (objective(params, {k: v[[1, 4, 5]] for k, v in data.items()})).sum()
    assert torch.allclose(hk.loss(objective, params, chosen), part)


def test_the_empirical_fisher_is_of_the_gradients_that_add_up_to_the_one_of_the_loss() -> None:
    model = net()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss(WEIGHT))
    params_list = list(model.parameters())
    losses = F.cross_entropy(model(X), Y, weight=WEIGHT, reduction="none") * (11 / WEIGHT[Y].sum())
    rows = [parameters_to_vector(torch.autograd.grad(one, params_list, retain_graph=True)) for one in losses]
    J = torch.stack(rows)
    assert (
        relative_error(dense(hk.empirical_fisher(objective, params, (X, Y), batch_size=4)), J.mT @ J / 11)
        < 1e-12
    )
    v = {name: torch.ones_like(p) for name, p in params.items()}
    found = parameters_to_vector(hk.fisher_vp(objective, params, (X, Y), v).values())
    assert relative_error(found, J.mT @ J @ torch.ones(J.shape[1], dtype=f64) / 11) < 1e-12


def test_without_weights_or_ignored_targets_nothing_is_scaled() -> None:
    objective, params = hk.from_module(net(), nn.CrossEntropyLoss())
    plain, _ = hk.from_module(net(), partial(F.cross_entropy, reduction="none"))
    H, expected = (hk.hessian(o, params, (X, Y), batch_size=4) for o in (objective, plain))
    v = torch.randn(H.n, dtype=f64)
    assert torch.equal(H @ v, expected @ v)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            lambda _: torch.ones(3),
            ValueError,
            r"example_weight returned shape \[3\] for a batch of 11 examples",
        ),
        (lambda _: 1.0, TypeError, "example_weight must return a tensor, got float"),
        (lambda _: -torch.ones(11), ValueError, "example_weight returned a weight that is negative"),
        (lambda _: torch.ones(11) / 0, ValueError, "example_weight returned a weight .* infinite"),
        (lambda _: torch.zeros(11), ValueError, "data: no example has any weight"),
    ],
)
def test_weights_that_are_none_are_refused(weight: Any, error: type[Exception], message: str) -> None:
    objective = hk.Objective(lambda p, batch: batch @ p, lambda z, _: z.square(), weight)
    for call in (hk.hessian, hk.loss, hk.grad):
        with pytest.raises(error, match=message):
            call(objective, torch.ones(3, dtype=f64), X)


def test_a_weight_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="example_weight must be a function of a batch, got 'batch'"):
        hk.Objective(lambda p, batch: batch @ p, lambda z, _: z, "batch")


def test_a_mean_cannot_be_weighted() -> None:
    objective = hk.Objective(
        lambda p, batch: batch @ p, lambda z, _: z.square().mean(), lambda batch: torch.ones(len(batch))
    )
    with pytest.raises(
        ValueError, match="objective has an example_weight, and output_loss returned a 0-d tensor"
    ):
        hk.hessian(objective, torch.ones(3, dtype=f64), X)


def test_sharpness_is_of_the_weighted_mean() -> None:
    model = net()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss(WEIGHT))
    plain = lambda p, batch: BY_CLASS(torch.func.functional_call(model, p, (batch[0],)), batch[1])  # noqa: E731
    options = {"epsilon": 0.05, "lr": 0.1, "max_steps": 5}
    found, expected = (
        hk.train.keskar_sharpness(loss_fn, params, hk.as_data((X, Y), batch_size=11), **options)
        for loss_fn in (objective, plain)
    )
    assert found.value == pytest.approx(expected.value, rel=1e-9)
