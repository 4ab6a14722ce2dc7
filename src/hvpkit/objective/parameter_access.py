"""Tensors of a module that are used past its copy: replaced where that is meant, refused where it is not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree


class ParameterAccess(TorchFunctionMode):
    """A mode in which torch functions of some tensors take others instead, or raise.

    Args:
        replaced: the tensor to use in place of each, by id.
        refused: the tensors whose values must not be read, unless they replace one.
        message: the error, with ``{name}`` for the name of the tensor.
    """

    def __init__(self, replaced: Mapping[int, Tensor], refused: NamedTensors, message: str) -> None:
        super().__init__()
        self.replaced, self.refused, self.message = replaced, refused, message
        self.given = {id(tensor) for tensor in replaced.values()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(id(tensor) in self.replaced for tensor in _tensors(args, kwargs)):
            args, kwargs = _pytree.tree_map(lambda leaf: self.replaced.get(id(leaf), leaf), (args, kwargs))
        result = func(*args, **kwargs)
        foreign = (tensor for tensor in _tensors(args, kwargs) if id(tensor) not in self.given)
        names = [name for tensor in foreign if (name := self.refused.name_of(tensor))]
        if names and _has_values(result):
            raise ValueError(self.message.format(name=names[0]))
        return result


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments, and in lists and tuples among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (part for part in value if isinstance(part, Tensor))


def _has_values(result: object) -> bool:
    """Return True if a result depends on the values of tensors, and not on shape, dtype or device alone."""
    if isinstance(result, torch.Size | torch.dtype | torch.device):
        return False
    return any(isinstance(leaf, Tensor | float | complex) for leaf in _pytree.tree_leaves(result))


class NamedTensors:
    """Tensors with their names, held weakly.

    Args:
        named: the tensors by name.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._known = {id(tensor): (weakref.ref(tensor), name) for name, tensor in named.items()}

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a tensor; None for one that is not among these."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None
