from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import hvpkit as hk
from oracles import relative_error
from problems import network


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts what is compiled; without making machine code of it, which takes long."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def vectors(H: hk.LinearOperator, k: int = 2) -> Tensor:
    return torch.randn(H.n, k, dtype=H.dtype, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "conv_layernorm", "encoder_layer", "tied_weights"])
def test_compiled_products_are_those_of_no_compiler(name: str, compiler: CompileCounterWithBackend) -> None:
    problem = network(name)
    H, reference = (
        hk.hessian(problem.objective, problem.params, problem.data, batch_size=5, compile=compile)
        for compile in (True, False)
    )
    assert H.mode_reason == "forward-over-reverse: compiled"
    assert relative_error(H @ vectors(H), reference @ vectors(H)) < 1e-10
    sample, other = H.sample(7, 0), reference.sample(7, 0)
    assert relative_error(sample @ vectors(H), other @ vectors(H)) < 1e-10
    assert compiler.frame_count == 1


def test_one_compilation_serves_ragged_batches_samples_and_other_parameters(
    compiler: CompileCounterWithBackend,
) -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=5, compile=True)
    H @ vectors(H, 1)
    H @ vectors(H, 3)
    for part in (H.sample(11, 0), H.coarsen(7), H.coarsen(12).coarsen(6)):
        part @ vectors(H)
    moved = {name: 1.1 * leaf for name, leaf in problem.params.items()}
    again = hk.hessian(problem.objective, moved, problem.data, batch_size=5, compile=True)
    expected = hk.hessian(problem.objective, moved, problem.data) @ vectors(H)
    assert relative_error(again @ vectors(H), expected) < 1e-10
    assert compiler.frame_count == 1


def test_more_functions_than_torch_recompiles_for_are_compiled(compiler: CompileCounterWithBackend) -> None:
    problem = network("mlp")
    for power in range(1, 11):

        def loss_fn(params: Any, batch: Any, power: int = power) -> Tensor:
            return problem.objective(params, batch) ** power

        H = hk.hessian(loss_fn, problem.params, problem.data, compile=True)
        expected = hk.hessian(loss_fn, problem.params, problem.data) @ vectors(H)
        assert relative_error(H @ vectors(H), expected) < 1e-10
    assert compiler.frame_count == 10


def test_a_mean_loss_is_compiled_too(compiler: CompileCounterWithBackend) -> None:
    problem = network("mlp")

    def mean_loss(params: Any, batch: Any) -> Tensor:
        return problem.objective(params, batch).mean()

    H = hk.hessian(mean_loss, problem.params, problem.data, batch_size=5, compile=True)
    expected = hk.hessian(problem.objective, problem.params, problem.data) @ vectors(H)
    assert relative_error(H @ vectors(H), expected) < 1e-10
    assert compiler.frame_count == 1


def test_what_cannot_be_compiled_is_multiplied_without_and_said(compiler: CompileCounterWithBackend) -> None:  # noqa: ARG001
    problem = network("mlp")

    def loss_fn(params: Any, batch: Any) -> Tensor:
        torch._dynamo.graph_break()
        return problem.objective(params, batch)

    with pytest.warns(hk.CompileWarning, match="torch could not compile the product .* are made without it"):
        H = hk.hessian(loss_fn, problem.params, problem.data, compile=True)
    expected = hk.hessian(problem.objective, problem.params, problem.data)
    assert H.mode == expected.mode
    assert relative_error(H @ vectors(H), expected @ vectors(H)) < 1e-10


def test_a_compiler_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = network("mlp")

    def off(function: Callable[..., list[Tensor]], **_: Any) -> Callable[..., list[Tensor]]:
        return lambda *args: [1.001 * leaf for leaf in function(*args)]

    monkeypatch.setattr(torch, "compile", off)
    with pytest.warns(hk.CompileWarning, match="the compiled product is off by 1e-03"):
        H = hk.hessian(problem.objective, problem.params, problem.data, compile=True)
    expected = hk.hessian(problem.objective, problem.params, problem.data) @ vectors(H)
    assert relative_error(H @ vectors(H), expected) < 1e-10


def test_compiled_products_have_one_mode() -> None:
    problem = network("mlp")
    with pytest.raises(ValueError, match="compile=True makes products forward-over-reverse; leave mode="):
        hk.hessian(problem.objective, problem.params, problem.data, mode="reverse-over-reverse", compile=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own compiler uses it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by g++")
def test_machine_code_gives_both_ends() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data, compile=True)
    ex = hk.extreme_eigenvalues(H, tol=1e-6)
    expected = hk.extreme_eigenvalues(hk.hessian(problem.objective, problem.params, problem.data), tol=1e-6)
    assert H.mode_reason == "forward-over-reverse: compiled"
    assert ex.largest.value == pytest.approx(expected.largest.value, rel=2e-6)
    assert ex.smallest.value == pytest.approx(expected.smallest.value, rel=2e-6)
