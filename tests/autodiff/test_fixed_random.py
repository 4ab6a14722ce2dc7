from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.autodiff.fixed_random import fixed_random_numbers
from oracles import ggn_by_jacobian, hessian_by_double_backward, relative_error
from problems import cross_entropy

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


X, Y = reals(12, 4), torch.arange(12) % 3


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


def sines(outputs: Tensor | tuple, targets: Tensor) -> Tensor:
    return (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(1).sin().sum(1) + targets


class Function(nn.Module):
    """Network with a random function between its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(torch.tanh(self.first(x)))))


class Variational(nn.Module):
    """Encoder to a mean and a scale, of which a sample is decoded."""

    def __init__(self, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.sample = nn.Linear(4, 6), nn.Linear(3, 3), sample

    def forward(self, x: Tensor) -> Tensor:
        mean, log_scale = self.encoder(x).chunk(2, dim=1)
        return self.decoder(torch.tanh(self.sample(mean, log_scale.exp())))


def row_drop(h: Tensor) -> Tensor:
    """Drop whole examples: stochastic depth."""
    return h + h.sin() * h.new_empty(len(h), 1).bernoulli_(0.7) / 0.7


def diffuse(h: Tensor) -> Tensor:
    times = torch.randint(1, 9, (len(h), 1)).to(h.dtype) / 9
    return times.sqrt() * h + (1 - times).sqrt() * torch.randn_like(h)


NOISY: dict[str, Callable[[], nn.Module]] = {
    "variational": lambda: Variational(lambda mean, scale: mean + scale * torch.randn_like(scale)),
    "Normal": lambda: Variational(lambda mean, scale: torch.distributions.Normal(mean, scale).rsample()),
    "Laplace": lambda: Variational(lambda mean, scale: torch.distributions.Laplace(mean, scale).rsample()),
    "Uniform": lambda: Variational(lambda a, b: torch.distributions.Uniform(a, a + b).rsample()),
    **{
        name: lambda function=function: Function(function)
        for name, function in {
            "randn": lambda h: h + torch.randn(*h.shape, dtype=h.dtype),
            "rand": lambda h: h * torch.rand(len(h), 1, dtype=h.dtype),
            "rand_like": lambda h: h * torch.rand_like(h),
            "normal": lambda h: h * torch.normal(torch.ones_like(h), 0.5),
            "scales": lambda h: h * torch.normal(1.0, torch.full_like(h, 0.5)),
            "both": lambda h: h * torch.normal(torch.ones_like(h), torch.full_like(h, 0.5)),
            "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h[:, :1], 0.5)),
            "bernoulli by rates": lambda h: h * torch.empty_like(h).bernoulli_(h.detach().sigmoid()),
            "exponential": lambda h: h * torch.empty_like(h).exponential_(2.0),
            "gumbel": lambda h: F.gumbel_softmax(h, 0.8),
            "rrelu": lambda h: F.rrelu(h, training=True),
            "rrelu in place": lambda h: F.rrelu(1 * h, 0.2, 0.5, training=True, inplace=True),
            "alpha": lambda h: F.alpha_dropout(h, 0.4, training=True),
            "feature alpha": lambda h: F.feature_alpha_dropout(h[:, :, None], 0.4, training=True)[:, :, 0],
            "stochastic depth": row_drop,
            "diffusion": diffuse,
            "attention": lambda h: F.scaled_dot_product_attention(
                *[h[:, None, :, None]] * 3, dropout_p=0.5
            ).flatten(1),
        }.items()
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NOISY)
def test_a_seed_makes_noise_a_function_with_curvature(name: str, mode: str) -> None:
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = NOISY[name]().double()
    objective, params = hk.from_module(model, cross_entropy, dropout=7)
    hessian = hessian_by_double_backward(objective, params, (X, Y))
    ggn = ggn_by_jacobian(objective.forward, objective.output_loss, params, (X, Y))
    assert float(torch.linalg.matrix_norm(ggn)) > 0.1
    for kind, oracle in ((hk.hessian, hessian), (hk.ggn, ggn)):
        K = kind(objective, params, (X, Y), mode=mode, batch_size=5)
        v = reals(K.n)
        assert relative_error(K @ v, oracle @ v) < (1e-7 if mode == "finite-difference" else 1e-12)
        assert torch.equal(K @ v, K @ v)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NOISY)
def test_noise_goes_by_seed_and_example_and_not_by_batch(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = NOISY[name]().double()
    objective, params = hk.from_module(model, cross_entropy, dropout=7)
    whole = objective(params, (X, Y))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        assert torch.equal(objective(params, (X, Y)), whole)
    one_by_one = [objective(params, (x[None], y[None])) for x, y in zip(X, Y, strict=True)]
    assert torch.allclose(torch.cat(one_by_one), whole, rtol=1e-12)
    assert torch.allclose(objective(params, (X.flip(0), Y.flip(0))).flip(0), whole, rtol=1e-12)
    other, _ = hk.from_module(model, cross_entropy, dropout=8)
    assert not torch.equal(other(params, (X, Y)), whole)


DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable]] = {
    "uniform": (lambda z: torch.empty_like(z).uniform_(-1, 3), stats.uniform(-1, 4).cdf),
    "rand": (torch.rand_like, stats.uniform.cdf),
    "normal": (lambda z: torch.empty_like(z).normal_(1, 2), stats.norm(1, 2).cdf),
    "randn": (torch.randn_like, stats.norm.cdf),
    "exponential": (lambda z: torch.empty_like(z).exponential_(3.0), stats.expon(scale=1 / 3).cdf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_numbers_have_their_distribution_and_do_not_depend_on_each_other(
    name: str, dtype: torch.dtype
) -> None:
    draw, cdf = DISTRIBUTIONS[name]
    z = torch.zeros(12, 5000, dtype=dtype)
    with fixed_random_numbers(3, (X, Y)):
        values, more = draw(z), draw(z)
    assert values.dtype == dtype
    for sample in (values, more):
        assert stats.kstest(sample.flatten().double().numpy(), cdf).pvalue > 1e-3
    rows = torch.cat([values, more]).double()
    correlations = torch.corrcoef(rows) - torch.eye(24).double()
    assert float(correlations.abs().max()) < 5 / 5000**0.5
    neighbours = torch.corrcoef(torch.stack([rows[:, 1:].flatten(), rows[:, :-1].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 4 / rows.numel() ** 0.5


def test_integers_and_rates_are_those_asked_for() -> None:
    with fixed_random_numbers(3, (X, Y)):
        integers = torch.randint(2, 6, (12, 5000))
        upto = torch.randint(3, (12, 5000))
        hits = torch.empty(12, 5000).bernoulli_(0.2)
        rows = torch.rand(12, 1) < 2
    assert integers.dtype == upto.dtype == torch.int64
    for drawn, values in ((integers, [2, 3, 4, 5]), (upto, [0, 1, 2])):
        counts = [int((drawn == value).sum()) for value in values]
        assert sum(counts) == drawn.numel()
        assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(float(hits.mean()) - 0.2) < 4 * (0.16 / hits.numel()) ** 0.5
    assert rows.all()


def test_dropout_of_cuda_is_that_of_bernoulli() -> None:
    """``native_dropout`` is what torch calls on a GPU inside its own functions."""
    x = reals(12, 50)
    with fixed_random_numbers(3, (X, Y)):
        found, kept = torch.native_dropout(x, 0.3, True)
    with fixed_random_numbers(3, (X, Y)):
        mask = torch.empty_like(x).bernoulli_(0.7)
    assert torch.equal(kept, mask.bool())
    assert torch.allclose(found, x * mask / 0.7, rtol=1e-14)
    with fixed_random_numbers(3, (X, Y)):
        assert not torch.native_dropout(x, 1.0, True)[0].any()
        assert torch.equal(torch.native_dropout(x, 0.3, False)[0], x)


def test_numbers_of_a_generator_and_those_of_no_example_are_left_alone() -> None:
    with torch.random.fork_rng(devices=[]), fixed_random_numbers(3, (X, Y)):
        first, second = (torch.randn(12, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        torch.default_generator.manual_seed(1)
        shared = torch.randn(5), torch.randn(())
    assert torch.equal(first, torch.randn(12, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(first, second)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        assert torch.equal(shared[0], torch.randn(5))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.5, batch_first=True),
    "RReLU": lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()),
    "AlphaDropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout()),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_modules_with_random_numbers_of_their_own_are_fixed(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ENCODERS[name]().double()
    data = (reals(7, 3, 4), torch.zeros(7))
    objective, params = hk.from_module(model, sines, dropout=0)
    oracle = hessian_by_double_backward(objective, params, data)
    off, _ = hk.from_module(model, sines)
    assert not torch.allclose(objective(params, data), off(params, data))
    v = reals(len(oracle))
    for mode in MODES:
        H = hk.hessian(objective, params, data, mode=mode, batch_size=4)
        assert relative_error(H @ v, oracle @ v) < (1e-6 if mode == "finite-difference" else 1e-11)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "recurrent": (
        lambda: nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
        "model: dropout=0 does not fix masks inside a recurrent layer",
    ),
    "recurrent, as many steps as examples": (
        lambda: nn.GRU(4, 4, 2, dropout=0.5),
        "model: dropout=0 does not fix masks inside a recurrent layer",
    ),
    "heads": (
        lambda: Heads(),
        r"loss_fn draws other random numbers in each call \(aten.bernoulli_\)",
    ),
    "one number for all": (
        lambda: Function(lambda h: h * torch.rand(())),
        r"loss_fn draws other random numbers in each call \(aten.rand\).* dropout=seed.* first dimension",
    ),
    "classes": (
        lambda: Function(lambda h: h + torch.multinomial(h.detach().softmax(-1)[0], 1)),
        r"loss_fn draws other random numbers in each call \(aten.multinomial\)",
    ),
}


class Heads(nn.MultiheadAttention):
    """Attention with weights, which torch makes with examples and heads in one dimension."""

    def __init__(self) -> None:
        super().__init__(4, 2, 0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_random_numbers_that_no_seed_reaches_are_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model = make().double()
    data = (reals(3, 3, 4), torch.zeros(3))
    objective, _ = hk.from_module(model, sines, dropout=0)
    params = {key: p.detach() for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=reason):
        hk.hessian(objective, params, data)


def test_packed_sequences_without_dropout_are_taken() -> None:
    class Packed(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True)
            return super().forward(packed)[1][-1]

    data = (reals(4, 3, 4), torch.zeros(4))
    for rate in (0.0, 0.5):
        model = Packed(4, 4, 2, dropout=rate, batch_first=True).double()
        objective, params = hk.from_module(model, sines, dropout=0)
        if rate:
            with pytest.raises(ValueError, match="inside a recurrent layer"):
                objective(params, data)
        else:
            oracle = hessian_by_double_backward(objective, params, data)
            v = reals(len(oracle))
            assert relative_error(hk.hessian(objective, params, data) @ v, oracle @ v) < 1e-10


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
