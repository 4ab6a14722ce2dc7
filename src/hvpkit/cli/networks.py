"""The built-in problems: networks by the names of their architectures, and their data."""

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
    "of cifar10: c1, c2, resnet18, or resnet20, resnet32, resnet38, resnet56 (any 6 n + 2), also without BatchNorm or "
    "residual connections: resnet20-nobn, resnet20-nores, resnet20-nobn-nores"
)


@dataclass(frozen=True)
class Classification:
    """A network, and the images and classes that it is for."""

    title: str
    model: nn.Module
    data: tuple[Tensor, Tensor]


def network(arch: str, *, seed: int) -> nn.Module:
    """A network for CIFAR-10.

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
        raise ValueError(f"arch must be one {ARCHITECTURES}; got {arch}")
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
    """A built-in problem with a network by its seed, not trained.

    CIFAR-10 is normalised by its channels' means and standard deviations.

    Args:
        name: ``"digits"`` or ``"cifar10"``.
        arch: of cifar10; digits have their own network.
        data_dir: where CIFAR-10 is.
        num_examples: so many of the first examples; None: all.
        seed: of the initial parameters.
        device: of network and images.
        dtype: likewise.

    Raises:
        ValueError: an argument that is wrong or missing, named.
        FileNotFoundError: no CIFAR-10 there.
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
