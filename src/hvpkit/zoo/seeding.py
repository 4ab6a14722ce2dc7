"""Initial parameters from a seed, without a change of the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed


@contextmanager
def seeded(seed: Seed) -> Iterator[None]:
    """Make modules on the CPU with initial parameters that depend on ``seed`` alone, inside ``with``.

    Raises:
        TypeError: ``seed`` is neither an int nor a ``torch.Generator``.
        ValueError: ``seed`` is negative.

    Example:
        >>> with seeded(0):
        ...     first = torch.nn.Linear(2, 2)
        >>> with seeded(0):
        ...     second = torch.nn.Linear(2, 2)
        >>> bool((first.weight == second.weight).all())
        True
    """
    number = resolve_seed(seed)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        yield
