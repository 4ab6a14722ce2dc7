"""A multilayer perceptron, and a convolutional network for 8 x 8 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.zoo.seeding import seeded


def mlp(
    *,
    in_features: int = 64,
    hidden: Sequence[int] = (64, 64),
    num_classes: int = 10,
    activation: Callable[[], nn.Module] = nn.GELU,
    seed: Seed = 0,
) -> nn.Sequential:
    """Make a multilayer perceptron for inputs of any shape with ``in_features`` entries.

    The defaults fit :func:`~hvpkit.zoo.digits`. PyTorch's default initialisation.

    Args:
        in_features: entries of one example; an image is flattened.
        hidden: widths of the hidden layers; none makes the model linear.
        num_classes: number of outputs.
        activation: makes the module between two layers. The default is smooth; ReLU has no second derivative, so
            that a ReLU network's Hessian has no term of the activations' curvature.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: a width that is not positive.

    Example:
        >>> sum(p.numel() for p in mlp(in_features=3072, hidden=[32]).parameters())
        98666
    """
    if not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a list of widths, as [64, 64], got {hidden!r}")
    if not callable(activation):
        raise TypeError(f"activation must make a module, as torch.nn.GELU does, got {activation!r}")
    widths = [check_count("in_features", in_features, 1)]
    widths += [check_count(f"hidden[{i}]", width, 1) for i, width in enumerate(hidden)]
    widths.append(check_count("num_classes", num_classes, 1))
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), *linear_layers(widths, activation))


def digits_cnn(width: int = 8, *, seed: Seed = 0) -> nn.Sequential:
    """Make two convolutions with BatchNorm and a linear layer, for 8 x 8 images in 10 classes.

    For :func:`~hvpkit.zoo.digits`.

    Args:
        width: channels of the first convolution; the second has twice as many.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: ``width`` is not positive.

    Example:
        >>> sum(p.numel() for p in digits_cnn().parameters())
        1922
    """
    check_count("width", width, 1)
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )


def linear_layers(widths: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Make linear layers from each width to the next, with an activation between them."""
    return [module for pair in pairwise(widths) for module in (activation(), nn.Linear(*pair))][1:]
