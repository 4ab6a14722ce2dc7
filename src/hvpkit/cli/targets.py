"""What commands work on: a loss with its parameters and data, or a network with its criterion and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import hvpkit as hk
from hvpkit.cli.model_checkpoints import load_into, load_like


@dataclass(frozen=True)
class Target:
    """A loss, its parameters and data, and a title for them."""

    title: str
    loss_fn: Callable[..., Any]
    params: Any
    data: Any

    def load(self, path: Path) -> Target:
        """Return the target at the parameters of a checkpoint.

        Raises:
            ValueError: as :func:`hvpkit.cli.model_checkpoints.load_like`.
        """
        return replace(self, title=f"{self.title}, {path.name}", params=load_like(self.params, path))


@dataclass(frozen=True)
class Network:
    """A network, its criterion, and data: examples to train on and, where there are any, to test with."""

    title: str
    model: nn.Module
    criterion: Callable[..., Any] | None
    data: Any
    test: Any = None

    def load(self, path: Path) -> Network:
        """Load a checkpoint into the network.

        Raises:
            ValueError: as :func:`hvpkit.cli.model_checkpoints.load_into`.
        """
        load_into(self.model, path)
        return replace(self, title=f"{self.title.removesuffix(', not trained')}, {path.name}")

    def target(self, batchnorm: str) -> Target:
        """Return the loss of the network as it is."""
        objective, params = hk.from_module(self.model, self.criterion, batchnorm=batchnorm)
        return Target(self.title, objective, params, self.data)
