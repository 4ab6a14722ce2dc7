"""Outputs of models: the tensor that a loss of torch takes, a model's own loss, and objects as trees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree

OUTPUT_KEYS = ("logits", "out", "output", "prediction")
"""Names under which models that return several values hold the one that losses take: transformers, torchvision."""


def main_tensor(outputs: Any) -> Any:
    """Return the tensor among the outputs that a loss of torch takes: by name, else the first one."""
    if isinstance(outputs, Tensor):
        return outputs
    fields = named_fields(outputs)
    for key in OUTPUT_KEYS:
        if isinstance(fields.get(key), Tensor):
            return fields[key]
    for value in fields.values() if fields else outputs if isinstance(outputs, tuple | list) else ():
        if isinstance(value, Tensor):
            return value
    return outputs


def own_loss(outputs: Any) -> Tensor:
    """Return the loss that a model computed itself: the outputs, their field ``loss``, or the first of a tuple.

    Raises:
        ValueError: there is none.
    """
    loss = named_fields(outputs).get("loss", outputs)
    if loss is outputs and isinstance(outputs, tuple | list) and outputs:
        loss = outputs[0]
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"criterion=None takes the loss that model computes, and model returned {type(outputs).__name__} without "
            "one; let it return its loss (a tensor, the field 'loss', or the first of a tuple), with the targets in "
            "the batch, or pass a criterion"
        )
    return loss


def named_fields(outputs: Any) -> dict[str, Any]:
    """Return the fields of a mapping, dataclass, named tuple or plain object by name; none for a tuple or tensor."""
    if isinstance(outputs, Mapping):
        return {str(key): value for key, value in outputs.items()}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if hasattr(outputs, "_fields"):
        return {name: getattr(outputs, name) for name in outputs._fields}
    if isinstance(outputs, Tensor | tuple | list):
        return {}
    return dict(getattr(outputs, "__dict__", {}))


class OwnLoss:
    """A loss in place of outputs. No tree of tensors: what needs outputs apart from their loss refuses it.

    Args:
        loss: of the batch.
    """

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Fields:
    """The tensors in the fields of an object, as a tree; all else in it is constant.

    Args:
        values: the fields that hold tensors, as trees.
        rebuild: from other such values to an object like the original one.
    """

    def __init__(self, values: dict[str, Any], rebuild: Callable[[dict[str, Any]], Any]) -> None:
        self.values, self.rebuild = values, rebuild


class Constant:
    """A value that is no tensor, as a tree without leaves.

    Args:
        value: anything.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


_pytree.register_pytree_node(
    Fields,
    lambda fields: ([fields.values], fields.rebuild),
    lambda values, rebuild: Fields(next(iter(values)), rebuild),
)
_pytree.register_pytree_node(Constant, lambda box: ([], box.value), lambda _, value: Constant(value))


def as_tree(outputs: Any) -> Any:
    """Return outputs as a tree of tensors: objects as :class:`Fields`, what holds no tensor as :class:`Constant`."""
    if isinstance(outputs, Tensor):
        return outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(as_tree(value) for value in outputs)
    if type(outputs) is dict:
        return {key: as_tree(value) for key, value in outputs.items()}
    fields = named_fields(outputs)
    if _is_record(outputs):
        fields = {name: as_tree(value) for name, value in fields.items()}
    fields = {name: value for name, value in fields.items() if _holds_tensor(value)}
    if not fields:
        return Constant(outputs)
    template = _with_fields(outputs, dict.fromkeys(fields))  # so that no graph outlives its use
    return Fields(fields, lambda values: _with_fields(template, values))


def _is_record(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) or dataclasses.is_dataclass(outputs) or hasattr(outputs, "_fields")


def _holds_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(tree))


def from_tree(tree: Any) -> Any:
    """Return the outputs of which :func:`as_tree` made a tree."""
    if isinstance(tree, Fields):
        return tree.rebuild({name: from_tree(value) for name, value in tree.values.items()})
    if isinstance(tree, Constant):
        return tree.value
    if type(tree) in (tuple, list):
        return type(tree)(from_tree(value) for value in tree)
    if type(tree) is dict:
        return {key: from_tree(value) for key, value in tree.items()}
    return tree


def _with_fields(original: Any, values: dict[str, Any]) -> Any:
    """Return a copy of an object with other values of some fields."""
    if hasattr(original, "_replace"):
        return original._replace(**values)
    changed = copy.copy(original)
    for name, value in values.items():
        if isinstance(original, Mapping):
            changed[name] = value
        if not isinstance(original, Mapping) or hasattr(original, name):  # a ModelOutput is both
            object.__setattr__(changed, name, value)
    return changed
