"""The training loop of all benchmarks, and the data, augmentation and statistics of image networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk

Data = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


def train_pass(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    *,
    batch_size: int = 64,
    augment: Augment | None = None,
    clip: float = 0.0,
) -> Iterator[tuple[Tensor, int]]:
    """Train for one pass in random order; yield the mean loss and the number of examples after each step.

    The norm of each gradient is at most `clip`, unless that is zero.
    """
    x, y = data
    model.train()
    for order in torch.randperm(len(x), generator=generator).split(batch_size):
        chosen = order.to(x.device)
        inputs = augment(x[chosen], generator) if augment else x[chosen]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), y[chosen])
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield loss.detach(), len(chosen)


def sgd(model: nn.Module, settings: dict[str, Any]) -> torch.optim.SGD:
    """Return SGD with momentum and weight decay."""
    decay = settings["weight_decay"]
    return torch.optim.SGD(model.parameters(), settings["lr"], momentum=0.9, weight_decay=decay)


def train_epoch(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, settings: dict[str, Any], seed: int
) -> float:
    """Train for one pass in an order by `seed`; return the mean loss on the way."""
    steps = train_pass(
        model,
        data,
        optimizer,
        torch.Generator().manual_seed(seed),
        batch_size=settings["batch_size"],
        augment=crop_and_flip if settings["augment"] else None,
        clip=settings.get("clip", 0.0),
    )
    return float(sum(loss * num for loss, num in steps)) / len(data[0])


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images shifted by up to an eighth of their size, half of them mirrored."""
    size, pad = x.shape[-1], x.shape[-1] // 8
    across, down = (torch.randint(2 * pad + 1, (len(x),), generator=generator).to(x.device) for _ in "xy")
    windows = F.pad(x, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    x = windows[torch.arange(len(x), device=x.device), :, down, across]
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def read_images(folder: Path | None, settings: dict[str, Any], device: torch.device) -> tuple[Data, Data]:
    """Return training and test images of CIFAR, or digits, of which those that are not trained on are the test.

    Raises:
        SystemExit: there are fewer than ``settings["examples"]``.
    """
    num = settings["examples"]
    if folder:
        read = hk.zoo.cifar100 if settings.get("data") == "CIFAR-100" else hk.zoo.cifar10
        train, test = (read(folder, train=part, normalize=True) for part in (True, False))
    else:
        x, y = hk.zoo.digits()
        train, test = (x.expand(-1, 3, -1, -1), y), (x[num:].expand(-1, 3, -1, -1), y[num:])
    train = train[0][:num], train[1][:num]
    if len(train[0]) < num:
        raise SystemExit(f"--examples: there are {len(train[0])}, got {num}")
    size = (settings["pixels"],) * 2
    (x, y), (x_test, y_test) = (
        (F.interpolate(images, size=size, mode="area").to(device), classes.to(device))
        for images, classes in (train, test)
    )
    return (x, y), (x_test, y_test)


@torch.no_grad()
def recompute_batchnorm(model: nn.Module, x: Tensor, batch_size: int) -> nn.Module:
    """Return a copy in evaluation mode whose BatchNorm has the mean statistics of batches of all examples."""
    model = deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
    for images in x.split(batch_size):
        model(images)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch_size: int = 1000) -> float:
    """Return the share of examples whose class has the highest score."""
    x, y = data
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(int((model(images).argmax(1) == classes).sum()) for images, classes in batches) / len(x)
