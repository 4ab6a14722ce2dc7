"""The built-in problems, ``digits`` and ``cifar10``: networks by name, and their data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hvpkit.zoo import c1, c2, cifar10, cifar_resnet, digits, digits_cnn, resnet18_cifar

NAMES = ("digits", "cifar10")
SINGLE: dict[str, Callable[..., nn.Module]] = {"c1": c1, "c2": c2, "resnet18": resnet18_cifar}
ARCHITECTURES = (
    "c1, c2, resnet18, or resnet20, resnet32, resnet38, resnet56 (any depth 6 n + 2); with -nobn without BatchNorm, "
    "with -nores without residual connections, as resnet20-nobn-nores"
)


@dataclass(frozen=True)
class Classification:
    """A network, its images and their classes."""

    title: str
    model: nn.Module
    data: tuple[Tensor, Tensor]


def network(arch: str, *, seed: int) -> nn.Module:
    """Make a network for CIFAR-10 by its name.

    Raises:
        ValueError: no such architecture.

    Example:
        >>> sum(p.numel() for p in network("resnet20", seed=0).parameters())
        269722
    """
    if arch in SINGLE:
        return SINGLE[arch](seed=seed)
    found = re.fullmatch(r"resnet(\d+)(-nobn)?(-nores)?", arch)
    if found is None:
        raise ValueError(f"arch must be one of {ARCHITECTURES}; got {arch}")
    depth, plain, straight = found.groups()
    return cifar_resnet(int(depth), batchnorm=not plain, residual=not straight, seed=seed)


def builtin(
    name: str,
    *,
    arch: str,
    data_dir: Path | None,
    num_examples: int | None,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> Classification:
    """Load a built-in problem with a network that is not trained.

    The channels of CIFAR-10 are normalised by their means and standard deviations.

    Args:
        name: ``"digits"`` or ``"cifar10"``.
        arch: architecture, for cifar10 only.
        data_dir: folder of CIFAR-10.
        num_examples: use only the first ones; None: all.
        seed: of the initial parameters.
        device: of the network and the images.
        dtype: of the network and the images.

    Raises:
        ValueError: an argument that is wrong or missing, named.
        FileNotFoundError: CIFAR-10 is not in ``data_dir``.
    """
    if name == "cifar10":
        if data_dir is None:
            raise ValueError(
                "cifar10 needs --data-dir, the folder that holds cifar-10-batches-py or its archive"
            )
        model, (x, y) = network(arch, seed=seed), cifar10(data_dir, normalize=True)
        title = f"{arch} on CIFAR-10"
    else:
        model, (x, y) = digits_cnn(seed=seed), digits()
        title = "the network for scikit-learn's digits"
    if num_examples is not None and not 1 <= num_examples <= len(x):
        raise ValueError(f"num_examples must be between 1 and {len(x)}, got {num_examples}")
    x, y = x[:num_examples].to(device, dtype), y[:num_examples].to(device)
    return Classification(title, model.to(device, dtype), (x, y))
