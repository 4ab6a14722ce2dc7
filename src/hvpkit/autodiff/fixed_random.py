"""Random numbers of a model, fixed by a seed and the example: masks of dropout, noise, samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.overrides import FunctionOverrides, Table
from hvpkit.autodiff.pytree import batch_size, flatten


@contextmanager
def fixed_random_numbers(seed: int, batch: Batch) -> Iterator[None]:
    """Make random numbers functions of the seed, the example, and the position of their call in the call order.

    Examples are identified by their content, so that their numbers do not depend on the batch. Fixed are dropout,
    and all uniform, normal, exponential and Bernoulli numbers and integers whose first dimension is the examples.
    Others, and those of an explicit generator, stay as they are: :func:`hvpkit.autodiff.randomness.check_repeatable`
    refuses them if they differ between calls.
    """
    bits = _Bits(seed, batch)
    with FunctionOverrides(_functions(bits)), _FixedDraws(bits):
        yield


class _Bits:
    """Source of 32 random bits ``[B, *shape]`` for each example, others in each call."""

    def __init__(self, seed: int, batch: Batch) -> None:
        self.seed = seed
        with torch._C._DisableFuncTorch():  # no wrappers of a transform around, for what operators are given
            self.examples = _keys(batch)
            low, high = (
                torch.tensor(part & _MASK, device=self.examples.device) for part in (seed, seed >> 32)
            )
            self._seed = _mix(low ^ _mix(high))
        self._calls = itertools.count()

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draw ``[B, *shape]`` of int64 in ``[0, 2^32)``."""
        places = torch.arange(prod(shape), device=self.examples.device)
        positions = _mix(_mix(self._seed + next(self._calls)) + places)
        return _mix(self.examples.unsqueeze(1) ^ positions).view(len(self), *shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw ``[B, *shape]`` of float64 in ``(0, 1)``."""
        return (self.draw(shape) + 0.5) / 2**32


def _functions(bits: _Bits) -> Table:
    """Return overrides of the functions that call other operators than those in ``_DRAWS``, or are faster so."""

    def check_examples(input: Tensor) -> None:
        if input.ndim == 0 or len(input) != len(bits):
            raise ValueError(
                f"model: dropout={bits.seed} fixes a mask for each example, but a dropout is applied to a tensor of "
                f"shape {list(input.shape)} in a batch of {len(bits)}: its first dimension must be the "
                "examples (batch_first=True)"
            )

    def dropout(
        input: Tensor, *, p: float, training: bool, inplace: bool, by_channel: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        check_examples(input)
        shape = input.shape[1:2] if by_channel else input.shape[1:]
        kept = bits.draw(shape) >= p * 2**32
        kept = kept.view(len(input), *shape, *(1,) * (input.ndim - 1 - len(shape)))
        scaled = torch.where(kept, input / (1 - p), 0.0) if p < 1 else torch.zeros_like(input)
        return input.copy_(scaled) if inplace else scaled

    def rrelu(input: Tensor, *, lower: float, upper: float, training: bool, inplace: bool) -> Tensor:
        if not training:
            return F.rrelu(input, lower, upper, training, inplace)
        check_examples(input)
        factors = (lower + (upper - lower) * bits.uniform(input.shape[1:])).to(input.dtype)
        result = torch.where(input > 0, input, input * factors)
        return input.copy_(result) if inplace else result

    def recurrent(layer: Callable[..., Any], *args: Any) -> Any:
        # dropout and training, after the number of layers: packed sequences have one argument more
        rate, training = args[5:7] if isinstance(args[6], bool) else args[6:8]
        if training and rate > 0:
            raise ValueError(
                f"model: dropout={bits.seed} does not fix masks inside a recurrent layer, whose first dimension is "
                "time; set its dropout to 0, or put nn.Dropout between layers"
            )
        return layer(*args)

    channels = partial(dropout, by_channel=True)
    layers = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
    return {
        F.dropout: dropout,
        F.rrelu: rrelu,
        **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), channels),
        **{layer: partial(recurrent, layer) for layer in layers},
    }


class _FixedDraws(TorchDispatchMode):
    """Context in which the random operators in ``_DRAWS`` are functions of fixed uniform numbers."""

    def __init__(self, bits: _Bits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draw = _DRAWS.get(func)
        if draw is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        shape = _shape(args)
        if not shape or shape[0] != len(self.bits):
            return func(*args, **kwargs)
        return draw(self.bits.uniform(shape[1:]), *args, **kwargs)


def _shape(args: tuple[Any, ...]) -> Sequence[int]:
    """Return the shape of what an operator draws: that of its tensors, or the size it is given."""
    shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
    return (
        torch.broadcast_shapes(*shapes) if shapes else next(arg for arg in args if not isinstance(arg, int))
    )


# Distributions and the operators that draw from them, as functions of uniform numbers u of the shape of the draw.


def _uniform(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * u


def _normal(u: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    values: Tensor = mean + std * torch.special.ndtri(u)
    return values


def _exponential(u: Tensor, rate: float = 1.0) -> Tensor:
    return -u.log() / rate


def _bernoulli(u: Tensor, p: Any = 0.5) -> Tensor:
    kept: Tensor = u >= 1 - p
    return kept.double()


def _integer(u: Tensor, low: int, high: int) -> Tensor:
    return low + (u * (high - low)).floor()


def _stored(out: Tensor, values: Tensor) -> Tensor:
    """Store values in a tensor of perhaps fewer digits; those below one must not be rounded to it."""
    if out.is_floating_point():
        below_one = 1 - torch.finfo(out.dtype).eps
        values = torch.where((values > below_one) & (values < 1), below_one, values)
    return out.copy_(values)


def _into(values: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator that writes to its first argument."""
    return lambda u, out, *args, generator=None: _stored(out, values(u, *args))  # noqa: ARG005


def _like(values: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator that draws a tensor like its first argument."""
    return lambda u, like, **options: _stored(torch.empty_like(like, **options), values(u))


def _of_size(values: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """Return an operator that draws a tensor of a size, its last argument, by default of this dtype."""

    def draw(u: Tensor, *args: Any, **options: Any) -> Tensor:
        *bounds, size = args
        return _stored(torch.empty(size, **{"dtype": dtype, **options}), values(u, *bounds))

    return draw


def _by_parameters(values: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator that draws by parameters, tensors or numbers, in their dtype."""

    def draw(u: Tensor, *args: Any, generator: None = None) -> Tensor:  # noqa: ARG001
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return _stored(torch.empty(u.shape, dtype=like.dtype, device=like.device), values(u, *args))

    return draw


def _dropout(u: Tensor, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = u >= p
    return torch.where(kept, input / (1 - p), 0.0) if p < 1 else torch.zeros_like(input), kept


_ATEN = torch.ops.aten
_DRAWS: dict[Any, Callable[..., Any]] = {
    _ATEN.rand.default: _of_size(_uniform),
    _ATEN.rand_like.default: _like(_uniform),
    _ATEN.uniform_.default: _into(_uniform),
    _ATEN.randn.default: _of_size(_normal),
    _ATEN.randn_like.default: _like(_normal),
    _ATEN.normal_.default: _into(_normal),
    _ATEN.normal.Tensor_float: _by_parameters(_normal),
    _ATEN.normal.float_Tensor: _by_parameters(_normal),
    _ATEN.normal.Tensor_Tensor: _by_parameters(_normal),
    _ATEN.exponential_.default: _into(_exponential),
    _ATEN.bernoulli_.float: _into(_bernoulli),
    _ATEN.bernoulli_.Tensor: _into(_bernoulli),
    _ATEN.bernoulli.default: _by_parameters(_bernoulli),
    _ATEN.bernoulli.p: lambda u, like, p, generator=None: _stored(torch.empty_like(like), _bernoulli(u, p)),  # noqa: ARG005
    _ATEN.randint.default: _of_size(lambda u, high: _integer(u, 0, high), torch.int64),
    _ATEN.randint.low: _of_size(_integer, torch.int64),
    _ATEN.native_dropout.default: _dropout,
}


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
