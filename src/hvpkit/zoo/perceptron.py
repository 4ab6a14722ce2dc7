"""A multilayer perceptron."""

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
    """Linear layers with an activation between them, for inputs of any shape with ``in_features`` entries.

    The defaults fit :func:`~hvpkit.zoo.digits_problem`. torch's default initialisation.

    Args:
        in_features: entries of one example; an image is flattened.
        hidden: widths of the hidden layers; none makes the model linear.
        num_classes: how many outputs.
        activation: makes the module between two layers; a smooth one by default, as the Hessian of a ReLU
            network leaves the activation's own curvature out.
        seed: of the initial parameters; the global random state stays as it is.

    Raises:
        ValueError: a width that is not positive.

    Example:
        >>> sum(p.numel() for p in mlp(in_features=3072, hidden=[32]).parameters())
        98666
    """
    widths = [check_count("in_features", in_features, 1)]
    widths += [check_count(f"hidden[{i}]", width, 1) for i, width in enumerate(hidden)]
    widths.append(check_count("num_classes", num_classes, 1))
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), *linear_layers(widths, activation))


def linear_layers(widths: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Linear maps from each width to the next, with an activation between them."""
    return [module for pair in pairwise(widths) for module in (activation(), nn.Linear(*pair))][1:]
