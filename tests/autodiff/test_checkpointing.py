from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import (
    CheckpointFunction,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import hvpkit as hk
from hvpkit.autodiff.checkpointing import without_checkpointing
from oracles import (
    ggn_by_differences,
    gradient_at,
    hessian_by_differences,
    hessian_by_double_backward,
    relative_error,
    scalar_loss,
    second_moment,
)
from problems import cross_entropy, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {mode: 1e-8 for mode in MODES[:2]} | {"finite-difference": 1e-7}
HALF = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])

CHECKPOINTS: dict[str, Callable] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "reentrant, other random numbers": partial(checkpoint, use_reentrant=True, preserve_rng_state=False),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "debugged": partial(checkpoint, use_reentrant=False, debug=True),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=HALF),
    "of the class": lambda block, x: CheckpointFunction.apply(block, True, x),
    "sequential, reentrant": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "nested": lambda block, x: checkpoint(
        partial(checkpoint, block, use_reentrant=True), x, use_reentrant=False
    ),
}


class Checkpointed(nn.Sequential):
    """Two blocks, the first of which has no input with a derivative."""

    def __init__(self, call: Callable) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5)),
            nn.Sequential(nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)),
        )
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.call(block, x)
        return x


def problem_with(call: Callable) -> tuple[hk.Objective, dict[str, Tensor], tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Checkpointed(call).double()
    return *hk.from_module(model, cross_entropy), network("mlp").data


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


OBJECTIVE, PARAMS, DATA = problem_with(plain)
HESSIAN = hessian_by_double_backward(OBJECTIVE, PARAMS, DATA)
GGN = ggn_by_differences(OBJECTIVE.forward, OBJECTIVE.output_loss, PARAMS, DATA)
V = torch.randn(len(HESSIAN), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_oracles_agree() -> None:
    assert relative_error(HESSIAN, hessian_by_differences(OBJECTIVE, PARAMS, DATA)) < 1e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_a_plain_call(name: str, mode: str) -> None:
    objective, params, data = problem_with(CHECKPOINTS[name])
    H = hk.hessian(objective, params, data, mode=mode, batch_size=5)
    assert relative_error(H @ V, HESSIAN @ V) < TOLERANCE[mode]
    G = hk.ggn(objective, params, data, mode=mode, batch_size=5)
    assert relative_error(G @ V, GGN @ V) < 1e-7
    v = H.unflatten(V[:, 0])
    assert (
        relative_error(H.flatten(hk.hvp(objective, params, data, v, mode=mode)), HESSIAN @ V[:, 0])
        < TOLERANCE[mode]
    )
    assert relative_error(H.flatten(hk.ggnvp(objective, params, data, v, mode=mode)), GGN @ V[:, 0]) < 1e-7


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_first_derivatives_forms_and_fisher_matrices_are_right_too(name: str) -> None:
    objective, params, data = problem_with(CHECKPOINTS[name])
    F_ = hk.empirical_fisher(objective, params, data, batch_size=5)
    assert relative_error(F_ @ V, second_moment(OBJECTIVE, PARAMS, DATA) @ V) < 1e-12
    expected = hk.fisher(OBJECTIVE, PARAMS, DATA, seed=1) @ V
    assert relative_error(hk.fisher(objective, params, data, seed=1) @ V, expected) < 1e-12
    point = F_.flatten(params)
    slope = gradient_at(scalar_loss(OBJECTIVE, PARAMS, DATA), point)
    assert relative_error(F_.flatten(hk.grad(objective, params, data)), slope) < 1e-12
    assert relative_error(hk.loss(objective, params, data), OBJECTIVE(PARAMS, DATA).mean()) < 1e-14
    along = hk.quadratic_form(objective, params, data, F_.unflatten(V[:, 0]))
    assert relative_error(along.mean(), V[:, 0] @ HESSIAN @ V[:, 0]) < 1e-10


def test_the_preflight_passes_on_right_products() -> None:
    objective, params, data = problem_with(CHECKPOINTS["reentrant"])
    H = hk.hessian(objective, params, data)
    assert hk.check(H).ok
    assert float((H @ V)[:20].abs().sum()) > 0.1  # the first layer, once zero


def test_composable_checkpoints_are_plain_calls() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Checkpointed(plain).double()
    for block in model:
        composable_checkpoint(block)

    def losses(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1])

    for mode in MODES:
        H = hk.hessian(losses, PARAMS, DATA, mode=mode)
        assert relative_error(H @ V, HESSIAN @ V) < TOLERANCE[mode]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_networks_of_transformers_with_gradient_checkpointing(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 7, "n_positions": 6, "n_embd": 4, "n_layer": 2, "n_head": 2}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **off, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().train()
    params = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(0))

    def losses(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, params, (tokens,)).logits
        return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)

    v = {name: torch.ones_like(p) for name, p in params.items()}
    expected = hk.hvp(losses, params, tokens, v)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for mode in MODES:
        found = hk.hvp(losses, params, tokens, v, mode=mode)
        for name, leaf in expected.items():
            scale = float(torch.stack([torch.linalg.vector_norm(e) for e in expected.values()]).norm())
            assert float(torch.linalg.vector_norm(found[name] - leaf)) < TOLERANCE[mode] * scale, name


def internals() -> tuple[object, ...]:
    return (
        "apply" in vars(CheckpointFunction),
        torch_checkpoint._checkpoint_without_reentrant_generator,
        torch_checkpoint._checkpoint_hook,
    )


def test_torchs_own_checkpoints_are_restored() -> None:
    before = internals()
    with without_checkpointing(), without_checkpointing():
        pass
    assert internals() == before
    with pytest.raises(KeyError), without_checkpointing():
        raise KeyError
    assert internals() == before
    objective, params, data = problem_with(CHECKPOINTS["nested"])
    H = hk.hessian(objective, params, data)
    calls = []

    def watched(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin().cos()

    for reentrant in (True, False):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        value = checkpoint(watched, x, use_reentrant=reentrant).sum()
        H @ V[:, 0]  # between a checkpoint and its recomputation
        calls.clear()
        value.backward()
        assert calls, "it recomputes again"
        assert relative_error(x.grad, (-x.sin().sin() * x.cos()).detach()) < 1e-14
    assert internals() == before


def test_threads_get_the_same_products() -> None:
    objective, params, data = problem_with(CHECKPOINTS["reentrant"])
    H, before = hk.hessian(objective, params, data), internals()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda column: H @ V[:, column], [0, 1, 2] * 4))
    assert internals() == before
    assert relative_error(torch.stack(found[:3], dim=1), HESSIAN @ V) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_other_hooks_on_saved_tensors_are_refused(mode: str) -> None:
    def offloaded(p: Tensor, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return (x @ p).exp()

    p = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="hooks"):
        hk.hvp(offloaded, p, torch.ones(3, 2).double(), p, mode=mode)
