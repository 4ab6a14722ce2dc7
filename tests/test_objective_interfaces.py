"""from_module accepts the models, criteria and batches that people have."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import hvpkit as hk
from oracles import relative_error

G = torch.Generator().manual_seed(0)
X = torch.randn(9, 3, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
W = torch.rand(9, dtype=torch.float64, generator=G) + 0.5
MASK = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1.0], dtype=torch.float64)
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


class Net(nn.Module):
    """Returns its outputs in a form of its own."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z, width: int = 2) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(3, 4), nn.Linear(4, width), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.b(torch.tanh(self.a(x))))


def trained_hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Dense Hessian of what training minimises, by double backward."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        if g.requires_grad
        else [torch.zeros_like(p) for p in params]
        for g in flat
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def trained_ggn(
    model: nn.Module, tensor: Callable[[Any], Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Dense J'HJ of the mean loss of one output tensor, by torch.autograd."""
    params = list(model.parameters())
    z = tensor(model(X))
    rows = [torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True) for e in z.flatten()]
    J = torch.stack([parameters_to_vector(row) for row in rows])
    H = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
    return J.mT @ H @ J


def dense(H: hk.LinearOperator) -> Tensor:
    return H @ torch.eye(H.n, dtype=torch.float64)


@dataclass
class Data:
    logits: Tensor
    hidden: Tensor
    steps: int = 3


Named = namedtuple("Named", ["logits", "hidden"])


class Plain:
    def __init__(self, prediction: Tensor) -> None:
        self.prediction, self.name = prediction, "plain"


class Cache:
    """Keeps what depends on the parameters where no loss reads it."""

    def __init__(self, value: Tensor) -> None:
        self.layers = [value]


def hugging_face(z: Tensor) -> Any:
    outputs = pytest.importorskip("transformers").modeling_outputs
    return outputs.CausalLMOutputWithPast(logits=z, past_key_values=Cache(z), hidden_states=(z, z * 2))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda z: z, lambda o: o),
    "tuple": (lambda z: (z, z.square()), lambda o: o[0]),
    "list": (lambda z: [z, None], lambda o: o[0]),
    "tuple with constants": (lambda z: (z, 3, None, "text", Cache(z)), lambda o: o[0]),
    "named tuple": (lambda z: Named(z, z.square()), lambda o: o.logits),
    "dict": (lambda z: {"hidden": z.square(), "logits": z}, lambda o: o["logits"]),
    "ordered dict": (lambda z: OrderedDict(aux=z.square(), out=z), lambda o: o["out"]),
    "dataclass": (lambda z: Data(z, z.square()), lambda o: o.logits),
    "plain object": (Plain, lambda o: o.prediction),
    "ModelOutput": (hugging_face, lambda o: o.logits),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_models_may_return_their_outputs_in_any_form(kind: str, own: bool) -> None:
    wrap, take = OUTPUTS[kind]
    model = Net(wrap).double()
    criterion = nn.CrossEntropyLoss()
    if own:
        criterion = lambda o, y: F.cross_entropy(take(o), y, reduction="none")  # noqa: E731
    objective, params = hk.from_module(model, criterion)
    oracle = trained_hessian(model, lambda: F.cross_entropy(take(model(X)), Y))
    for mode in MODES:
        H = hk.hessian(objective, params, (X, Y), batch_size=5, mode=mode)
        assert relative_error(dense(H), oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    oracle = trained_ggn(model, take, lambda z: F.cross_entropy(z, Y))
    for mode in MODES:
        G = hk.ggn(objective, params, (X, Y), batch_size=5, mode=mode)
        assert relative_error(dense(G), oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    if not own:
        assert relative_error(dense(hk.fisher(objective, params, (X, Y))), oracle) < 1e-12


def test_hugging_face_models_take_torchs_losses_and_their_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8, max_position_embeddings=8, num_labels=3
    )
    model = transformers.DistilBertForSequenceClassification(config).double().train()
    tokens = torch.randint(0, 11, (6, 5))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(6) % 3}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def loss_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(model.eval(), params, (), inputs).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    params = {name: p.detach() for name, p in model.named_parameters()}
    expected = hk.hessian(loss_fn, params, batch, wrt="classifier.*")
    v = torch.ones(expected.n, dtype=torch.float64)
    model.train()
    for criterion in (nn.CrossEntropyLoss(), None):
        objective, params = hk.from_module(model, criterion)
        assert torch.allclose(
            hk.loss(objective, params, batch), F.cross_entropy(model.eval()(**inputs).logits, batch["labels"])
        )
        H = hk.hessian(objective, params, batch, wrt="classifier.*", batch_size=3)
        assert relative_error(H @ v, expected @ v) < 1e-12


class OwnLoss(Net):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        return self.give(None if labels is None else F.cross_entropy(logits, labels), logits)


GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda loss, _: loss,
    "tuple": lambda loss, logits: (loss, logits),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "attribute": lambda loss, logits: Plain2(loss, logits),
}


class Plain2:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.logits, self.loss = logits, loss


@pytest.mark.parametrize("batch", [(X, Y), {"x": X, "labels": Y}])
@pytest.mark.parametrize("kind", GIVEN)
def test_models_may_compute_their_own_loss(kind: str, batch: Any) -> None:
    model = OwnLoss(GIVEN[kind]).double()
    objective, params = hk.from_module(model, None)
    oracle = trained_hessian(model, lambda: F.cross_entropy(Net.forward(model, X), Y))
    for mode in MODES:
        H = hk.hessian(objective, params, batch, batch_size=3, mode=mode)
        assert relative_error(dense(H), oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    assert torch.allclose(hk.loss(objective, params, batch), F.cross_entropy(Net.forward(model, X), Y))


@pytest.mark.parametrize("kind", GIVEN)
def test_a_models_own_loss_has_no_gauss_newton_matrix(kind: str) -> None:
    objective, params = hk.from_module(OwnLoss(GIVEN[kind]).double(), None)
    for constructor in (hk.ggn, hk.fisher, hk.empirical_fisher):
        with pytest.raises((TypeError, ValueError)):
            constructor(objective, params, (X, Y))
    with pytest.raises((TypeError, ValueError)):
        hk.ggnvp(objective, params, (X, Y), params)
    H = hk.hessian(objective, params, (X, Y))
    with pytest.raises(ValueError, match="needs outputs that are real tensors"):
        H.coarsen(3)


def test_a_model_without_a_loss_of_its_own_needs_a_criterion() -> None:
    objective, params = hk.from_module(OwnLoss(GIVEN["dict"]).double(), None)
    with pytest.raises(
        ValueError, match=r"criterion=None takes the loss that model computes, and model returned"
    ):
        hk.loss(objective, params, X)


# Criteria.


class MeanOnly(nn.Module):
    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y) * 2


class Reducing(nn.Module):
    """As many people write a focal loss."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(o, y, reduction="none")
        losses = (1 - (-losses).exp()) ** 2 * losses
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


def focal(o: Tensor, y: Tensor, gamma: float = 2.0, reduction: str = "mean") -> Tensor:
    losses = F.cross_entropy(o, y, reduction="none")
    losses = (1 - (-losses).exp()) ** gamma * losses
    return losses if reduction == "none" else losses.mean()


class Stubborn(nn.Module):
    """Says that it has a reduction, and gives a mean whatever it is."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y)


CRITERIA: dict[str, tuple[Callable[..., Tensor], float, int]] = {
    "mean only": (MeanOnly(), 1.0, 0),
    "function": (lambda o, y: F.cross_entropy(o, y), 1.0, 0),
    "reducing": (Reducing(), 1.0, 1),
    "reducing sum": (Reducing("sum"), 1 / 9, 1),
    "reducing none": (Reducing("none"), 1.0, 1),
    "function reducing": (focal, 1.0, 1),
    "partial reducing": (partial(focal, gamma=1.0), 1.0, 1),
    "stubborn": (Stubborn(), 1.0, 0),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_of_ones_own(name: str) -> None:
    criterion, factor, ndim = CRITERIA[name]
    model = Net().double()
    objective, params = hk.from_module(model, criterion)
    oracle = factor * trained_hessian(model, lambda: criterion(model(X), Y).mean())
    for mode in MODES:
        H = hk.hessian(objective, params, (X, Y), batch_size=3, mode=mode)
        assert relative_error(dense(H), oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    assert objective(params, (X, Y)).ndim == ndim


class WeightedMean(nn.Module):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 3.0], dtype=o.dtype)[y]
        losses = weights * F.cross_entropy(o, y, reduction="none")
        return losses if self.reduction == "none" else losses.sum() / weights.sum()


class Subclass(nn.CrossEntropyLoss):
    pass


def test_a_subclass_of_a_weighted_criterion_is_weighted() -> None:
    model, criterion = Net().double(), Subclass(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))
    objective, params = hk.from_module(model, criterion)
    oracle = trained_hessian(model, lambda: criterion(model(X), Y))
    assert relative_error(dense(hk.hessian(objective, params, (X, Y), batch_size=2)), oracle) < 1e-12


def test_a_reduction_that_is_no_mean_over_examples_is_refused() -> None:
    model, criterion = Net().double(), WeightedMean()
    objective, params = hk.from_module(model, criterion)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"criterion with reduction='mean' gives .* on the first batch"):
            hk.hessian(objective, params, (X, Y))
    objective, params = hk.from_module(model, lambda o, y: criterion(o, y))
    oracle = trained_hessian(model, lambda: criterion(model(X), Y))
    assert relative_error(dense(hk.hessian(objective, params, (X, Y))), oracle) < 1e-12


def weighted(o: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return w * F.cross_entropy(o, y, reduction="none")


@pytest.mark.parametrize(
    ("batch", "targets"),
    [
        ((X, Y, W), 2),
        ((X, (Y, W)), None),
        ({"x": X, "y": Y, "w": W}, ("y", "w")),
        ({"x": X, "labels": Y, "label": W}, ["labels", "label"]),
    ],
)
def test_criteria_may_take_several_targets(batch: Any, targets: Any) -> None:
    model = Net().double()
    objective, params = hk.from_module(model, weighted, targets=targets)
    oracle = trained_hessian(model, lambda: weighted(model(X), Y, W).mean())
    assert relative_error(dense(hk.hessian(objective, params, batch, batch_size=4)), oracle) < 1e-12
    oracle = trained_ggn(model, lambda o: o, lambda z: weighted(z, Y, W).mean())
    assert relative_error(dense(hk.ggn(objective, params, batch, batch_size=4)), oracle) < 1e-12


def test_one_key_may_be_named() -> None:
    model = Net().double()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss(), targets="y")
    oracle = trained_hessian(model, lambda: F.cross_entropy(model(X), Y))
    assert relative_error(dense(hk.hessian(objective, params, {"x": X, "y": Y})), oracle) < 1e-12


def test_targets_that_a_batch_lacks_are_refused() -> None:
    model = Net().double()
    for targets, batch in ((3, (X, Y)), ("z", {"x": X, "y": Y}), ("y", (X, Y)), (1, {"x": X, "y": Y})):
        objective, params = hk.from_module(model, nn.CrossEntropyLoss(), targets=targets)
        with pytest.raises(
            ValueError, match=r"data: a batch for from_module must be .* from_module\(\.\.\., targets=\)"
        ):
            hk.loss(objective, params, batch)
    with pytest.raises(TypeError, match="targets must be keys of a batch, or a number"):
        hk.from_module(model, nn.CrossEntropyLoss(), targets=[1, 2])
    with pytest.raises(ValueError, match="targets must be at least 0, got -1"):
        hk.from_module(model, nn.CrossEntropyLoss(), targets=-1)


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, :2], z[:, 2:]


PAIRS: dict[str, tuple[Callable[..., Tensor], Tensor, Callable[[Tensor], Any]]] = {
    "cosine": (nn.CosineEmbeddingLoss(margin=0.1), 2 * Y - 1, halves),
    "gaussian": (nn.GaussianNLLLoss(), X[:, :2], lambda z: (z[:, :2], z[:, 2:].exp())),
    "ranking": (nn.MarginRankingLoss(margin=3.0), (2 * Y - 1), lambda z: (z[:, 0].square(), z[:, 1])),
    "variational": (
        lambda mean, log_scale, x: (x[:, :2] - mean).square().sum(1) * log_scale.exp().sum(1),
        X,
        halves,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_criteria_may_take_several_outputs(name: str) -> None:
    criterion, y, wrap = PAIRS[name]
    model = Net(wrap, 4).double()
    objective, params = hk.from_module(model, criterion)
    place = 1 if name == "gaussian" else 2
    arguments = lambda: [*model(X)[:place], y, *model(X)[place:]]  # noqa: E731
    oracle = trained_hessian(model, lambda: criterion(*arguments()).mean())
    H = hk.hessian(objective, params, (X, y), batch_size=4)
    assert relative_error(dense(H), oracle) < 1e-11


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_divides_by_the_lengths_of_targets_as_torch_does(reduction: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(-1)).double()

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).transpose(0, 1)

    x = torch.randn(3, 6, 3, dtype=torch.float64)
    y, lengths = torch.tensor([[1, 2, 0], [3, 1, 2], [2, 0, 0]]), torch.tensor([2, 3, 1])
    times = torch.full((3,), 6)
    criterion = nn.CTCLoss(reduction=reduction)
    objective, params = hk.from_module(TimeFirst(), criterion, targets=3)
    expected = criterion(model(x).transpose(0, 1), y, times, lengths) / (3 if reduction == "sum" else 1)
    assert torch.allclose(hk.loss(objective, params, (x, y, times, lengths)), expected, rtol=1e-10)


@pytest.mark.parametrize("batch", [X, (X,), [(X[:5],), (X[5:],)]])
def test_an_autoencoder_has_its_input_as_target(batch: Any) -> None:
    model = Net(width=3).double()
    for criterion in (nn.MSELoss(), F.mse_loss, lambda o, x: (o - x).square().mean(1)):
        objective, params = hk.from_module(model, criterion)
        oracle = trained_hessian(model, lambda: F.mse_loss(model(X), X))
        assert relative_error(dense(hk.hessian(objective, params, batch)), oracle) < 1e-12


def test_a_criterion_of_one_argument_gets_the_outputs() -> None:
    model = Net().double()
    objective, params = hk.from_module(model, lambda o: o.square().sum(1))
    oracle = trained_hessian(model, lambda: model(X).square().sum(1).mean())
    assert relative_error(dense(hk.hessian(objective, params, X, batch_size=4)), oracle) < 1e-12


# What cannot be accepted says what to write.


@pytest.mark.parametrize(
    ("model", "criterion"),
    [(nn.CrossEntropyLoss(), Net()), (F.cross_entropy, Net()), (partial(F.mse_loss), Net())],
)
def test_arguments_in_the_other_order_are_refused(model: Any, criterion: Any) -> None:
    with pytest.raises(
        TypeError, match=r"from_module takes the model first: from_module\(model, criterion\)"
    ):
        hk.from_module(model, criterion)


def test_script_modules_are_refused_by_name() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3))
    with pytest.raises(
        TypeError, match=r"model is a ScriptModule, whose compiled code .* that was scripted or traced"
    ):
        hk.from_module(script, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"model\.1 is a ScriptModule"):
        hk.from_module(nn.Sequential(nn.Linear(3, 3), script), nn.CrossEntropyLoss())


def test_a_loss_and_parameters_in_the_other_order_are_refused() -> None:
    model = Net().double()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())
    for call in (hk.hessian, hk.grad, hk.loss):
        with pytest.raises(
            TypeError, match=r"loss_fn must be a function loss_fn\(params, batch\), got dict; .* order"
        ):
            call(params, objective, (X, Y))
        with pytest.raises(
            TypeError, match=r"params must be a tree of tensors, .* hvpkit\.from_module\(model, criterion\)"
        ):
            call(torch.add, nn.CrossEntropyLoss(), (X, Y))
