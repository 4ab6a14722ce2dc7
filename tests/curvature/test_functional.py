from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import hvpkit as hk
from hvpkit.autodiff.pytree import Layout
from oracles import (
    gradient_at,
    hessian_by_differences,
    hessian_by_double_backward,
    relative_error,
    scalar_loss,
)
from problems import NETWORKS, Problem, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
EXACT = MODES[:2]
# A central difference in float64 is off by about eps^(2/3) = 4e-11 times the ratio of third derivatives
# to second ones, which in these networks is up to some hundreds.
TOLERANCE = {mode: 1e-8 for mode in EXACT} | {"finite-difference": 1e-7}


def direct_loss(model: nn.Module) -> Callable:
    """The loss without hvpkit: the module itself, called with other parameters."""
    evaluated = copy.deepcopy(model).eval()

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(evaluated, params, (batch[0],))
        return F.cross_entropy(outputs, batch[1], reduction="none")

    return loss_fn


@cache
def solved(name: str) -> tuple[Problem, Tensor, Tensor]:
    problem = network(name)
    loss_fn = direct_loss(problem.model)
    by_backward = hessian_by_double_backward(loss_fn, problem.params, problem.data)
    by_differences = hessian_by_differences(loss_fn, problem.params, problem.data)
    return problem, by_backward, by_differences


def vectors(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_a_product_with_one_batch_equals_both_oracles(name: str, mode: str) -> None:
    problem, by_backward, by_differences = solved(name)
    layout = Layout.of(problem.params)
    for v in vectors(layout.n, 3).mT:
        found = layout.flatten(
            hk.hvp(problem.objective, problem.params, problem.data, layout.unflatten(v), mode=mode)
        )
        assert relative_error(found, by_backward @ v) < TOLERANCE[mode]
        assert relative_error(found, by_differences @ v) < TOLERANCE[mode]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_a_product_over_ragged_batches_equals_both_oracles(name: str, mode: str, batch_size: int) -> None:
    problem, by_backward, by_differences = solved(name)
    H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=batch_size, mode=mode)
    v = vectors(H.n, 2)
    assert relative_error(H @ v, by_backward @ v) < TOLERANCE[mode]
    assert relative_error(H @ v, by_differences @ v) < TOLERANCE[mode]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_loss_over_ragged_batches_equal_direct_autograd(name: str) -> None:
    problem, _, _ = solved(name)
    function = scalar_loss(direct_loss(problem.model), problem.params, problem.data)
    point = parameters_to_vector(problem.params.values())
    data = hk.as_data(problem.data, batch_size=5)
    slope = parameters_to_vector(hk.grad(problem.objective, problem.params, data).values())
    assert relative_error(slope, gradient_at(function, point)) < 1e-13
    assert relative_error(hk.loss(problem.objective, problem.params, data), function(point)) < 1e-14


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_are_constants_unless_asked_for(mode: str) -> None:
    problem, _, _ = solved("frozen_parameter")
    assert list(problem.params) == ["0.weight", "2.weight", "2.bias"]
    objective, params = hk.from_module(
        problem.model, partial(F.cross_entropy, reduction="none"), include_frozen=True
    )
    assert list(params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    whole = hessian_by_double_backward(direct_loss(problem.model), params, problem.data)
    H = hk.hessian(objective, params, problem.data, mode=mode)
    v = vectors(H.n, 2)
    assert relative_error(H @ v, whole @ v) < TOLERANCE[mode]


def test_tied_weights_are_one_parameter() -> None:
    problem, oracle, _ = solved("tied_weights")
    assert list(problem.params) == ["embedding.weight", "hidden.weight", "hidden.bias"]
    assert len(oracle) == sum(p.numel() for p in problem.model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_unused_parameters_have_zeros(mode: str) -> None:
    problem, _, _ = solved("unused_parameter")
    ones = {name: torch.ones_like(p) for name, p in problem.params.items()}
    product = hk.hvp(problem.objective, problem.params, problem.data, ones, mode=mode)
    slope = hk.grad(problem.objective, problem.params, problem.data)
    for tree in (product, slope):
        assert not tree["idle.weight"].any()
        assert not tree["idle.bias"].any()
        assert tree["first.weight"].any()


@pytest.mark.parametrize("name", ["mlp", "gru", "encoder_layer", "tied_weights"])
def test_vectors_are_in_the_order_of_parameters_to_vector(name: str) -> None:
    problem, oracle, _ = solved(name)
    H = hk.hessian(problem.objective, problem.params, problem.data)
    assert torch.equal(H.flatten(problem.params), parameters_to_vector(problem.model.parameters()))
    e = torch.zeros(H.n, dtype=torch.float64)
    e[3] = 1.0
    assert relative_error(H @ e, oracle[:, 3]) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_mean_gives_what_losses_of_examples_give(mode: str) -> None:
    problem, oracle, _ = solved("mlp")

    def mean_loss(params: dict[str, Tensor], batch: object) -> Tensor:
        return problem.objective(params, batch).mean()

    data = hk.as_data(problem.data, batch_size=5)
    H = hk.hessian(mean_loss, problem.params, data, mode=mode)
    v = vectors(H.n, 2)
    assert relative_error(H @ v, oracle @ v) < TOLERANCE[mode]
    by_example = hk.grad(problem.objective, problem.params, data)
    for name, slope in hk.grad(mean_loss, problem.params, data).items():
        assert relative_error(slope, by_example[name]) < 1e-13
    by_example = hk.loss(problem.objective, problem.params, data)
    assert relative_error(hk.loss(mean_loss, problem.params, data), by_example) < 1e-14


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_linear_has_no_curvature(mode: str) -> None:
    params = {"w": torch.ones(2, dtype=torch.float64), "idle": torch.ones(1, dtype=torch.float64)}
    x = torch.randn(4, 2, dtype=torch.float64)
    v = {"w": torch.tensor([1.0, 2.0]).double(), "idle": torch.ones(1).double()}
    product = hk.hvp(lambda p, batch: batch @ p["w"], params, x, v, mode=mode)
    assert not any(leaf.any() for leaf in product.values())


@pytest.mark.parametrize("mode", MODES)
def test_the_product_with_zero_is_zero(mode: str) -> None:
    problem, _, _ = solved("mlp")
    zero = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    product = hk.hvp(problem.objective, problem.params, problem.data, zero, mode=mode)
    assert not any(leaf.any() for leaf in product.values())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_difference_does_not_depend_on_the_length_of_v(scale: float) -> None:
    problem, oracle, _ = solved("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data, mode="finite-difference")
    v = vectors(H.n, 1)[:, 0]
    assert relative_error((H @ (scale * v)) / scale, oracle @ v) < TOLERANCE["finite-difference"]


def quartic(params: object, batch: Tensor) -> Tensor:
    """Losses whose Hessian at any point is known by hand: 12 diag(x^4 p^2) for each example."""
    return ((batch * params) ** 4).sum(tuple(range(1, batch.ndim)))


@pytest.mark.parametrize(
    ("dtype", "digits"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("mode", EXACT)
def test_products_keep_the_dtype_and_have_its_digits(dtype: torch.dtype, digits: float, mode: str) -> None:
    p, v = torch.tensor([0.5, -1.0, 0.25]).to(dtype), torch.tensor([1.0, 2.0, -1.0]).to(dtype)
    x = torch.tensor([[1.0, 0.5, 1.5], [0.5, 1.0, -1.0]]).to(dtype)
    found = hk.hvp(quartic, p, x, v, mode=mode)
    expected = 12 * (x.double() ** 4).mean(0) * p.double() ** 2 * v.double()
    assert found.dtype == dtype
    assert relative_error(found, expected) < digits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("params", "loss_fn"),
    [
        (torch.tensor(2.0), lambda p, x: (x.sum(1) * p) ** 3),
        (torch.tensor([[1.0, 0.5, 2.0]]), lambda p, x: (x @ p.mT).squeeze(1) ** 3),
        ([torch.tensor(2.0), torch.ones(3)], lambda p, x: (x @ p[1] * p[0]) ** 3),
        (
            {"a": (torch.ones(3), [torch.tensor(0.5)]), "b": torch.ones(3, 2)},
            lambda p, x: (x @ p["b"]).sum(1) ** 3 * p["a"][1][0] * (x @ p["a"][0]),
        ),
    ],
    ids=["scalar", "matrix", "list", "nested"],
)
def test_parameters_may_be_any_tree(params: object, loss_fn: Callable, mode: str) -> None:
    layout = Layout.of(params)
    point = layout.flatten(params).double()
    x = vectors(5, 3)

    def of_vector(p: dict[str, Tensor], batch: Tensor) -> Tensor:
        return loss_fn(layout.unflatten(p["all"]), batch)

    oracle = hessian_by_double_backward(of_vector, {"all": point}, x)
    v = vectors(layout.n, 1)[:, 0]
    product = hk.hvp(loss_fn, layout.unflatten(point), x, layout.unflatten(v), mode=mode)
    assert relative_error(layout.flatten(product), oracle @ v) < TOLERANCE[mode]
    H = hk.hessian(loss_fn, layout.unflatten(point), x, mode=mode, batch_size=2)
    assert relative_error(H @ v, oracle @ v) < TOLERANCE[mode]
    assert relative_error(layout.flatten(H @ layout.unflatten(v)), oracle @ v) < TOLERANCE[mode]


def test_parameters_may_be_a_mapping_that_torch_does_not_know() -> None:
    params = UserDict(b=vectors(1, 1)[0], w=UserDict(x=vectors(3, 1)[:, 0]))
    x, v = vectors(5, 3, seed=1), UserDict(w={"x": vectors(3, 1, seed=2)[:, 0]}, b=vectors(1, 1, seed=3)[0])

    def loss_fn(p: dict, batch: Tensor) -> Tensor:
        return (batch @ p["w"]["x"] + p["b"]) ** 2

    rows = torch.cat([torch.ones(5, 1, dtype=torch.float64), x], dim=1)
    expected = 2 * rows.mT @ (rows @ torch.cat([v["b"], v["w"]["x"]])) / 5
    for product in (hk.hvp(loss_fn, params, x, v), hk.hessian(loss_fn, params, x) @ v):
        assert list(product) == ["b", "w"]
        assert relative_error(torch.cat([product["b"], product["w"]["x"]]), expected) < 1e-14


def test_products_forward_over_reverse_map_over_directions() -> None:
    problem, oracle, _ = solved("attention")
    layout = Layout.of(problem.params)

    def product(v: Tensor) -> Tensor:
        return layout.flatten(hk.hvp(problem.objective, problem.params, problem.data, layout.unflatten(v)))

    rows = vectors(layout.n, 4).mT
    assert relative_error(torch.vmap(product)(rows), rows @ oracle) < 1e-12


@pytest.mark.parametrize("mode", EXACT)
def test_a_loss_may_differentiate_by_its_inputs(mode: str) -> None:
    def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Of u' = u for the network u, as physics-informed losses are written."""

        def u(t: Tensor) -> Tensor:
            return torch.tanh(t * params["a"]) @ params["b"]

        value, slope = torch.func.vmap(torch.func.grad_and_value(u))(x)[::-1]
        return (slope - value) ** 2

    params = {"a": vectors(3, 1)[:, 0], "b": vectors(3, 1, seed=1)[:, 0]}
    x = vectors(6, 1, seed=2)[:, 0]
    oracle = hessian_by_differences(residual, params, x)
    H = hk.hessian(residual, params, x, mode=mode, batch_size=4)
    assert relative_error(H @ torch.eye(6, dtype=torch.float64), oracle) < 1e-8


def test_a_loss_may_call_autograd_on_its_inputs_where_products_go_backward_twice() -> None:
    def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        value = torch.tanh(x.unsqueeze(1) * params["a"]) @ params["b"]
        slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        return (slope - value) ** 2

    params = {"a": vectors(3, 1)[:, 0], "b": vectors(3, 1, seed=1)[:, 0]}
    x = vectors(6, 1, seed=2)[:, 0]
    oracle = hessian_by_differences(residual, params, x)
    H = hk.hessian(residual, params, x, mode="reverse-over-reverse")
    assert relative_error(H @ torch.eye(6, dtype=torch.float64), oracle) < 1e-8
    expected = residual(params, x).mean().detach()
    assert relative_error(hk.loss(residual, params, x), expected) < 1e-14
    assert not hk.loss(residual, params, x).requires_grad


@pytest.mark.filterwarnings("ignore::hvpkit.CapturedParameterWarning")
@pytest.mark.parametrize("mode", MODES)
def test_results_carry_no_graph_whatever_the_loss_closes_over(mode: str) -> None:
    head = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(x * p) @ head) ** 2

    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x, v = vectors(4, 2), torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(hk.CapturedParameterWarning, match="head"):
        H = hk.hessian(loss_fn, p, x, mode=mode)
    results = [
        hk.hvp(loss_fn, p, x, v, mode=mode),
        hk.grad(loss_fn, p, x),
        hk.loss(loss_fn, p, x),
        H @ v,
    ]
    assert not any(result.requires_grad for result in results)
    assert p.grad is None
    assert head.grad is None


def test_a_mode_without_the_derivative_names_the_others() -> None:
    class NoForwardMode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * slope

    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        return NoForwardMode.apply(x @ p)

    p, x, v = torch.ones(2).double(), vectors(3, 2), torch.ones(2).double()
    with pytest.raises(RuntimeError) as caught:
        hk.hvp(loss_fn, p, x, v)
    assert "mode='reverse-over-reverse' or 'finite-difference'" in "".join(caught.value.__notes__)
    expected = (6 * (x @ p) * (x @ v)) @ x / 3
    for mode in MODES[1:]:
        assert relative_error(hk.hvp(loss_fn, p, x, v, mode=mode), expected) < TOLERANCE[mode]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("loss_fn", "error", "reason"),
    [
        (lambda p, x: x @ p[:, None], ValueError, r"loss_fn returned shape \[.*, 1\] .* squeeze it"),
        (lambda p, x: x * p, ValueError, r"loss_fn returned shape \[., 2\] .* reduce it over all but"),
        (lambda p, x: (x @ p).long(), TypeError, "loss_fn returned dtype torch.int64"),
        (lambda p, x: (x @ p).to(torch.complex64), TypeError, "loss_fn returned dtype torch.complex64"),
        (lambda p, _: float(p.detach().sum()), TypeError, "loss_fn must return a tensor, got float"),
        (lambda p, x: [x @ p], TypeError, "loss_fn must return a tensor, got list"),
        (lambda *_: None, TypeError, "loss_fn must return a tensor, got NoneType"),
        (lambda _, x: x.sum(1), ValueError, "loss_fn does not depend on params"),
        (lambda p, x: x @ p.detach(), ValueError, "loss_fn does not depend on params"),
    ],
)
def test_a_loss_that_is_no_loss_of_examples_is_refused(
    loss_fn: Callable, error: type[Exception], reason: str, size: int
) -> None:
    p, x = torch.ones(2), torch.ones(size, 2)
    for mode in MODES:
        with pytest.raises(error, match=reason):
            hk.hvp(loss_fn, p, x, torch.ones(2), mode=mode)
    for front_door in (hk.grad, hk.hessian):
        with pytest.raises(error, match=reason):
            front_door(loss_fn, p, x)


@pytest.mark.parametrize(
    ("v", "error", "reason"),
    [
        ({"w": torch.ones(3), "b": torch.ones(1)}, ValueError, "v .*leaf 'w' has shape"),
        ({"w": torch.ones(2)}, ValueError, "v must be a tree shaped like the parameters"),
        (torch.ones(3), ValueError, "v must be a tree shaped like the parameters"),
        ({"w": torch.ones(2).double(), "b": torch.ones(1)}, ValueError, "v has dtype torch.float64"),
        ({"w": torch.ones(2, device="meta"), "b": torch.ones(1)}, ValueError, "v has device meta"),
        ({"w": [1.0, 2.0], "b": torch.ones(1)}, TypeError, "v must be a tree of tensors"),
    ],
)
def test_a_direction_unlike_the_parameters_is_refused(v: object, error: type[Exception], reason: str) -> None:
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(error, match=reason):
        hk.hvp(lambda p, x: (x @ p["w"] + p["b"]) ** 2, params, torch.ones(3, 2), v)


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of 'forward-over-reverse', .* got 'reverse'"):
        hk.hvp(quartic, torch.ones(2), torch.ones(3, 2), torch.ones(2), mode="reverse")


@pytest.mark.parametrize("front_door", [hk.grad, hk.loss, hk.hessian])
def test_the_front_doors_look_at_parameters_and_data(front_door: Callable) -> None:
    with pytest.raises(ValueError, match="params contains NaN or infinity"):
        front_door(quartic, torch.tensor([1.0, float("nan")]), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"params must share one dtype"):
        front_door(quartic, [torch.ones(1), torch.ones(1).double()], torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"params has dtype torch.int64"):
        front_door(quartic, torch.arange(2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="data is empty"):
        front_door(quartic, torch.ones(2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="data is a one-shot iterator"):
        front_door(quartic, torch.ones(2), (torch.ones(3, 2) for _ in range(2)))


@pytest.mark.parametrize(("front_door", "what"), [(hk.grad, "gradient"), (hk.loss, "loss")])
def test_what_is_not_finite_names_its_first_batch(front_door: Callable, what: str) -> None:
    x = torch.ones(9, 2)
    x[5] = float("nan")
    x[8] = float("inf")
    with pytest.raises(hk.NonFiniteError, match=rf"the {what} is not finite .* from batch 2 of the data"):
        front_door(quartic, torch.ones(2), hk.as_data(x, batch_size=2))
    with pytest.raises(hk.NonFiniteError, match="first from batch 1 of the data"):
        front_door(quartic, torch.ones(2), hk.as_data(x, batch_size=4))


def test_a_sum_that_overflows_blames_no_batch() -> None:
    data = hk.as_data(torch.full((2,), 3e38), batch_size=1).subset([0, 1], weights=torch.ones(2))
    with pytest.raises(hk.NonFiniteError, match="though no batch alone is"):
        hk.loss(torch.mul, torch.tensor(1.0), data)


def test_a_mean_does_not_overflow_where_its_sum_would() -> None:
    x = torch.full((4096,), 100.0, dtype=torch.float16)
    assert float(hk.loss(torch.mul, torch.tensor(1.0, dtype=torch.float16), x)) == 100.0
