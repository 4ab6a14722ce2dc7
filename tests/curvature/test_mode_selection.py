from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvpkit as hk
from hvpkit.curvature.batches import Leaves
from hvpkit.curvature.constructors import empirical_fisher, fisher, ggn
from hvpkit.curvature.mode_selection import choose_recipe, lower_precision
from oracles import hessian_by_double_backward, relative_error
from problems import network

FORWARD, REVERSE, DIFFERENCES = "forward-over-reverse", "reverse-over-reverse", "finite-difference"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# "auto".


@pytest.mark.parametrize("constructor", [hk.hessian, ggn, empirical_fisher, fisher])
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "gru", "encoder_layer", "tied_weights"])
def test_auto_takes_an_exact_mode_and_says_why(name: str, constructor: Callable) -> None:
    problem = network(name)
    H = constructor(problem.objective, problem.params, problem.data)
    assert H.mode in (FORWARD, REVERSE)
    assert H.mode_reason.startswith(f"{H.mode}: ")
    assert "times as long, and agrees to" in H.mode_reason
    assert H.sample(5, 0).mode_reason == H.mode_reason
    assert constructor(problem.objective, problem.params, problem.data, mode=H.mode).mode_reason is None


class Clock:
    """Time that passes only in products, so many seconds in each mode."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now, self.seconds, self.calls = 0.0, seconds, []

    def linearize(self, mode: str) -> Callable[[Sequence[Leaves]], list[Leaves]]:
        key = mode.split("-")[0]
        passed = self.seconds[key]
        self.now += passed[min(self.calls.count(mode), len(passed) - 1)]
        self.calls.append(mode)
        return lambda vectors: [[2.0 * leaf for leaf in vector] for vector in vectors]


@pytest.mark.parametrize(
    ("reverse", "forward", "chosen", "reason"),
    [
        ([1.0], [1.0], REVERSE, f"{FORWARD} takes 1 times as long"),
        ([1.0], [0.9], REVERSE, f"{FORWARD} takes 0.9 times as long"),
        ([1.0], [0.4], FORWARD, f"{REVERSE} takes 2.5 times as long"),
        ([1.0], [5.0], REVERSE, f"{FORWARD} takes 5 times as long"),
        # the first product is not timed; one slow round is no evidence, and of several the fastest counts
        ([9.0, 1.0], [1.0], REVERSE, f"{FORWARD} takes 1 times as long"),
        ([1.0, 9.0, 1.0], [1.0], REVERSE, f"{FORWARD} takes 1 times as long"),
        ([1.0, 9.0, 9.0, 9.0, 9.0, 1.1], [1.0], REVERSE, f"{FORWARD} takes 0.91 times as long"),
    ],
)
def test_the_usual_mode_is_left_only_for_a_clearly_faster_one(
    reverse: list[float], forward: list[float], chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(reverse=reverse, forward=forward)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    recipe = choose_recipe(clock, lambda seed: [normal(3, seed=seed)], "auto", "native")
    assert recipe.mode == chosen
    assert reason in recipe.reason
    assert len(clock.calls) <= 12


def cubic(wrong_in: dict[str, float | None]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of sums of cubes, whose second derivatives are off by a factor in some modes, or missing (None)."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 3 * x**2

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            if wrong_in.get(REVERSE, 1.0) is None:
                raise RuntimeError("no double backward\nof any kind")
            return wrong_in.get(REVERSE, 1.0) * 6 * ctx.saved_tensors[0] * slope

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            if wrong_in.get(FORWARD, 1.0) is None:
                raise NotImplementedError("no forward mode")
            return wrong_in.get(FORWARD, 1.0) * 6 * ctx.saved_tensors[0] * tangent

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope * Derivative.apply(ctx.saved_tensors[0])

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * tangent

    return lambda p, x: Function.apply(x @ p)


X, P = normal(50, 4), normal(4, seed=1)
ORACLE = hessian_by_double_backward(lambda p, x: (x @ p["p"]) ** 3, {"p": P}, X)


@pytest.mark.parametrize(
    ("wrong_in", "chosen", "reason"),
    [
        ({FORWARD: 1.05}, REVERSE, f"{REVERSE}: {FORWARD} is wrong by .*, as finite differences say"),
        ({REVERSE: 1.05}, FORWARD, f"{FORWARD}: {REVERSE} is wrong by .*, as finite differences say"),
        ({REVERSE: float("nan")}, FORWARD, f"{FORWARD}: {REVERSE} is wrong by nan"),
        ({FORWARD: None}, REVERSE, rf"{REVERSE}: {FORWARD} does not work here \(no forward mode\)"),
        ({REVERSE: None}, FORWARD, rf"{FORWARD}: {REVERSE} does not work here \(no double backward\)"),
        (
            {FORWARD: None, REVERSE: None},
            DIFFERENCES,
            rf"{DIFFERENCES}: {REVERSE} does not .*, and {FORWARD}",
        ),
    ],
)
def test_a_mode_that_is_wrong_or_missing_is_not_taken(
    wrong_in: dict[str, float | None], chosen: str, reason: str
) -> None:
    H = hk.hessian(cubic(wrong_in), P, X, batch_size=20)
    assert H.mode == chosen
    assert re.match(reason, H.mode_reason)
    assert relative_error(H @ torch.eye(4).double(), ORACLE) < (1e-8 if chosen == DIFFERENCES else 1e-13)


def test_differences_replace_modes_that_are_both_wrong() -> None:
    loss_fn = cubic({FORWARD: 1.05, REVERSE: 0.95})
    with pytest.warns(hk.DerivativeWarning, match="differ by 1e-01, and both from finite differences"):
        H = hk.hessian(loss_fn, P, X)
    assert H.mode == DIFFERENCES
    assert relative_error(H @ torch.eye(4).double(), ORACLE) < 1e-8
    for mode, factor in ((FORWARD, 1.05), (REVERSE, 0.95)):  # whoever names a mode gets it
        H = hk.hessian(loss_fn, P, X, mode=mode)
        assert relative_error(H @ torch.eye(4).double(), factor * ORACLE) < 1e-13


def with_long_gradients(wrong_in: dict[str, float | None]) -> Callable[[Tensor, Tensor], Tensor]:
    """Losses whose gradients are rounded to more than the error that is to be found, in float32."""
    cubes = cubic(wrong_in)
    return lambda p, x: cubes(p, x) + 1e4 * (x @ p)


def test_modes_in_float32_are_judged_in_float64() -> None:
    H = hk.hessian(with_long_gradients({REVERSE: 1.07}), P.float(), X.float())
    assert H.mode == FORWARD
    assert re.match(f"{FORWARD}: {REVERSE} is wrong by 7e-02 here", H.mode_reason)


def only_float32(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def checked(p: Tensor, x: Tensor) -> Tensor:
        if p.dtype != torch.float32:
            raise RuntimeError("only float32")
        return loss_fn(p, x)

    return checked


def test_a_gap_that_nothing_can_settle_is_refused_if_it_is_large() -> None:
    with pytest.raises(
        ArithmeticError, match=r"no mode can be trusted here.* differ by 7e-02, .*cannot tell"
    ):
        hk.hessian(only_float32(with_long_gradients({FORWARD: 1.07})), P.float(), X.float())
    H = hk.hessian(only_float32(with_long_gradients({FORWARD: 1.0005})), P.float(), X.float())
    assert H.mode == REVERSE
    assert re.match(f"{REVERSE}: {FORWARD} differs by [45]e-04, less than finite differences", H.mode_reason)


# One exact mode, or none, is right.


class Swish(torch.autograd.Function):
    """Swish as many write it: right once, and without the derivative of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach()
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class Reversal(torch.autograd.Function):
    """Gradient reversal: the identity, with the negative of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return -gradient


class CorrectSquare(torch.autograd.Function):
    """x^2 without a forward mode; its double backward is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def through(function: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = torch.tanh) -> Callable:
    """Losses of a network of two layers with a function in the middle."""
    return lambda p, x: (after(function(torch.tanh(x @ p["a"])) @ p["b"]) ** 2).sum(-1)


def layers(dtype: torch.dtype = torch.float64, width: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    params = {"a": normal(4, width, seed=2).to(dtype), "b": 0.5 * normal(width, 3, seed=3).to(dtype)}
    return params, X.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_only_mode_that_works_is_left_if_its_derivative_is_wrong(dtype: torch.dtype) -> None:
    arguments = layers(dtype)
    with pytest.warns(
        hk.DerivativeWarning, match=f"{REVERSE} is wrong by .*mode='finite-difference' is used"
    ):
        H = hk.hessian(through(Swish.apply), *arguments)
    oracle = hessian_by_double_backward(through(nn.functional.silu), *layers())
    eye = torch.eye(H.n, dtype=dtype)
    error = relative_error(H @ eye, oracle)
    assert H.mode == DIFFERENCES
    assert H.mode_reason.startswith(f"{DIFFERENCES}: {REVERSE} is wrong by")
    assert error < (1e-8 if dtype == torch.float64 else 2e-3)
    named = hk.hessian(through(Swish.apply), *arguments, mode=REVERSE)
    assert relative_error(named @ eye, oracle) > 0.02


def test_an_interval_covers_the_truth_where_the_only_mode_is_wrong() -> None:
    with pytest.warns(hk.DerivativeWarning):
        H = hk.hessian(through(Swish.apply), *layers())
    truth = torch.linalg.eigvalsh(hessian_by_double_backward(through(nn.functional.silu), *layers()))
    found = hk.lanczos(H, which="LA", tol=1e-4, certify=True)
    assert abs(float(found.values[0]) - float(truth[-1])) < 1e-4 * float(truth[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("after", [torch.tanh, torch.relu, torch.abs])
def test_the_only_mode_that_works_is_kept_if_it_is_right(after: Callable, dtype: torch.dtype) -> None:
    H = hk.hessian(through(CorrectSquare.apply, after), *layers(dtype, width=60))
    assert H.mode == REVERSE
    assert "agrees with finite differences to" in H.mode_reason


def test_no_kink_is_taken_for_a_wrong_derivative() -> None:
    # inputs so close to the kink that half of the differences cross it
    distance = torch.finfo(torch.float64).eps ** 0.5
    params, x = layers()
    x = torch.cat([x[:31], torch.zeros(1, 4, dtype=torch.float64)])

    def loss_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        z = CorrectSquare.apply(x @ p["a"]) @ p["b"]
        return (torch.relu(z) + torch.relu(p["b"][0] - p["b"][0].detach() + 0.5 * distance)).sum(-1)

    assert hk.hessian(loss_fn, params, x).mode == REVERSE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [hk.hessian, ggn])
def test_the_gradient_of_no_loss_is_refused(kind: Callable, dtype: torch.dtype) -> None:
    forward = lambda p, x: torch.tanh(Reversal.apply(torch.tanh(x @ p["a"])) @ p["b"])  # noqa: E731
    objective = hk.Objective(forward, lambda z, x: (z**2).sum(-1))  # noqa: ARG005
    with pytest.raises(
        ArithmeticError, match=r"gradient of no loss.*gradient reversal.*reverse-over-reverse"
    ):
        kind(objective, *layers(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", ["norm", "cdist"])
def test_distances_of_zero_leave_finite_differences(distance: str, dtype: torch.dtype) -> None:
    # some centres are examples: at distance zero double backward of a norm loses the curvature of its square
    x, centres = X.to(dtype), torch.cat([X[:3], X[3:5] + 0.1]).to(dtype)

    def kernels(c: Tensor, x: Tensor) -> Tensor:
        if distance == "cdist":
            d = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            d = torch.linalg.vector_norm(x[:, None] - c, dim=-1)
        return torch.exp(-(d**2)).sum(-1)

    def smooth(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.exp(-(x[:, None] - p["c"]).square().sum(-1)).sum(-1)

    with pytest.warns(hk.DerivativeWarning):
        H = hk.hessian(kernels, centres, x)
    assert H.mode == DIFFERENCES
    oracle = hessian_by_double_backward(smooth, {"c": centres.double()}, x.double())
    assert relative_error(H @ torch.eye(H.n, dtype=dtype), oracle) < (
        1e-7 if dtype == torch.float64 else 3e-3
    )


def test_distances_rounded_by_matrix_products_are_not_trusted() -> None:
    with pytest.warns(hk.DerivativeWarning):
        H = hk.hessian(lambda c, x: torch.exp(-(torch.cdist(x, c) ** 2)).sum(-1), X[:5].clone(), X)
    assert H.mode == DIFFERENCES


def test_compiled_code_is_not_of_a_mode_that_is_wrong() -> None:
    with (
        pytest.warns(hk.DerivativeWarning),
        pytest.warns(hk.CompileWarning, match=f"{FORWARD}, which it would compile, is wrong"),
    ):
        H = hk.hessian(cubic({FORWARD: 1.05, REVERSE: 0.95}), P, X, compile=True)
    assert H.mode == DIFFERENCES


@pytest.mark.parametrize("name", ["swish", "norm"])
def test_check_finds_a_wrong_mode_that_was_named(name: str) -> None:
    if name == "swish":
        H = hk.hessian(through(Swish.apply), *layers(), mode=REVERSE)
    else:
        H = hk.hessian(
            lambda c, x: torch.exp(-(torch.linalg.vector_norm(x[:, None] - c, dim=-1) ** 2)).sum(-1),
            X[:16].clone(),
            X[:16],
            mode=FORWARD,
        )
    report = hk.check(H)
    assert not report.ok
    if name == "swish":
        assert [f.check for f in report.findings if f.verdict == "failed"] == ["differences"]


def test_a_loss_without_curvature_agrees_with_itself() -> None:
    H = hk.hessian(lambda p, x: x @ p, P, X)
    assert H.mode_reason.endswith("agrees to 0e+00")


def test_running_out_of_memory_is_no_reason_to_take_another_mode() -> None:
    def linearize(mode: str) -> Callable[[Sequence[Leaves]], list[Leaves]]:
        if mode == REVERSE:
            raise torch.OutOfMemoryError("out of memory")
        return lambda vectors: [list(vector) for vector in vectors]

    with pytest.raises(torch.OutOfMemoryError):
        choose_recipe(
            SimpleNamespace(linearize=linearize), lambda seed: [normal(3, seed=seed)], "auto", "native"
        )


def test_trials_take_the_first_few_examples_only() -> None:
    sizes = []

    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x @ p) ** 2

    hk.hessian(loss_fn, P, X.repeat(4, 1), batch_size=100)
    assert set(sizes) == {100, 32}
    assert sizes.count(100) <= 3


# Errors of finite differences and of arithmetic.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("constructor", [hk.hessian, ggn, empirical_fisher])
@pytest.mark.parametrize("name", ["mlp", "conv_layernorm", "encoder_layer"])
def test_finite_differences_know_their_error(name: str, constructor: Callable, dtype: torch.dtype) -> None:
    problem = network(name)
    objective, params = hk.from_module(problem.model.to(dtype), nn.CrossEntropyLoss())
    data = (problem.data[0].to(dtype), problem.data[1])
    exact, H = (constructor(objective, params, data, mode=mode) for mode in (REVERSE, DIFFERENCES))
    V = normal(H.n, 4).to(dtype)
    error = relative_error(H @ V, exact @ V)
    assert H.precision >= torch.finfo(dtype).eps ** (2 / 3)
    assert error / 5 < H.precision < max(20 * error, 3 * torch.finfo(dtype).eps ** (2 / 3))
    assert exact.precision == torch.finfo(dtype).eps
    asymmetry = float((V.mT @ (H @ V) - (H @ V).mT @ V).abs().max() / (V.mT @ (H @ V)).abs().max())
    assert asymmetry < H.precision**0.5


def in_float32(name: str) -> tuple[hk.Objective, dict[str, Tensor], tuple[Tensor, Tensor]]:
    problem = network(name)
    objective, params = hk.from_module(problem.model.float(), nn.CrossEntropyLoss())
    x, y = problem.data
    return objective, params, (x.float() if x.is_floating_point() else x, y)


@pytest.mark.parametrize("mode", [REVERSE, FORWARD])
@pytest.mark.parametrize("constructor", [hk.hessian, ggn, empirical_fisher, fisher])
@pytest.mark.parametrize("name", ["mlp", "encoder_layer"])
def test_products_in_bf16_carry_the_error_that_was_measured(
    name: str, constructor: Callable, mode: str
) -> None:
    arguments = in_float32(name)
    exact = constructor(*arguments, mode=mode)
    H = constructor(*arguments, mode=mode, arithmetic="bf16", batch_size=5)
    V = normal(H.n, 8).float()
    error = relative_error(H @ V, exact @ V)
    assert 1e-3 < error < 3e-2
    assert error / 5 < H.precision < 5 * error
    assert (H @ V).dtype == torch.float32
    assert H.name == f"{exact.name} in bf16"
    assert (H.sample(5, 0).name, H.sample(5, 0).precision) == (H.name, H.precision)
    assert relative_error(exact @ V, constructor(*arguments, mode=mode) @ V) == 0.0


@pytest.mark.parametrize("solver", ["lanczos", "lobpcg", "chebyshev", "power", "eigsh", "multifidelity"])
def test_what_is_reported_of_a_solve_in_bf16_is_of_native_products(solver: str) -> None:
    arguments = in_float32("encoder_layer")
    exact = hk.hessian(*arguments, mode=REVERSE)
    H = hk.hessian(*arguments, mode=REVERSE, arithmetic="bf16")
    if solver == "multifidelity":
        found = hk.multifidelity([H.sample(7, 0), H], which="LA", tol=1e-2)
    else:
        found = getattr(hk, solver)(H, 1, tol=1e-2, max_matvecs=60)
    vector, value = found.vectors[:, 0], float(found.values[0])
    image = exact @ vector
    assert value == pytest.approx(float(vector @ image), rel=1e-5)
    assert abs(value - float(vector @ (H @ vector))) > 1e-5 * abs(value), (
        "products in bf16 would be told apart"
    )
    residual = float(torch.linalg.vector_norm(image - value * vector))
    assert float(found.residual_norms[0]) == pytest.approx(residual, rel=1e-2, abs=1e-5)
    top = float(torch.linalg.eigvalsh((exact @ torch.eye(H.n)).double()).abs().max())
    assert abs(value) == pytest.approx(top, rel=1e-2)


def test_the_algebra_knows_native_arithmetic() -> None:
    arguments = in_float32("mlp")
    plain, H = (hk.hessian(*arguments, mode=REVERSE, arithmetic=kind) for kind in ("native", "bf16"))
    v = normal(H.n).float()
    for made in (
        lambda A: 3.0 * A,
        lambda A: A.shift(2.0),
        lambda A: A + A,
        lambda A: A - plain,
        lambda A: -A,
    ):
        torch.testing.assert_close(made(H).exact @ v, made(plain) @ v)
        assert made(plain).exact is None
    torch.testing.assert_close(H.sample(5, 0).exact @ v, plain.sample(5, 0) @ v)


def test_arithmetic_that_a_mode_lacks_leaves_auto_another() -> None:
    # torch's CPU convolutions have no forward mode under autocast
    arguments = in_float32("conv_batchnorm")
    H = hk.hessian(*arguments, arithmetic="bf16")
    assert H.mode == REVERSE
    assert f"{FORWARD} does not work here" in H.mode_reason
    with pytest.raises(RuntimeError) as caught:
        hk.hessian(*arguments, arithmetic="bf16", mode=FORWARD)
    assert (
        "arithmetic='bf16' with mode='forward-over-reverse'; another mode may do"
        in caught.value.__notes__[-1]
    )


@pytest.mark.parametrize("constructor", [hk.hessian, ggn, empirical_fisher, fisher])
def test_arithmetic_that_means_nothing_here_is_refused(constructor: Callable) -> None:
    arguments = in_float32("mlp")
    with pytest.raises(ValueError, match="arithmetic must be one of 'native', 'bf16', 'tf32', got 'fp8'"):
        constructor(*arguments, arithmetic="fp8")
    with pytest.raises(ValueError, match="arithmetic='tf32' needs a CUDA device, got cpu"):
        constructor(*arguments, arithmetic="tf32")
    with pytest.raises(ValueError, match="arithmetic='bf16' leaves finite differences no digits"):
        constructor(*arguments, arithmetic="bf16", mode=DIFFERENCES)
    double = network("mlp")
    with pytest.raises(
        ValueError, match=r"arithmetic='bf16' is for parameters in float32, got torch.float64"
    ):
        constructor(double.objective, double.params, double.data, arithmetic="bf16")


def test_settings_of_arithmetic_are_put_back() -> None:
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    a = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with lower_precision("tf32", torch.device("cpu")):
        assert [kind.fp32_precision for kind in kinds] == ["tf32", "tf32"]
    assert [kind.fp32_precision for kind in kinds] == before
    with lower_precision("bf16", torch.device("cpu")):
        assert (a @ a).dtype == torch.bfloat16
    with lower_precision("native", torch.device("cpu")):
        assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("arithmetic", ["tf32", "bf16"])
def test_products_of_less_precision_on_a_gpu(arithmetic: str) -> None:
    _, params, data = in_float32("mlp")
    params = {name: p.cuda() for name, p in params.items()}
    H = hk.hessian(
        lambda p, batch: nn.functional.cross_entropy(
            torch.tanh(batch[0] @ p["0.weight"].mT + p["0.bias"]) @ p["2.weight"].mT + p["2.bias"], batch[1]
        ),
        params,
        data,
        arithmetic=arithmetic,
    )
    assert torch.finfo(torch.float32).eps < H.precision < 3e-2
