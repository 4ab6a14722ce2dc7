"""Modules are found wherever a loss holds them, and named where they are known to make a check fail."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import hvpkit as hk
from hvpkit.diagnostics.known_causes import REMEDIES, find_suspects, held

MODEL = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))


def through_a_global(params, batch):
    return torch.func.functional_call(MODEL, params, batch)


def through_a_closure():
    model = MODEL
    return lambda params, batch: torch.func.functional_call(model, params, batch)


def through_nested_closures():
    inner = through_a_closure()

    def loss(params, batch):
        return inner(params, batch).sum()

    return loss


class Trainer:
    def __init__(self) -> None:
        self.model, self.numbers = MODEL, [1, 2]

    def loss(self, params, batch):
        return torch.func.functional_call(self.model, params, batch)

    def __call__(self, params, batch):
        return self.loss(params, batch)


@pytest.mark.parametrize(
    "loss_fn",
    [
        through_a_global,
        through_a_closure(),
        through_nested_closures(),
        partial(torch.func.functional_call, MODEL),
        partial(through_a_global, model=MODEL),
        Trainer().loss,
        Trainer(),
        hk.Objective(through_a_closure(), torch.add),
        MODEL.forward,
        MODEL,
    ],
)
def test_modules_are_found(loss_fn):
    assert list(held(loss_fn, nn.Module)) == [MODEL]


@pytest.mark.parametrize("loss_fn", [None, torch.sum, len, 3, lambda p: p, nn.Linear])
def test_where_there_are_none_none_are_found(loss_fn):
    assert list(held(loss_fn, nn.Module)) == []


def test_a_loss_that_holds_itself_ends():
    def loss(params):
        return loss if params else MODEL

    assert list(held(loss, nn.Module)) == [MODEL]


def suspects(check: str, *modules: nn.Module) -> list[str]:
    found, mend = find_suspects(check, nn.Sequential(*modules))
    assert (mend == REMEDIES[check]) == (not found)
    return list(found)


class MaxNorm(nn.Module):
    max_norm = 1.0


WEIGHT_NORM = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
SPECTRAL_NORM = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("check", "module", "name"),
    [
        ("repeatable", nn.Dropout(0.5), "0 (Dropout)"),
        ("repeatable", nn.AlphaDropout(0.5), "0 (AlphaDropout)"),
        ("repeatable", nn.RReLU(), "0 (RReLU)"),
        ("repeatable", nn.MultiheadAttention(2, 1, dropout=0.1), "0 (MultiheadAttention)"),
        ("repeatable", nn.FractionalMaxPool2d(2, output_size=2).eval(), "0 (FractionalMaxPool2d)"),
        ("repeatable", SPECTRAL_NORM, "0.parametrizations.weight.0 (_SpectralNorm)"),
        ("repeatable", nn.Embedding(3, 2, max_norm=1.0), "0 (Embedding)"),
        ("symmetric", nn.Embedding(3, 2, padding_idx=0), "0 (Embedding)"),
        ("differences", WEIGHT_NORM, "0.parametrizations.weight.0 (_WeightNorm)"),
        ("symmetric", nn.LayerNorm(2), "0 (LayerNorm)"),
        ("symmetric", nn.InstanceNorm1d(2), "0 (InstanceNorm1d)"),
        ("symmetric", nn.BatchNorm1d(2), "0 (BatchNorm1d)"),
        ("batching", nn.BatchNorm2d(2), "0 (BatchNorm2d)"),
        ("batching", nn.BatchNorm2d(2, track_running_stats=False).eval(), "0 (BatchNorm2d)"),
    ],
)
def test_a_module_is_suspected_of_what_it_is_known_for(check, module, name):
    assert suspects(check, module) == [name]


@pytest.mark.parametrize(
    ("check", "module"),
    [
        ("repeatable", nn.Dropout(0.5).eval()),
        ("repeatable", nn.Dropout(0.0)),
        ("repeatable", nn.MultiheadAttention(2, 1)),
        ("repeatable", nn.LayerNorm(2)),
        ("symmetric", nn.Embedding(3, 2)),
        ("symmetric", nn.BatchNorm1d(2).eval()),
        ("symmetric", nn.GroupNorm(1, 2)),
        ("batching", nn.BatchNorm1d(2).eval()),
        ("batching", nn.LayerNorm(2)),
        ("finite", nn.LayerNorm(2)),
    ],
)
def test_others_are_not(check, module):
    assert suspects(check, module) == []


def test_each_mend_is_said_once():
    found, mend = find_suspects(
        "symmetric", nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2), nn.Embedding(3, 2, 0))
    )
    assert found == ("0 (LayerNorm)", "1 (LayerNorm)", "2 (Embedding)")
    assert mend.count("jacrev") == mend.count("padding") == 1
