from __future__ import annotations

import copy
import gc
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error
from problems import Problem, cross_entropy, network


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


G = torch.Generator().manual_seed(0)
SCORES = torch.randn(6, 4, dtype=torch.float64, generator=G)
CLASSES = torch.randint(0, 4, (6,), generator=G)
REALS = torch.randn(6, 4, dtype=torch.float64, generator=G)
BITS = (REALS > 0).double()
CHANCES = REALS.softmax(1)
SEQUENCE = torch.randn(6, 4, 3, dtype=torch.float64, generator=G)
TOKENS = torch.randint(0, 4, (6, 3), generator=G)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")

CRITERIA: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), SCORES, CLASSES),
    "CrossEntropyLoss smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), SCORES, CLASSES),
    "CrossEntropyLoss soft": (nn.CrossEntropyLoss(), SCORES, CHANCES),
    "CrossEntropyLoss sequence": (nn.CrossEntropyLoss(), SEQUENCE, TOKENS),
    "CrossEntropyLoss sum": (nn.CrossEntropyLoss(reduction="sum"), SCORES, CLASSES),
    "CrossEntropyLoss sum sequence": (nn.CrossEntropyLoss(reduction="sum"), SEQUENCE, TOKENS),
    "CrossEntropyLoss weighted sum": (nn.CrossEntropyLoss(WEIGHT, reduction="sum"), SCORES, CLASSES),
    "CrossEntropyLoss weighted": (nn.CrossEntropyLoss(WEIGHT), SCORES, CLASSES),
    "CrossEntropyLoss weighted smoothed": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SCORES, CLASSES),
    "CrossEntropyLoss weighted sequence": (nn.CrossEntropyLoss(WEIGHT), SEQUENCE, TOKENS),
    "CrossEntropyLoss weighted soft": (nn.CrossEntropyLoss(WEIGHT), SCORES, CHANCES),
    "CrossEntropyLoss soft sequence": (nn.CrossEntropyLoss(WEIGHT), SEQUENCE, SEQUENCE.softmax(1)),
    "CrossEntropyLoss ignored class": (nn.CrossEntropyLoss(WEIGHT, ignore_index=2), SEQUENCE, TOKENS),
    "NLLLoss weighted": (nn.NLLLoss(WEIGHT), SCORES.log_softmax(1), CLASSES),
    "cross_entropy weighted": (partial(F.cross_entropy, weight=WEIGHT), SCORES, CLASSES),
    "nll_loss weighted": (
        partial(F.nll_loss, weight=WEIGHT, reduction="mean"),
        SEQUENCE.log_softmax(1),
        TOKENS,
    ),
    "NLLLoss": (nn.NLLLoss(), SCORES.log_softmax(1), CLASSES),
    "MSELoss": (nn.MSELoss(), SCORES, REALS),
    "MSELoss vector": (nn.MSELoss(), SCORES[:, 0], REALS[:, 0]),
    "MSELoss sum": (nn.MSELoss(reduction="sum"), SEQUENCE, SEQUENCE.flip(0)),
    "L1Loss": (nn.L1Loss(), SCORES, REALS),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.3), SCORES, REALS),
    "HuberLoss": (nn.HuberLoss(delta=0.3), SCORES, REALS),
    "BCELoss": (nn.BCELoss(weight=WEIGHT), CHANCES, BITS),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), SCORES, BITS),
    "BCEWithLogitsLoss column": (nn.BCEWithLogitsLoss(), SCORES[:, :1], BITS[:, :1]),
    "KLDivLoss": (nn.KLDivLoss(), SCORES.log_softmax(1), CHANCES),
    "KLDivLoss batchmean": (nn.KLDivLoss(reduction="batchmean"), SCORES.log_softmax(1), CHANCES),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), SCORES, CHANCES),
    "SoftMarginLoss": (nn.SoftMarginLoss(), SCORES, 2 * BITS - 1),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), SCORES, BITS),
    "MultiMarginLoss": (nn.MultiMarginLoss(), SCORES, CLASSES),
    "cross_entropy": (F.cross_entropy, SCORES, CLASSES),
    "cross_entropy sequence": (partial(F.cross_entropy, label_smoothing=0.1), SEQUENCE, TOKENS),
    "cross_entropy weighted sum": (
        partial(F.cross_entropy, weight=WEIGHT, reduction="sum"),
        SCORES,
        CLASSES,
    ),
    "mse_loss": (F.mse_loss, SCORES, REALS),
    "mse_loss sum": (partial(F.mse_loss, reduction="sum"), SCORES, REALS),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, SCORES, BITS),
    "kl_div batchmean": (partial(F.kl_div, reduction="batchmean"), SCORES.log_softmax(1), CHANCES),
}


def losses_of(criterion: Callable, outputs: Tensor, targets: Tensor) -> Tensor:
    objective, _ = hk.from_module(nn.Linear(1, 1), criterion)
    return objective.output_loss(outputs, (outputs, targets))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", CRITERIA)
def test_torch_losses_are_evaluated_per_example(name: str) -> None:
    criterion, outputs, targets = CRITERIA[name]
    objective, _ = hk.from_module(nn.Linear(1, 1), criterion)
    found = objective.output_loss(outputs, (outputs, targets))
    alone = [criterion(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    weight = torch.ones(len(outputs), dtype=torch.float64)
    if objective.example_weight is not None:
        weight = objective.example_weight((outputs, targets))
    kept = weight > 0
    assert torch.allclose((found / weight)[kept], torch.stack(alone)[kept], rtol=1e-13, atol=1e-15)
    assert not found[~kept].any()
    together = found.sum() if "sum" in name else found.sum() / weight.sum()
    assert torch.allclose(together, criterion(outputs, targets), rtol=1e-13)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(WEIGHT, reduction="none"),
        partial(F.cross_entropy, reduction="none", weight=WEIGHT),
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
    ],
)
def test_per_example_criteria_are_used_unchanged(criterion: Callable) -> None:
    assert torch.equal(losses_of(criterion, SCORES, CLASSES), criterion(SCORES, CLASSES))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shapes", [((6, 1), (6,)), ((6,), (6, 1)), ((1, 1), (1,)), ((6, 6, 6), (6, 6))])
@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), F.l1_loss, nn.SmoothL1Loss(reduction="sum"), nn.HuberLoss()]
)
def test_outputs_that_would_be_paired_with_all_targets_are_refused(
    criterion: Callable, shapes: tuple[tuple[int, ...], ...]
) -> None:
    outputs, targets = (torch.ones(shape) for shape in shapes)
    with pytest.raises(
        ValueError, match=r"criterion would pair each output with all targets: .*give both the same"
    ):
        losses_of(criterion, outputs, targets)


def test_switching_a_criterion_leaves_the_callers_own_as_it_was() -> None:
    criterion = nn.CrossEntropyLoss()
    losses_of(criterion, SCORES, CLASSES)
    assert criterion.reduction == "mean"
    assert criterion(SCORES, CLASSES).ndim == 0


def test_an_ignored_target_is_an_example_of_loss_zero() -> None:
    targets = torch.tensor([0, 1, -100, 2, 3, -100])
    found = losses_of(nn.CrossEntropyLoss(), SCORES, targets)
    assert found[[2, 5]].eq(0).all()
    assert torch.allclose(found.sum(), F.cross_entropy(SCORES, targets, reduction="sum"))


class OwnMean(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("criterion", [OwnMean(), lambda outputs, targets: F.cross_entropy(outputs, targets)])
def test_a_criterion_that_only_gives_a_mean_has_no_losses_of_examples(criterion: Callable) -> None:
    problem = network("mlp")
    objective, params = hk.from_module(problem.model, criterion)
    assert objective(params, problem.data).shape == ()
    H, expected = (hk.hessian(o, params, problem.data, batch_size=5) for o in (objective, problem.objective))
    v = torch.ones(H.n, dtype=torch.float64)
    assert relative_error(H @ v, expected @ v) < 1e-13
    with pytest.raises(ValueError, match="loss_fn returned a 0-d mean, which cannot be weighted by example"):
        hk.loss(objective, params, hk.as_data(problem.data).subset([0, 1], torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="loss_fn returned a 0-d mean, but a Fisher matrix is made of"):
        hk.empirical_fisher(objective, params, problem.data)


def test_a_criterion_with_one_loss_per_position_is_refused() -> None:
    positions = partial(F.cross_entropy, reduction="none")
    objective, params = hk.from_module(nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (4, 3))), positions)
    with pytest.raises(ValueError, match=r"loss_fn returned shape \[6, 3\] for a batch of 6 examples"):
        hk.loss(objective, params, (torch.ones(6, 2), TOKENS))


@pytest.mark.parametrize("criterion", ["cross_entropy", 3.0])
def test_a_criterion_that_cannot_be_called_is_refused(criterion: object) -> None:
    with pytest.raises(TypeError, match="criterion must be a function"):
        hk.from_module(nn.Linear(1, 1), criterion)


@pytest.mark.parametrize("model", [None, torch.tanh, nn.Linear])
def test_a_model_that_is_not_a_module_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        hk.from_module(model, cross_entropy)


def test_modules_without_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="model has no parameters to differentiate by: it has none"):
        hk.from_module(nn.Tanh(), cross_entropy)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"model has no parameters .* frozen \(pass include_frozen=True\)"):
        hk.from_module(frozen, cross_entropy)
    assert list(hk.from_module(frozen, cross_entropy, include_frozen=True)[1]) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="model: lazy parameter 'weight' has no shape yet"):
        hk.from_module(nn.LazyLinear(3), cross_entropy)


def test_an_unknown_batchnorm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="batchnorm must be one of 'eval', 'batch', got 'train'"):
        hk.from_module(nn.Linear(2, 2), cross_entropy, batchnorm="train")


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        outputs = torch.tanh(self.left(left)) + self.right(right)
        return outputs if scale is None else outputs * scale


def test_batches_may_hold_several_inputs_by_place_or_by_name() -> None:
    model = Several()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())
    left, right, scale = torch.randn(5, 3), torch.randn(5, 2), torch.rand(5, 1)
    targets = torch.tensor([0, 1, 1, 0, 1])
    expected = F.cross_entropy(model(left, right, scale), targets, reduction="none")
    named = {"right": right, "left": left, "scale": scale}
    for batch in (
        (left, right, scale, targets),
        [left, right, scale, targets],
        *({**named, key: targets} for key in ("targets", "target", "labels", "label")),
        UserDict(named, labels=targets),
    ):
        assert torch.equal(objective(params, batch), expected)
        assert torch.allclose(hk.loss(objective, params, [batch]), expected.mean())
        assert torch.equal(objective.forward(params, batch), model(left, right, scale))
        assert torch.equal(objective.output_loss(objective.forward(params, batch), batch), expected)
    without = F.cross_entropy(model(left, right), targets, reduction="none")
    assert torch.equal(objective(params, (left, right, targets)), without)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(4, 3),
        (torch.ones(4, 3),),
        {"x": torch.ones(4, 3)},
        {"x": torch.ones(4, 3), "label": torch.zeros(4), "labels": torch.zeros(4)},
    ],
)
def test_a_batch_without_one_target_is_refused(batch: object) -> None:
    objective, params = hk.from_module(nn.Linear(3, 2), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"data: a batch for from_module must be \(\*inputs, targets\), or"):
        hk.loss(objective, params, batch)


def test_an_objective_of_two_functions_has_the_hessian_of_their_composition() -> None:
    def forward(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return torch.tanh(batch["x"] @ params["w"])

    def output_loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["y"]) ** 2

    def composed(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return output_loss(forward(params, batch), batch)

    objective = hk.Objective(forward, output_loss)
    params = {"w": REALS[0, :3]}
    data = {"x": SEQUENCE[:, 0], "y": REALS[:, 0]}
    oracle = hessian_by_double_backward(composed, params, data)
    H = hk.hessian(objective, params, data, batch_size=4)
    assert relative_error(H @ torch.eye(3, dtype=torch.float64), oracle) < 1e-13


def distributed(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def never(graph: object, inputs: object) -> Callable:
    raise AssertionError(f"a compiled module was called: {graph}, {inputs}")


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend=never)


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend=never)
    return module


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled,
        compiled_in_place,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(compiled(model)),
    ],
)
def test_wrapped_modules_are_unwrapped(wrap: Callable) -> None:
    problem = network("mlp")
    objective, params = hk.from_module(wrap(network("mlp").model), cross_entropy)
    assert list(params) == list(problem.params)
    assert torch.equal(objective(params, problem.data), problem.objective(params, problem.data))


def test_compiled_submodules_are_unwrapped() -> None:
    problem = network("mlp")
    model = nn.Sequential(compiled(problem.model[0]), problem.model[1], nn.DataParallel(problem.model[2]))
    objective, params = hk.from_module(model, cross_entropy)
    assert list(params) == list(problem.params)
    assert torch.equal(objective(params, problem.data), problem.objective(params, problem.data))
    assert type(model[0]) is not nn.Linear
    assert type(model[2]) is nn.DataParallel


@pytest.fixture
def _one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        distributed,
        lambda model: compiled(distributed(model)),
        lambda model: distributed(nn.Sequential(compiled(model[0]), *model[1:])),
        lambda model: nn.Sequential(
            model[0], nn.Sequential(distributed(nn.Sequential(compiled(model[1]), model[2])))
        ),
    ],
)
def test_distributed_modules_are_unwrapped_at_any_depth(wrap: Callable) -> None:
    problem = network("mlp")
    model = wrap(network("mlp").model)
    kinds = [type(module) for module in model.modules()]
    objective, params = hk.from_module(model, cross_entropy)
    assert len(params) == len(problem.params)
    assert not any("module" in name or "_orig_mod" in name for name in params)
    H, expected = (hk.hessian(o, p, problem.data) for o, p in ((objective, params), problem_of(problem)))
    v = torch.ones(H.n, dtype=torch.float64)
    assert torch.equal(H @ v, expected @ v)
    assert [type(module) for module in model.modules()] == kinds


def problem_of(problem: Problem) -> tuple[hk.Objective, dict[str, Tensor]]:
    return problem.objective, problem.params


@pytest.mark.parametrize("dropout", [None, 0])
def test_an_objective_does_not_keep_the_modules_tensors(dropout: int | None) -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Dropout(), nn.Linear(6, 3)
    ).double()
    kept = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    objective, params = hk.from_module(model, cross_entropy, dropout=dropout)
    before = objective(params, (X3, Y3))
    del model
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)
    assert torch.equal(objective(params, (X3, Y3)), before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_not_moved(kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind(2, 3, batch_first=True).double()
    objective, params = hk.from_module(model, lambda outputs, _: outputs[0].square().sum((1, 2)))
    monkeypatch.setattr(kind, "flatten_parameters", None)
    x = SEQUENCE[:, :, :2]
    oracle = hessian_by_double_backward(objective, params, (x, CLASSES))
    H = hk.hessian(objective, params, (x, CLASSES))
    assert relative_error(H @ torch.ones(H.n).double(), oracle.sum(1)) < 1e-13


def test_a_criterion_with_parameters_is_refused_unless_they_are_frozen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.scale * cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match=r"criterion has parameters of its own, .*requires_grad_\(False\)"):
        hk.from_module(nn.Linear(2, 3), Scaled())
    objective, params = hk.from_module(nn.Linear(4, 3).double(), Scaled().requires_grad_(False))
    plain, _ = hk.from_module(nn.Linear(4, 3).double(), cross_entropy)
    batch = network("mlp").data
    assert torch.allclose(objective(params, batch), 2 * plain(params, batch), rtol=1e-14)


def test_modules_that_keep_what_they_computed_are_copied() -> None:
    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            self.history = [self.last]
            return self.last

    model = Remembers(3, 2)
    outputs = model(torch.ones(4, 3))
    objective, params = hk.from_module(model, cross_entropy)
    batch = (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    assert torch.equal(objective(params, batch), cross_entropy(outputs, batch[1]))
    assert model.last is outputs


class Counts(nn.Module):
    """Writes to its buffers in every call, and puts out what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("moving", torch.zeros(3))
        self.limits = torch.ones(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        outputs = torch.tanh(self.linear(x)) * self.limits
        self.moving.mul_(0.5).add_(outputs.detach().mean(0))
        return outputs * self.calls + self.moving


@pytest.mark.parametrize("mode", MODES)
def test_buffer_writes_are_discarded(mode: str) -> None:
    model, data = Counts().double(), network("mlp").data
    objective, params = hk.from_module(model, cross_entropy)
    expected = cross_entropy(copy.deepcopy(model)(data[0]), data[1])
    H = hk.hessian(objective, params, data, mode=mode)
    v = torch.ones(H.n, dtype=torch.float64)
    products = [H @ v for _ in range(2)]
    assert torch.equal(*products)
    assert torch.equal(objective(params, data), expected)
    model.limits.zero_()
    assert torch.equal(H @ v, products[0])
    assert int(model.calls) == 0


def regularised() -> nn.Module:
    layers = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, 3)
    model = nn.Sequential(*layers).double()
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    return model


X3 = torch.randn(7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y3 = torch.tensor([0, 1, 2, 2, 1, 0, 1])


@pytest.mark.parametrize("training", [False, True])
def test_eval_batchnorm_uses_running_statistics_in_any_module_mode(training: bool) -> None:
    model = regularised().train(training)
    objective, params = hk.from_module(model, cross_entropy)
    assert objective.batchnorm == "eval"
    expected = cross_entropy(copy.deepcopy(model).eval()(X3), Y3)
    assert torch.equal(objective(params, (X3, Y3)), expected)
    assert torch.allclose(hk.loss(objective, params, hk.as_data((X3, Y3), batch_size=1)), expected.mean())


@pytest.mark.parametrize("training", [False, True])
def test_batch_batchnorm_equals_a_training_pass_and_keeps_running_statistics(training: bool) -> None:
    model = regularised().train(training)
    objective, params = hk.from_module(model, cross_entropy, batchnorm="batch")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = copy.deepcopy(model).train()
    trained[3].eval()
    assert objective.batchnorm == "batch"
    assert torch.equal(objective(params, (X3, Y3)), cross_entropy(trained(X3), Y3))
    for mode in MODES:
        H = hk.hessian(objective, params, (X3, Y3), mode=mode)
        assert torch.isfinite(H @ torch.ones(H.n, dtype=torch.float64)).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert len(before) == 3


@pytest.mark.parametrize("mode", MODES)
def test_batch_batchnorm_has_the_hessian_of_the_mean_over_batches(mode: str) -> None:
    model = regularised()
    objective, params = hk.from_module(model, cross_entropy, batchnorm="batch")
    trained = copy.deepcopy(model).train()
    trained[3].eval()

    def loss_fn(p: dict[str, Tensor], parts: list[slice]) -> Tensor:
        outputs = [torch.func.functional_call(trained, p, (X3[part],)) for part in parts]
        return cross_entropy(torch.cat(outputs), Y3)

    oracle = hessian_by_double_backward(loss_fn, params, [slice(0, 4), slice(4, 7)])
    H = hk.hessian(objective, params, (X3, Y3), batch_size=4, mode=mode)
    v = torch.randn(H.n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(H @ v, oracle @ v) < (1e-7 if mode == "finite-difference" else 1e-12)


def test_a_batch_of_one_has_no_statistics() -> None:
    objective, params = hk.from_module(regularised(), cross_entropy, batchnorm="batch")
    one = (X3[:1], Y3[:1])
    reason = 'batchnorm="batch" needs at least two examples in each batch, and data has a batch of one'
    with pytest.raises(ValueError, match=reason):
        objective(params, one)
    with pytest.raises(ValueError, match=reason):
        hk.hessian(objective, params, one)
    with pytest.raises(ValueError, match=reason):
        hk.loss(objective, params, hk.as_data((X3, Y3), batch_size=3))


def test_a_batchnorm_without_running_statistics_has_no_eval_form() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r'batchnorm="eval" needs running statistics, and model has .*'):
        hk.from_module(model, cross_entropy)
    objective, params = hk.from_module(model, cross_entropy, batchnorm="batch")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    assert torch.equal(objective(params, (x, y)), cross_entropy(model(x), y))


def test_batch_statistics_of_several_processes_are_refused() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(regularised())
    with pytest.raises(
        ValueError, match=r'batchnorm="batch" goes by .* one process, and model has a SyncBatchNorm'
    ):
        hk.from_module(model, cross_entropy, batchnorm="batch")
    objective, params = hk.from_module(model, cross_entropy)
    assert torch.equal(objective(params, (X3, Y3)), cross_entropy(copy.deepcopy(model).eval()(X3), Y3))


def test_under_batch_statistics_batches_are_fixed_and_the_operator_says_so() -> None:
    objective, params = hk.from_module(regularised(), cross_entropy, batchnorm="batch")
    data = hk.as_data((X3, Y3), batch_size=4)
    for wrt in (None, "0.*"):
        H = hk.hessian(objective, params, data, wrt=wrt)
        assert H.sample is None
        assert (2.0 * H.shift(1.0)).sample is None
        assert "Hessian of fixed batches" in repr(H)
    weighted = data.subset([0, 1, 2, 5], torch.ones(4))
    with pytest.raises(ValueError, match=r'batchnorm="batch" makes the loss .* examples cannot be weighted'):
        hk.hessian(objective, params, weighted)
    plain, _ = hk.from_module(regularised(), cross_entropy)
    assert hk.hessian(plain, params, data).sample is not None


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_later_training_does_not_change_an_objective(batchnorm: str) -> None:
    model = regularised()
    objective, params = hk.from_module(model, cross_entropy, batchnorm=batchnorm)
    before = objective(params, (X3, Y3)).clone()
    model.train()(X3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2).add_(1)
    model.requires_grad_(False)
    assert torch.equal(objective(params, (X3, Y3)), before)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (
            lambda p: {name: p[name] for name in p if name != "0.weight"},
            ValueError,
            "params lacks '0.weight' .*wrt=",
        ),
        (
            lambda p: {f"module.{name}": p[name] for name in p},
            ValueError,
            "params lacks '0.bias', '0.weight', ",
        ),
        (
            lambda p: p | {"1.running_mean": torch.ones(4)},
            ValueError,
            "params has '1.running_mean', no parameter",
        ),
        (
            lambda p: p | {"0.bias": torch.ones(3)},
            ValueError,
            r"params\['0.bias'\] has shape \[3\], expected \[4\]",
        ),
        (lambda p: list(p.values()), TypeError, "params must be a dict .* got list"),
    ],
)
def test_other_parameters_than_those_of_the_network_are_refused(
    change: Callable, error: type[Exception], reason: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())
    data = torch.randn(6, 3), torch.arange(6) % 2
    for ask in (hk.Objective.__call__, hk.loss, hk.grad, hk.hessian):
        with pytest.raises(error, match=reason):
            ask(objective, change(params), data)
    assert hk.hessian(objective, dict(model.named_parameters()), data).n == 34  # frozen ones as variables


def test_an_objective_accepts_parameters_of_a_later_training_step() -> None:
    model = network("mlp").model
    objective, _ = hk.from_module(model, cross_entropy)
    data = network("mlp").data
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(
        objective(dict(model.named_parameters()), data), cross_entropy(model(data[0]), data[1])
    )


TOKENS5 = torch.tensor([[0, 3, 1], [2, 0, 0], [1, 1, 3], [3, 2, 0], [2, 2, 1]])


def padded(tied: bool) -> nn.Module:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3, padding_idx=0, sparse=False)
            self.head = nn.Linear(3, 4)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(tokens)).mean(1))

    return Padded().double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_padding_row_is_a_constant_of_the_embedding(mode: str, tied: bool) -> None:
    model, y = padded(tied), torch.tensor([0, 1, 2, 3, 1])
    objective, params = hk.from_module(model, cross_entropy)

    def loss_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, p, (batch[0],)), batch[1])

    assert torch.equal(objective(params, (TOKENS5, y)), loss_fn(params, (TOKENS5, y)))
    oracle = hessian_by_double_backward(loss_fn, params, (TOKENS5, y))
    H = hk.hessian(objective, params, (TOKENS5, y), mode=mode)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert relative_error(dense, oracle) < (1e-8 if mode == "finite-difference" else 1e-13)
    assert relative_error(dense, dense.mT) < (1e-8 if mode == "finite-difference" else 1e-14)
    assert bool(dense[:3].any()) == tied


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_has_exact_products(mode: str, dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    parametrizations.weight_norm(model[0], dim=dim)
    objective, params = hk.from_module(model, cross_entropy)
    with torch.no_grad():
        params = {name: p + 0.1 for name, p in params.items()}
    g, v = (params[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
    axes = {0: (1,), 1: (0,), None: (0, 1)}[dim]
    assert g.numel() < v.numel() == 12

    def loss_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        g, v = (p[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
        weight = g * v / v.square().sum(axes, keepdim=True).sqrt()
        hidden = torch.tanh(F.linear(batch[0], weight, p["0.bias"]))
        return cross_entropy(F.linear(hidden, p["2.weight"], p["2.bias"]), batch[1])

    batch = network("mlp").data
    assert torch.allclose(objective(params, batch), loss_fn(params, batch), rtol=1e-13)
    oracle = hessian_by_double_backward(loss_fn, params, batch)
    H = hk.hessian(objective, params, batch, mode=mode)
    dense = H @ torch.eye(H.n, dtype=torch.float64)
    assert relative_error(dense, oracle) < (1e-7 if mode == "finite-difference" else 1e-12)


def test_spectral_normalisation_keeps_its_vectors() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))).double().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objective, params = hk.from_module(model, cross_entropy)
    data = network("mlp").data
    expected = cross_entropy(copy.deepcopy(model).eval()(data[0]), data[1])
    for _ in range(2):
        assert torch.equal(objective(params, data), expected)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
