from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.curvature.constructors import ggn
from hvpkit.curvature.ggn import ggnvp
from oracles import ggn_by_jacobian, hessian_by_double_backward, relative_error
from problems import NETWORKS, Problem, cross_entropy, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {"forward-over-reverse": 1e-13, "reverse-over-reverse": 1e-13, "finite-difference": 1e-8}
each_mode = pytest.mark.parametrize("mode", MODES)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@cache
def with_oracle(name: str) -> tuple[Problem, Tensor]:
    problem = network(name)
    objective = problem.objective
    return problem, ggn_by_jacobian(objective.forward, objective.output_loss, problem.params, problem.data)


@each_mode
@pytest.mark.parametrize("name", NETWORKS)
def test_a_product_with_one_batch_is_that_of_the_dense_matrix(name: str, mode: str) -> None:
    problem, oracle = with_oracle(name)
    v = normal(len(oracle))
    tree = dict(zip(problem.params, v.split([p.numel() for p in problem.params.values()]), strict=True))
    tree = {key: piece.view_as(problem.params[key]) for key, piece in tree.items()}
    found = ggnvp(problem.objective, problem.params, problem.data, tree, mode=mode)
    assert {key: leaf.shape for key, leaf in found.items()} == {
        key: p.shape for key, p in problem.params.items()
    }
    assert not any(leaf.requires_grad for leaf in found.values())
    assert relative_error(parameters_to_vector(found.values()), oracle @ v) < TOLERANCE[mode]


@each_mode
@pytest.mark.parametrize("batch_size", [1, 5, None])
@pytest.mark.parametrize("name", ["conv_batchnorm", "gru", "tied_weights", "unused_parameter"])
def test_products_over_ragged_batches_are_those_of_the_dense_matrix(
    name: str, batch_size: int | None, mode: str
) -> None:
    problem, oracle = with_oracle(name)
    loader = DataLoader(TensorDataset(*problem.data), batch_size=4, shuffle=True)
    G = ggn(problem.objective, problem.params, loader, batch_size=batch_size, mode=mode)
    V = normal(G.n, 3)
    assert relative_error(G @ V, oracle @ V) < TOLERANCE[mode]
    assert (G.num_examples, G.cost, G.mode) == (13, 1.0, mode)


@each_mode
def test_batch_statistics_make_it_a_sum_over_batches(mode: str) -> None:
    problem = network("conv_batchnorm")
    objective, params = hk.from_module(problem.model, cross_entropy, batchnorm="batch")
    x, y = problem.data
    parts = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    dense = sum(
        ggn_by_jacobian(objective.forward, objective.output_loss, params, part) * len(part[1]) / 13
        for part in parts
    )
    G = ggn(objective, params, (x, y), batch_size=5, mode=mode)
    V = normal(G.n, 2)
    assert relative_error(G @ V, dense @ V) < TOLERANCE[mode]


@each_mode
def test_examples_count_by_their_weights(mode: str) -> None:
    problem = network("mlp")
    weights = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = hk.as_data(problem.data, batch_size=3).subset([1, 4, 6, 12], weights)
    chosen = tuple(t[[1, 4, 6, 12]] for t in problem.data)
    objective = problem.objective
    oracle = ggn_by_jacobian(objective.forward, objective.output_loss, problem.params, chosen, weights)
    G = ggn(objective, problem.params, data, mode=mode)
    assert relative_error(G @ eye(G.n), oracle) < TOLERANCE[mode]


@pytest.mark.parametrize("wrt", ["0.*", "*.weight", lambda name: "1" in name])
def test_wrt_gives_the_block_of_the_chosen_parameters(wrt: object) -> None:
    problem, oracle = with_oracle("conv_batchnorm")
    whole = ggn(problem.objective, problem.params, problem.data)
    block = ggn(problem.objective, problem.params, problem.data, wrt=wrt, batch_size=4)
    named = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    ones = {name: torch.ones_like(named[name]) for name in block.unflatten(torch.zeros(block.n))}
    rows = whole.flatten(named | ones).nonzero().flatten()
    assert 0 < block.n == len(rows) < whole.n
    assert relative_error(block @ eye(block.n), oracle[rows][:, rows]) < 1e-13
    assert isinstance(block.origin.loss_fn, hk.Objective)
    assert block.origin.loss_fn.batchnorm == "eval"


@pytest.mark.parametrize("name", ["mlp", "conv_layernorm", "attention"])
def test_it_is_semi_definite_where_the_hessian_is_not(name: str) -> None:
    problem, _ = with_oracle(name)
    arguments = problem.objective, problem.params, problem.data
    values = torch.linalg.eigvalsh(ggn(*arguments) @ eye(ggn(*arguments).n))
    assert float(values[0]) > -1e-14 * float(values[-1])
    H = hk.hessian(*arguments)
    assert float(torch.linalg.eigvalsh(H @ eye(H.n))[0]) < -1e-3 * float(values[-1])


@each_mode
def test_where_outputs_are_linear_it_is_the_hessian(mode: str) -> None:
    x, y = normal(9, 4), torch.arange(9) % 3
    objective = hk.Objective(
        lambda p, batch: batch[0] @ p["w"] + p["b"], lambda z, batch: cross_entropy(z, batch[1])
    )
    params = {"w": normal(4, 3), "b": normal(3)}
    G = ggn(objective, params, (x, y), batch_size=4, mode=mode)
    oracle = hessian_by_double_backward(objective, params, (x, y))
    assert relative_error(G @ eye(15), oracle) < TOLERANCE[mode]


@each_mode
def test_a_loss_of_any_shape_in_the_outputs_has_its_own_curvature(mode: str) -> None:
    # not convex, and not linear in the cross entropies that it is made of
    def focal(z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(z, batch[1], reduction="none")
        return (1 - (-losses).exp()) ** 2 * losses - 0.1 * z.pow(3).sum(1)

    problem = network("mlp")
    oracle = ggn_by_jacobian(problem.objective.forward, focal, problem.params, problem.data)
    assert float(torch.linalg.eigvalsh(oracle)[0]) < -0.01
    objective = hk.Objective(problem.objective.forward, focal)
    G = ggn(objective, problem.params, problem.data, batch_size=6, mode=mode)
    assert relative_error(G @ eye(G.n), oracle) < TOLERANCE[mode]


@dataclass
class Outputs:
    logits: Tensor
    extra: object = None


_pytree.register_dataclass(Outputs, field_names=["logits", "extra"], drop_field_names=[])

TREES: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[object], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda tree: tree),
    "dict with constants": (
        lambda a, b: {"mask": torch.ones(3), "b": b, "size": 3, "none": None, "a": a},
        lambda tree: (tree["a"] * tree["mask"][0], tree["b"] * (tree["size"] - 2)),
    ),
    "dataclass": (lambda a, b: Outputs(a, [b]), lambda tree: (tree.logits, tree.extra[0])),
}


@each_mode
@pytest.mark.parametrize("kind", TREES)
def test_outputs_may_be_a_tree_of_several_tensors(kind: str, mode: str) -> None:
    pack, unpack = TREES[kind]
    x, w = normal(6, 3), normal(3, 2)

    def parts(p: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(batch @ p)
        return z[:, 0], z[:, 1:]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (a * b[:, 0] + a**2 + b[:, 0] ** 2).exp()  # curvature across the two

    objective = hk.Objective(lambda p, batch: pack(*parts(p, batch)), lambda tree, _: loss(*unpack(tree)))
    oracle = ggn_by_jacobian(
        lambda p, batch: torch.tanh(batch @ p["w"]), lambda z, _: loss(z[:, 0], z[:, 1:]), {"w": w}, x
    )
    assert relative_error(ggn(objective, w, x, batch_size=4, mode=mode) @ eye(6), oracle) < TOLERANCE[mode]


class Opaque:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda p, x: Opaque(x @ p), "objective.forward must return a tree of tensors, got a Opaque in it"),
        (
            lambda p, x: torch.complex(x @ p, x @ p),
            "objective.forward gave outputs of dtype torch.complex128",
        ),
    ],
)
def test_outputs_that_cannot_be_differentiated_are_refused(forward: Callable, reason: str) -> None:
    objective = hk.Objective(forward, lambda z, _: getattr(z, "logits", z).abs() ** 2)
    x, p = normal(3, 2), normal(2)
    with pytest.raises(TypeError, match=reason):
        ggnvp(objective, p, x, p)
    with pytest.raises(TypeError, match=reason):
        ggn(objective, p, x)


@each_mode
def test_a_mean_over_the_batch_gives_what_losses_of_examples_give(mode: str) -> None:
    problem, oracle = with_oracle("mlp")
    objective = hk.Objective(problem.objective.forward, lambda z, batch: F.cross_entropy(z, batch[1]))
    G = ggn(objective, problem.params, problem.data, batch_size=4, mode=mode)
    assert relative_error(G @ eye(G.n), oracle) < TOLERANCE[mode]
    with pytest.raises(ValueError, match="0-d mean, which cannot be weighted by example"):
        ggn(
            objective,
            problem.params,
            hk.as_data(problem.data).subset([0, 1], torch.tensor([1.0, 2.0])),
            mode=mode,
        )


@each_mode
def test_unused_parameters_have_zeros_and_so_have_batches_that_use_none(mode: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def forward(p: dict[str, Tensor], batch: Tensor) -> Tensor:
        routed = p["first"] if bool(batch[0, 0]) else p["second"]
        return batch.sum(1) * routed

    objective = hk.Objective(forward, lambda z, _: 0.5 * z**2)
    params = {"first": torch.tensor(2.0).double(), "second": torch.tensor(3.0).double()}
    G = ggn(objective, params, x, batch_size=1, mode=mode)
    assert torch.allclose(G @ eye(2), 0.5 * eye(2))
    block = ggn(objective, params, x, batch_size=1, mode=mode, wrt="first")
    assert torch.allclose(block @ eye(1), 0.5 * eye(1))


@each_mode
def test_an_objective_that_is_no_function_of_params_is_refused(mode: str) -> None:
    x, p = normal(3, 2), normal(2)
    for forward in (lambda _, batch: batch, lambda p, batch: batch @ p.detach()):
        objective = hk.Objective(forward, lambda z, _: z.reshape(3, -1).sum(1))
        with pytest.raises(ValueError, match="loss_fn does not depend on params"):
            ggnvp(objective, p, x, p, mode=mode)
        with pytest.raises(ValueError, match="loss_fn does not depend on params"):
            ggn(objective, p, x, mode=mode)


def test_what_is_no_objective_is_refused_with_the_mend() -> None:
    x, p = normal(3, 2), normal(2)
    for use in (partial(ggn, data=x), partial(ggnvp, batch=x, v=p)):
        with pytest.raises(
            TypeError, match=r"objective must be a hvpkit.Objective, .* use hvpkit.from_module"
        ):
            use(lambda p, batch: (batch @ p) ** 2, params=p)
    objective = hk.Objective(lambda p, batch: batch @ p, lambda z, _: z**2)
    with pytest.raises(ValueError, match="mode must be one of"):
        ggnvp(objective, p, x, p, mode="exact")
    with pytest.raises(TypeError, match="must be floating point"):
        ggnvp(objective, p.long(), x, p)


def test_a_product_that_is_not_finite_names_its_first_batch() -> None:
    x = torch.ones(9, 2, dtype=torch.float64)
    x[7] = float("nan")
    objective = hk.Objective(lambda p, batch: batch @ p, lambda z, _: z**2)
    G = ggn(objective, torch.ones(2).double(), x, batch_size=2)
    with pytest.raises(hk.NonFiniteError, match=r"the GGN product is not finite .* batch 3 of the data"):
        G @ torch.ones(2).double()


def test_samples_are_the_matrix_of_so_many_examples() -> None:
    problem, oracle = with_oracle("mlp")
    G = ggn(problem.objective, problem.params, problem.data, batch_size=5)
    assert relative_error(G.sample(13, 0) @ eye(G.n), oracle) < 1e-13
    part = G.sample(4, 0)
    assert (part.cost, part.num_examples, part.mode) == (4 / 13, 4, G.mode)
    assert relative_error(part @ eye(G.n), oracle) > 0.1


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_float32_has_the_digits_of_float32(name: str) -> None:
    problem, oracle = with_oracle(name)
    model = network(name).model.float()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())
    data = tuple(t.float() if t.is_floating_point() else t for t in problem.data)
    G = ggn(objective, params, data)
    assert G.precision == torch.finfo(torch.float32).eps
    assert relative_error(G @ torch.eye(G.n), oracle) < 1e-5


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that tensors took at once beyond what was there before, by the allocator's own account."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    total = highest = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        total += size
        highest = max(highest, total)
    return highest


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_wide_softmax_takes_less_than_twice_the_memory_of_a_training_step(mode: str) -> None:
    vocabulary, tokens = 5000, 64
    g = torch.Generator().manual_seed(0)
    params = {"embed": torch.randn(vocabulary, 4, generator=g), "b": torch.randn(4, generator=g)}
    x, y = torch.randint(vocabulary, (2, 4, tokens // 4), generator=g)

    def forward(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(F.embedding(batch[0], p["embed"]) + p["b"]) @ p["embed"].mT

    def loss(z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(z.flatten(0, 1), batch[1].flatten(), reduction="none")
        return losses.view(batch[1].shape).mean(1)

    def step() -> None:
        points = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss(forward(points, (x, y)), (x, y)).mean().backward()

    logits = vocabulary * tokens * 4
    least = peak_bytes(step)
    assert least > 2.9 * logits  # the outputs are what takes the memory here
    objective = hk.Objective(forward, loss)
    ggnvp(objective, params, (x, y), params, mode=mode)  # what is loaded at first use is no part of it
    assert peak_bytes(lambda: ggnvp(objective, params, (x, y), params, mode=mode)) < 2 * least
