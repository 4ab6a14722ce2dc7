import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LRScheduler, SequentialLR

from hvpkit.train.knee import KneeLR, knee_lr

SHAPES = [(0, 4, 10), (3, 4, 10), (3, 0, 10), (0, 0, 5), (10, 0, 20)]
STEPS = {"warmup_steps": 3, "explore_steps": 4, "total_steps": 12}


def optimizer(*rates, tensor=False):
    groups = [{"params": [torch.ones(1, requires_grad=True)], "lr": rate} for rate in rates]
    for group in groups:
        if tensor:
            group["lr"] = torch.tensor(group["lr"])
    return torch.optim.Adam(groups, foreach=False, capturable=False)


def rates(opt):
    return [float(group["lr"]) for group in opt.param_groups]


def advance(opt, scheduler, num_steps):
    seen = []
    for _ in range(num_steps):
        seen.append(rates(opt))
        opt.step()
        scheduler.step()
    return seen


def expected(num_steps, *peaks, first=0, **steps):
    return [[knee_lr(s, peak_lr=peak, **steps) for peak in peaks] for s in range(first, first + num_steps)]


class Published:
    """The authors' scheduler, github.com/nikhil-iyer-97/wide-minima-density-hypothesis, knee_lr_schedule.py."""

    def __init__(self, peak_lr, warmup_steps, explore_steps, total_steps):
        self.peak_lr, self.warmup_steps, self.explore_steps = peak_lr, warmup_steps, explore_steps
        self.decay_steps = total_steps - (explore_steps + warmup_steps)
        self.current_step = 1

    def get_lr(self):
        if self.current_step <= self.warmup_steps:
            return self.peak_lr * self.current_step / self.warmup_steps
        if self.current_step <= self.explore_steps + self.warmup_steps:
            return self.peak_lr
        slope = -1 * self.peak_lr / self.decay_steps
        over = self.current_step - (self.explore_steps + self.warmup_steps)
        return max(0.0, self.peak_lr + slope * over)


@pytest.mark.parametrize(("warmup", "explore", "total"), [*SHAPES, (3, 4, 12), (1, 1, 3), (2, 3, 5)])
def test_rates_of_all_steps_are_those_of_the_published_scheduler(warmup, explore, total):
    published = Published(0.3, warmup, explore, total)
    for step in range(total):
        found = knee_lr(step, peak_lr=0.3, warmup_steps=warmup, explore_steps=explore, total_steps=total)
        assert found == pytest.approx(published.get_lr(), abs=1e-15)
        published.current_step += 1


@pytest.mark.parametrize(("warmup", "explore", "total"), SHAPES)
def test_rate_interpolates_the_knots(warmup, explore, total):
    knots = ([0] if warmup else []) + [warmup, warmup + explore, total]
    values = ([0] if warmup else []) + [0.3, 0.3, 0]
    for step in np.arange(0, total + 3, 0.25):
        found = knee_lr(
            float(step), peak_lr=0.3, warmup_steps=warmup, explore_steps=explore, total_steps=total
        )
        assert found == pytest.approx(np.interp(step + 1, knots, values), abs=1e-15)


def test_ends_of_the_phases():
    def at(step):
        return knee_lr(step, peak_lr=0.3, **STEPS)

    assert (at(0), at(2), at(6), at(11), at(12), at(1000)) == (0.3 / 3, 0.3, 0.3, 0.0, 0.0, 0.0)
    assert 0.3 > at(7) > at(10) > 0


def test_without_decay_the_peak_holds_up_to_the_last_step():
    found = [knee_lr(s, peak_lr=0.3, warmup_steps=2, explore_steps=3, total_steps=5) for s in range(7)]
    assert found == [0.15, 0.3, 0.3, 0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step", -1, ValueError),
        ("step", math.nan, ValueError),
        ("step", "3", TypeError),
        ("step", True, TypeError),
        ("peak_lr", 0.0, ValueError),
        ("peak_lr", math.inf, ValueError),
        ("peak_lr", "x", TypeError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", 1.5, TypeError),
        ("explore_steps", -1, ValueError),
        ("total_steps", 6, ValueError),
        ("total_steps", 0, ValueError),
    ],
)
def test_bad_arguments_are_named(name, value, error):
    with pytest.raises(error, match=f"^{name} must"):
        knee_lr(**{"step": 1, "peak_lr": 0.3, **STEPS, name: value})


@pytest.mark.parametrize("tensor", [False, True])
def test_scheduler_sets_the_schedule_of_each_group(tensor):
    opt = optimizer(0.5, 0.25, tensor=tensor)
    scheduler = KneeLR(opt, **STEPS)
    assert isinstance(scheduler, LRScheduler)
    if tensor:
        held = opt.param_groups[0]["lr"]
    seen = advance(opt, scheduler, 15)
    np.testing.assert_allclose(seen, expected(15, 0.5, 0.25, **STEPS), rtol=1e-7 if tensor else 0)
    assert scheduler.get_last_lr() == [0.0, 0.0]
    if tensor:
        assert opt.param_groups[0]["lr"] is held


@pytest.mark.parametrize(("peak_lr", "peaks"), [(0.2, (0.2, 0.2)), ([0.2, 0.1], (0.2, 0.1))])
def test_peaks_replace_the_rates_of_the_groups(peak_lr, peaks):
    opt = optimizer(1.0, 2.0)
    scheduler = KneeLR(opt, peak_lr=peak_lr, **STEPS)
    assert advance(opt, scheduler, 13) == expected(13, *peaks, **STEPS)


@pytest.mark.parametrize(
    "order", [("optimizer", "scheduler"), ("scheduler", "optimizer"), ("scheduler",), ("optimizer first",)]
)
@pytest.mark.parametrize(("warmup", "done"), [(3, 2), (3, 9), (0, 9), (0, 1)])
@pytest.mark.parametrize("tensor", [False, True])
def test_state_goes_on_in_whatever_order_it_is_loaded(order, warmup, done, tensor):
    steps = {**STEPS, "warmup_steps": warmup}
    opt = optimizer(0.5, 0.25, tensor=tensor)
    scheduler = KneeLR(opt, **steps)
    advance(opt, scheduler, done)
    file = io.BytesIO()
    torch.save({"scheduler": scheduler.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = optimizer(0.5, 0.25, tensor=tensor)
    if order == ("optimizer first",):
        other.load_state_dict(saved["optimizer"])
    again = KneeLR(other, **steps)
    if order[0] == "optimizer":
        other.load_state_dict(saved["optimizer"])
    held = other.param_groups[0]["lr"]
    again.load_state_dict(saved["scheduler"])
    assert other.param_groups[0]["lr"] is held or not tensor
    if order == ("scheduler", "optimizer"):
        other.load_state_dict(saved["optimizer"])
    assert again.last_epoch == done
    found = advance(other, again, 6)
    np.testing.assert_allclose(found, expected(6, 0.5, 0.25, first=done, **steps), rtol=1e-6, atol=1e-15)


def test_rounding_of_a_tensor_rate_does_not_add_up():
    steps = {"warmup_steps": 700, "explore_steps": 3, "total_steps": 2000}
    opt = optimizer(0.3, tensor=True)
    found = advance(opt, KneeLR(opt, **steps), 2001)
    np.testing.assert_allclose(found, expected(2001, 0.3, **steps), rtol=1e-7)


def test_resumes_from_a_last_epoch():
    opt = optimizer(0.5)
    advance(opt, KneeLR(opt, **STEPS), 5)
    other = optimizer(0.5)
    other.load_state_dict(opt.state_dict())
    assert advance(other, KneeLR(other, last_epoch=8, **STEPS), 4) == expected(4, 0.5, first=9, **STEPS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_copies_go_on_alone(copied):
    opt = optimizer(0.5)
    scheduler = KneeLR(opt, **STEPS)
    advance(opt, scheduler, 5)
    other = copied(scheduler)
    assert advance(other.optimizer, other, 6) == expected(6, 0.5, first=5, **STEPS)
    assert rates(opt) == expected(1, 0.5, first=5, **STEPS)[0]


def test_in_a_sequence_before_and_after_another():
    opt = optimizer(0.5)
    knee = {"explore_steps": 2, "total_steps": 6}
    first, last = KneeLR(opt, **STEPS), KneeLR(opt, peak_lr=0.1, **knee)
    scheduler = SequentialLR(opt, [first, ConstantLR(opt, factor=0.5, total_iters=99), last], [12, 14])
    found = advance(opt, scheduler, 20)
    assert found[:12] == expected(12, 0.5, **STEPS)
    assert found[14:] == expected(6, 0.1, **knee)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("knee_first", [True, False])
def test_factors_of_a_chain_multiply(warmup, knee_first):
    steps = {**STEPS, "warmup_steps": warmup}
    opt = optimizer(0.5)
    parts = [KneeLR(opt, **steps), ExponentialLR(opt, 0.9)]
    scheduler = ChainedScheduler(parts if knee_first else parts[::-1])
    found = np.array(advance(opt, scheduler, 14))[:, 0]
    factors = 0.9 ** np.arange(14)
    np.testing.assert_allclose(
        found, np.array(expected(14, 0.5, **steps))[:, 0] * factors, rtol=1e-13, atol=1e-17
    )


def test_a_factor_from_the_first_step_on_stays_until_it_is_taken_back():
    steps = {"explore_steps": 3, "total_steps": 8}
    opt = optimizer(0.5)
    scheduler = ChainedScheduler([KneeLR(opt, **steps), ConstantLR(opt, factor=0.25, total_iters=5)])
    found = np.array(advance(opt, scheduler, 8))[:, 0]
    factors = np.where(np.arange(8) < 5, 0.25, 1.0)
    np.testing.assert_allclose(found, np.array(expected(8, 0.5, **steps))[:, 0] * factors, rtol=1e-14)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_chain_goes_on_from_its_state(optimizer_first, tensor):
    def chain():
        opt = optimizer(0.5, tensor=tensor)
        return opt, ChainedScheduler([KneeLR(opt, **STEPS), ExponentialLR(opt, 0.9)])

    opt, scheduler = chain()
    advance(opt, scheduler, 9)
    saved = [copy.deepcopy(opt.state_dict()), copy.deepcopy(scheduler.state_dict())]
    whole = advance(opt, scheduler, 4)
    other, again = chain()
    parts = [(other, saved[0]), (again, saved[1])]
    for part, state in parts if optimizer_first else parts[::-1]:
        part.load_state_dict(state)
    assert advance(other, again, 4) == whole


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"peak_lr": [0.1]}, "peak_lr"),
        ({"peak_lr": [0.1, -0.1]}, "peak_lr"),
        ({"peak_lr": -0.1}, "peak_lr"),
        ({"total_steps": 6}, "total_steps"),
        ({"explore_steps": -1}, "explore_steps"),
    ],
)
def test_scheduler_refuses_before_it_touches_the_optimizer(arguments, name):
    opt = optimizer(0.5, 0.25)
    with pytest.raises(ValueError, match=f"^{name} must"):
        KneeLR(opt, **{**STEPS, **arguments})
    assert rates(opt) == [0.5, 0.25]
    assert "initial_lr" not in opt.param_groups[0]


def test_scheduler_wants_an_optimizer():
    with pytest.raises(TypeError, match=r"^optimizer must"):
        KneeLR(torch.nn.Linear(1, 1), **STEPS)
