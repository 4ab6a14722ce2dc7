"""A short training loop for classifiers: Adam on the cross entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_monitor, check_positive, check_type

LEARNING_RATE = 3e-3
"""Of Adam; chosen by feel: the networks of the zoo reach a loss of 0.01 on the digits in 10 to 20 epochs."""

BATCH_SIZE = 64
"""Examples of a step; chosen by feel."""


def train_classifier(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    target_loss: float = 0.01,
    max_epochs: int = 60,
    seed: Seed = 0,
    monitor: Callable[[int, float], object] | None = None,
) -> float:
    """Train ``model`` in place with Adam until the mean loss of an epoch is low, and return that loss.

    Args:
        model: a classifier; left in training mode.
        data: inputs and classes.
        target_loss: mean training loss of an epoch at which to stop.
        max_epochs: the most epochs.
        seed: of the order of the examples.
        monitor: called after each epoch with its number, from 1, and its mean loss.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named.

    Example:
        >>> from hvpkit.zoo import digits, digits_cnn
        >>> train_classifier(digits_cnn(), digits(), max_epochs=3) < 1.0
        True
    """
    check_positive("target_loss", target_loss)
    check_count("max_epochs", max_epochs, 1)
    check_type("model", model, nn.Module)
    check_monitor(monitor, "monitor(epoch, loss)")
    if not isinstance(data, tuple) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise TypeError("data must be the pair (inputs, classes) of two tensors")
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    source = torch.Generator().manual_seed(resolve_seed(seed))
    model.train()
    mean = float("inf")
    for epoch in range(1, max_epochs + 1):
        total = 0.0
        for indices in torch.randperm(len(x), generator=source).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[indices]), y[indices])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(indices)
        mean = total / len(x)
        if monitor is not None:
            monitor(epoch, mean)
        if mean <= target_loss:
            break
    return mean
