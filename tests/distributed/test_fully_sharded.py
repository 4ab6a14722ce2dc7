"""Modules of fully_shard (FSDP2) and DDP are taken whole, give the numbers of the plain module, and train on."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hvpkit as hk
from distributed.ranks import run, told
from hvpkit._utils.memory import Allocations
from hvpkit.objective import fully_sharded
from hvpkit.train import SpectrumTracker

G = torch.Generator().manual_seed(0)
X = torch.randn(23, 6, generator=G)
IMAGES = torch.randn(23, 2, 5, 5, generator=G)
TOKENS = torch.randint(0, 9, (23, 7), generator=G)
Y = torch.randint(0, 3, (23,), generator=G)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed, and a layer that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.again, self.scale = self.inner, nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.out(self.scale * torch.tanh(self.again(h)) + h @ self.inner.weight)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Sequential(nn.Linear(5, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Linear(27, 3))
    )


def transformer() -> nn.Module:
    return hk.zoo.tiny_gpt(vocab_size=9, context=7, width=8, num_layers=1, num_heads=2)


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "perceptron": (perceptron, nn.CrossEntropyLoss(), (X, Y)),
    "convolutional": (convolutional, nn.CrossEntropyLoss(), (IMAGES, Y)),
    "transformer": (transformer, next_token, (TOKENS, TOKENS)),
    "tied": (Tied, nn.CrossEntropyLoss(), (X, Y)),
}
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-10}


def problem(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    make, criterion, data = PROBLEMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().to(dtype)
    data = tuple(x.to(dtype) if x.is_floating_point() else x for x in data)
    return model, criterion, data


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if not isinstance(model, Tied) and isinstance(child, nn.Sequential | nn.ModuleList):
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def figures(model: nn.Module, criterion: Any, data: Any, mesh: DeviceMesh | None) -> list[Any]:
    objective, params = hk.from_module(model, criterion)
    H = hk.hessian(objective, params, hk.as_data(data, mesh=mesh), batch_size=4, mode="reverse-over-reverse")
    v = torch.linspace(-1, 1, H.n, dtype=torch.float64).to(H.dtype)
    plain = all(type(p) is Tensor and not p.requires_grad for p in params.values())
    return [plain, list(params), torch.cat([p.flatten() for p in params.values()]), H @ v]


def steps(model: nn.Module, criterion: Any, data: Any, optimizer: Any, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        torch.mean(criterion(model(data[0]), data[1])).backward()
        optimizer.step()


def state(model: nn.Module) -> list[Tensor]:
    return [fully_sharded.gathered(t.detach()).clone() for t in (*model.parameters(), *model.buffers())]


def measured_in_training(mesh: DeviceMesh, name: str, dtype: torch.dtype) -> list[Any]:
    """Train a sharded model with measurements in between, and one without; return what was measured, and both."""
    model, criterion, data = problem(name, dtype)
    measured, untouched = (shard(copy.deepcopy(model), mesh) for _ in range(2))
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (measured, untouched)]
    classes = [type(module) for module in measured.modules()]
    found = [figures(measured, criterion, data, mesh)]
    for one, optimizer in zip((measured, untouched), optimizers, strict=True):
        steps(one, criterion, data, optimizer, 2)
    with torch.no_grad():
        measured(data[0])  # the root's parameters are whole after this
        untouched(data[0])
    found.append(figures(measured, criterion, data, mesh))
    losses = [criterion(one(data[0]), data[1]).mean() for one in (measured, untouched)]
    found.append(figures(measured, criterion, data, mesh))  # between a forward and a backward pass
    for loss, optimizer in zip(losses, optimizers, strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [type(module) for module in measured.modules()] == classes
    return [found, state(measured), state(untouched)]


def measured_alone(name: str, dtype: torch.dtype) -> list[Any]:
    model, criterion, data = problem(name, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = figures(model, criterion, data, None)
    steps(model, criterion, data, optimizer, 2)
    with torch.no_grad():
        model(data[0])
    second = figures(model, criterion, data, None)
    criterion(model(data[0]), data[1])
    return [first, second, figures(model, criterion, data, None)]


def options(mesh: DeviceMesh) -> list[Any]:
    """Return the figures of other ways to shard, and of DDP."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, criterion, data = problem("convolutional", torch.float32)
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = [figures(shard(copy.deepcopy(model), two), criterion, data, mesh)]
    rounded = shard(copy.deepcopy(model), mesh, mp_policy=low).eval()
    with torch.no_grad():
        rounded(data[0])
    found.append(figures(rounded, criterion, data, mesh))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    return [*found, figures(wrapped, criterion, data, mesh)]


def nothing_is_kept(mesh: DeviceMesh) -> bool:
    model, criterion, _ = problem("perceptron", torch.float32)
    model = shard(model, mesh)
    objective, _ = hk.from_module(model, criterion)
    of_fsdp = [key for module in objective.network.modules() for key in vars(module) if "fsdp" in key]
    reference = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    return reference() is None and not of_fsdp


def scaled(mesh: DeviceMesh | None) -> Any:
    """Return a product in the coordinates of Adam, whose state is sharded."""
    model, criterion, data = problem("perceptron", torch.float64)
    model = model if mesh is None else shard(model, mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, criterion, data, optimizer, 2)
    objective, params = hk.from_module(model, criterion)
    H = hk.precondition(hk.hessian(objective, params, hk.as_data(data, mesh=mesh)), optimizer)
    return H @ torch.ones(H.n, dtype=H.dtype)


def tracked(mesh: DeviceMesh | None) -> list[Any]:
    model, criterion, data = problem("perceptron", torch.float64)
    model = model if mesh is None else shard(model, mesh)
    tracker = SpectrumTracker.for_module(criterion, data, tol=1e-6, k=2)
    if mesh is not None:
        tracker.share(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        tracker(model.eval(), step=step)
        steps(model.train(), criterion, data, optimizer, 1)
    return [ex.values for _, ex in tracker.results] + [
        one.gradient_share for one in tracker.alignments.values()
    ]


def refusals(mesh: DeviceMesh) -> list[str]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, criterion, data = problem("perceptron", torch.float32)
    plan = {"0": ColwiseParallel(), "4": RowwiseParallel()}
    parallel = parallelize_module(copy.deepcopy(model), mesh, plan)
    sharded = shard(copy.deepcopy(model), mesh)

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return criterion(outputs, targets) + float(sharded.training)

    found = [
        told(lambda: hk.from_module(parallel, criterion)),
        told(lambda: hk.from_module(sharded, penalised)),
    ]
    free = fully_sharded.free_memory
    fully_sharded.free_memory = lambda device: 500.0 if mesh.get_local_rank() else free(device)
    found.append(told(lambda: hk.from_module(sharded, criterion)))
    fully_sharded.free_memory = free
    found.append(told(lambda: hk.hessian(lambda _, x: x.sum(1), dict(sharded.named_parameters()), data)))
    return [*found, told(lambda: hk.from_module(sharded, criterion))]


CASES = [(name, dtype) for name in PROBLEMS for dtype in DTYPES]


@pytest.fixture(scope="module")
def answers() -> dict[Any, list[Any]]:
    others: list[Callable[[DeviceMesh], Any]] = [options, nothing_is_kept, scaled, tracked, refusals]
    trained = [lambda mesh, case=case: measured_in_training(mesh, *case) for case in CASES]
    found = run(2, *trained, *others)
    return dict(zip([*CASES, *(other.__name__ for other in others)], found, strict=True))


def assert_close(found: list[Any], expected: list[Any], tol: float) -> None:
    assert found[:2] == expected[:2]
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm()) <= tol * float(other.norm())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_sharded_model_has_the_numbers_of_the_plain_one_and_trains_on(
    name: str, dtype: torch.dtype, answers: dict[Any, list[Any]]
) -> None:
    expected = measured_alone(name, dtype)
    for found, measured, untouched in answers[name, dtype]:
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, DTYPES[dtype])
        for one, other in zip(measured, untouched, strict=True):
            assert torch.equal(one, other)


def test_replicas_low_precision_and_ddp_have_the_numbers_of_the_plain_model(
    answers: dict[Any, list[Any]],
) -> None:
    model, criterion, data = problem("convolutional", torch.float32)
    expected = figures(model, criterion, data, None)
    for of_rank in answers["options"]:
        for found in of_rank:
            assert_close(found, expected, 1e-6)


def test_an_objective_keeps_nothing_of_the_sharded_model(answers: dict[Any, list[Any]]) -> None:
    assert answers["nothing_is_kept"] == [True, True]


def test_the_state_of_a_sharded_optimizer_preconditions(answers: dict[Any, list[Any]]) -> None:
    for found in answers["scaled"]:
        torch.testing.assert_close(found, scaled(None), rtol=1e-10, atol=1e-12)


def test_a_tracker_follows_a_sharded_model(answers: dict[Any, list[Any]]) -> None:
    expected = tracked(None)
    for found in answers["tracked"]:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_gathered_is_refused_by_name_on_all_ranks(answers: dict[Any, list[Any]]) -> None:
    for parallel, criterion, memory, params, fine in answers["refusals"]:
        assert parallel.startswith("TypeError: model: parameter '0.weight' is a DTensor")
        assert "full_tensor()" in parallel
        assert criterion.startswith("TypeError: criterion refers to model, whose parameters are sharded")
        assert memory.startswith("MemoryError: model: its parameters take 372 bytes")
        assert "500 bytes are free" in memory
        assert params.startswith("TypeError: params['0.weight'] is a DTensor")
        assert fine == "nothing"


def test_what_a_whole_model_takes_is_what_is_asked_for() -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(200, 200), nn.Tanh())))
    data, size = (torch.randn(4, 200, generator=G), torch.randn(4, 200, generator=G)), 4 * 200 * 201 * 4
    with Allocations() as held:
        objective, params = hk.from_module(model, nn.MSELoss())
        H = hk.hessian(objective, params, data, mode="reverse-over-reverse", memory_limit=0)
        v = torch.ones(H.n)
        H @ v
    assert held.peak <= fully_sharded.WHOLE_VECTORS * size
