"""The built-in problems, ``digits``, ``cifar10`` and ``cifar100``: networks by name, and their data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit.cli.targets import Network
from hvpkit.zoo import c1, c2, cifar10, cifar100, cifar_resnet, digits, digits_cnn, resnet18_cifar

NAMES = ("digits", "cifar10", "cifar100")
CIFAR: dict[str, tuple[str, int, Callable[..., tuple[Tensor, Tensor]]]] = {
    "cifar10": ("CIFAR-10", 10, cifar10),
    "cifar100": ("CIFAR-100", 100, cifar100),
}
"""Title, number of classes and reader of the data sets that lie in a folder."""

SINGLE: dict[str, Callable[..., nn.Module]] = {"c1": c1, "c2": c2, "resnet18": resnet18_cifar}
ARCHITECTURES = (
    "c1, c2, resnet18, or resnet20, resnet32, resnet38, resnet56 (any depth 6 n + 2); with -nobn without BatchNorm, "
    "with -nores without residual connections, as resnet20-nobn-nores"
)


def network(arch: str, *, num_classes: int = 10, seed: int) -> nn.Module:
    """Make a network for CIFAR by its name.

    Raises:
        ValueError: no such architecture.

    Example:
        >>> sum(p.numel() for p in network("resnet20", seed=0).parameters())
        269722
    """
    if arch in SINGLE:
        return SINGLE[arch](num_classes=num_classes, seed=seed)
    found = re.fullmatch(r"resnet(\d+)(-nobn)?(-nores)?", arch)
    if found is None:
        raise ValueError(f"arch must be one of {ARCHITECTURES}; got {arch}")
    depth, plain, straight = found.groups()
    return cifar_resnet(
        int(depth), batchnorm=not plain, residual=not straight, num_classes=num_classes, seed=seed
    )


def builtin(
    name: str,
    *,
    arch: str,
    data_dir: Path | None,
    num_examples: int | None,
    seed: int,
    device: str,
    dtype: torch.dtype,
    with_test: bool = False,
) -> Network:
    """Load a built-in problem with a network that is not trained.

    The channels of CIFAR are normalised by their means and standard deviations over the training images.

    Args:
        name: one of :data:`NAMES`.
        arch: architecture, for CIFAR only.
        data_dir: folder of CIFAR.
        num_examples: use only the first ones; None: all.
        seed: of the initial parameters.
        device: of the network and the images.
        dtype: of the network and the images.
        with_test: also load test images: those of CIFAR, or the digits that ``num_examples`` leaves.

    Raises:
        ValueError: an argument that is wrong or missing, named.
        FileNotFoundError: CIFAR is not in ``data_dir``.
    """
    test = None
    if name in CIFAR:
        published, num_classes, read = CIFAR[name]
        if data_dir is None:
            raise ValueError(
                f"{name} needs --data-dir, the folder that holds {published} as published, unpacked or not"
            )
        model, (x, y) = network(arch, num_classes=num_classes, seed=seed), read(data_dir, normalize=True)
        test = read(data_dir, train=False, normalize=True) if with_test else None
        title = f"{arch} on {published}"
    else:
        model, (x, y) = digits_cnn(seed=seed), digits()
        title = "the network for scikit-learn's digits"
    if num_examples is not None and not 1 <= num_examples <= len(x):
        raise ValueError(f"num_examples must be between 1 and {len(x)}, got {num_examples}")
    if with_test and test is None and len(x[num_examples or len(x) :]):
        test = x[num_examples:], y[num_examples:]
    data, test = (
        None if part is None else (part[0].to(device, dtype), part[1].to(device))
        for part in ((x[:num_examples], y[:num_examples]), test)
    )
    return Network(f"{title}, not trained", model.to(device, dtype), F.cross_entropy, data, test)
