from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.train import AbsaResult, absa, absa_init, absa_update, fgsm
from oracles import gradient_at, hessian_by_double_backward
from problems import cross_entropy, network


def batch_sizes(state, eigenvalues: list[float]) -> list[int]:
    sizes = []
    for eigenvalue in eigenvalues:
        state = absa_update(state, eigenvalue)
        sizes.append(state.batch_size)
    return sizes


@pytest.mark.parametrize(
    ("options", "eigenvalues", "expected"),
    [
        (
            {},
            [40, 30, 20, 15, 10, 5],
            [8, 8, 16, 16, 32, 64],
        ),  # each time by half of the last one that counted
        ({}, [10, 20, 80, 6, 5.001, 5], [8, 8, 8, 8, 8, 16]),  # what is higher in between is no reference
        ({}, [7, 7, 7, 7], [8, 8, 8, 8]),
        ({"alpha": 1.1}, [10, 9.2, 9, 8.2, 8.1], [8, 8, 16, 16, 32]),
        ({"beta": 3}, [10, 5, 2], [8, 24, 72]),
        ({"beta": 1.01}, [10, 5, 2], [8, 9, 10]),  # by one example at least
        ({"max_batch_size": 20}, [10, 5, 2, 1, 0.1], [8, 16, 20, 20, 20]),
        ({"max_batch_size": 8}, [10, 5, 2], [8, 8, 8]),
        ({"kappa": 3}, [7] * 7, [8, 8, 16, 16, 16, 32, 32]),
        ({"kappa": 1}, [7, 8, 9], [16, 32, 64]),
        ({"kappa": 3}, [8, 4, 4, 4, 4, 2], [8, 16, 16, 16, 32, 64]),  # waiting starts anew at each growth
        ({"kappa": 3}, [10, 9, 8, 5], [8, 8, 16, 32]),  # growth by waiting leaves the reference
        ({}, [-1, 0, 10, -5, 6, 5], [8, 8, 8, 8, 8, 16]),  # only positive values have a ratio
    ],
)
def test_batch_grows_as_the_paper_says(options: dict, eigenvalues: list[float], expected: list[int]) -> None:
    assert batch_sizes(absa_init(8, 0.1, **options), eigenvalues) == expected


def test_learning_rate_follows_the_batch_that_is_met_and_share_decays_with_growth() -> None:
    state = absa_init(8, 0.1, adversarial_share=0.6, share_decay=3.0, max_batch_size=24)
    seen = []
    for eigenvalue in (16.0, 8.0, 8.0, 4.0, 1.0):
        state = absa_update(state, eigenvalue)
        seen.append((state.batch_size, state.lr, state.adversarial_share, state.reference, state.num_waited))
    expected = [
        (8, 0.1, 0.6, 16.0, 1),
        (16, 0.2, 0.2, 8.0, 0),
        (16, 0.2, 0.2, 8.0, 1),
        (24, 0.3, 0.2 / 3, 4.0, 0),
        (24, 0.3, 0.2 / 3, 4.0, 1),
    ]
    for found, wanted in zip(seen, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_learning_rate_decays_after_the_epochs_named() -> None:
    state = absa_init(8, 1.0, lr_decay=0.5, lr_decay_epochs=(2, 3), kappa=3)
    rates = []
    for _ in range(4):
        state = absa_update(state, 1.0)
        rates.append(state.lr)
    assert rates == [1.0, 0.5, 0.5, 0.5]  # the third epoch halves it and, by growth, doubles it
    assert state.batch_size == 16


@pytest.mark.parametrize(("epochs", "shares"), [(0, [0, 0, 0]), (2, [0.2, 0.2, 0]), (None, [0.2] * 3)])
def test_adversarial_share_ends_after_the_epochs_named(epochs: int | None, shares: list[float]) -> None:
    state = absa_init(8, 1.0, adversarial_epochs=epochs)
    seen = [state.adversarial_share]
    for _ in range(2):
        state = absa_update(state, 1.0)
        seen.append(state.adversarial_share)
    assert seen == shares


def test_controller_is_frozen_and_an_update_makes_another_one() -> None:
    state = absa_init(8, 0.1)
    with pytest.raises(FrozenInstanceError):
        state.lr = 1.0
    assert absa_update(state, 3.0) == absa_update(state, 3.0)
    assert state == absa_init(8, 0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "^batch_size must"),
        ({"batch_size": 2.5}, TypeError, "^batch_size must"),
        ({"lr": 0.0}, ValueError, "^lr must"),
        ({"alpha": 1.0}, ValueError, "^alpha must"),
        ({"beta": 0.5}, ValueError, "^beta must"),
        ({"kappa": 0}, ValueError, "^kappa must"),
        ({"max_batch_size": 7}, ValueError, "^max_batch_size must"),
        ({"adversarial_share": 1.5}, ValueError, "^adversarial_share must"),
        ({"adversarial_share": math.nan}, ValueError, "^adversarial_share must"),
        ({"share_decay": 0.5}, ValueError, "^share_decay must"),
        ({"adversarial_epochs": -1}, ValueError, "^adversarial_epochs must"),
        ({"lr_decay": 0.0}, ValueError, "^lr_decay must"),
        ({"lr_decay_epochs": (0,)}, ValueError, "^lr_decay_epochs must"),
    ],
)
def test_bad_settings_are_named(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        absa_init(**({"batch_size": 8, "lr": 0.1} | arguments))


@pytest.mark.parametrize("eigenvalue", [math.nan, math.inf])
def test_an_eigenvalue_that_is_not_finite_is_refused(eigenvalue: float) -> None:
    with pytest.raises(ValueError, match=r"^eigenvalue must be finite"):
        absa_update(absa_init(8, 0.1), eigenvalue)


@pytest.mark.parametrize("name", ["mlp", "conv_groupnorm", "gru"])
def test_fgsm_moves_each_entry_by_epsilon_and_raises_each_loss(name: str) -> None:
    problem, epsilon = network(name), 1e-3
    x, y = problem.data
    x_before = x.clone()
    moved, same = fgsm(problem.objective, problem.params, problem.data, epsilon)
    change = moved - x
    assert change.abs().max() <= epsilon * (1 + 1e-9)
    assert torch.equal(
        change.sign(), gradient_at(lambda x: problem.objective(problem.params, (x, y)).sum(), x).sign()
    )
    assert bool(
        (problem.objective(problem.params, (moved, y)) > problem.objective(problem.params, (x, y))).all()
    )
    assert torch.equal(x, x_before)
    assert same is y
    assert not moved.requires_grad


def test_fgsm_needs_a_floating_input() -> None:
    problem = network("embedding")
    with pytest.raises(ValueError, match=r"^batch: the first tensor"):
        fgsm(problem.objective, problem.params, problem.data, 0.1)


def moons(num_examples: int = 96) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other, with noise."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(num_examples) % 2
    angle = torch.rand(num_examples, generator=g) * math.pi
    x = torch.stack([torch.cos(angle), torch.sin(angle)], 1) * (1 - 2 * y[:, None])
    x = x + y[:, None] * torch.tensor([1.0, 0.5]) + 0.1 * torch.randn(num_examples, 2, generator=g)
    return x.double(), y


def small_network() -> tuple[hk.Objective, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    return hk.from_module(model, cross_entropy)


def run(**options) -> AbsaResult:
    objective, params = small_network()
    state = options.pop("state", absa_init(8, 0.1, kappa=4, adversarial_epochs=10))
    options = {"num_epochs": 4, "epsilon": 0.05} | options
    return absa(objective, params, options.pop("data", moons()), state, **options)


def same_bits(a: AbsaResult, b: AbsaResult) -> bool:
    tensors = [(a.params, b.params), (a.velocity, b.velocity)]
    equal = all(torch.equal(one[name], two[name]) for one, two in tensors for name in one)
    return equal and a.history == b.history and a.state == b.state


def test_trains_a_small_network_while_the_batch_grows() -> None:
    objective, params = small_network()
    start = absa_init(4, 0.2, kappa=8, max_batch_size=32, adversarial_epochs=10)
    found = run(state=start, num_epochs=22)
    assert float(hk.loss(objective, params, moons())) > 0.6
    assert found.history[-1].loss < 0.02
    sizes = [epoch.batch_size for epoch in found.history]
    assert sizes == sorted(sizes)
    assert set(sizes) == {4, 8, 16, 32}
    assert [epoch.lr / epoch.batch_size for epoch in found.history] == pytest.approx([0.2 / 4] * 22)
    assert [epoch.num_steps for epoch in found.history] == [96 // size for size in sizes]
    assert found.history[0].adversarial_share == 0.2
    assert all(epoch.adversarial_share == 0 for epoch in found.history[10:])


def test_controller_is_given_what_history_says() -> None:
    found, state = run(num_epochs=6), absa_init(8, 0.1, kappa=4, adversarial_epochs=10)
    state = replace(state, max_batch_size=96)
    for epoch in found.history:
        assert (epoch.batch_size, epoch.lr, epoch.adversarial_share) == (
            state.batch_size,
            state.lr,
            state.adversarial_share,
        )
        state = absa_update(state, epoch.eigenvalue)
    assert found.state == state


def test_history_holds_the_loss_and_the_largest_eigenvalue_after_each_epoch() -> None:
    objective, _ = small_network()
    seen: list[AbsaResult] = []
    found = run(tol=1e-10, hessian_examples=None, monitor=seen.append)
    assert [len(result.history) for result in seen] == [1, 2, 3, 4]
    assert same_bits(seen[-1], found)
    for result in seen:
        H = hessian_by_double_backward(objective, result.params, moons())
        last = result.history[-1]
        assert last.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-9)
        assert last.loss == pytest.approx(float(objective(result.params, moons()).mean()))


def test_eigenvalues_are_asked_for_as_exact_as_told() -> None:
    x = torch.linspace(0.1, 3, 80, dtype=torch.float64)
    start, state = torch.ones_like(x), absa_init(1, 1e-9, adversarial_share=0.0)
    values = [
        absa(
            lambda p, b: (p**4 * x).sum() + 0 * b, start, torch.ones(1), state, num_epochs=1, tol=tol
        ).history[0]
        for tol in (0.5, 1e-10)
    ]
    assert values[1].eigenvalue == pytest.approx(36.0, rel=1e-6)
    assert 18.0 < values[0].eigenvalue < values[1].eigenvalue


def test_eigenvalues_of_a_sample_are_of_the_same_examples_each_time() -> None:
    few = run(hessian_examples=10, tol=1e-6)
    whole = run(hessian_examples=96, tol=1e-6)
    assert few.history[0].loss == whole.history[0].loss
    assert few.history[0].eigenvalue != pytest.approx(whole.history[0].eigenvalue, rel=1e-3)
    still = run(hessian_examples=10, tol=1e-6, state=absa_init(8, 1e-300))
    assert [epoch.eigenvalue for epoch in still.history] == pytest.approx([still.history[0].eigenvalue] * 4)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"momentum": 0.0}, {"momentum": 0.5, "weight_decay": 0.3}]
)
def test_steps_with_the_whole_data_are_those_of_torch(options: dict) -> None:
    objective, params = small_network()
    found = run(state=absa_init(96, 0.3, adversarial_share=0.0), num_epochs=5, microbatch_size=40, **options)
    mine = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.SGD(mine.values(), lr=0.3, **({"momentum": 0.9} | options))
    for _ in range(5):
        optimizer.zero_grad()
        objective(mine, moons()).mean().backward()
        optimizer.step()
    for name, p in mine.items():
        torch.testing.assert_close(found.params[name], p.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_share_of_each_batch_is_moved(share: float) -> None:
    x, y = torch.zeros(24, 3, dtype=torch.float64), torch.arange(24.0, dtype=torch.float64)
    seen: list[Tensor] = []

    def loss_fn(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0].detach())
        return batch[0] @ w + 0.5 * w.square().sum()

    state = absa_init(8, 1e-6, adversarial_share=share)
    absa(
        loss_fn, torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64), (x, y), state, num_epochs=2, epsilon=0.5
    )
    moved = [batch for batch in seen if len(batch) == 8 and bool((batch != 0).any())]
    assert len(moved) == 6
    pattern = torch.tensor([0.5, -0.5, 0.5], dtype=torch.float64)
    for batch in moved:
        rows = [bool(torch.equal(row, pattern)) for row in batch]
        assert sum(rows) == round(share * 8)
        assert bool((batch[[not row for row in rows]] == 0).all())
    if share < 1:
        assert len({tuple((batch != 0)[:, 0].tolist()) for batch in moved}) > 1


def test_every_epoch_deals_out_all_examples_evenly_in_an_order_of_its_own() -> None:
    x = torch.arange(50.0, dtype=torch.float64)
    seen: list[list[float]] = []

    def loss_fn(w: Tensor, batch: Tensor) -> Tensor:
        if len(batch) < 30:
            seen.append(batch.tolist())
        return (w - batch) ** 2

    state = absa_init(20, 1e-6, adversarial_share=0.0)
    absa(loss_fn, torch.ones((), dtype=torch.float64), x, state, num_epochs=2)
    epochs = [seen[:3], seen[3:]]
    for epoch in epochs:
        assert sorted(map(len, epoch)) == [16, 17, 17]
        assert sorted(chain(*epoch)) == x.tolist()
    assert epochs[0] != epochs[1]


def test_seed_decides_the_run() -> None:
    first = run(seed=3)
    assert same_bits(first, run(seed=3))
    other = run(seed=4)
    assert not any(torch.equal(first.params[name], other.params[name]) for name in first.params)


def test_adversarial_examples_change_the_run() -> None:
    plain = run(state=absa_init(8, 0.1, kappa=4, adversarial_share=0.0))
    assert not same_bits(plain, run())
    assert same_bits(plain, run(state=absa_init(8, 0.1, kappa=4, adversarial_share=0.0), epsilon=1.0))


def test_a_run_goes_on_from_an_interruption_to_the_same_bits() -> None:
    kept: list[AbsaResult] = []

    def interrupt(result: AbsaResult) -> None:
        kept.append(result)
        if len(result.history) == 3:
            raise KeyboardInterrupt

    whole = run(num_epochs=6)
    with pytest.raises(KeyboardInterrupt):
        run(num_epochs=6, monitor=interrupt)
    assert len(kept) == 3
    assert same_bits(run(num_epochs=6, resume=kept[-1]), whole)
    assert same_bits(run(num_epochs=3, resume=kept[-1]), kept[-1])  # nothing is left to do


def test_a_tree_of_another_model_is_not_resumed() -> None:
    stranger = replace(run(num_epochs=1), params={"w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"^resume.params must be"):
        run(resume=stranger)


def test_nothing_of_the_callers_is_touched() -> None:
    objective, params = small_network()
    data = moons()
    copies = {name: p.clone() for name, p in params.items()}, [t.clone() for t in data]
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = absa(objective, params, data, absa_init(8, 0.1), num_epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    for name, p in params.items():
        assert torch.equal(p, copies[0][name])
        assert p.grad is None
        assert not found.params[name].requires_grad
        assert found.params[name].data_ptr() != p.data_ptr()
    assert all(map(torch.equal, data, copies[1]))
    with pytest.raises(FrozenInstanceError):
        found.params = {}


def test_no_epoch_gives_a_copy_of_the_start() -> None:
    objective, params = small_network()
    found = absa(objective, params, moons(), absa_init(8, 0.1), num_epochs=0)
    assert found.history == ()
    assert all(torch.equal(found.params[name], p) for name, p in params.items())
    assert all(found.params[name].data_ptr() != p.data_ptr() for name, p in params.items())


def test_datasets_and_loaders_train_as_tensors_do() -> None:
    data, whole = moons(), run(num_epochs=2, microbatch_size=16)
    dataset = TensorDataset(*data)
    assert same_bits(run(num_epochs=2, data=dataset, microbatch_size=16), whole)
    assert same_bits(run(num_epochs=2, data=DataLoader(dataset, batch_size=16, shuffle=True)), whole)
    assert not same_bits(
        run(num_epochs=2, microbatch_size=96), whole
    )  # the adversarial share is chosen in each microbatch


@pytest.mark.parametrize("size", [1, 3])
def test_weights_of_examples_count(size: int) -> None:
    data = hk.as_data(torch.tensor([0.0, 10.0, 4.0], dtype=torch.float64))
    data = data.subset(torch.arange(3), torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    start, state = torch.zeros((), dtype=torch.float64), absa_init(size, 1e-7, adversarial_share=0.0)
    found = absa(lambda w, batch: (w - batch) ** 2, start, data, state, num_epochs=1, momentum=0.0)
    assert found.history[0].eigenvalue == pytest.approx(2.0)
    assert float(found.params) / (1e-7 * found.history[0].num_steps) == pytest.approx(2 * 2.5, rel=1e-5)


def test_divergence_is_named() -> None:
    with pytest.raises(hk.NonFiniteError, match="learning rate 1e\\+200"):
        absa(
            lambda w, batch: (w * batch) ** 4,
            torch.ones((), dtype=torch.float64),
            torch.ones(8, dtype=torch.float64),
            absa_init(4, 1e200, adversarial_share=0.0),
            num_epochs=3,
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"state": 3}, TypeError, "^state must"),
        ({"state": absa_init(97, 0.1)}, ValueError, "^state.batch_size must"),
        ({"num_epochs": -1}, ValueError, "^num_epochs must"),
        ({"momentum": 1.0}, ValueError, "^momentum must"),
        ({"weight_decay": -1.0}, ValueError, "^weight_decay must"),
        ({"epsilon": math.nan}, ValueError, "^epsilon must"),
        ({"hessian_examples": 0}, ValueError, "^hessian_examples must"),
        ({"tol": 0.0}, ValueError, "^tol must"),
        ({"mode": "fast"}, ValueError, "^mode must"),
        ({"microbatch_size": 0}, ValueError, "^microbatch_size must"),
        ({"seed": -1}, ValueError, "^seed must"),
        ({"data": [moons()]}, ValueError, "^data must"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(**options)


def test_a_random_loss_is_refused_before_the_first_epoch() -> None:
    _, params = small_network()
    with pytest.raises(ValueError, match="random numbers"):
        absa(
            lambda p, batch: (batch[0] @ p["0.weight"].T).sum(1) * torch.rand(()),
            params,
            moons(),
            absa_init(8, 0.1),
            num_epochs=0,
        )
