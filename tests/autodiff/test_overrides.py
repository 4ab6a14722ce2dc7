from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.autodiff.overrides import OVERRIDES, FunctionOverrides, without_cudnn
from oracles import hessian_by_differences, relative_error

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {mode: 1e-8 for mode in MODES[:2]} | {"finite-difference": 1e-7}


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


SCORES, SIGNS, CHANCES = 3 * reals(5, 4), reals(5, 4).sign(), reals(5, 4).softmax(1)
CLASSES = torch.tensor([0, 3, 1, 1, 2])
NAMED = torch.tensor([[0, -1, 1, 1], [-1, 0, 0, 0], [3, 1, 0, 2], [2, 2, -1, 0], [1, 3, -1, -1]])
TOKENS = torch.tensor([[0, 3, 1], [2, 0, 0], [0, 0, 0], [1, 1, 3]])
LABELS = torch.tensor([[1, 2, 2], [2, 2, 2], [1, 1, 1], [2, 1, 2]])


def ctc(labels: Tensor, num_labels: list[int], lengths: list[int], **options: object) -> Tensor:
    scores = reals(6, 4, 3).log_softmax(2)
    return F.ctc_loss(scores, labels, torch.tensor(lengths), torch.tensor(num_labels), **options)


CALLS: dict[str, Callable[..., Tensor]] = {
    **{f"embedding {i}": lambda i=i: F.embedding(TOKENS, reals(4, 3), i) for i in (None, 0, -1)},
    "embedding sparse": lambda: F.embedding(TOKENS, reals(4, 3), sparse=True, scale_grad_by_freq=True),
    **{
        f"embedding_bag {mode} {i}": lambda mode=mode, i=i: F.embedding_bag(
            TOKENS, reals(4, 3), mode=mode, padding_idx=i
        )
        for mode, i in itertools.product(("sum", "mean", "max"), (None, 0, -4))
    },
    "embedding_bag weighted": lambda: F.embedding_bag(
        TOKENS, reals(4, 2), mode="sum", per_sample_weights=reals(4, 3), padding_idx=1
    ),
    **{
        f"weight_norm {dim}": lambda dim=dim, shape=shape: torch._weight_norm(
            reals(2, 3, 2), reals(*shape), dim
        )
        for dim, shape in {0: (2, 1, 1), 1: (1, 3, 1), 2: (1, 1, 2), -1: ()}.items()
    },
    **{
        f"conv2d {shape} {options}": lambda shape=shape, options=options: F.conv2d(
            reals(2, 4, 7, 6), reals(*shape), reals(shape[0]), **options
        )
        for shape, options in (
            ((3, 4, 1, 1), {"stride": 2}),
            ((3, 4, 1, 1), {"stride": (1, 3), "padding": "valid"}),
            ((4, 2, 1, 1), {"stride": [2], "groups": 2, "dilation": 3}),
            ((3, 4, 1, 1), {"stride": 2, "padding": (1, 0)}),
            ((3, 4, 1, 1), {"padding": "same"}),
            ((3, 4, 3, 1), {"stride": 2, "padding": 1}),
        )
    },
    "hardsigmoid": lambda: F.hardsigmoid(SCORES),
    "multi_margin of one": lambda: F.multi_margin_loss(SCORES[0], CLASSES[0]),
    "multilabel_margin of one": lambda: F.multilabel_margin_loss(SCORES[0], NAMED[0]),
    **{
        f"{name} {reduction}": lambda loss=loss, reduction=reduction: loss(reduction=reduction)
        for reduction in ("none", "mean", "sum")
        for name, loss in {
            "huber": lambda **r: F.huber_loss(SCORES, CHANCES, delta=0.7, **r),
            "huber weighted": lambda **r: F.huber_loss(SCORES, CHANCES, weight=CHANCES, **r),
            "soft_margin": lambda **r: F.soft_margin_loss(SCORES, SIGNS, **r),
            "multi_margin": lambda **r: F.multi_margin_loss(SCORES, CLASSES, margin=1.3, **r),
            "multi_margin squared": lambda **r: F.multi_margin_loss(SCORES, CLASSES, 2, 1.3, CHANCES[0], **r),
            "multilabel_margin": lambda **r: F.multilabel_margin_loss(SCORES, NAMED, **r),
            "ctc": lambda **r: ctc(LABELS, [3, 1, 2, 0], [6, 5, 6, 4], **r),
            "ctc impossible": lambda **r: ctc(LABELS, [3, 3, 3, 3], [6, 5, 3, 1], **r),
            "ctc zero_infinity": lambda **r: ctc(LABELS, [3, 3, 3, 3], [6, 5, 3, 1], zero_infinity=True, **r),
            "ctc blank": lambda **r: ctc(LABELS - 1, [3, 1, 2, 2], [6, 6, 6, 6], blank=2, **r),
        }.items()
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_overrides_have_the_values_of_torch(name: str) -> None:
    expected = CALLS[name]()
    with FunctionOverrides(OVERRIDES):
        found = CALLS[name]()
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_strided_convolutions_of_few_channels_in_channels_last_layout_keep_to_their_memory() -> None:
    layers = [nn.Conv2d(4, 8, 1, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers), reals(50, 4, 16, 16)
    y = torch.arange(50) % 3
    exact = hk.hessian(*hk.from_module(model.double(), F.cross_entropy), (x, y))
    model, images = model.float(), x.float().contiguous(memory_format=torch.channels_last)
    H = hk.hessian(*hk.from_module(model, F.cross_entropy), (images, y), mode="reverse-over-reverse")
    v = reals(H.n)
    for _ in range(10):  # torch's own gradient ends the process in the first few
        assert relative_error(H @ v.float(), exact @ v) < 1e-5


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("loss", [F.soft_margin_loss, F.multilabel_margin_loss, F.multi_margin_loss])
@pytest.mark.parametrize("old", [{"size_average": False}, {"reduce": False}, {"size_average": True}])
def test_the_older_names_of_reductions_mean_what_they_did(loss: Callable, old: dict[str, bool]) -> None:
    targets = {F.soft_margin_loss: SIGNS, F.multilabel_margin_loss: NAMED, F.multi_margin_loss: CLASSES}[loss]
    expected = loss(SCORES, targets, **old)
    with FunctionOverrides(OVERRIDES):
        assert torch.allclose(loss(SCORES, targets, **old), expected, rtol=1e-12)


def test_an_inplace_hardsigmoid_writes_to_its_input() -> None:
    x = SCORES.clone()
    with FunctionOverrides(OVERRIDES):
        assert F.hardsigmoid(x, inplace=True) is x
    assert torch.allclose(x, F.hardsigmoid(SCORES), rtol=1e-14)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 2))


class Padded(nn.Module):
    """Network whose padding row is used only by the embedding, where it is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


RAW: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), reals(4, 3)),
    "old weight_norm": (old_weight_norm, reals(4, 3)),
    "padding": (Padded, TOKENS),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(4, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 2)), TOKENS),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RAW)
def test_matvecs_are_right_without_from_module(name: str, mode: str) -> None:
    make, inputs = RAW[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double()
    params = {key: p.detach() + 0.1 for key, p in model.named_parameters()}
    held = {"embedding.weight": params["embedding.weight"][:1]} if name == "padding" else {}

    def losses(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, params, (batch[0],))
        return F.huber_loss(outputs, batch[1], reduction="none", delta=9.0).mean(1)

    def with_constants(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        fixed = {key: torch.cat([rows, params[key][len(rows) :]]) for key, rows in held.items()}
        return losses(params | fixed, batch)

    batch = (inputs, reals(4, 2))
    oracle = hessian_by_differences(with_constants, params, batch)
    H = hk.hessian(losses, params, batch, mode=mode)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert relative_error(dense, oracle) < TOLERANCE[mode]
    assert relative_error(dense, dense.mT) < TOLERANCE[mode]


def test_a_padding_row_of_a_weight_that_is_made_of_others_is_refused_in_differences() -> None:
    params = {"a": reals(4, 3), "b": reals(3)}

    def losses(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.tanh(F.embedding(tokens, params["a"] * params["b"], 0)).sum((1, 2))

    for mode in MODES[:2]:
        hk.hessian(losses, params, TOKENS, mode=mode) @ torch.ones(15, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"model: mode='finite-difference' would move the padding row"):
        hk.hvp(losses, params, TOKENS, params, mode=MODES[2])


def test_a_frozen_embedding_keeps_its_padding_row_in_differences() -> None:
    table, w = reals(4, 3), reals(3)

    def losses(w: Tensor, tokens: Tensor) -> Tensor:
        return torch.tanh(F.embedding(tokens, table, 0) @ w).mean(1)

    exact = hk.hvp(losses, w, TOKENS, w)
    assert relative_error(hk.hvp(losses, w, TOKENS, w, mode=MODES[2]), exact) < 1e-7


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda w, tokens: F.embedding(tokens, w, max_norm=1.0).square().sum((1, 2)),
        lambda w, tokens: F.embedding_bag(tokens, w, max_norm=1.0).square().sum(1),
    ],
)
def test_embeddings_that_change_their_weight_are_refused_before_they_do(loss_fn: Callable) -> None:
    w = reals(4, 3)
    for front_door in (hk.hessian, hk.grad, hk.loss):
        with pytest.raises(ValueError, match="model: an embedding with max_norm rescales its weight"):
            front_door(loss_fn, w, TOKENS)
    assert torch.equal(w, reals(4, 3))


def test_forms_without_an_override_are_refused_with_the_form_that_has_one() -> None:
    flat, offsets = TOKENS.flatten(), torch.arange(0, 12, 3)
    with pytest.raises(ValueError, match=r"model: an EmbeddingBag with offsets .* pass a matrix of indices"):
        hk.hvp(
            lambda w, _: F.embedding_bag(flat, w, offsets).square().sum(1), reals(4, 3), TOKENS, reals(4, 3)
        )

    def joined(scores: Tensor, _: Tensor) -> Tensor:
        lengths = torch.tensor([6, 6, 6, 6]), torch.tensor([3, 3, 3, 3])
        return F.ctc_loss(scores.log_softmax(2), LABELS.flatten(), *lengths, reduction="none")

    with pytest.raises(
        ValueError, match=r"criterion: .* ctc_loss needs log_probs \[T, B, C\] and targets \[B, S\]"
    ):
        hk.hvp(joined, reals(6, 4, 3), TOKENS, reals(6, 4, 3))


@pytest.mark.parametrize("mode", MODES)
def test_inputs_may_be_made_to_require_grad(mode: str) -> None:
    def losses(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w.clone().requires_grad_()).square() + torch.ones(3).requires_grad_(True)

    x, w = reals(3, 2), reals(2)
    oracle = hessian_by_differences(lambda p, x: losses(p["w"], x), {"w": w}, x)
    assert relative_error(hk.hvp(losses, w, x, w, mode=mode), oracle @ w) < TOLERANCE[mode]
    assert relative_error(hk.quadratic_form(losses, w, x, w).mean(), w @ oracle @ w) < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_by_inputs_need_a_mode_that_has_them(mode: str) -> None:
    def gradient_norm(w: Tensor, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(x @ w).sum(), x, create_graph=True)
        return slope.square().sum(1)

    x, w = reals(3, 2), reals(2)
    if mode == MODES[0]:
        with pytest.raises(RuntimeError, match="does not require grad"):
            hk.hvp(gradient_norm, w, x, w, mode=mode)
    else:
        oracle = hessian_by_differences(lambda p, x: gradient_norm(p["w"], x), {"w": w}, x)
        assert relative_error(hk.hvp(gradient_norm, w, x, w, mode=mode), oracle @ w) < TOLERANCE[mode]


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_recurrent_layers_leave_cudnn_aside_and_put_it_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    watch = without_cudnn(
        lambda *_: (seen.append(torch.backends.cudnn.enabled), torch.ones(2, 3, 2).double())
    )
    monkeypatch.setitem(OVERRIDES, getattr(torch, name), lambda *args: watch(*args)[1:] * 2)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    options = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    with FunctionOverrides(OVERRIDES):
        layer(2, 2, **options).double()(reals(2, 3, 2))
    assert seen == [False]
    assert torch.backends.cudnn.enabled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_have_right_products_on_a_gpu(kind: type[nn.RNNBase], mode: str) -> None:
    model = kind(2, 3, 2, batch_first=True).double()
    batch = (reals(4, 3, 2), torch.zeros(4))
    objective, params = hk.from_module(model, lambda outputs, _: outputs[0].square().sum((1, 2)))
    H = hk.hessian(objective, params, batch, mode=MODES[1])
    there, on_gpu = hk.from_module(model.cuda(), lambda outputs, _: outputs[0].square().sum((1, 2)))
    found = hk.hessian(there, on_gpu, batch, mode=mode) @ torch.ones(H.n, dtype=torch.float64, device="cuda")
    assert relative_error(found.cpu(), H @ torch.ones(H.n, dtype=torch.float64)) < TOLERANCE[mode]
