"""Random numbers in a loss: detected, to be refused, or fixed by a seed and the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.overrides import FunctionOverrides
from hvpkit.autodiff.pytree import batch_size, flatten

T = TypeVar("T")


def check_repeatable(loss: Callable[[], T], device: torch.device) -> T:
    """Return ``loss()``; raise ValueError if it draws random numbers that differ between calls.

    The global generators are restored. Random numbers of NumPy and Python are not detected.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with _Draws() as draws:
            value = loss()
        if draws.names:
            with _Draws() as again:
                loss()
            if draws.states != again.states:
                raise ValueError(
                    f"loss_fn draws other random numbers in each call ({', '.join(sorted(draws.names))}), so it "
                    "is no function of params; switch that off (training=False, or a rate of 0), let "
                    "hvpkit.from_module(..., dropout=seed) fix the masks of nn.Dropout, or draw from a "
                    "torch.Generator that is seeded in each call"
                )
    return value


class _Draws(TorchDispatchMode):
    """Recorder of the random operators called inside, and of the generators' states before each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.states: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(str(func.overloadpacket))
            given = kwargs.get("generator")
            generators = (
                (torch.default_generator, *torch.cuda.default_generators) if given is None else (given,)
            )
            self.states += [generator.get_state().tolist() for generator in generators]
        return func(*args, **kwargs)


def fixed_dropout(seed: int, batch: Batch) -> FunctionOverrides:
    """Make each dropout mask a function of the seed, the example, and the dropout's position in the call order.

    Examples are identified by their content, so that a mask does not depend on the batch. Dropout inside fused
    functions (attention, recurrent layers) stays random.
    """
    examples = _keys(batch)
    low, high = (torch.tensor(part & _MASK, device=examples.device) for part in (seed, seed >> 32))
    stream = _mix(low ^ _mix(high))
    dropouts = itertools.count()

    def dropout(
        input: Tensor, *, p: float, training: bool, inplace: bool, by_channel: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        if input.ndim == 0 or len(input) != len(examples):
            raise ValueError(
                f"model: dropout={seed} fixes a mask for each example, but a dropout is applied to a tensor of "
                f"shape {list(input.shape)} in a batch of {len(examples)}: its first dimension must be the "
                "examples (batch_first=True)"
            )
        shape = input.shape[1:2] if by_channel else input.shape[1:]
        positions = _mix(_mix(stream + next(dropouts)) + torch.arange(prod(shape), device=examples.device))
        kept = _mix(examples.unsqueeze(1) ^ positions) >= p * 2**32
        kept = kept.view(len(input), *shape, *(1,) * (input.ndim - 1 - len(shape)))
        scaled = torch.where(kept, input / (1 - p), 0.0) if p < 1 else torch.zeros_like(input)
        return input.copy_(scaled) if inplace else scaled

    channels = partial(dropout, by_channel=True)
    return FunctionOverrides(
        {F.dropout: dropout} | dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), channels)
    )


def _keys(batch: Batch) -> Tensor:
    """Hash the content of each example to a number, ``[B]``: the bits of all its tensors."""
    leaves, _ = flatten(batch)
    keys = torch.zeros(batch_size(batch), dtype=torch.int64, device=leaves[0].device)
    for leaf in leaves:
        real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        rows = real.detach().reshape(len(keys), -1).contiguous()
        bits = rows.view(_INTEGERS[rows.itemsize]).to(torch.int64)
        positions = _mix(torch.arange(bits.shape[1], device=keys.device))
        keys = _mix(keys + _mix(bits ^ (bits >> 32) ^ positions).sum(dim=1))
    return keys


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """Hash to 32 bits, stored in int64 so that no multiplication overflows.

    Constants of C. Wellons, https://github.com/skeeto/hash-prospector.
    """
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
    return x ^ (x >> 15)
