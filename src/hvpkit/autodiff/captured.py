"""Tensors beside its arguments that a loss function depends on, or writes to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hvpkit.autodiff.references import references
from hvpkit.errors import CapturedParameterWarning

MAX_NAMES = 4
"""Names that a message lists."""


def evaluate_unchanged(function: object, evaluate: Callable[[], Tensor]) -> Tensor:
    """Return ``evaluate()``, a value of ``function``; raise ValueError if the call wrote to buffers of a module.

    They are put back.
    """
    with torch.inference_mode(False):
        before = [(name, buffer, buffer.clone()) for name, buffer in _buffers(function) if not buffer.is_meta]
    value = evaluate()
    # By values: batch norm does not raise the version of what it writes to.
    written = [(name, buffer, copy) for name, buffer, copy in before if not _same(buffer, copy)]
    if written:
        with torch.no_grad():
            for _, buffer, copy in written:
                buffer.copy_(copy)
        raise ValueError(
            f"loss_fn writes to the buffers {listed([name for name, *_ in written])} of a module in each call, as "
            "batch norm does in training mode; call model.eval(), pass copies of the buffers to "
            'torch.func.functional_call, or take hvpkit.from_module(model, criterion, batchnorm="batch")'
        )
    return value


def warn_captured(function: object, value: Tensor, points: Sequence[Tensor]) -> None:
    """Warn if ``value``, a loss by ``function``, depends on parameters that are not among ``points``."""
    names = captured_parameters(function, value, points)
    if names:
        warnings.warn(
            f"loss_fn depends on {listed(names)}, which require gradients and are not in params: they are taken for "
            "constants. If they are the parameters that params stands for, compute the loss from its params "
            "argument (torch.func.functional_call, hvpkit.from_module); if they are meant to be fixed, as those of "
            "a discriminator, say so by requires_grad_(False) or detach()",
            CapturedParameterWarning,
            stacklevel=5,
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors of one shape have the same values, NaN included."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def captured_parameters(function: object, value: Tensor, points: Sequence[Tensor]) -> list[str]:
    """Return the names of the parameters that ``value`` has derivatives by, other than ``points``.

    Found in the autograd graph of ``value``: instances of ``nn.Parameter``, and leaves that ``function`` refers to.
    Inputs that a loss differentiates by itself are neither.
    """
    given = {id(point) for point in points}
    leaves = list(graph_leaves(value))
    found = [leaf for leaf in leaves if id(leaf) not in given]
    if not found or len(found) == len(leaves):  # a loss that depends on no point at all is another error
        return []
    names = dict(_named_tensors(function))
    labels = (names.get(id(leaf)) or _unnamed(leaf) for leaf in found)
    return sorted(label for label in labels if label)


def graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors of the autograd graph of ``value``."""
    waiting = [value.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _unnamed(leaf: Tensor) -> str | None:
    return f"a parameter of shape {list(leaf.shape)}" if isinstance(leaf, nn.Parameter) else None


def _named_tensors(function: object) -> Iterator[tuple[int, str]]:
    """Yield the id and the name of each tensor that ``function`` refers to, those of modules by their dotted names."""
    for name, thing in reversed([*references(function)]):  # a dict of these keeps the nearest name
        if isinstance(thing, Tensor):
            yield id(thing), name
    for name, module in _modules(function):
        for parameter_name, parameter in module.named_parameters():
            yield id(parameter), f"{name}.{parameter_name}".lstrip(".")


def _buffers(function: object) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, module in _modules(function):
        for buffer_name, buffer in module.named_buffers():
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{name}.{buffer_name}".lstrip("."), buffer


def _modules(function: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that ``function`` refers to, by the name of the variable that holds each; not those inside."""
    inside: set[int] = set()
    for name, thing in references(function):
        if isinstance(thing, nn.Module) and id(thing) not in inside:
            inside |= {id(part) for part in thing.modules()}
            yield name.rpartition(".")[2], thing


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list, quoted, and the number of the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:MAX_NAMES]) + more
