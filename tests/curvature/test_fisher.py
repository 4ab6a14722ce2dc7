from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.curvature.constructors import empirical_fisher, fisher
from hvpkit.curvature.fisher import Likelihood, fisher_vp
from oracles import ggn_by_jacobian, relative_error, second_moment
from problems import NETWORKS, cross_entropy, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {"forward-over-reverse": 1e-13, "reverse-over-reverse": 1e-13, "finite-difference": 1e-8}
each_mode = pytest.mark.parametrize("mode", MODES)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The empirical Fisher matrix.


@each_mode
@pytest.mark.parametrize("name", NETWORKS)
def test_the_empirical_one_is_the_second_moment_of_gradients(name: str, mode: str) -> None:
    problem = network(name)
    oracle = second_moment(problem.objective, problem.params, problem.data)
    F = empirical_fisher(problem.objective, problem.params, problem.data, batch_size=5, mode=mode)
    V = normal(F.n, 3)
    assert relative_error(F @ V, oracle @ V) < TOLERANCE[mode]
    product = fisher_vp(problem.objective, problem.params, problem.data, F.unflatten(V[:, 0]), mode=mode)
    assert relative_error(parameters_to_vector(product.values()), oracle @ V[:, 0]) < TOLERANCE[mode]


@each_mode
def test_under_batch_statistics_gradients_go_through_the_statistics(mode: str) -> None:
    problem = network("conv_batchnorm")
    objective, params = hk.from_module(problem.model, cross_entropy, batchnorm="batch")
    x, y = problem.data
    parts = [(x[:6], y[:6]), (x[6:12], y[6:12])]
    dense = sum(second_moment(objective, params, part) for part in parts) / 2
    F = empirical_fisher(objective, params, (x[:12], y[:12]), batch_size=6, mode=mode)
    V = normal(F.n, 2)
    assert relative_error(F @ V, dense @ V) < TOLERANCE[mode]


@each_mode
def test_examples_count_by_their_weights(mode: str) -> None:
    problem = network("mlp")
    weights = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = hk.as_data(problem.data, batch_size=3).subset([1, 4, 6, 12], weights)
    chosen = tuple(t[[1, 4, 6, 12]] for t in problem.data)
    oracle = second_moment(problem.objective, problem.params, chosen, weights)
    F = empirical_fisher(problem.objective, problem.params, data, mode=mode)
    assert relative_error(F @ eye(F.n), oracle) < TOLERANCE[mode]
    assert int(torch.linalg.matrix_rank(F @ eye(F.n), rtol=1e-6)) == 4


def test_data_of_a_loader_and_a_block_of_parameters() -> None:
    problem = network("mlp")
    oracle = second_moment(problem.objective, problem.params, problem.data)[20:25, 20:25]
    loader = DataLoader(TensorDataset(*problem.data), batch_size=4, shuffle=True)
    F = empirical_fisher(problem.objective, problem.params, loader, wrt="0.bias")
    assert relative_error(F @ eye(5), oracle) < 1e-13


@each_mode
def test_a_mean_over_the_batch_is_refused_as_its_examples_are_not_known_apart(mode: str) -> None:
    x, p = normal(3, 2), normal(2)
    for size in (3, 1):
        with pytest.raises(
            ValueError, match="0-d mean, but a Fisher matrix is made of the gradients of single"
        ):
            empirical_fisher(lambda p, x: (x @ p).square().mean(), p, x, batch_size=size, mode=mode) @ p
        with pytest.raises(ValueError, match="0-d mean"):
            fisher_vp(lambda p, x: (x @ p).square().mean(), p, x, p, mode=mode)


def test_losses_that_are_none_are_refused_as_they_are_for_hessians() -> None:
    x, p = normal(3, 2), normal(2)
    for loss_fn, reason in (
        (lambda p, x: x @ p.detach(), "loss_fn does not depend on params"),
        (lambda p, x: x * p, "loss_fn returned shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            fisher_vp(loss_fn, p, x, p)
        with pytest.raises(ValueError, match=reason):
            empirical_fisher(loss_fn, p, x)
    with pytest.raises(TypeError, match="must be floating point"):
        fisher_vp(lambda p, x: x @ p, p.long(), x, p)


# The Fisher matrix of the model's own predictions.


def tokens_last(losses: Callable) -> Callable:
    """A mean over tokens of losses of logits [B, T, V]."""
    return lambda z, batch: losses(z.flatten(0, 1), batch[1].flatten()).view(batch[1].shape).mean(1)


masked = partial(F.cross_entropy, reduction="none", ignore_index=2)
by_class = partial(
    F.cross_entropy, reduction="none", weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
)
smoothed = partial(F.cross_entropy, reduction="none", label_smoothing=0.2)
positives = partial(
    F.binary_cross_entropy_with_logits, reduction="none", pos_weight=torch.tensor(3.0).double()
)


def targets(z: Tensor, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if kind == "gaussian":
        return torch.randn(z.shape, generator=g, dtype=torch.float64)
    if kind == "bernoulli":
        return torch.randint(2, z.shape, generator=g).double()
    return torch.randint(3, z.shape[:-1], generator=g)


# name: likelihood, shape of the outputs of an example (classes last), output_loss
LOSSES: dict[str, tuple[str, tuple[int, ...], Callable]] = {
    "cross entropy": ("categorical", (3,), lambda z, batch: cross_entropy(z, batch[1])),
    "cross entropy, batch mean": ("categorical", (3,), lambda z, batch: F.cross_entropy(z, batch[1])),
    "smoothed labels": ("categorical", (3,), lambda z, batch: smoothed(z, batch[1])),
    "weights of classes": ("categorical", (3,), lambda z, batch: by_class(z, batch[1])),
    "tokens": ("categorical", (2, 3), tokens_last(cross_entropy)),
    "tokens, some ignored": ("categorical", (2, 3), tokens_last(masked)),
    "pixels, classes second": (
        "categorical",
        (2, 3),
        lambda z, batch: cross_entropy(z.movedim(-1, 1), batch[1]).sum(1),
    ),
    "binary": (
        "bernoulli",
        (),
        lambda z, batch: F.binary_cross_entropy_with_logits(z, batch[1], reduction="none"),
    ),
    "labels, positives weighted": ("bernoulli", (3,), lambda z, batch: positives(z, batch[1]).mean(1)),
    "half squares": ("gaussian", (), lambda z, batch: 0.5 * (z - batch[1]) ** 2),
    "squares, mean of three": ("gaussian", (3,), lambda z, batch: (z - batch[1]).square().mean(1)),
}
each_loss = pytest.mark.parametrize("case", LOSSES)


def predictor(case: str) -> tuple[str, hk.Objective, dict[str, Tensor], tuple[Tensor, Tensor]]:
    likelihood, shape, loss = LOSSES[case]
    x, size = normal(7, 3), max(1, torch.Size(shape).numel())
    params = {"w": normal(3, 4, seed=1), "u": normal(4, size, seed=2)}

    def forward(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (torch.tanh(batch[0] @ p["w"]) @ p["u"]).reshape(len(batch[0]), *shape)

    y = targets(forward(params, (x,)), likelihood)
    return likelihood, hk.Objective(forward, loss), params, (x, y)


@each_loss
def test_the_exact_one_is_the_gauss_newton_matrix(case: str) -> None:
    likelihood, objective, params, data = predictor(case)
    oracle = ggn_by_jacobian(objective.forward, objective.output_loss, params, data)
    for name in (None, likelihood):
        F = fisher(objective, params, data, likelihood=name, batch_size=4)
        assert F.terms[0][1].kind == "fisher"
        assert relative_error(F @ eye(F.n), oracle) < 1e-13


@each_loss
def test_samples_have_the_exact_one_as_their_mean(case: str) -> None:
    _, objective, params, data = predictor(case)
    oracle = ggn_by_jacobian(objective.forward, objective.output_loss, params, data)
    V = normal(len(oracle), 3, seed=3)
    exact = (V * (oracle @ V)).sum(0)
    forms = []
    for seed in range(25):
        F = fisher(objective, params, data, num_samples=12, seed=seed, mode="reverse-over-reverse")
        forms.append((V * (F @ V)).sum(0))
    values = torch.stack(forms)
    stderr = values.std(0) / len(values) ** 0.5
    assert bool((stderr < 0.1 * exact).all())
    assert bool(((values.mean(0) - exact).abs() < 4 * stderr).all())


@pytest.mark.parametrize("case", ["cross entropy", "tokens", "binary", "squares, mean of three"])
def test_samples_belong_to_examples_and_not_to_batches(case: str) -> None:
    _, objective, params, data = predictor(case)
    sampled = partial(fisher, objective, params, data, num_samples=2)
    V = eye(sampled().n)
    one = sampled(seed=1) @ V
    for options in ({"batch_size": 3}, {"batch_size": 1, "mode": "forward-over-reverse"}, {"mode": MODES[1]}):
        assert relative_error(sampled(seed=1, **options) @ V, one) < 1e-13
    assert relative_error(sampled(seed=1, mode="finite-difference") @ V, one) < 1e-7
    assert relative_error(sampled(seed=2) @ V, one) > 0.05
    assert relative_error(sampled(seed=torch.Generator().manual_seed(5)) @ V, one) > 0.05


def test_one_sample_a_prediction_has_the_rank_of_the_examples() -> None:
    _, objective, params, (x, y) = predictor("cross entropy")
    F = fisher(objective, params, (x[:2], y[:2]), num_samples=1)
    values = torch.linalg.eigvalsh(F @ eye(F.n))
    assert int((values > 1e-12).sum()) == 2
    assert float(values[0]) > -1e-15


@pytest.mark.parametrize("num_samples", [None, 3])
def test_weights_of_examples_and_samples_of_them(num_samples: int | None) -> None:
    _, objective, params, data = predictor("cross entropy")
    F = fisher(objective, params, data, num_samples=num_samples)
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64) / 7
    heavy = fisher(objective, params, hk.as_data(data).subset([0, 1], weights), num_samples=num_samples)
    single = [
        fisher(objective, params, hk.as_data(data).subset([0, 1], row), num_samples=num_samples) @ eye(F.n)
        for row in eye(2)
    ]
    assert relative_error(heavy @ eye(F.n), weights[0] * single[0] + weights[1] * single[1]) < 1e-13
    part = F.sample(3, 0)
    assert (part.cost, part.num_examples) == (3 / 7, 3)


def test_sampling_leaves_global_generators_alone() -> None:
    _, objective, params, data = predictor("cross entropy")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    F = fisher(objective, params, data, num_samples=2)
    assert torch.equal(F @ eye(F.n), F @ eye(F.n))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_a_sample_has_the_moments_of_its_likelihood() -> None:
    z = normal(3)
    count = 40_000
    for likelihood, uniforms in (
        (Likelihood("gaussian"), torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator())),
        (Likelihood("bernoulli"), torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator())),
        (Likelihood("categorical", 1), torch.rand(count, dtype=torch.float64, generator=torch.Generator())),
    ):
        scores = likelihood.score(z.expand(count, 3), uniforms)
        stderr = scores.std(0) / count**0.5
        assert bool((scores.mean(0).abs() < 4 * stderr).all())
        for u in eye(3):
            products = scores * (scores @ u)[:, None]
            expected = likelihood.covariance(z[None], u[None])[0]
            error = (products.mean(0) - expected).abs()
            assert bool((error < 4 * products.std(0) / count**0.5 + 1e-12).all())


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
def test_a_network_with_outputs_zero_is_not_taken_for_another(name: str) -> None:
    case = {"gaussian": "half squares", "bernoulli": "binary"}[name]
    _, objective, params, data = predictor(case)
    params = params | {"u": torch.zeros_like(params["u"])}
    wrong = ({"gaussian", "bernoulli"} - {name}).pop()
    with pytest.raises(ValueError, match=f"not minus the logarithm of '{wrong}'"):
        fisher(objective, params, data, likelihood=wrong)
    fisher(objective, params, data, likelihood=name)


@pytest.mark.parametrize("num_samples", [None, 1])
@pytest.mark.parametrize(
    ("loss", "likelihood"),
    [
        (lambda z, batch: F.huber_loss(z, batch[0], reduction="none").sum(1), None),
        (lambda z, batch: (z - batch[0]).pow(4).sum(1), None),
        (lambda z, _: F.softplus(z).sum(1), "categorical"),
        (lambda z, _: z.square().sum(1), "bernoulli"),
        (lambda z, batch: F.poisson_nll_loss(z, batch[0] ** 2, reduction="none").sum(1), None),
        (lambda z, _: z.sum(1), None),
    ],
)
def test_a_loss_of_another_likelihood_is_refused(
    loss: Callable, likelihood: str | None, num_samples: int | None
) -> None:
    objective = hk.Objective(lambda p, batch: batch[0] @ p, loss)
    with pytest.raises(ValueError, match=r"likelihood: output_loss is not minus the logarithm of"):
        fisher(objective, normal(3, 3), (normal(5, 3),), likelihood=likelihood, num_samples=num_samples)


def test_arguments_out_of_their_range_are_refused() -> None:
    _, objective, params, data = predictor("cross entropy")
    with pytest.raises(ValueError, match="likelihood must be one of 'categorical', 'bernoulli', 'gaussian'"):
        fisher(objective, params, data, likelihood="poisson")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        fisher(objective, params, data, num_samples=0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        fisher(objective, params, data, num_samples=1, seed=-1)
    with pytest.raises(TypeError, match=r"objective must be a hvpkit.Objective"):
        fisher(lambda p, batch: objective(p, batch), params, data)


@pytest.mark.parametrize(
    "forward", [lambda p, x: (x @ p, x @ p), lambda p, x: (x @ p).flatten(), lambda p, x: (x @ p).T]
)
def test_outputs_that_are_not_one_tensor_of_the_examples_are_refused(forward: Callable) -> None:
    def loss(z: object, x: Tensor) -> Tensor:
        z = z[0] if isinstance(z, tuple) else z
        return z.square().reshape(len(x), -1).sum(1)

    objective = hk.Objective(forward, loss)
    with pytest.raises(ValueError, match=r"objective: a Fisher matrix .* needs outputs that are one tensor"):
        fisher(objective, normal(3, 2), normal(5, 3))


@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_module_in_float32_has_the_same_samples_in_the_digits_of_float32(num_samples: int | None) -> None:
    problem = network("mlp")
    found = []
    for dtype in (torch.float64, torch.float32):
        objective, params = hk.from_module(problem.model.to(dtype), nn.CrossEntropyLoss())
        data = (problem.data[0].to(dtype), problem.data[1])
        F = fisher(objective, params, data, num_samples=num_samples, seed=3)
        found.append(F @ torch.eye(F.n, dtype=dtype))
    assert 1e-9 < relative_error(found[1], found[0]) < 1e-5
