"""Blocks of parameters: ``wrt``."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.autodiff.pytree import Layout, flatten, snapshot, unflatten
from hvpkit.objective import Objective

Selection = str | Sequence[str] | Callable[[str], bool] | None
"""Globs over dotted parameter names, or a predicate of a name; None: all."""


def restrict(loss_fn: LossFn, params: Tree, wrt: Selection) -> tuple[LossFn, Tree]:
    """Return the loss as a function of the chosen parameters, and those as a dict by name; the others are constants.

    Raises:
        ValueError: ``wrt`` matches nothing.
    """
    if wrt is None:
        return loss_fn, params
    leaves, spec = flatten(params)
    names = Layout.of(params).names
    chosen = _matcher(wrt)
    selected = {name: leaf for name, leaf in zip(names, leaves, strict=True) if chosen(name)}
    if not selected:
        raise ValueError(f"wrt={wrt!r} matches no parameter; their names: {', '.join(names)}")
    constants = [snapshot(leaf) for leaf in leaves]

    def restricted(function: Callable[[Tree, Batch], Any]) -> Callable[[dict[str, Tensor], Batch], Any]:
        def of_selected(variables: dict[str, Tensor], batch: Batch) -> Any:
            whole = [variables.get(name, leaf) for name, leaf in zip(names, constants, strict=True)]
            return function(unflatten(whole, spec), batch)

        return of_selected

    if isinstance(loss_fn, Objective):
        return replace(loss_fn, forward=restricted(loss_fn.forward)), selected
    return restricted(loss_fn), selected


def _matcher(wrt: Selection) -> Callable[[str], bool]:
    if callable(wrt):
        return wrt
    globs = [wrt] if isinstance(wrt, str) else list(wrt or ())
    return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)
