"""The caller's world is the same after as before, and has no say in what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from problems import cross_entropy, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


class Everything(nn.Module):
    """Layers that keep state, drop at random, or take a fast path in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(2, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.idle = nn.Linear(2, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(self.norm(self.embed(x)).mT)
        self.last = hidden
        return self.head(self.drop(hidden.mean(1)))


def world(dtype: torch.dtype, training: bool) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Everything().to(dtype)
        x, y = torch.randn(11, 2, 5, dtype=dtype), torch.randint(0, 3, (11,))
        model(x).sum().backward()
        v = torch.randn(sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=dtype)
    model.train(training)
    model.norm.train(not training)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=generator)
    return {"model": model, "x": x, "y": y, "v": v, "generator": generator, "loader": loader}


def settings() -> dict[str, object]:
    sdp, (_, words, *rest) = torch.backends.cuda, np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (words.tolist(), rest),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "sdp": (
            sdp.math_sdp_enabled(),
            sdp.flash_sdp_enabled(),
            sdp.mem_efficient_sdp_enabled(),
            sdp.cudnn_sdp_enabled(),
        ),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def snapshot(things: dict) -> dict[str, object]:
    """All that can be seen of the caller's things, as plain values."""
    model = things["model"]
    tensors = {
        **{f"parameter {name}": p for name, p in model.named_parameters()},
        **{f"grad {name}": p.grad for name, p in model.named_parameters()},
        **{f"buffer {name}": b for name, b in model.named_buffers()},
        **{key: things[key] for key in ("x", "y", "v")},
        "last": model.last,
    }
    seen: dict[str, object] = {
        name: None if t is None else (t.tolist(), t.data_ptr(), t._version, t.requires_grad, t.is_leaf)
        for name, t in tensors.items()
    }
    seen["training"] = {name: module.training for name, module in model.named_modules()}
    seen["identity"] = [id(p) for p in model.parameters()]
    seen["attributes"] = {name: sorted(vars(module)) for name, module in model.named_modules()}
    seen["hooks"] = [len(module._forward_pre_hooks) for module in model.modules()]
    seen["generator"] = things["generator"].get_state().tolist()
    return seen | settings()


def use_everything(things: dict, data: object, mode: str) -> list[Tensor]:
    """One of everything; its results."""
    objective, params = hk.from_module(things["model"], cross_entropy)
    H = hk.hessian(objective, params, data, mode=mode)
    product = H @ things["v"]
    results = [
        product,
        H @ torch.stack([things["v"], product], dim=1),
        H.flatten(hk.hvp(objective, params, (things["x"], things["y"]), H.unflatten(things["v"]), mode=mode)),
        H.flatten(hk.grad(objective, params, data)),
        hk.loss(objective, params, data),
        hk.hessian(objective, params, data, mode=mode, wrt="head.*") @ torch.ones_like(things["v"][:12]),
        hk.grad(objective, params, hk.as_data(data).subset([2, 3, 3], torch.ones(3)))["head.weight"],
        (2.0 * (H + H.shift(1.0))) @ things["v"],
    ]
    if mode != "finite-difference":  # whose asymmetry in float32 solvers refuse
        found = hk.lanczos(H, 2, which="BE", max_matvecs=5, seed=1)
        ends = hk.extreme_eigenvalues(H, max_matvecs=5)
        results += [found.values, found.vectors, found.residual_norms, ends.largest.vector]
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("source", ["tensors", "loader"])
def test_everything_of_the_callers_is_as_it_was(mode: str, training: bool, source: str) -> None:
    things = world(torch.float64, training)
    data = (things["x"], things["y"]) if source == "tensors" else things["loader"]
    before = snapshot(things)
    results = use_everything(things, data, mode)
    after = snapshot(things)
    assert {name for name in before if before[name] != after[name]} == set()
    assert list(before) == list(after)
    assert not any(result.requires_grad for result in results)


def test_the_comparison_sees_what_it_is_meant_to() -> None:
    things = world(torch.float32, True)
    before = snapshot(things)
    things["model"](things["x"]).sum().backward()
    list(things["loader"])
    np.random.rand()
    random.random()
    with torch.no_grad(), torch.autocast("cpu"):
        after = snapshot(things)
    changed = {name for name in before if before[name] != after[name]}
    expected = {"torch", "numpy", "random", "generator", "grad", "autocast", "last", "grad head.weight"}
    assert changed >= expected
    assert "parameter head.weight" not in changed
    assert "grad idle.weight" not in changed


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_errors_leave_everything_as_it_was_too(batchnorm: str) -> None:
    things = world(torch.float64, True)
    objective, params = hk.from_module(things["model"], cross_entropy, batchnorm=batchnorm)
    things["x"][7] = float("nan")
    before = snapshot(things)
    H = hk.hessian(objective, params, hk.as_data((things["x"], things["y"]), batch_size=4))
    for mode in MODES:
        with pytest.raises(ValueError, match="v must have shape"):
            H @ things["v"][1:]
        with pytest.raises(hk.NonFiniteError, match="batch 1"):
            hk.hessian(objective, params, (things["x"], things["y"]), mode=mode, batch_size=4) @ things["v"]
    with pytest.raises(hk.NonFiniteError):
        hk.loss(objective, params, things["loader"])
    with pytest.raises(hk.NonFiniteError):
        hk.grad(objective, params, things["loader"])
    after = snapshot(things)
    # NaN is unlike itself
    assert {name for name in before if before[name] != after[name]} <= {"x"}


CONTEXTS: dict[str, Callable] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "other default dtype": lambda: default_dtype(torch.float16),
}


@cache
def without_context(dtype: torch.dtype, mode: str) -> list[Tensor]:
    things = world(dtype, True)
    return use_everything(things, things["loader"], mode)


@pytest.mark.parametrize("mode", MODES)
def test_losses_run_where_second_derivatives_exist_in_full_precision(mode: str) -> None:
    seen = []

    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        now = settings()
        fused = torch.overrides.has_torch_function((x,))  # torch's layers take their fused path without
        seen.append((fused, now["inference"], now["autocast"][0]))
        elsewhere.append(pool.submit(settings).result())
        return (x @ p) ** 2

    p, x = torch.ones(2), torch.ones(4, 2)
    outside, elsewhere = settings(), []
    with ThreadPoolExecutor(1) as pool, torch.autocast("cpu"), torch.inference_mode():
        hk.hvp(loss_fn, p, x, p, mode=mode)
        hk.hessian(loss_fn, p, x, mode=mode) @ p
        hk.grad(loss_fn, p, x)
        hk.loss(loss_fn, p, x)
    assert set(seen) == {(True, False, False)}
    assert elsewhere
    assert all(found == outside for found in elsewhere)


def test_threads_get_the_same_bits_and_leave_the_settings_alone() -> None:
    problem = network("attention")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    v = torch.ones(H.n, dtype=torch.float64)
    expected, before = H @ v, settings()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: H @ v, range(24)))
    assert settings() == before
    assert all(torch.equal(product, expected) for product in found)


class default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_modes_have_no_say(context: str, dtype: torch.dtype, mode: str) -> None:
    things = world(dtype, True)
    expected = without_context(dtype, mode)
    with CONTEXTS[context]():
        before = settings()
        found = use_everything(things, things["loader"], mode)
        assert settings() == before
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_made_in_inference_mode_are_as_good_as_others(mode: str) -> None:
    things = world(torch.float64, False)
    objective, params = hk.from_module(things["model"], cross_entropy)
    v = {name: torch.ones_like(p) for name, p in params.items()}
    batch = (things["x"], things["y"])
    expected = hk.hvp(objective, params, batch, v, mode=mode)
    with torch.inference_mode():
        copies = [{name: leaf.clone() for name, leaf in tree.items()} for tree in (params, v)]
        batch = tuple(leaf.clone() for leaf in batch)
    for context in (nullcontext, torch.inference_mode):
        with context():
            found = hk.hvp(objective, copies[0], batch, copies[1], mode=mode)
            H = hk.hessian(objective, copies[0], hk.as_data(batch, batch_size=100), mode=mode)
            again = H @ copies[1]
            sample = H.coarsen(3)
            assert sample.num_examples == 3
        for name, leaf in expected.items():
            assert torch.equal(found[name], leaf)
            assert torch.equal(again[name], leaf)


@pytest.mark.parametrize("training", [False, True])
def test_train_and_eval_have_no_say(training: bool) -> None:
    worlds = [world(torch.float64, mode) for mode in (training, not training)]
    results = [use_everything(things, (things["x"], things["y"]), MODES[1]) for things in worlds]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_runs_repeat_bitwise_whatever_the_global_seeds() -> None:
    runs = []
    for seed in (0, 1):
        things = world(torch.float64, True)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            runs.append(use_everything(things, things["loader"], MODES[1]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Centred(nn.Module):
    """A network that works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 1.0
        return self.linear(x)


@pytest.mark.parametrize("form", ["tensors", "list", "loader"])
@pytest.mark.parametrize("first", [Centred(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))])
def test_losses_that_write_to_their_batch_are_refused_before_they_write_to_data(
    first: nn.Module, form: str
) -> None:
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    before = x.clone()
    data = {"tensors": (x, y), "list": [(x, y)], "loader": DataLoader(TensorDataset(x, y), 5)}[form]
    objective, params = hk.from_module(first, cross_entropy)
    for ask in (hk.hessian, hk.ggn, hk.fisher, hk.empirical_fisher, hk.train.keskar_sharpness):
        with pytest.raises(ValueError, match=r"loss_fn writes to its batch in place .*as x\.clone\(\)"):
            ask(objective, params, data)
        assert torch.equal(x, before)
    for ask in (hk.grad, hk.loss):
        with pytest.raises(ValueError, match="loss_fn writes to its batch in place"):
            ask(objective, params, data)


def test_nothing_of_hvpkit_lies_on_another_default_device() -> None:
    """As after torch.set_default_device("cuda"); what is made on "meta" by mistake has no values."""
    objective, params = hk.from_module(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), cross_entropy
    )
    data, ones = (torch.randn(40, 4), torch.arange(40) % 3), torch.ones(43)

    def answers() -> list[float]:
        H, G = (make(objective, params, data, batch_size=16) for make in (hk.hessian, hk.ggn))
        found = [
            *hk.extreme_eigenvalues(H).to_frame()["value"],
            hk.multifidelity([H.coarsen(20), H], 1).values.sum(),
            hk.top_eigenvalues(H, 2).values.sum(),
            hk.lobpcg(H).values.sum(),
            hk.chebyshev(H).values.sum(),
            hk.eigsh(H).values.sum(),
            hk.follow_top(H, 1)[0].values.sum(),
            hk.trace(H).interval(0.9)[0],
            hk.logdet(G, damping=1.0).value,
            hk.spectral_density(H, num_steps=9, num_probes=2).cdf(0.1),
            hk.diagonal(H).value.sum(),
            hk.solve(G, ones, damping=1.0).x.sum(),
            (hk.inverse(G, damping=1.0) @ ones).sum(),
            hk.matrix_function(H, torch.exp, ones).x.sum(),
            hk.loss(objective, params, data),
            hk.train.keskar_sharpness(objective, params, [data], max_steps=2).value,
            hk.train.absa(objective, params, data, hk.train.absa_init(8, 0.1), num_epochs=1)
            .history[0]
            .eigenvalue,
            hk.blocks(objective, params, data)["0"].extremes.largest.value,
        ]
        assert hk.check(H).ok
        assert hk.plan(H).tasks
        return [float(value) for value in found]

    expected = answers()
    with torch.device("meta"):
        assert answers() == pytest.approx(expected, rel=1e-4)  # modes are chosen by time
