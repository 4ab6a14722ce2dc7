from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error
from problems import cross_entropy

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


X, Y, W = reals(12, 4), torch.arange(12) % 3, reals(4, 3)
G = torch.Generator().manual_seed(0)

DRAWING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "dropout1d": lambda h: F.dropout1d(h[:, None], 0.5, training=True)[:, 0],
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel_softmax": F.gumbel_softmax,
    "noise": lambda h: h + torch.randn_like(h),
    "noise of an own generator": lambda h: h + torch.randn(h.shape, generator=G),
    "attention": lambda h: F.scaled_dot_product_attention(*[h[None, :, None]] * 3, dropout_p=0.5)[0, :, 0],
    "one bit": lambda h: h * (1 + torch.bernoulli(torch.tensor(0.5))),
}

REPEATABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout off": lambda h: F.dropout(h, 0.5, training=False),
    "rrelu in evaluation": lambda h: F.rrelu(h, training=False),
    "seeded noise": lambda h: h + torch.randn(h.shape, generator=torch.Generator().manual_seed(2)),
    "seeded dropout": lambda h: seeded(h),
}


def seeded(h: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return F.dropout(h, 0.5, training=True)


def losses(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    return lambda w, batch: cross_entropy(function(batch[0] @ w), batch[1])


@pytest.mark.parametrize("name", DRAWING)
def test_losses_that_draw_other_numbers_in_each_call_are_refused(name: str) -> None:
    before, loss_fn = torch.get_rng_state(), losses(DRAWING[name])
    for front_door in (hk.hessian, hk.grad, lambda *arguments: hk.hvp(*arguments, W)):
        with pytest.raises(
            ValueError, match=r"loss_fn draws other random numbers in each call \(aten\..*switch"
        ):
            front_door(loss_fn, W, (X, Y))
    for mode in MODES:
        with pytest.raises(ValueError, match="loss_fn draws other random numbers"):
            hk.hvp(loss_fn, W, (X, Y), W, mode=mode)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REPEATABLE)
def test_losses_that_draw_the_same_numbers_are_taken(name: str, mode: str) -> None:
    loss_fn = losses(REPEATABLE[name])
    oracle = hessian_by_double_backward(lambda p, batch: loss_fn(p["w"], batch), {"w": W}, (X, Y))
    H = hk.hessian(loss_fn, W, (X, Y), mode=mode)
    assert relative_error(H @ W.flatten(), oracle @ W.flatten()) < 1e-8
    assert torch.equal(H @ W.flatten(), H @ W.flatten())


class Functional(nn.Module):
    """Dropout by a function call that follows the module's own mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


def mlp(*more: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), *more, nn.Linear(5, 3)).double()


def convolutional() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        head = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
        return nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 6, 2), nn.Dropout1d(0.5), nn.Tanh(), head
        ).double()


DROPPING: dict[str, Callable[[], nn.Module]] = {
    "module": mlp,
    "function": lambda: mlp(Functional()),
    "twice": lambda: mlp(nn.Linear(5, 5), nn.Dropout(0.3, inplace=True)),
    "channels": convolutional,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DROPPING)
def test_a_seed_makes_dropout_a_function_with_a_hessian(name: str, mode: str) -> None:
    objective, params = hk.from_module(DROPPING[name](), cross_entropy, dropout=7)
    oracle = hessian_by_double_backward(objective, params, (X, Y))
    H = hk.hessian(objective, params, (X, Y), mode=mode, batch_size=5)
    v = reals(H.n)
    assert relative_error(H @ v, oracle @ v) < (1e-7 if mode == "finite-difference" else 1e-12)


@pytest.mark.parametrize("name", DROPPING)
def test_fixed_masks_go_by_seed_and_example_and_not_by_batch(name: str) -> None:
    model = DROPPING[name]()
    objective, params = hk.from_module(model, cross_entropy, dropout=7)
    whole = objective(params, (X, Y))
    assert torch.equal(objective(params, (X, Y)), whole)
    one_by_one = [objective(params, (x[None], y[None])) for x, y in zip(X, Y, strict=True)]
    assert torch.allclose(torch.cat(one_by_one), whole, rtol=1e-13)
    assert torch.allclose(objective(params, (X.flip(0), Y.flip(0))).flip(0), whole, rtol=1e-13)
    off, _ = hk.from_module(model, cross_entropy)
    others = [
        hk.from_module(model, cross_entropy, dropout=seed)[0](params, (X, Y)) for seed in (0, 8, 7 + 2**40)
    ]
    seen = torch.stack([whole, off(params, (X, Y)), *others])
    assert len(seen.unique(dim=0)) == 5


def test_masks_keep_the_mean_and_drop_at_their_rate() -> None:
    ones = nn.Sequential(nn.Linear(4, 5000), nn.Dropout(0.3)).double()
    nn.init.zeros_(ones[0].weight)
    nn.init.ones_(ones[0].bias)
    objective, params = hk.from_module(ones, cross_entropy, dropout=0)
    scaled = objective.forward(params, (X, Y))
    assert torch.allclose(scaled.unique(), torch.tensor([0.0, 1 / 0.7], dtype=torch.float64), rtol=1e-14)
    kept = (scaled > 0).double()
    stderr = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - 0.7) < 4 * stderr
    # Masks of different examples, and of neighbours in one, are as good as independent.
    centred = kept - 0.7
    pairs = centred @ centred.mT / 5000
    assert float((pairs - 0.21 * torch.eye(12).double()).abs().max()) < 5 * 0.21 / 5000**0.5
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 4 * 0.21 / kept.numel() ** 0.5


def test_dropouts_after_one_another_have_their_own_masks() -> None:
    twice = nn.Sequential(nn.Linear(4, 5000), nn.Dropout(0.5), nn.Dropout(0.5)).double()
    nn.init.ones_(twice[0].bias)
    nn.init.zeros_(twice[0].weight)
    objective, params = hk.from_module(twice, cross_entropy, dropout=0)
    kept = (objective.forward(params, (X, Y)) > 0).double()
    assert abs(float(kept.mean()) - 0.25) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5


def test_whole_channels_are_dropped_together() -> None:
    model = nn.Sequential(nn.Conv2d(1, 40, 1), nn.Dropout2d(0.5)).double()
    objective, params = hk.from_module(model, lambda z, _: z.flatten(1).sum(1), dropout=0)
    outputs = objective.forward(params, (reals(12, 1, 3, 3), Y))
    dropped = (outputs == 0).flatten(2)
    assert torch.equal(dropped.all(2), dropped.any(2))
    assert 0.3 < float(dropped.double().mean()) < 0.7


def test_a_rate_of_one_drops_all_without_nan() -> None:
    objective, params = hk.from_module(mlp(nn.Dropout(1.0)), cross_entropy, dropout=0)
    assert torch.equal(objective.forward(params, (X, Y)), params["4.bias"].expand(12, 3))


def test_examples_are_known_by_all_that_the_batch_holds() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).double()
    objective, params = hk.from_module(model, cross_entropy, dropout=0)
    same = X[:1].expand(6, 4)
    masks = objective.forward(params, (same, torch.tensor([0, 0, 1, 1, 2, 2]))) == 0
    assert torch.equal(masks[::2], masks[1::2])
    assert len(masks.unique(dim=0)) == 3
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
    ):
        marks = torch.tensor([0, 1, 0, 1, 0, 1]).to(dtype)
        masks = objective.forward(params, (same, marks)) == 0
        assert len(masks.unique(dim=0)) == 2


@pytest.mark.parametrize("training", [False, True])
def test_dropout_on_request_leaves_statistics_and_the_model_alone(training: bool) -> None:
    layers = (
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.InstanceNorm1d(5, track_running_stats=True),
        nn.Dropout(0.5),
    )
    model = nn.Sequential(layers[0], layers[1], nn.Unflatten(1, (5, 1)), layers[2], nn.Flatten(), layers[3])
    model = model.double().train(training)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)).double()
    model.append(normed)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objective, params = hk.from_module(model, cross_entropy, dropout=1)
    whole = objective(params, (X, Y))
    assert torch.allclose(objective(params, (X[3:5], Y[3:5])), whole[3:5], rtol=1e-13)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert {module.training for module in model.modules()} == {training} | {True}
    assert model.training == training


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.5, batch_first=True),
    "recurrent": lambda: nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
    "rrelu": lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()),
    "alpha": lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_randomness_that_no_seed_reaches_is_refused(name: str) -> None:
    def loss(outputs: Tensor | tuple, targets: Tensor) -> Tensor:
        return (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(1).square().sum(1) + targets

    model = REFUSED[name]().double()
    data = (reals(4, 3, 4), torch.zeros(4))
    off, params = hk.from_module(model, loss)
    hk.hessian(off, params, data)
    objective, params = hk.from_module(model, loss, dropout=0)
    with pytest.raises(ValueError, match=r"loss_fn draws other random numbers in each call \(aten"):
        hk.hessian(objective, params, data)


def test_a_dropout_whose_first_dimension_is_not_the_examples_is_refused() -> None:
    class TimeFirst(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x.transpose(0, 1), 0.5, self.training)).mean(0)

    model = TimeFirst(4, 3).double()
    objective, params = hk.from_module(model, cross_entropy, dropout=3)
    reason = r"model: dropout=3 fixes a mask for each example, but .* of shape \[5, 12, 4\] in a batch of 12"
    with pytest.raises(ValueError, match=reason):
        objective(params, (reals(12, 5, 4), Y))


@pytest.mark.parametrize("dropout", [True, -1, 0.5])
def test_a_seed_is_a_whole_number(dropout: object) -> None:
    with pytest.raises((TypeError, ValueError), match="dropout must be"):
        hk.from_module(mlp(), cross_entropy, dropout=dropout)
