"""Losses in float64, whatever dtypes they are written in."""

from __future__ import annotations

import torch

import hvpkit as hk
from hvpkit.curvature.float64 import in_float64


def test_float64_reaches_constants_casts_and_what_modules_hold():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).eval()
    constant = torch.rand(2)

    def loss(params, batch):
        z = torch.func.functional_call(model, params, (batch,))
        return (z.float() * constant).to(torch.float16).sum(1)

    params = {name: p.detach().double() for name, p in model.named_parameters()}
    x = torch.randn(4, 3)
    found = in_float64(loss)(params, x)
    wide = torch.func.functional_call(model.double(), params, (x.double(),)) * constant.double()
    assert found.dtype == torch.float64
    assert torch.equal(found, wide.sum(1))


def test_both_halves_of_an_objective_run_in_float64():
    objective, params = hk.from_module(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss())
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    wide = in_float64(objective)
    outputs = wide.forward({name: p.double() for name, p in params.items()}, batch)
    assert wide.output_loss(outputs, batch).dtype == outputs.dtype == torch.float64
