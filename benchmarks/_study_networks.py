"""Networks and examples of the studies by name: small ones, on digits, on digits with a long tail, and on CIFAR-10."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import hvpkit as hk
from _harness import Record
from _training import Data, read_images, train_pass

NUM_CLASSES = 10


def examples(name: str, settings: Record, cifar10: Path | None) -> tuple[Data, Data]:
    """Return the training and test examples of a network.

    Raises:
        SystemExit: it needs CIFAR-10 and there is none, or there are fewer than ``settings["examples"]``.
    """
    if name.startswith("CIFAR-10"):
        if not cifar10:
            raise SystemExit(f"--networks: {name} needs --cifar10 FOLDER")
        return read_images(cifar10, settings, torch.device("cpu"))
    train, (x, y) = read_images(None, {**settings, "pixels": 8}, torch.device("cpu"))
    if "long tail" in name:
        train = long_tailed(*train)
    return (train, (x, y)) if "ResNet" in name else ((train[0][:, :1], train[1]), (x[:, :1], y))


def long_tailed(x: Tensor, y: Tensor) -> Data:
    """Keep the first examples of each class: of class c, 10^(-c/9) times as many as of class 0."""
    num_first = int((y == 0).sum())
    kept = [
        (y == c).nonzero().flatten()[: round(num_first * 10 ** (-c / (NUM_CLASSES - 1)))]
        for c in range(NUM_CLASSES)
    ]
    chosen = torch.cat(kept)
    return x[chosen], y[chosen]


def network(name: str, seed: int, *, batchnorm: bool = True) -> nn.Module:
    """Return a network with its initial parameters.

    Raises:
        SystemExit: a name that is not known.
    """
    if "ResNet-8" in name:
        return hk.zoo.cifar_resnet(8, width=4, batchnorm=batchnorm, seed=seed)
    if "digits CNN" in name:
        return hk.zoo.digits_cnn(seed=seed)
    raise SystemExit(
        f"--networks: there is no {name}; there are digits CNN, digits ResNet-8, CIFAR-10 ResNet-8"
    )


def train_by_adam(
    model: nn.Module, data: Data, settings: Record, num_epochs: int, seed: int
) -> Iterator[int]:
    """Train a model in place; yield the number of steps done, from 0 on."""
    optimizer, source = (
        torch.optim.Adam(model.parameters(), settings["lr"]),
        torch.Generator().manual_seed(seed),
    )
    passes = (
        train_pass(model, data, optimizer, source, batch_size=settings["batch_size"])
        for _ in range(num_epochs)
    )
    yield 0
    for step, _ in enumerate(chain.from_iterable(passes), 1):
        yield step
