"""Preconditioned curvature against dense matrices, and the formulas against the steps that torch.optim takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

import hvpkit as hk
from hvpkit.curvature.optimizer_scale import optimizer_scale
from oracles import ggn_by_jacobian, hessian_by_double_backward, relative_error
from problems import matrix, network

F64 = torch.float64
LR = 1e-3
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, LR, betas=(0.8, 0.95)),
    "Adam, eps": lambda p: Adam(p, LR, eps=1e-2),
    "Adam, amsgrad": lambda p: Adam(p, LR, betas=(0.8, 0.5), amsgrad=True),
    "AdamW": lambda p: AdamW(p, LR, weight_decay=0.0),
    "NAdam": lambda p: NAdam(p, LR),
    "Adamax": lambda p: Adamax(p, LR),
    "RAdam": lambda p: RAdam(p, LR, betas=(0.9, 0.9)),
    "RAdam, not yet adaptive": lambda p: RAdam(p, LR),
    "RMSprop": lambda p: RMSprop(p, LR),
    "RMSprop, centered": lambda p: RMSprop(p, LR, centered=True, eps=1e-3),
    "Adagrad": lambda p: Adagrad(p, LR, initial_accumulator_value=0.1),
    "SGD": lambda p: SGD(p, LR),
}


def trained(
    make: Callable[[Any], Optimizer], steps: int = 7
) -> tuple[nn.Module, Any, Optimizer, Tensor, Tensor]:
    """A network after some steps: with its data, the optimizer, the last gradient and the last change."""
    problem = network("mlp", num_examples=40)
    model, (x, y) = problem.model, problem.data
    optimizer, gradient = make(model.parameters()), torch.zeros(0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x) * (1 + step), y).backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        optimizer.step()
    change = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    return model, (x, y), optimizer, gradient, change


def mean_gradient(optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """The bias-corrected mean of gradients that the optimizer divides."""
    (group,), states = optimizer.param_groups, optimizer.state
    if not any("exp_avg" in state for state in states.values()):
        return gradient
    m = torch.cat([states[p]["exp_avg"].reshape(-1) for p in group["params"]])
    t, beta = float(states[group["params"][0]]["step"]), group["betas"][0]
    if isinstance(optimizer, NAdam):
        decay = group["momentum_decay"]
        mu, mu_next = (beta * (1 - 0.5 * 0.96 ** (s * decay)) for s in (t, t + 1))
        product = float(states[group["params"][0]]["mu_product"])
        return gradient * (1 - mu) / (1 - product) + m * mu_next / (1 - product * mu_next)
    return m / (1 - beta**t)


def hessian_of(model: nn.Module, data: Any, **options: Any) -> hk.CurvatureOperator:
    objective, params = hk.from_module(model, F.cross_entropy)
    return hk.hessian(objective, params, data, mode="reverse-over-reverse", **options)


def dense_hessian(model: nn.Module, data: Any) -> Tensor:
    objective, params = hk.from_module(model, F.cross_entropy)
    return hessian_by_double_backward(objective, params, data)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_diagonal_is_what_the_optimizer_divides_its_mean_gradient_by(name: str) -> None:
    steps = 4 if "not yet" in name else 7
    model, data, optimizer, gradient, change = trained(OPTIMIZERS[name], steps)
    D = optimizer_scale(hessian_of(model, data), optimizer)
    assert relative_error(-LR * mean_gradient(optimizer, gradient) / D, change) < 1e-9
    if name in ("SGD", "RAdam, not yet adaptive"):
        assert torch.equal(D, torch.ones_like(D))
    else:
        assert float(D.max() / D.min()) > 1.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preconditioned_hessian_is_that_of_the_dense_matrix(name: str) -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS[name])
    H = hessian_of(model, data)
    D = optimizer_scale(H, optimizer)
    expected = dense_hessian(model, data) / (D[:, None] * D).sqrt()
    P = hk.precondition(H, optimizer)
    assert isinstance(P, hk.CurvatureOperator)
    assert relative_error(P.to_dense(), expected) < 1e-11
    assert float(torch.linalg.eigvals(dense_hessian(model, data) / D[:, None]).real.max()) == pytest.approx(
        hk.extreme_eigenvalues(P, tol=1e-8).largest.value, rel=1e-6
    )


def test_momentum_does_not_matter_to_sgd() -> None:
    model, data, optimizer, _, _ = trained(lambda p: SGD(p, LR, momentum=0.9, nesterov=True))
    H = hessian_of(model, data)
    assert torch.equal(hk.precondition(H, optimizer).to_dense(), H.to_dense())
    fresh = SGD(model.parameters(), LR)
    assert torch.equal(hk.precondition(H, fresh).to_dense(), H.to_dense())


def test_vector_tree_and_array_are_the_same() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["Adam"])
    H = hessian_of(model, data)
    D = optimizer_scale(H, optimizer)
    v = torch.ones(H.n, dtype=F64)
    expected = hk.precondition(H, optimizer) @ v
    for scale in (D, H.unflatten(D), D.numpy()):
        assert torch.equal(hk.precondition(H, scale) @ v, expected)


def test_any_operator_may_be_preconditioned() -> None:
    A = matrix([-3.0, -1.0, 0.5, 2.0, 7.0])
    D = torch.tensor([1.0, 2.0, 4.0, 0.5, 0.1], dtype=F64)
    expected = A / (D[:, None] * D).sqrt()
    P = hk.precondition(hk.aslinearoperator(A), D)
    assert relative_error(P.to_dense(), expected) < 1e-14
    assert relative_error((2 * P.shift(1.0)).to_dense(), 2 * (expected + torch.eye(5, dtype=F64))) < 1e-14
    again = A / (D[:, None] * D)
    assert relative_error(hk.precondition(P, D).to_dense(), again) < 1e-14
    assert relative_error(hk.precondition(A, D).to_dense(), expected) < 1e-14


def test_algebra_around_a_preconditioner() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["Adam"])
    H, dense = hessian_of(model, data), dense_hessian(model, data)
    objective, params = hk.from_module(model, F.cross_entropy)
    G = hk.ggn(objective, params, data)
    dense_ggn = ggn_by_jacobian(objective.forward, objective.output_loss, params, data)
    D = optimizer_scale(H, optimizer)
    S, eye = torch.diag(D.rsqrt()), torch.eye(H.n, dtype=F64)
    cases = {
        "shift after": (hk.precondition(H, optimizer).shift(0.3), S @ dense @ S + 0.3 * eye),
        "shift before": (hk.precondition(H.shift(0.3), D), S @ (dense + 0.3 * eye) @ S),
        "both": (-2 * hk.precondition(H.shift(0.3), D).shift(1.0), -2 * (S @ (dense + 0.3 * eye) @ S + eye)),
        "difference": (hk.precondition(H - G, D), S @ (dense - dense_ggn) @ S),
        "sum": (hk.precondition(H, D) + H, S @ dense @ S + dense),
        "twice": (hk.precondition(hk.precondition(H.shift(1.0), D), D), S @ S @ (dense + eye) @ S @ S),
    }
    for name, (op, expected) in cases.items():
        assert isinstance(op, hk.CurvatureOperator), name
        assert relative_error(op.to_dense(), expected) < 1e-11, name
        assert op.origin is None
        assert relative_error(op.rebatched(7).to_dense(), expected) < 1e-11, name
        whole = op.coarsen(op.num_examples)
        assert relative_error(whole.to_dense(), expected) < 1e-11, name
        report = hk.check(op)
        assert report.ok, (name, str(report))
        assert {f.check: f.verdict for f in report.findings}["differences"] == "ok"


def test_a_shift_below_a_preconditioner_is_planned_and_continued(tmp_path: Path) -> None:
    problem, file = network("mlp"), tmp_path / "solve.pt"
    H = hk.ggn(problem.objective, problem.params, problem.data).shift(0.1)
    D = torch.linspace(0.5, 2.0, H.n, dtype=H.dtype)
    P = hk.precondition(H, D)
    assert hk.plan(P, seconds_a_pass=1.0).fits
    whole = hk.lanczos(P, 2, which="BE", tol=1e-6)
    hk.lanczos(P, 2, which="BE", tol=1e-6, max_matvecs=8, checkpoint=file)
    with pytest.raises(ValueError, match="sigma differs, scale differs"):
        hk.lanczos(hk.precondition(H, 2 * D), 2, which="BE", tol=1e-6, checkpoint=file)
    found = hk.lanczos(P, 2, which="BE", tol=1e-6, checkpoint=file)
    assert torch.equal(found.vectors, whole.vectors)


def test_samples_are_unbiased() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["RMSprop"])
    P = hk.precondition(
        hessian_of(model, data).shift(0.2), optimizer_scale(hessian_of(model, data), optimizer)
    )
    v = torch.ones(P.n, dtype=F64)
    mean = sum(P.coarsen(10, seed=seed) @ v for seed in range(400)) / 400
    assert relative_error(mean, P @ v) < 0.15
    uniform = sum(P.sample(10, seed) @ v for seed in range(400)) / 400
    assert relative_error(uniform, P @ v) < 0.15


def test_both_ends_by_samples_as_by_all_data() -> None:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
    x, y = torch.randn(10_000, 20, generator=g), torch.randint(0, 5, (10_000,), generator=g)
    optimizer = Adam(model.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    P = hk.precondition(hessian_of(model, (x, y), batch_size=2000), optimizer)
    assert P.samples_pay
    exact = torch.linalg.eigvalsh(P.to_dense().double())
    found = hk.extreme_eigenvalues(P)
    assert found.num_matvecs % 1  # those of a sample count by their share
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=2e-2)
    assert found.smallest.value == pytest.approx(float(exact[0]), rel=2e-2)


def test_precision_and_native_arithmetic_pass_through() -> None:
    model, data, _, _, _ = trained(OPTIMIZERS["Adam"])
    objective, params = hk.from_module(model.float(), F.cross_entropy)
    G = hk.ggn(objective, params, (data[0].float(), data[1]), arithmetic="bf16")
    P = hk.precondition(G, torch.full((G.n,), 4.0))
    assert P.precision == G.precision
    assert P.exact is not None
    v = torch.ones(G.n)
    assert relative_error(P.exact @ v, G.exact @ v / 4) < 1e-5


def test_blocks_and_twins_are_matched_by_value_and_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3)).double()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.arange(20) % 3

    def stepped(parameters: Any) -> Optimizer:
        optimizer = Adam(parameters, lr=0.0)  # values stay equal, states do not
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    named, unnamed = stepped(model.named_parameters()), stepped(model.parameters())
    for wrt in ("3.*", "0.*", "2.weight"):
        H = hessian_of(model, (x, y), wrt=wrt)
        names = [name for name, _ in model.named_parameters() if name in H.layout.names]
        expected = [named.state[dict(model.named_parameters())[name]]["exp_avg_sq"] for name in names]
        D = torch.cat([v.reshape(-1) for v in expected]).div(1 - 0.999).sqrt() + 1e-8
        assert relative_error(optimizer_scale(H, named), D) < 1e-9
    assert torch.equal(
        optimizer_scale(hessian_of(model, (x, y)), unnamed), optimizer_scale(hessian_of(model, (x, y)), named)
    )
    with pytest.raises(ValueError, match=r"several parameters .*'3.weight'; give it names"):
        hk.precondition(hessian_of(model, (x, y), wrt="3.*"), unnamed)


def test_equal_parameters_in_groups_of_another_order_need_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def stepped(make: Callable[..., Optimizer], *groups: Any) -> Optimizer:
        optimizer = make([{"params": group} for group in groups], lr=0.0)  # as at the start of a warm-up
        F.cross_entropy(model(x), torch.arange(20) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    H, named = hessian_of(model, (x, torch.arange(20) % 3)), dict(model.named_parameters())
    weights, biases = ["2.weight", "0.weight"], ["2.bias", "0.bias"]
    by_value = [[named[name] for name in names] for names in (weights, biases)]
    with pytest.raises(ValueError, match=r"several parameters .*'0.bias'; give it names"):
        hk.precondition(H, stepped(Adam, *by_value))
    assert torch.equal(optimizer_scale(H, stepped(SGD, *by_value)), torch.ones(H.n, dtype=F64))
    optimizer = stepped(Adam, *([(name, named[name]) for name in names] for names in (weights, biases)))
    squares = [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()]
    assert (
        relative_error(optimizer_scale(H, optimizer), torch.cat(squares).div(1 - 0.999).sqrt() + 1e-8) < 1e-9
    )


def test_adagrad_has_a_state_but_no_scale_before_its_first_step() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["Adagrad"], steps=0)
    with pytest.raises(ValueError, match=r"Adagrad has no state for .*it has not taken a step"):
        hk.precondition(hessian_of(model, data), optimizer)


def test_what_the_optimizer_lacks_is_named() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["Adam"])
    H = hessian_of(model, data)
    with pytest.raises(
        ValueError, match=r"Adam has no state for 0.weight, 0.bias, 2.weight, 2.bias: it has not"
    ):
        hk.precondition(H, Adam(model.parameters()))
    with pytest.raises(ValueError, match=r"no parameter with the values of '2.weight'"):
        hk.precondition(H, Adam(model[0].parameters()))
    partial = Adam(model.parameters(), lr=0.0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    for p in (model[0].bias, model[2].weight, model[2].bias):
        p.grad = None
    partial.step()
    with pytest.raises(ValueError, match=r"no state for 0.bias, 2.weight, 2.bias:"):
        hk.precondition(H, partial)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"no parameter with the values of '0.weight': make H .*after its last step"
    ):
        hk.precondition(H, optimizer)
    with pytest.raises(TypeError, match=r"is not over parameters"):
        hk.precondition(hk.aslinearoperator(torch.eye(3)), optimizer)
    with pytest.raises(TypeError, match=r"LBFGS, whose formula is not known"):
        hk.precondition(H, torch.optim.LBFGS(model.parameters()))


def test_diagonal_that_is_not_positive_is_named() -> None:
    model, data, _, _, _ = trained(OPTIMIZERS["SGD"])
    H = hessian_of(model, data)
    D = torch.ones(H.n, dtype=F64)
    D[-1] = 0
    with pytest.raises(ValueError, match=r"^scale must be positive, got 0 for '2.bias'"):
        hk.precondition(H, D)
    with pytest.raises(ValueError, match=r"^scale must be positive, got -1 at 2"):
        hk.precondition(hk.aslinearoperator(torch.eye(3)), torch.tensor([1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match=r"^scale must have shape"):
        hk.precondition(H, torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match=r"^scale must be one vector"):
        hk.precondition(H, torch.ones(H.n, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"^scale contains NaN"):
        hk.precondition(H, D * torch.nan)


def test_nothing_of_the_callers_changes() -> None:
    model, data, optimizer, _, _ = trained(OPTIMIZERS["Adam"])
    states = {p: {k: torch.as_tensor(v).clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    P = hk.precondition(hessian_of(model, data), optimizer)
    before = P @ torch.ones(P.n, dtype=F64)
    for p, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), states[p][key])
            torch.as_tensor(value).add_(1)
    assert torch.equal(P @ torch.ones(P.n, dtype=F64), before)
