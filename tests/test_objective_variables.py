"""Losses as functions of other variables, against dense Hessians by torch.autograd of the same function written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from oracles import ggn_by_jacobian, hessian_by_double_backward, relative_error, second_moment
from problems import Attention, cross_entropy, network

F64 = torch.float64
each_mode = pytest.mark.parametrize(
    ("mode", "tol"),
    [("forward-over-reverse", 1e-10), ("reverse-over-reverse", 1e-10), ("finite-difference", 1e-4)],
)


@pytest.fixture(autouse=True)
def same_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(function: Any, point: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, point).reshape(point.numel(), point.numel())


@each_mode
def test_subspace(mode: str, tol: float) -> None:
    problem = network("mlp")
    n = sum(p.numel() for p in problem.params.values())
    A = random(n, 6)
    whole = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    loss, z0 = hk.reparametrize(problem.objective, problem.params, A)
    assert z0.tolist() == [0.0] * 6
    H = hk.hessian(loss, z0, problem.data, mode=mode, batch_size=5)
    assert relative_error(H.to_dense(), A.mT @ whole @ A) < tol
    if mode == "finite-difference":
        return
    J = ggn_by_jacobian(
        problem.objective.forward, problem.objective.output_loss, problem.params, problem.data
    )
    assert relative_error(hk.ggn(loss, z0, problem.data, mode=mode).to_dense(), A.mT @ J @ A) < tol
    E = second_moment(problem.objective, problem.params, problem.data)
    assert relative_error(hk.empirical_fisher(loss, z0, problem.data).to_dense(), A.mT @ E @ A) < tol
    assert relative_error(H.coarsen(13).to_dense(), H.to_dense()) < tol


@each_mode
def test_low_rank_factors_have_the_second_derivative_of_their_product(mode: str, tol: float) -> None:
    problem = network("mlp")
    x, y = problem.data
    W = problem.params["0.weight"]
    z0 = {"B": random(5, 2), "A": random(2, 4, seed=4)}
    loss, z = hk.reparametrize(
        problem.objective, problem.params, lambda z: {"0.weight": W + z["B"] @ z["A"]}, z0
    )

    def written_out(flat: Tensor) -> Tensor:
        B, A = flat[:10].view(5, 2), flat[10:].view(2, 4)
        p = problem.params
        h = torch.tanh(x @ (W + B @ A).mT + p["0.bias"])
        return F.cross_entropy(h @ p["2.weight"].mT + p["2.bias"], y)

    expected = dense(written_out, torch.cat([z0["B"].flatten(), z0["A"].flatten()]))
    assert relative_error(hk.hessian(loss, z, problem.data, mode=mode).to_dense(), expected) < tol
    A = hk.hessian(loss, z, problem.data, mode=mode, wrt="A")
    assert relative_error(A.to_dense(), expected[10:, 10:]) < tol
    J = hk.ggn(loss, z, problem.data).to_dense()
    assert (
        relative_error(J, expected) > 0.01
    )  # the term of the map's second derivative is in the Hessian alone


def test_maps_to_nested_flat_and_complex_parameters() -> None:
    data = random(7, 3)
    params = {"layer": {"w": random(3), "scale": torch.tensor(0.5, dtype=F64)}}

    def loss_fn(p: Any, batch: Tensor) -> Tensor:
        return (batch @ p["layer"]["w"] * p["layer"]["scale"]) ** 4

    expected = dense(lambda z: ((data @ z.exp()) * 0.5).pow(4).mean(), torch.zeros(3, dtype=F64))
    by_name, z = hk.reparametrize(loss_fn, params, lambda z: {"layer.w": z.exp()}, torch.zeros(3, dtype=F64))
    assert relative_error(hk.hessian(by_name, z, data).to_dense(), expected) < 1e-10
    flat, z = hk.reparametrize(loss_fn, params, lambda z: torch.cat([z.exp(), z.new_tensor([0.5])]), z)
    assert relative_error(hk.hessian(flat, z, data).to_dense(), expected) < 1e-10
    tree, z = hk.reparametrize(
        loss_fn, params, lambda z: {"layer": {"w": z.exp(), "scale": params["layer"]["scale"]}}, z
    )
    assert relative_error(hk.hessian(tree, z, data).to_dense(), expected) < 1e-10

    point = torch.complex(random(3), random(3, seed=4))
    loss, z = hk.reparametrize(
        lambda p, batch: (batch.to(p) @ p).abs() ** 2, point, torch.eye(6, dtype=F64)[:, :2]
    )
    expected = 2 * (data[:, 0] ** 2).mean() * torch.eye(2, dtype=F64)
    assert relative_error(hk.hessian(loss, z, data).to_dense(), expected) < 1e-10


def test_a_weighted_mean_stays_one() -> None:
    x, y = random(9, 4), torch.tensor([0, 1, 2, -100, 0, 1, -100, 2, 0])
    model = nn.Linear(4, 3).double()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss(weight=random(3).abs()))
    A = random(15, 5)
    whole = hk.hessian(objective, params, (x, y)).to_dense()
    H = hk.hessian(*hk.reparametrize(objective, params, A), (x, y), batch_size=4)
    assert relative_error(H.to_dense(), A.mT @ whole @ A) < 1e-10


def input_hessians(problem: Any) -> list[Tensor]:
    x, y = problem.data
    return [
        dense(lambda one, i=i: problem.objective(problem.params, (one[None], y[i : i + 1])).sum(), x[i])
        for i in range(len(x))
    ]


@each_mode
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "gru"])
def test_perturbed_inputs_have_the_hessians_of_the_examples_as_blocks(
    mode: str, tol: float, name: str
) -> None:
    problem = network(name, num_examples=3)
    x, _ = problem.data
    loss, delta, data = hk.perturb_inputs(problem.objective, problem.params, problem.data)
    assert delta.shape == x.shape
    H = 3 * hk.hessian(loss, delta, data, mode=mode, batch_size=2)
    expected = torch.block_diag(*input_hessians(problem))
    assert relative_error(H.to_dense(), expected) < tol
    ex = hk.extreme_eigenvalues(H, tol=1e-6)
    assert ex.largest.value == pytest.approx(
        float(torch.linalg.eigvalsh(expected)[-1]), rel=max(1e-5, 10 * tol)
    )
    with pytest.raises(TypeError, match="variables for each example"):
        H.coarsen(2)
    assert H.sample is None


def test_shared_perturbation_of_inputs_has_the_mean_of_their_hessians() -> None:
    problem = network("mlp")
    loss, delta, data = hk.perturb_inputs(problem.objective, problem.params, problem.data, shared=True)
    H = hk.hessian(loss, delta, data, batch_size=5)
    assert relative_error(H.to_dense(), torch.stack(input_hessians(problem)).mean(0)) < 1e-10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*problem.data), 4)
    loss, delta, data = hk.perturb_inputs(problem.objective, problem.params, loader, shared=True)
    assert relative_error(hk.hessian(loss, delta, data).to_dense(), H.to_dense()) < 1e-10
    assert H.coarsen(6).num_examples == 6


def test_inputs_by_name_and_outputs_of_the_loss_alone() -> None:
    p, x, mask = random(3), random(6, 3), random(6, seed=5)
    batch = {"in": {"x": x}, "mask": mask}

    def loss_fn(p: Tensor, batch: Any) -> Tensor:
        return batch["mask"] * (batch["in"]["x"] @ p).tanh()

    loss, delta, data = hk.perturb_inputs(loss_fn, p, batch, "in.x")
    expected = dense(lambda d: (mask * ((x + d) @ p).tanh()).sum(), torch.zeros_like(x))
    assert relative_error((6 * hk.hessian(loss, delta, data, batch_size=4)).to_dense(), expected) < 1e-10

    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    objective, params = hk.from_module(model, nn.MSELoss())  # an autoencoder: the clean input is its target
    loss, delta, data = hk.perturb_inputs(objective, params, x)
    expected = dense(lambda d: (model(x + d) - x).square().mean(1).sum(), torch.zeros_like(x))
    assert relative_error((6 * hk.hessian(loss, delta, data)).to_dense(), expected) < 1e-10
    G = 6 * hk.ggn(loss, delta, data)
    J = torch.autograd.functional.jacobian(lambda d: model(x + d), torch.zeros_like(x)).reshape(18, 18)
    assert relative_error(G.to_dense(), J.mT @ J * (2 / 3)) < 1e-10


def test_batch_statistics_couple_the_examples() -> None:
    x, y = random(6, 4), torch.arange(6) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    objective, params = hk.from_module(model, cross_entropy, batchnorm="batch")
    expected = dense(lambda d: F.cross_entropy(model.train()(x + d), y), torch.zeros_like(x))
    H = hk.hessian(*hk.perturb_inputs(objective, params, (x, y)))
    assert relative_error(H.to_dense(), expected) < 1e-8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(4, 5),
            nn.Sequential(nn.Tanh(), nn.Linear(5, 5)),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor, *, perturbation: Tensor | float = 0.0) -> Tensor:
        h = self.first(x)
        return self.last((h + self.block(h) + perturbation).tanh())


@each_mode
def test_perturbed_activations(mode: str, tol: float) -> None:
    x, y = random(6, 4), torch.arange(6) % 3
    model = Residual().double()
    objective, params = hk.from_module(model, cross_entropy)
    zero = torch.zeros(6, 5, dtype=F64)
    expected = dense(lambda d: F.cross_entropy(model(x, perturbation=d), y, reduction="sum"), zero)
    loss, delta, data = hk.perturb_activations(objective, params, (x, y), "block.1")
    assert torch.equal(delta, zero)
    H = 6 * hk.hessian(loss, delta, data, mode=mode, batch_size=4)
    assert relative_error(H.to_dense(), expected) < tol
    assert H.sample is None
    loss, delta, data = hk.perturb_activations(objective, params, (x, y), "block", shared=True)
    mean = torch.stack([expected[5 * i : 5 * i + 5, 5 * i : 5 * i + 5] for i in range(6)]).mean(0)
    H = hk.hessian(loss, delta, data, mode=mode, batch_size=4)
    assert relative_error(H.to_dense(), mean) < tol
    bias = hk.hessian(objective, params, (x, y), wrt="block.1.bias")
    assert relative_error(H.to_dense(), bias.to_dense()) < tol
    assert (
        relative_error(hk.grad(loss, delta, data), hk.grad(objective, params, (x, y))["block.1.bias"]) < 1e-10
    )


def test_activations_leave_module_and_objective_as_they_were() -> None:
    problem = network("mlp")
    loss, delta, data = hk.perturb_activations(problem.objective, problem.params, problem.data, "1")
    before = problem.objective(problem.params, problem.data)
    G = hk.ggn(loss, delta, data)
    assert float(hk.extreme_eigenvalues(G).smallest.value) > -1e-12
    with pytest.raises(RuntimeError):
        loss(torch.ones(13, 2), next(iter(data)))
    modules = [*problem.model.modules(), *problem.objective.network.modules()]
    assert not any(module._forward_hooks for module in modules)
    assert torch.equal(problem.objective(problem.params, problem.data), before)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).transpose(0, 1).transpose(0, 1)


def test_activations_that_cannot_be_perturbed() -> None:
    x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
    objective, params = hk.from_module(Twice(), cross_entropy)
    for name, words in {
        "layer": "called 2 times",
        "unused": "called 0 times",
        "other": "layer, unused",
    }.items():
        with pytest.raises(ValueError, match=words):
            hk.perturb_activations(objective, params, (x, y), name)
    objective, params = hk.from_module(Attention(), cross_entropy)
    with pytest.raises(TypeError, match="one floating tensor, got tuple"):
        hk.perturb_activations(objective, params, (torch.ones(5, 3, 4), y), "attention")
    tokens = network("embedding")
    with pytest.raises(TypeError, match="perturb_activations"):
        hk.perturb_inputs(tokens.objective, tokens.params, tokens.data)
    loss, delta, data = hk.perturb_activations(tokens.objective, tokens.params, tokens.data, "0")
    assert delta.shape == (13, 5, 3)
    assert hk.hessian(loss, delta, data).n == 13 * 15
