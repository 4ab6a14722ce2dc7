"""The demonstration: train a small network on digits, find both ends of its Hessian's spectrum, draw them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.files import atomic_write

Report = Callable[[int, float], object]
"""Called after each epoch with its number and its mean loss."""


def _silent(_epoch: int, _loss: float) -> None:
    """Reports nothing."""


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    target_loss: float = 0.01,
    max_epochs: int = 60,
    seed: int = 0,
    report: Report = _silent,
) -> float:
    """Trains ``model`` in place with Adam until its mean loss in training is low; returns that loss.

    Args:
        model: a classifier.
        data: inputs and classes.
        target_loss: mean training loss of an epoch at which to stop.
        max_epochs: epochs, at most.
        seed: of the order of the examples.
        report: called with the number of the epoch and its loss.
    """
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    mean = float("inf")
    for epoch in range(1, max_epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            value = F.cross_entropy(model(x[chosen]), y[chosen])
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(chosen)
        mean = total / len(x)
        report(epoch, mean)
        if mean <= target_loss:
            break
    return mean


def run(
    out: Path,
    *,
    tol: float = 1e-2,
    seed: int = 0,
    report: Report = _silent,
    monitor: Callable[[hk.Progress], object] | None = None,
) -> tuple[hk.ExtremeResult, dict[str, Any]]:
    """Trains, solves, and writes ``extremes.json`` and ``extremes.png`` into the folder ``out``.

    Returns:
        The result, and what it was computed on.
    """
    import matplotlib

    from hvpkit import plots
    from hvpkit.zoo import digits, digits_cnn

    matplotlib.use("agg")
    out.mkdir(parents=True, exist_ok=True)
    data = digits()
    model = digits_cnn(seed=seed)
    train(model, data, seed=seed, report=report)
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="eval")
    H = hk.hessian(objective, params, data)
    ex = hk.extreme_eigenvalues(H, tol=tol, seed=seed, monitor=monitor)
    problem = {
        "data": "scikit-learn digits",
        "num_examples": H.num_examples,
        "model": "convolutional network with BatchNorm",
        "num_parameters": H.n,
        "loss": "cross entropy",
        "mean_loss": float(hk.loss(objective, params, data)),
        "batchnorm": objective.batchnorm,
        "mode": H.mode,
        "dtype": str(H.dtype).removeprefix("torch."),
        "seed": seed,
    }
    with atomic_write(out / "extremes.json") as draft:
        draft.write_text(json.dumps({**ex.to_dict(), "problem": problem}, indent=2))
    title = f"Hessian of the mean loss over all {H.num_examples:,} digits, {H.n:,} parameters"
    figure = plots.extremes(ex, objective, params, data, title=title)
    with atomic_write(out / "extremes.png") as draft:
        figure.savefig(draft, dpi=150, format="png")
    return ex, problem
