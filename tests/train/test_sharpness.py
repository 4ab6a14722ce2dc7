import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.utils import parameters_to_vector

import hvpkit as hk
from hvpkit._utils.random import normal_vector
from hvpkit.train.sharpness import keskar_sharpness
from oracles import scalar_loss
from problems import network

F64 = torch.float64


def quadratic(H, g, *, loss=0.5, at=None, num_examples=5, dtype=F64, seed=0):
    """A loss of that value, gradient and Hessian at ``at``: the mean over examples of linear terms that differ."""
    n = len(g)
    at = torch.zeros(n, dtype=F64) if at is None else at
    x = torch.randn(num_examples, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = x - x.mean(0) + g
    H, at, x = (t.to(dtype) for t in (H, at, x))

    def loss_fn(params, batch):
        z = torch.cat([params["a"], params["b"].flatten()]) - at
        return loss + 0.5 * z @ H @ z + batch @ z

    return loss_fn, {"a": at[:1].clone(), "b": at[1:].clone().view(1, -1)}, x


def highest_in_box(H, g, radius):
    """Largest rise of the quadratic: the best of the stationary points of all faces of the box."""
    best = 0.0
    for signs in itertools.product([-1.0, 0.0, 1.0], repeat=len(g)):
        z = torch.tensor(signs, dtype=F64) * radius
        free = torch.tensor([sign == 0 for sign in signs])
        if free.any():
            z[free] = torch.linalg.solve(H[free][:, free], -(g + H @ z)[free])
        if bool((z.abs() <= radius * (1 + 1e-12)).all()):
            best = max(best, float(g @ z + z @ H @ z / 2))
    return best


def random_problem(n, seed, *, gradient=1.0):
    g = torch.Generator().manual_seed(seed)
    H = torch.randn(n, n, generator=g, dtype=F64)
    return (
        H + H.mT,
        gradient * torch.randn(n, generator=g, dtype=F64),
        torch.randn(n, generator=g, dtype=F64),
    )


def percent(rise, loss=0.5):
    return 100 * rise / (1 + loss)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("gradient", [0.0, 0.02])
def test_convex_diagonal_quadratic_is_highest_at_a_corner(dtype, optimizer, gradient):
    _, g, w = random_problem(6, 1, gradient=gradient)
    curvatures = torch.linspace(0.5, 8, 6, dtype=F64)
    loss_fn, params, x = quadratic(torch.diag(curvatures), g, at=w, dtype=dtype)
    found = keskar_sharpness(loss_fn, params, x, epsilon=0.1, lr=0.1, tol=1e-5, optimizer=optimizer)
    b = 0.1 * (w.abs() + 1)
    rise = float(g.abs() @ b + curvatures @ b**2 / 2)
    assert found.status == "converged"
    assert found.value == pytest.approx(percent(rise), rel=1e-5)
    assert found.loss == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(found.perturbation.abs().to(F64), b, rtol=1e-3, atol=0)
    assert float(found) == found.value


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_linear_loss_is_highest_at_the_corner_of_the_gradient(dtype):
    _, g, w = random_problem(5, 2)
    loss_fn, params, x = quadratic(torch.zeros(5, 5, dtype=F64), g, at=w, dtype=dtype)
    found = keskar_sharpness(loss_fn, params, x, epsilon=1e-3, lr=1e-2)
    rise = float(g.abs() @ (1e-3 * (w.abs() + 1)))
    assert found.value == pytest.approx(percent(rise), rel=1e-12 if dtype == F64 else 1e-3)
    assert found.gap == 0


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gradient", [0.0, 0.3])
def test_indefinite_quadratic_is_highest_where_its_faces_say(n, seed, gradient):
    H, g, w = random_problem(n, seed, gradient=gradient)
    loss_fn, params, x = quadratic(H, g, at=w)
    best = percent(highest_in_box(H, g, 0.1 * (w.abs() + 1)))
    options = {"epsilon": 0.1, "lr": 0.1, "tol": 1e-6}
    one = keskar_sharpness(loss_fn, params, x, **options)
    many = keskar_sharpness(loss_fn, params, x, num_starts=6, **options)
    assert one.converged
    assert many.converged
    assert one.value <= many.value * (1 + 1e-14)  # a later maximum that is as high to rounding counts as well
    assert many.value == pytest.approx(best, rel=1e-5)


def test_further_starts_find_higher_maxima():
    gains = []
    for seed in range(6):
        H, g, w = random_problem(4, seed, gradient=0.0)
        loss_fn, params, x = quadratic(H, g, at=w)
        one, many = (
            keskar_sharpness(loss_fn, params, x, epsilon=0.1, lr=0.1, num_starts=k).value for k in (1, 4)
        )
        gains.append(many / one - 1)
    assert min(gains) >= 0
    assert max(gains) > 0.1


def test_concave_loss_is_highest_inside_the_box():
    H, target = torch.diag(-torch.tensor([2.0, 4.0, 8.0], dtype=F64)), torch.tensor([0.05, -0.03, 0.01])
    loss_fn, params, x = quadratic(H, -H @ target.to(F64))
    found = keskar_sharpness(loss_fn, params, x, epsilon=0.1, lr=0.1, tol=1e-8)
    assert found.converged
    assert found.value == pytest.approx(percent(float(-target.to(F64) @ H @ target.to(F64) / 2)), rel=1e-7)
    torch.testing.assert_close(found.perturbation, target.to(F64), rtol=1e-3, atol=0)


def test_highest_iterate_counts_and_not_the_last():
    seen = []
    loss_fn, params, x = quadratic(-torch.eye(3, dtype=F64), torch.full((3,), 0.01, dtype=F64))

    def watched(params, batch):
        losses = loss_fn(params, batch)
        seen.append(float(losses.detach().mean()))
        return losses

    found = keskar_sharpness(watched, params, x, epsilon=0.1, lr=2.5, max_steps=20)
    assert found.max_loss == max(seen) > seen[-1]
    assert found.status == "rising"


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("gradient", [0.0, 0.3])
def test_subspace_is_that_of_the_reduced_quadratic(p, gradient):
    H, g, w = random_problem(8, 5, gradient=gradient)
    loss_fn, params, x = quadratic(H, g, at=w)
    A = normal_vector(8 * p, dtype=F64, device=torch.device("cpu"), seed=3).view(8, p)
    A = A / A.norm(dim=0)
    coordinates = torch.linalg.pinv(A) @ w
    radius = 0.1 * (coordinates.abs() + 1)
    options = {"epsilon": 0.1, "lr": 0.1, "tol": 1e-6, "subspace_dim": p, "num_starts": 4, "seed": 3}
    found = keskar_sharpness(loss_fn, params, x, **options)
    assert found.value == pytest.approx(percent(highest_in_box(A.mT @ H @ A, A.mT @ g, radius)), rel=1e-5)
    z = torch.linalg.pinv(A) @ found.perturbation
    torch.testing.assert_close(A @ z, found.perturbation)
    assert bool((z.abs() <= radius * (1 + 1e-12)).all())


def test_subspaces_differ_by_seed():
    H, g, w = random_problem(8, 5)
    loss_fn, params, x = quadratic(H, g, at=w)
    run = partial(keskar_sharpness, loss_fn, params, x, epsilon=0.1, lr=0.1, subspace_dim=2)
    assert {run(seed=0).value for _ in range(100)} == {run(seed=0).value} != {run(seed=1).value}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("trained", [False, True])
def test_network_is_no_higher_at_random_corners(dtype, trained):
    problem = network("mlp")
    params, (x, y) = dict(problem.params), problem.data
    loss = scalar_loss(problem.objective, params, (x, y))
    w = parameters_to_vector(params.values()).detach().requires_grad_()
    if trained:
        descent = torch.optim.LBFGS([w], lr=1.0, max_iter=12, line_search_fn="strong_wolfe")
        descent.step(lambda: _backward(loss(w), w))
    w = w.detach().to(dtype)
    tree = {
        name: piece.view_as(p)
        for piece, (name, p) in zip(
            w.split([p.numel() for p in params.values()]), params.items(), strict=True
        )
    }
    data = hk.as_data((x.to(dtype), y), batch_size=4)  # 13 examples: a ragged last batch
    found = keskar_sharpness(problem.objective, tree, data, epsilon=5e-3, optimizer="adam", max_steps=150)
    b = 5e-3 * (w.double().abs() + 1)
    g = torch.Generator().manual_seed(0)
    corners = [2.0 * torch.randint(0, 2, b.shape, generator=g) - 1 for _ in range(200)]
    with torch.no_grad():
        base = float(loss(w.double()))
        highest = max(float(loss(w.double() + corner * b)) for corner in corners)
    assert found.value >= 100 * (highest - base) / (1 + base)
    assert found.loss == pytest.approx(base, rel=1e-5)
    moved = float(loss(w.double() + found.perturbation.double()))
    assert found.max_loss == pytest.approx(moved, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert bool((found.perturbation.double().abs() <= b * (1 + 1e-6)).all())


def _backward(value, w):
    (w.grad,) = torch.autograd.grad(value, w)
    return value


def small(**options):
    H, g, w = random_problem(4, 0)
    loss_fn, params, x = quadratic(H, g, at=w)
    return partial(keskar_sharpness, loss_fn, params, x, **{"epsilon": 0.1, "lr": 0.1, **options}), params, x


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_parameters_and_global_state_stay_as_they_are_when_interrupted(interruption):
    run, params, _ = small()
    kept = {name: p.clone() for name, p in params.items()}
    for p in params.values():
        p.requires_grad_().grad = torch.full_like(p, 7.0)
    state, calls = torch.get_rng_state(), []

    def interrupt(found):
        calls.append(found)
        if len(calls) == 3:
            raise interruption("stop")

    for monitor in (None, interrupt):
        if monitor is None:
            run()
        else:
            with pytest.raises(interruption):
                run(monitor=monitor)
        assert all(torch.equal(p, kept[name]) for name, p in params.items())
        assert all(bool((p.grad == 7).all()) for p in params.values())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.backends.mha.get_fastpath_enabled()
    assert len(calls) == 3


def test_optimizer_may_be_a_function_of_a_list():
    given = []

    def make(z):
        given.extend(z)
        return torch.optim.SGD(z, lr=0.05, momentum=0.9)

    plain, momentum = (small(tol=1e-10, **options)[0]() for options in ({}, {"optimizer": make}))
    assert [t.shape for t in given] == [(4,)]
    assert momentum.value == pytest.approx(plain.value, rel=1e-9)


def test_optimizer_must_make_one():
    with pytest.raises(TypeError, match=r"^optimizer must return"):
        small(optimizer=lambda z: z)[0]()


def test_status_tells_an_ascent_that_still_rises():
    run, _, _ = small()
    short, long = run(lr=1e-4, max_steps=3), run()
    assert (short.status, short.converged, long.status) == ("rising", False, "converged")
    assert 0 < short.value < long.value
    assert short.gap > 1e-2 * (short.max_loss - short.loss)
    assert "max_steps" in short.message
    assert short.num_steps == 3
    assert short.num_passes == 5


def test_status_tells_a_rise_lost_in_rounding():
    H = 1e-2 * torch.eye(4, dtype=F64)
    for dtype, status in ((torch.float32, "rounding-limited"), (F64, "converged")):
        loss_fn, params, x = quadratic(H, torch.zeros(4, dtype=F64), dtype=dtype)
        found = keskar_sharpness(loss_fn, params, x, epsilon=1e-4, lr=10.0)
        assert found.status == status
    assert found.value == pytest.approx(percent(2e-2 * 1e-8), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_a_maximum_there_is_no_rise(dtype):
    loss_fn, params, x = quadratic(-torch.eye(4, dtype=F64), torch.zeros(4, dtype=F64), dtype=dtype)
    found = keskar_sharpness(loss_fn, params, x, epsilon=0.1, lr=0.5, max_steps=60)
    assert found.status in (
        "rounding-limited",
        "rising",
    )  # by the rounding of terms that cancel inside the loss
    assert found.value == pytest.approx(0, abs=1e-5 if dtype == torch.float32 else 1e-13)


def test_monitor_sees_the_best_so_far_after_each_evaluation():
    seen = []
    found = small(num_starts=3, monitor=seen.append)[0]()
    assert [each.num_passes for each in seen] == list(range(2, found.num_passes + 1))
    heights = [each.max_loss for each in seen]
    assert heights == sorted(heights)
    assert repr(seen[-1]) == repr(found)
    assert found.num_steps == found.num_passes - 4  # the parameters and three starts take no step


def test_repeats_itself_by_seed_also_from_a_generator():
    def loss_fn(w, x):
        return x * (w**2).sum()

    run = partial(
        keskar_sharpness, loss_fn, torch.zeros(4, dtype=F64), torch.ones(3, dtype=F64), epsilon=0.1, lr=0.1
    )
    signs = {tuple(run(seed=seed).perturbation.sign().tolist()) for seed in range(8)}
    assert len(signs) > 4  # all corners are alike
    assert torch.equal(run(seed=1).perturbation, run(seed=1).perturbation)
    first, second = (run(seed=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.perturbation, second.perturbation)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, {"subspace_dim": 2}])
def test_callers_inference_mode_and_autocast_do_not_matter(options):
    run, _, _ = small(**options)
    plain = run()
    with torch.inference_mode():
        found = run()
    assert found.value == plain.value
    assert not found.perturbation.is_inference()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run().value == plain.value


def test_loss_that_is_not_finite_in_the_box_is_an_error():
    def loss_fn(w, x):
        return torch.log(w).sum() + x

    x = torch.ones(3, dtype=F64)
    with pytest.raises(hk.NonFiniteError, match="batch 0"):
        keskar_sharpness(loss_fn, torch.tensor([0.05], dtype=F64), 2 * x, epsilon=0.1, num_starts=8)
    with pytest.raises(hk.NonFiniteError, match="batch 0"):
        keskar_sharpness(loss_fn, torch.tensor([1.0], dtype=F64), math.nan * x)


def test_loss_of_minus_one_or_less_is_refused():
    def loss_fn(w, x):
        return w.sum() - x

    with pytest.raises(ValueError, match=r"^loss_fn must have a mean above -1"):
        keskar_sharpness(loss_fn, torch.zeros(2), torch.ones(3))


@pytest.mark.parametrize(
    ("dtype", "epsilon"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-4), (torch.float32, 1e-7), (F64, 1e-15)]
)
def test_epsilon_that_rounds_away_is_refused(dtype, epsilon):
    params = torch.linspace(0.1, 1, 50, dtype=dtype)
    with pytest.raises(ValueError, match=r"^epsilon must be larger"):
        keskar_sharpness(
            lambda w, x: (x * w**2).sum(-1), params, torch.ones(3, 50, dtype=dtype), epsilon=epsilon
        )


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("epsilon", 0.0, ValueError),
        ("lr", -1.0, ValueError),
        ("tol", math.inf, ValueError),
        ("max_steps", 0, ValueError),
        ("num_starts", 1.5, TypeError),
        ("subspace_dim", 5, ValueError),
        ("optimizer", "lbfgs", ValueError),
        ("optimizer", torch.optim.SGD([torch.zeros(2)], lr=1.0), TypeError),
        ("seed", -1, ValueError),
    ],
)
def test_bad_arguments_are_named(name, value, error):
    with pytest.raises(error, match=f"^{name} must"):
        small()[0](**{name: value})


def test_loss_that_is_random_or_has_no_gradient_is_refused():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="random numbers"):
        keskar_sharpness(lambda w, x: (x * torch.rand(4) * w).sum(-1), torch.ones(4), x)
    with pytest.raises(ValueError, match="does not depend on params"):
        keskar_sharpness(lambda w, x: (x * w.detach()).sum(-1), torch.ones(4), x)
