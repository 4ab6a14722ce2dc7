"""Random vectors, each a pure function of a seed and a stream number."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.typing import Seed


def resolve_seed(seed: Seed) -> int:
    """Return an integer seed: ``seed`` itself, or one number drawn from it if it is a generator.

    Raises:
        TypeError: ``seed`` is neither an int nor a ``torch.Generator``.
        ValueError: ``seed`` is negative.
    """
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (), generator=seed, device=seed.device).item())
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int or a torch.Generator, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return int(seed)


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator for stream number ``stream`` of ``seed``; streams are independent of each other."""
    return _generators(seed, stream, 1)[0]


def _generators(seed: int, stream: int, count: int) -> list[torch.Generator]:
    """Return independent generators for the pieces of a stream; the first ones do not depend on how many there are."""
    words = np.random.SeedSequence((seed, stream)).generate_state(count, np.uint64).tolist()
    return [torch.Generator().manual_seed(word) for word in words]


PIECE = 2**16
"""Numbers that are drawn by one generator: a rank draws only the pieces that its part of a vector touches."""


def normal_vector(
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    stream: int = 0,
    part: slice | None = None,
) -> Tensor:
    """Draw a standard normal vector ``[n]`` on the CPU and move it: the same numbers on every device.

    With ``part`` only those entries are returned, the same numbers again, and few more are drawn.

    Example:
        >>> import torch
        >>> normal_vector(3, dtype=torch.float64, device=torch.device("cpu"), seed=0).shape
        torch.Size([3])
    """
    sample_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    part = slice(0, n) if part is None else part
    kept = torch.empty(part.stop - part.start, dtype=sample_dtype, device="cpu")
    for number, random in enumerate(_generators(seed, stream, -(-part.stop // PIECE))):
        start, stop = number * PIECE, min((number + 1) * PIECE, n)
        first, last = max(start, part.start), min(stop, part.stop)
        if first < last:
            drawn = torch.randn(stop - start, generator=random, dtype=sample_dtype, device="cpu")
            kept[first - part.start : last - part.start] = drawn[first - start : last - start]
    return kept.to(device, dtype)
