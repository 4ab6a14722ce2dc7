"""Losses and modules that refer to the tensors of the caller's own model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.autodiff import references
from oracles import relative_error

per_example = partial(F.cross_entropy, reduction="none")
X = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.features(x))


def trained_hessian(model: nn.Module, criterion: Callable = per_example) -> Tensor:
    """Dense Hessian of the loss that training minimises, by double backward through the caller's own module."""
    params = list(model.parameters())
    loss = criterion(model(X), Y).mean()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


# Criteria that read the model.


def with_penalty(m: nn.Module) -> Callable:
    return lambda o, t: per_example(o, t) + 0.05 * sum(p.pow(2).sum() for p in m.parameters())


def with_detached_penalty(m: nn.Module) -> Callable:
    return lambda o, t: per_example(o, t) + 0.05 * sum(p.detach().pow(2).sum() for p in m.parameters())


def with_number(m: nn.Module) -> Callable:
    return lambda o, t: per_example(o, t) + 0.05 * m.b.bias.norm().item()


def with_data(m: nn.Module) -> Callable:
    return lambda o, t: per_example(o, t) + 0.05 * m.b.bias.data.square().sum()


class Regularised(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return per_example(o, t) + 0.05 * torch.cat([w.flatten() for w in self.weights]).square().sum()


def penalised(o: Tensor, t: Tensor, *, model: nn.Module) -> Tensor:
    return with_penalty(model)(o, t)


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, o: Tensor, t: Tensor) -> Tensor:
        return with_penalty(self.model)(o, t)

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        return self.loss(o, t)


NET = Net().double()


def with_global(o: Tensor, t: Tensor) -> Tensor:
    return per_example(o, t) + 0.05 * NET.b.weight.square().sum()


READERS: dict[str, Callable[[nn.Module], Callable]] = {
    "closure": with_penalty,
    "detached": with_detached_penalty,
    "number": with_number,
    "data": with_data,
    "attribute": lambda m: Regularised([m.a.weight, m.b.weight]).requires_grad_(False),
    "partial": lambda m: partial(penalised, model=m),
    "bound method": lambda m: Trainer(m).loss,
    "callable": Trainer,
    "global": lambda m: with_global,  # noqa: ARG005
}


@pytest.mark.parametrize("kind", READERS)
def test_a_criterion_that_reads_parameters_is_refused(kind: str) -> None:
    model = NET if kind == "global" else Net().double()
    objective, params = hk.from_module(model, READERS[kind](model))
    v = {name: torch.ones_like(p) for name, p in params.items()}
    for call in (
        lambda: hk.hessian(objective, params, (X, Y)),
        lambda: hk.ggn(objective, params, (X, Y)),
        lambda: hk.empirical_fisher(objective, params, (X, Y)),
        lambda: hk.hvp(objective, params, (X, Y), v),
        lambda: hk.ggnvp(objective, params, (X, Y), v),
        lambda: hk.quadratic_form(objective, params, (X, Y), v),
        lambda: hk.grad(objective, params, (X, Y)),
        lambda: hk.loss(objective, params, (X, Y)),
    ):
        with pytest.raises(ValueError, match=r"criterion reads the parameter '[ab]\.(weight|bias)' of model"):
            call()


def test_the_remedy_for_a_penalty_has_the_hessian_that_is_trained() -> None:
    model = Net().double()
    objective, params = hk.from_module(model, per_example)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return objective(params, batch) + 0.05 * sum(p.square().sum() for p in params.values())

    H = hk.hessian(loss_fn, params, (X, Y), batch_size=4)
    oracle = trained_hessian(model, with_penalty(model))
    assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), oracle) < 1e-13


def test_a_criterion_may_ask_for_shapes_dtypes_and_devices_of_parameters() -> None:
    model = Net().double()

    def criterion(o: Tensor, t: Tensor) -> Tensor:
        first = next(model.parameters())
        scale = torch.ones((), dtype=first.dtype, device=first.device) * first.shape[0] * first.numel() / 48
        assert first.size(0) == first.ndim + 2
        return per_example(o, t) * scale

    objective, params = hk.from_module(model, criterion)
    H = hk.hessian(objective, params, (X, Y))
    oracle = trained_hessian(model)
    assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), oracle) < 1e-13


def test_a_criterion_may_read_what_is_frozen() -> None:
    model = Net().double()
    model.a.weight.requires_grad_(False)
    criterion = lambda o, t: per_example(o, t) * (1 + model.a.weight.square().mean())  # noqa: E731
    objective, params = hk.from_module(model, criterion)
    assert torch.allclose(hk.loss(objective, params, (X, Y)), criterion(model(X), Y).mean())


# Modules with functions that refer to the module.


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pre = lambda x: torch.tanh(self.a(x))

    def features(self, x: Tensor) -> Tensor:
        return self.pre(x)


class NestedClosure(Net):
    def __init__(self) -> None:
        super().__init__()

        def pre(x: Tensor) -> Tensor:
            return torch.tanh(self.a(x))

        def outer(x: Tensor) -> Tensor:
            return pre(x) * 1.0

        self.steps = [outer]

    def features(self, x: Tensor) -> Tensor:
        return self.steps[0](x)


class Bound(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pre = self._pre

    def _pre(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def features(self, x: Tensor) -> Tensor:
        return self.pre(x)


class Partial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pre = partial(_apply, layer=self.a)

    def features(self, x: Tensor) -> Tensor:
        return self.pre(x)


def _apply(x: Tensor, *, layer: nn.Module) -> Tensor:
    return torch.tanh(layer(x))


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_pre_hook(lambda _, args: (args[0] * self.a.bias.square().sum(),))


class HookedByMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_pre_hook(self._scaled)

    def _scaled(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:  # noqa: ARG002
        return (args[0] * self.a.bias.square().sum(),)


class ListOfParameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.penalised = [self.a.weight, self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        scale = sum(w.square().sum() for w in self.penalised)
        return super().forward(x) * scale


class ClosureOverParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.scale = lambda: weight.square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()


class Assigned(Net):
    """Its forward pass is replaced on the instance, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: self.b(torch.tanh(self.a(x)))


class Defaults(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pre = lambda x, layer=self.a: torch.tanh(layer(x))

    def features(self, x: Tensor) -> Tensor:
        return self.pre(x)


class DroppedClosure(Net):
    """Its closure reaches layers whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.pre = lambda x: self.drop(self.norm(torch.tanh(self.a(x))))

    def features(self, x: Tensor) -> Tensor:
        return self.pre(x)


REFERRING = (
    *(Closure, NestedClosure, Bound, Partial, Hooked, HookedByMethod, ListOfParameters, ClosureOverParameter),
    *(Assigned, Defaults, DroppedClosure),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", REFERRING)
def test_functions_of_a_module_read_the_parameters_that_vary(kind: type[nn.Module], mode: str) -> None:
    model = kind().double()
    oracle = trained_hessian(model.eval())
    model.train()
    objective, params = hk.from_module(model, per_example)
    H = hk.hessian(objective, params, (X, Y), batch_size=5, mode=mode)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert relative_error(dense, oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    assert hk.check(H).ok


def test_functions_of_a_module_at_top_level_read_the_parameters_that_vary() -> None:
    scope = {"torch": torch, "net": Net().double()}
    exec("net.features = lambda x: torch.tanh(net.a(x))", scope)  # as in a notebook
    oracle = trained_hessian(scope["net"])
    objective, params = hk.from_module(scope["net"], per_example)
    H = hk.hessian(objective, params, (X, Y))
    assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), oracle) < 1e-12


@pytest.mark.parametrize("kind", REFERRING)
def test_later_training_does_not_reach_functions_of_a_module(kind: type[nn.Module]) -> None:
    model = kind().double()
    objective, params = hk.from_module(model, per_example)
    before = objective(params, (X, Y))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert torch.equal(objective(params, (X, Y)), before)


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> Helper:
        return self

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.model.a(x))


def test_a_module_that_reads_its_original_through_a_helper_is_refused() -> None:
    model = Net().double()
    model.features = Helper(model).features
    objective, params = hk.from_module(model, per_example)
    with pytest.raises(ValueError, match=r"model: its forward pass reads 'a.weight' of the original module"):
        hk.hessian(objective, params, (X, Y))


class Caches(Net):
    """Computes a norm once, in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            self.norm = self.a.weight.norm()
        return super().forward(x) / self.norm


@pytest.mark.parametrize("mode", MODES)
def test_what_a_call_stores_in_a_module_is_not_there_in_the_next(mode: str) -> None:
    model = Caches().double()
    objective, params = hk.from_module(model, per_example)
    oracle = trained_hessian(model)
    H = hk.hessian(objective, params, (X, Y), batch_size=4, mode=mode)
    for _ in range(2):
        dense = H @ torch.eye(H.n, dtype=torch.float64)
        assert relative_error(dense, oracle) < (1e-6 if mode == "finite-difference" else 1e-12)
    fresh, _ = hk.from_module(Caches().double(), per_example)
    moved = {name: p + 1 for name, p in params.items()}
    assert torch.equal(objective(moved, (X, Y)), fresh(moved, (X, Y)))


# Criteria that read what a forward pass stored.


class Stores(Net):
    """Keeps its hidden features, as for a penalty on activations."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.features(x)
        self.penalty = 0.1 * self.b.weight.square().sum()
        self.size = float(self.hidden.detach().norm())
        return self.b(self.hidden)


class Extractor:
    """Its hook keeps the output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.hidden: Tensor | None = None
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: object, output: Tensor) -> None:  # noqa: ARG002
        self.hidden = output


def stored_by_extractor(m: nn.Module) -> Callable:
    extractor = Extractor(m.a)
    return lambda o, t: per_example(o, t) + extractor.hidden.square().mean(1)


STORED: dict[str, Callable[[nn.Module], Callable]] = {
    "activations": lambda m: lambda o, t: per_example(o, t) + m.hidden.square().mean(1),
    "detached": lambda m: lambda o, t: per_example(o, t) * m.hidden.detach().square().mean(1),
    "penalty": lambda m: lambda o, t: per_example(o, t) + m.penalty,
    "number": lambda m: lambda o, t: per_example(o, t) * m.size,
    "extractor": stored_by_extractor,
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("kind", STORED)
def test_a_criterion_that_reads_what_a_forward_pass_stored_is_refused(kind: str, called_before: bool) -> None:
    model = Stores().double()
    criterion = STORED[kind](model)
    if called_before:
        with torch.no_grad():
            model(X)
    objective, params = hk.from_module(model, criterion)
    before = {name: value for name, value in vars(model).items() if not isinstance(value, dict)}
    v = {name: torch.ones_like(p) for name, p in params.items()}
    for call in (
        lambda: hk.hessian(objective, params, (X, Y)),
        lambda: hk.hvp(objective, params, (X, Y), v),
        lambda: hk.loss(objective, params, (X, Y)),
    ):
        with pytest.raises(ValueError, match="criterion refers to model, and gives other losses than"):
            call()
    after = {name: value for name, value in vars(model).items() if not isinstance(value, dict)}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_the_remedy_for_stored_values_has_the_hessian_that_is_trained() -> None:
    class Returns(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.features(x)
            return self.b(hidden), hidden

    model = Returns().double()
    criterion = lambda o, t: per_example(o[0], t) + o[1].square().mean(1)  # noqa: E731
    objective, params = hk.from_module(model, criterion)
    oracle = trained_hessian(model, criterion)
    H = hk.hessian(objective, params, (X, Y), batch_size=4)
    assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), oracle) < 1e-12
    assert bool(torch.linalg.vector_norm(hk.ggn(objective, params, (X, Y)) @ torch.ones(H.n).double()) > 0)


class Task:
    """Holds the model and the data, as a trainer does; its loss reads neither."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.names = model, ["a", "b"]

    def loss(self, o: Tensor, t: Tensor) -> Tensor:
        return per_example(o, t)


@pytest.mark.parametrize("options", [{}, {"batchnorm": "batch"}, {"dropout": 3}])
def test_a_criterion_may_refer_to_the_model_without_reading_it(options: dict) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    objective, params = hk.from_module(model, Task(model).loss, **options)
    plain, _ = hk.from_module(model, per_example, **options)
    assert torch.equal(objective(params, (X, Y)), plain(params, (X, Y)))
    after = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(module.training for module in model.modules())


# Attributes that cannot be copied, and wrappers of libraries.


class Writer:
    def __init__(self) -> None:
        self.lock, self.lines = threading.Lock(), []

    def write(self, module: nn.Module, args: object, output: Tensor) -> None:  # noqa: ARG002
        with self.lock:
            self.lines.append(float(output.detach().sum()))


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def test_attributes_that_cannot_be_copied_are_shared_and_named() -> None:
    model = Locked().double()
    with pytest.warns(UserWarning, match=r"model: lock \(lock\) cannot be copied, and is used as it is"):
        objective, params = hk.from_module(model, per_example)
    H = hk.hessian(objective, params, (X, Y))
    assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), trained_hessian(model)) < 1e-12


def test_hooks_that_cannot_be_copied_are_left_out_and_named() -> None:
    model, writer = Net().double(), Writer()
    model.a.register_forward_hook(writer.write)
    with pytest.warns(
        UserWarning, match=r"model: a\._forward_hooks \(method\) cannot be copied, and is left out"
    ):
        objective, params = hk.from_module(model, per_example)
    H = hk.hessian(objective, params, (X, Y))
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert writer.lines == []
    assert relative_error(dense, trained_hessian(model)) < 1e-12


def test_results_of_computations_are_copied_wherever_they_are_kept() -> None:
    class Notes:
        pass

    model = Net().double()
    model.notes = Notes()
    model.notes.last = [model(X)]
    objective, params = hk.from_module(model, per_example)
    assert torch.equal(objective(params, (X, Y)), per_example(model(X), Y))


def test_models_prepared_by_accelerate_are_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Net().double()
    oracle = trained_hessian(model)
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(True)
        prepared = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(model)
        objective, params = hk.from_module(prepared, per_example)
        H = hk.hessian(objective, params, (X, Y))
        assert list(params) == [name for name, _ in model.named_parameters()]
        assert relative_error(H @ torch.eye(H.n, dtype=torch.float64), oracle) < 1e-12
    accelerate.state.AcceleratorState._reset_state(True)


def test_wrappers_of_training_libraries_are_unwrapped_by_name() -> None:
    class _FabricModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Net().double()
    objective, params = hk.from_module(_FabricModule(model), per_example)
    assert list(params) == [name for name, _ in model.named_parameters()]
    assert torch.equal(objective(params, (X, Y)), per_example(model(X), Y))


def test_sharded_models_are_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(
        TypeError, match=r"model\.0 is a FullyShardedDataParallel, whose parameters are shards"
    ):
        hk.from_module(nn.Sequential(FullyShardedDataParallel(Net())), per_example)


def test_a_module_that_refers_to_a_large_program_is_searched_in_linear_time(monkeypatch) -> None:
    """As a LightningModule refers to its trainer, and that to everything."""
    model = nn.Linear(2, 2)
    world = [object() for _ in range(20)]
    model.trainer = [lambda number=number: (world, number) for number in range(200)]
    model.trainer.append(lambda: model)
    visits = []
    contents = references._contents
    monkeypatch.setattr(references, "_contents", lambda thing: visits.append(1) or contents(thing))
    objective, params = hk.from_module(model, nn.MSELoss())
    assert len(visits) < 2000  # and not a search from each of 200 functions
    assert objective(params, (torch.ones(3, 2), torch.ones(3, 2))).shape == (3,)
