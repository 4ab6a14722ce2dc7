"""Initial parameters from a seed, without a change of the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    with torch.device("cpu"), _DrawsFrom(torch.Generator().manual_seed(number)):
        yield


class _DrawsFrom(TorchDispatchMode):
    """Context in which this thread draws from another generator than the global one."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self.generator}
            if all(argument.name != "generator" for argument in func._schema.arguments):
                func = getattr(func.overloadpacket, _WITH_GENERATOR[func._overloadname])
        return func(*args, **kwargs)


_WITH_GENERATOR = {"default": "generator", "low": "low_generator"}
"""Overloads of torch's operators, and those of the same that take a generator."""
