from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.train import adahessian
from hvpkit.train.adahessian import AdaHessian, block_average
from oracles import hessian_by_double_backward
from problems import NETWORKS, cross_entropy, matrix, network

pytestmark = pytest.mark.filterwarnings("ignore:Using backward")

SHAPES = [(2, 5), (3,), (2, 1, 2, 2)]
SIZES = [math.prod(shape) for shape in SHAPES]


def model_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], num_steps: int
) -> list[Tensor]:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model_loss(model, batch).backward(create_graph=True)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same_bits(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


class Cubic:
    """theta' A theta / 2 + sum c theta^3 / 6, of which every derivative is known."""

    def __init__(self) -> None:
        self.A = matrix(np.linspace(0.5, 4, sum(SIZES)).tolist(), seed=3)
        self.c = torch.linspace(-1, 1, sum(SIZES), dtype=torch.float64)

    def __call__(self, params: list[Tensor]) -> Tensor:
        theta = torch.cat([p.flatten() for p in params])
        return theta @ self.A @ theta / 2 + (self.c * theta**3).sum() / 6

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return self.A.numpy() @ theta + self.c.numpy() * theta**2 / 2

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        return self.A.numpy() + np.diag(self.c.numpy() * theta)


def start_params() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in SHAPES]


def averaged(flat: np.ndarray, block_size: int, kernels: bool, absolute: bool) -> np.ndarray:
    flat = np.abs(flat) if absolute else flat
    first, second, third = np.split(flat, np.cumsum(SIZES)[:-1])
    rows = first.reshape(2, 5).copy()
    for row in rows:
        for at in range(0, 5, block_size):
            row[at : at + block_size] = row[at : at + block_size].mean()
    cells = third.reshape(2, 4).copy()
    if kernels:
        cells[:] = cells.mean(axis=1, keepdims=True)
    return np.concatenate([rows.ravel(), second, cells.ravel()])


def by_hand(
    problem: Cubic, theta: np.ndarray, signs: list[np.ndarray], num_steps: int, o: dict
) -> np.ndarray:
    beta1, beta2 = o["betas"]
    gradients, squares = [], []
    signs = iter(signs)
    for t in range(1, num_steps + 1):
        g = problem.gradient(theta)
        gradients.append(-g if o["maximize"] else g)
        if (t - 1) % o["update_every"] == 0:
            z = [next(signs) for _ in range(o["num_probes"])]
            estimate = sum(v * (problem.hessian(theta) @ v) for v in z) / len(z)
            squares.append(averaged(estimate, o["block_size"], o["average_kernels"], o["absolute"]) ** 2)
        weights = [beta1 ** (t - i) for i in range(1, t + 1)]
        m = (1 - beta1) * sum(w * g for w, g in zip(weights, gradients, strict=True)) / (1 - beta1**t)
        n = len(squares)
        weights = [beta2 ** (n - i) for i in range(1, n + 1)]
        v = (1 - beta2) * sum(w * s for w, s in zip(weights, squares, strict=True)) / (1 - beta2**n)
        direction = m / (np.sqrt(v) ** o["hessian_power"] + o["eps"])
        theta = theta - o["lr"] * (direction + o["weight_decay"] * theta)
    return theta


PLAIN = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-4,
    "weight_decay": 0.0,
    "hessian_power": 1.0,
    "average_kernels": False,
    "block_size": 1,
    "absolute": True,
    "update_every": 1,
    "num_probes": 1,
    "maximize": False,
}
OPTIONS = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.3},
    "hessian_power": {"hessian_power": 0.5},
    "gradient_descent": {"hessian_power": 0.0},
    "kernels": {"average_kernels": True},
    "signed_kernels": {"average_kernels": True, "absolute": False},
    "blocks": {"block_size": 2},
    "signed_blocks": {"block_size": 2, "absolute": False},
    "wide_blocks": {"block_size": 9},
    "delayed": {"update_every": 3},
    "probes": {"num_probes": 3},
    "maximize": {"maximize": True, "lr": 0.01},
    "everything": {
        "betas": (0.8, 0.7),
        "eps": 0.05,
        "weight_decay": 0.2,
        "hessian_power": 0.5,
        "average_kernels": True,
        "block_size": 3,
        "update_every": 2,
        "num_probes": 2,
        "maximize": True,
        "lr": 0.05,
    },
}


def record_probes(params: list[Tensor], probes: list[Tensor]) -> None:
    """Record the vectors that a step multiplies the Hessian by: the gradients of its second backward pass."""
    for p in params:
        if p.grad is not None and p.grad.requires_grad:
            p.grad.register_hook(lambda z: probes.append(z.clone()))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_paper(name: str, foreach: bool) -> None:
    options, problem, num_steps = PLAIN | OPTIONS[name], Cubic(), 7
    signs: list[np.ndarray] = []
    params = start_params()
    theta = torch.cat([p.detach().flatten() for p in params]).numpy()
    optimizer = AdaHessian(params, foreach=foreach, **options)
    for _ in range(num_steps):
        optimizer.zero_grad()
        problem(params).backward(create_graph=optimizer.needs_graph)
        drawn: list[list[Tensor]] = [[] for _ in params]
        for p, probes in zip(params, drawn, strict=True):
            record_probes([p], probes)
        optimizer.step()
        signs += [np.concatenate([z.numpy().ravel() for z in parts]) for parts in zip(*drawn, strict=True)]
    assert all(set(np.abs(z)) == {1.0} for z in signs)
    assert len(signs) == math.ceil(num_steps / options["update_every"]) * options["num_probes"]
    expected = by_hand(problem, theta, signs, num_steps, options)
    found = torch.cat([p.detach().flatten() for p in params]).numpy()
    assert np.abs(expected - theta).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_step_on_a_diagonal_quadratic_is_newtons() -> None:
    curvature = torch.logspace(-3, 4, 12, dtype=torch.float64)
    p = torch.linspace(-2, 3, 12, dtype=torch.float64).requires_grad_()
    optimizer = AdaHessian([p], lr=1.0, betas=(0.0, 0.0), eps=1e-30)
    loss = (curvature * (p - 1) ** 2).sum() / 2
    loss.backward(create_graph=True)
    optimizer.step()
    assert (p - 1).abs().max() < 1e-14


def test_estimate_on_a_dense_quadratic_is_the_diagonal_in_expectation() -> None:
    A, num = matrix(np.linspace(-1, 3, 10).tolist()), 4000
    p = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    gradient = A @ p
    samples = []
    for seed in range(2):  # of many probes each, so that the mean over probes is looked at too
        p.grad = gradient
        streams, group = {p: 1 << 32}, {"seed": seed, "num_probes": num}
        samples.append(adahessian._hutchinson({p: group}, streams)[p])
        gradient = A @ p
    off = A - A.diag().diag()
    stderr = (off.square().sum(1) / num).sqrt()
    for sample in samples:
        scores = (sample - A.diag()) / stderr
        assert scores.abs().max() < 4
        assert 0.3 < scores.std() < 2
    assert not torch.equal(*samples)


def test_estimate_is_that_of_the_loss_over_several_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = hk.from_module(model, cross_entropy)
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(9, 3, generator=g, dtype=torch.float64), torch.randint(0, 2, (9,), generator=g))
    H = hessian_by_double_backward(*problem, batch)
    params = list(model.parameters())
    model_loss(model, batch).backward(create_graph=True)
    due = {p: {"seed": 5, "num_probes": 1500} for p in params}
    found = adahessian._hutchinson(due, {p: (1 << 32) + i for i, p in enumerate(params)})
    stderr = ((H - H.diag().diag()).square().sum(1) / 1500).sqrt() + 1e-12
    scores = (torch.cat([found[p].flatten() for p in params]) - H.diag()) / stderr
    assert scores.abs().max() < 4.5
    assert scores.abs().mean() > 0.3


def published_steps(
    loss: Callable[[list[Tensor]], Tensor], params: list[Tensor], signs: list[list[Tensor]], lr: float
) -> list[Tensor]:
    """The steps of github.com/amirgholami/adahessian, image_classification/optim_adahessian.py, at its defaults."""
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t, z in enumerate(signs, 1):
        grads = torch.autograd.grad(loss(params), params, create_graph=True)
        images = torch.autograd.grad(grads, params, z)
        sizes = [
            image.abs().mean(dim=[2, 3], keepdim=True) if image.ndim == 4 else image.abs() for image in images
        ]
        moved = []
        for p, g, size, mean, square in zip(params, grads, sizes, m, v, strict=True):
            mean.mul_(0.9).add_(g.detach(), alpha=0.1)
            square.mul_(0.999).addcmul_(size.expand_as(p), size.expand_as(p), value=0.001)
            denominator = square.sqrt() / math.sqrt(1 - 0.999**t) + 1e-4
            moved.append((p - lr * mean / (1 - 0.9**t) / denominator).detach().requires_grad_())
        params = moved
    return params


@pytest.mark.parametrize("absolute", [True, False])
def test_default_is_the_published_code(absolute: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20,), generator=generator)
    params = [
        torch.randn(s, generator=generator, dtype=torch.float64) / 2 for s in ((4, 1, 3, 3), (3, 64), (3,))
    ]

    def loss(params: list[Tensor]) -> Tensor:
        features = torch.tanh(F.conv2d(x, params[0])).flatten(1)
        return F.cross_entropy(features @ params[1].mT + params[2], y)

    ours = [p.clone().requires_grad_() for p in params]
    optimizer, signs = AdaHessian(ours, absolute=absolute), []
    for _ in range(40):
        optimizer.zero_grad()
        loss(ours).backward(create_graph=True)
        drawn: list[list[Tensor]] = [[] for _ in ours]
        for p, probes in zip(ours, drawn, strict=True):
            record_probes([p], probes)
        optimizer.step()
        signs.append([probe for (probe,) in drawn])
    expected = published_steps(loss, [p.clone().requires_grad_() for p in params], signs, lr=0.15)
    off = torch.cat([(a - b).detach().flatten() for a, b in zip(ours, expected, strict=True)]).norm()
    size = torch.cat([p.detach().flatten() for p in expected]).norm()
    assert (off < 1e-10 * size) if absolute else (off > 0.1 * size)


def test_probes_of_each_step_and_tensor_are_others() -> None:
    drawn: list[Tensor] = []
    for seed in (0, 1):
        params = [torch.ones(64, requires_grad=True) for _ in range(2)]
        optimizer = AdaHessian(params, seed=seed, num_probes=2)
        for _ in range(3):
            optimizer.zero_grad()
            sum((p**2).sum() for p in params).backward(create_graph=True)
            record_probes(params, drawn)
            optimizer.step()
    assert len(drawn) == 24
    products = torch.stack(drawn) @ torch.stack(drawn).T - 64 * torch.eye(24)
    assert products.abs().max() < 4.5 * 8


@pytest.mark.parametrize(
    ("shape", "block_size", "expected"),
    [
        ((4,), 2, [0, 1, 2, 3]),
        ((2, 3), 1, [0, 1, 2, 3, 4, 5]),
        ((2, 3), 2, [0.5, 0.5, 2, 3.5, 3.5, 5]),
        ((2, 3), 100, [1, 1, 1, 4, 4, 4]),
        ((1, 2, 3), 2, [1, 1, 1, 4, 4, 4]),
        ((1, 1, 2, 3), 1, [2.5] * 6),
        ((), 3, [0]),
    ],
)
def test_block_average(shape: tuple[int, ...], block_size: int, expected: list[float]) -> None:
    diagonal = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    found = block_average(diagonal, block_size)
    assert found.shape == shape
    assert found.flatten().tolist() == expected
    if len(shape) > 2:
        assert torch.equal(block_average(diagonal, block_size, kernels=False), diagonal)


def excess_of_logistic_regression(make: type[torch.optim.Optimizer], lr: float, num_steps: int) -> float:
    """Of the loss over its minimum, for categories whose indicators are scaled by 0.01 to 100."""
    g = torch.Generator().manual_seed(0)
    category = torch.randint(0, 9, (400,), generator=g)
    x = F.one_hot(category, 9) * torch.logspace(-2, 2, 9, dtype=torch.float64)
    chance = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)[category]
    y = (torch.rand(400, generator=g, dtype=torch.float64) < chance).double()
    means = torch.stack([y[category == i].mean() for i in range(9)])
    w = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = make([w], lr=lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y)
        loss.backward(create_graph=True)
        optimizer.step()
    return float(loss.detach() - F.binary_cross_entropy(means[category], y))


def test_beats_adam_where_features_are_badly_scaled() -> None:
    rates = [10.0**exponent for exponent in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5)]
    adam, ours = (
        min(excess_of_logistic_regression(make, lr, 100) for lr in rates)
        for make in (torch.optim.Adam, AdaHessian)
    )
    assert 0 < ours < 0.01
    assert adam > 0.05


def test_resumed_run_has_the_same_bits() -> None:
    problem = network("conv_groupnorm")
    model, batch = problem.model.float(), (problem.data[0].float(), problem.data[1])
    options = {"update_every": 2, "num_probes": 2, "weight_decay": 0.01, "seed": 9}
    other = copy.deepcopy(model)
    whole = train(model, AdaHessian(model.parameters(), **options), batch, 6)
    optimizer = AdaHessian(other.parameters(), **options)
    train(other, optimizer, batch, 3)
    file = io.BytesIO()
    torch.save({"model": other.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = copy.deepcopy(other)
    for p in again.parameters():
        p.data.zero_()
    again.load_state_dict(saved["model"])
    resumed = AdaHessian(again.parameters(), lr=3.0)  # the options come from the state
    resumed.load_state_dict(saved["optimizer"])
    assert same_bits(train(again, resumed, batch, 3), whole)
    assert same_bits(train(other, optimizer, batch, 3), whole)


def test_seed_decides_the_run_and_global_random_state_is_left_alone() -> None:
    problem = network("mlp")
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1, torch.Generator().manual_seed(3)):
        model = copy.deepcopy(problem.model)
        runs.append(train(model, AdaHessian(model.parameters(), seed=seed), problem.data, 3))
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])
    assert not same_bits(runs[2], runs[3])
    assert torch.equal(torch.get_rng_state(), before)


def exact(params: list[Tensor], step: int) -> list[Tensor]:
    return [torch.full_like(p, float(step)) for p in params]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("diagonal", [None, exact])
def test_copies_go_on_alike(copier, diagonal) -> None:
    problem = network("mlp")
    model = problem.model
    optimizer = AdaHessian(model.parameters(), diagonal=diagonal, update_every=2)
    train(model, optimizer, problem.data, 3)
    model.zero_grad()
    twin, twin_optimizer = copier((model, optimizer))
    assert twin_optimizer.diagonal is diagonal
    assert same_bits(train(twin, twin_optimizer, problem.data, 3), train(model, optimizer, problem.data, 3))


@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name not in ("gru", "attention", "encoder_layer")]
)
def test_groups_together_equal_plain_loop(name: str) -> None:
    problem, ends = network(name), []
    for foreach in (False, True, None):
        model = copy.deepcopy(problem.model)
        params = list(model.parameters())
        groups = [{"params": params[:1], "lr": 0.05}, {"params": params[1:], "block_size": 2}]
        optimizer = AdaHessian(groups, foreach=foreach, weight_decay=0.1)
        ends.append(train(model, optimizer, problem.data, 3))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])
    assert not same_bits(ends[0], list(problem.model.parameters()))


def test_a_group_that_is_added_later_starts_then() -> None:
    A = torch.diag(torch.tensor([2.0, 5.0], dtype=torch.float64))
    first, second = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = AdaHessian([first], lr=0.5, betas=(0.9, 0.9), update_every=2)
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": [second], "lr": 1.0})
        assert optimizer.needs_graph  # of one or of the other
        optimizer.zero_grad()
        (first @ A @ first / 2 + second @ A @ second / 2).backward(create_graph=True)
        optimizer.step()
        if step == 1:  # a first step of rate 1 is Newton's
            assert second.abs().max() < 1e-3
    assert [optimizer.state[p]["step"] for p in (first, second)] == [3, 2]
    assert [optimizer.state[p]["num_diagonals"] for p in (first, second)] == [2, 1]


def test_parameters_without_a_gradient_stay() -> None:
    model = NETWORKS["unused_parameter"][0]().double()
    idle = copy.deepcopy(model.idle)
    frozen = model.first.bias.requires_grad_(False)
    before = frozen.clone()
    optimizer = AdaHessian(model.parameters(), weight_decay=0.5)
    train(model, optimizer, network("unused_parameter").data, 2)
    assert same_bits(list(idle.parameters()), list(model.idle.parameters()))
    assert torch.equal(frozen, before)
    assert set(optimizer.state) == {model.first.weight, model.last.weight, model.last.bias}


def test_parameters_in_which_the_loss_is_linear_have_no_curvature() -> None:
    w, b = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = AdaHessian([w, b], lr=0.1, eps=0.5)
    (3 * w**2 / 2 + 2 * b).backward(create_graph=True)
    optimizer.step()
    assert w.item() == pytest.approx(1 - 0.1 * 3 / 3.5)
    assert b.item() == pytest.approx(1 - 0.1 * 2 / 0.5)


def test_clipping_scales_the_gradient_and_not_the_diagonal() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=1.0, eps=1e-30)
    (2 * w**2).sum().backward(create_graph=True)
    norm = nn.utils.clip_grad_norm_([w], 1.0)
    optimizer.step()
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64) * (1 - 1 / norm.detach())
    torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=0.0)


def test_accumulated_losses_have_the_diagonal_of_their_sum() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=1.0, eps=1e-30)
    for factor in (1.0, 4.0):
        (factor * (w - 1) ** 2).sum().backward(create_graph=True)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.ones_like(w))


def test_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    w = torch.tensor(3.0, requires_grad=True)
    optimizer = AdaHessian([w], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w - 1) ** 2
        loss.backward(create_graph=True)
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
    assert float(w.detach()) == pytest.approx(1.0, abs=1e-3)


def test_a_step_lets_go_of_the_graph() -> None:
    def left_behind(stepped: bool) -> bool:
        w = torch.ones(3, requires_grad=True)
        optimizer = AdaHessian([w])
        (w**3).sum().backward(create_graph=True)
        if stepped:
            optimizer.step()
            assert w.grad is not None
            assert w.grad.grad_fn is None
        watch = weakref.ref(w)
        del w, optimizer
        return watch() is not None

    gc.collect()
    gc.disable()
    try:
        assert not left_behind(stepped=True)
        assert left_behind(stepped=False)  # or else this test would see nothing
    finally:
        gc.enable()
        gc.collect()


def test_a_step_frees_what_the_graph_saved() -> None:
    w = torch.ones(3, requires_grad=True)
    (w**3).sum().backward(create_graph=True)
    gradient = w.grad
    AdaHessian([w], num_probes=2).step()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(gradient.sum(), w)


def test_only_due_steps_want_a_graph() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer, wanted = AdaHessian([w], update_every=3), []
    for _ in range(7):
        wanted.append(optimizer.needs_graph)
        optimizer.zero_grad()
        (w**2).sum().backward(create_graph=optimizer.needs_graph)
        optimizer.step()
    assert wanted == [True, False, False, True, False, False, True]
    assert not AdaHessian([w], diagonal=exact).needs_graph


def test_estimator_of_the_callers_is_asked_for_what_is_due_and_used() -> None:
    w, idle, v = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    asked = []

    def diagonal(params: list[Tensor], step: int) -> list[Tensor]:
        asked.append((params, step, torch.is_grad_enabled()))
        return [torch.full_like(p, -4.0) for p in params]

    optimizer = AdaHessian(
        [w, idle, v], lr=1.0, eps=1e-30, betas=(0.0, 0.0), update_every=2, diagonal=diagonal
    )
    for _ in range(3):
        optimizer.zero_grad()
        (w.sum() + 2 * v.sum()).backward()
        optimizer.step()
    assert [step for _, step, _ in asked] == [1, 3]
    assert all(params[0] is w and params[1] is v and len(params) == 2 for params, _, _ in asked)
    assert all(enabled for _, _, enabled in asked)
    assert w.tolist() == [1 - 3 / 4] * 2
    assert v.tolist() == [1 - 6 / 4] * 2


def test_hessian_of_a_batch_as_the_estimator() -> None:
    problem = network("mlp")
    model = problem.model

    def diagonal(_: list[Tensor], step: int) -> list[Tensor]:
        H = hk.hessian(problem.objective, dict(model.named_parameters()), problem.data)
        return list(H.unflatten(hk.diagonal(H, num_matvecs=H.n, seed=step).value).values())

    H = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = AdaHessian(model.parameters(), lr=0.1, eps=1e-3, diagonal=diagonal)
    model_loss(model, problem.data).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(
        after, before - 0.1 * gradient / (H.diag().abs() + 1e-3), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 3),  # from zero
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=9, cycle_momentum=False),
    ],
)
def test_torch_schedulers_drive_it(make) -> None:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=0.2, eps=1e-12)
    scheduler = make(optimizer)
    for _ in range(4):
        rate, before = optimizer.param_groups[0]["lr"], float(w.detach())
        optimizer.zero_grad()
        w.sum().backward()
        optimizer.diagonal = lambda params, _: [torch.ones_like(p) for p in params]
        optimizer.step()
        scheduler.step()
        assert before - float(w.detach()) == pytest.approx(rate, abs=1e-10)
    assert optimizer.param_groups[0]["lr"] != 0.2


def test_gradients_without_a_graph_are_named_and_nothing_moves() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = AdaHessian([w])
    (w**2).sum().backward()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        optimizer.step()
    assert w.tolist() == [1.0, 1.0]
    assert not optimizer.state


@pytest.mark.parametrize("num_probes", [1, 2])
def test_attention_without_a_second_derivative_is_refused_with_the_remedy(num_probes: int) -> None:
    model, tokens = hk.zoo.tiny_gpt(width=8, num_layers=1, num_heads=2), torch.arange(12).view(2, 6)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdaHessian(model.parameters(), num_probes=num_probes)

    def backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).mT, tokens).backward(create_graph=True)

    backward()
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
        optimizer.step()
    assert same_bits(before, list(model.parameters()))
    assert not optimizer.state
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        backward()
    optimizer.step()
    assert not same_bits(before, list(model.parameters()))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = AdaHessian(embedding.parameters(), diagonal=exact)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()


def test_a_grad_scaler_is_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer, scaler = AdaHessian([w]), torch.amp.GradScaler("cpu")
    scaler.scale((w**2).sum()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert w.tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    (w**2).sum().backward(create_graph=True)
    optimizer.step()  # the refusal is over
    assert w.tolist() != [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "^lr must"),
        ({"lr": math.nan}, ValueError, "^lr must"),
        ({"lr": torch.tensor(0.1)}, TypeError, "^lr must"),
        ({"betas": (0.9, 1.0)}, ValueError, "^betas must"),
        ({"betas": (0.9,)}, ValueError, "^betas must"),
        ({"eps": 0.0}, ValueError, "^eps must"),
        ({"weight_decay": -0.1}, ValueError, "^weight_decay must"),
        ({"weight_decay": math.inf}, ValueError, "^weight_decay must"),
        ({"hessian_power": 1.5}, ValueError, "^hessian_power must"),
        ({"hessian_power": True}, TypeError, "^hessian_power must"),
        ({"block_size": 0}, ValueError, "^block_size must"),
        ({"block_size": 1.5}, TypeError, "^block_size must"),
        ({"update_every": 0}, ValueError, "^update_every must"),
        ({"num_probes": 0}, ValueError, "^num_probes must"),
        ({"seed": -1}, ValueError, "^seed must"),
        ({"seed": "a"}, TypeError, "^seed must"),
        ({"diagonal": 3}, TypeError, "^diagonal must"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdaHessian([torch.ones(1, requires_grad=True)], **options)
    if "diagonal" not in options and not isinstance(options.get("seed"), str):
        with pytest.raises(error, match=words):
            AdaHessian([{"params": [torch.ones(1, requires_grad=True)], **options}])


def test_complex_parameters_are_refused_also_in_later_groups() -> None:
    odd = torch.ones(1, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match=r"^params must be real"):
        AdaHessian([odd])
    optimizer = AdaHessian([torch.ones(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"^params must be real"):
        optimizer.add_param_group({"params": [odd]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "diagonal",
    [
        lambda *_: [],
        lambda *_: [torch.ones(3)],
        lambda *_: [torch.ones(2, dtype=torch.float64)],
    ],
)
def test_an_estimate_of_another_shape_is_refused(diagonal) -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = AdaHessian([w], diagonal=diagonal)
    w.sum().backward()
    with pytest.raises(ValueError, match=r"^diagonal must return"):
        optimizer.step()
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_real_dtype(dtype: torch.dtype) -> None:
    w = torch.tensor([[3.0, -1.0], [2.0, 0.5]], dtype=dtype, requires_grad=True)
    optimizer = AdaHessian([w], lr=1.0, block_size=2, num_probes=2)
    ((w - 1) ** 2).sum().backward(create_graph=True)
    optimizer.step()
    assert w.dtype == dtype
    assert (w - 1).abs().max() < 0.02


def test_hooks_and_zero_grad_work_as_in_torch() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer, seen = AdaHessian([("w", w)]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    (w**2).sum().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert w.grad is None
    assert seen == ["before", "after"] * 2
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repr(optimizer)
