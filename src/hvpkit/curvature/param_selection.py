"""Selection of the parameters that an operator differentiates by: ``wrt``."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from hvpkit._utils.typing import LossFn, Tree
from hvpkit.autodiff.pytree import Layout, flatten, snapshot, unflatten
from hvpkit.objective import composed
from hvpkit.objective.fully_sharded import gathered

Selection = str | Sequence[str] | Callable[[str], bool] | None
"""Names or globs over dotted parameter names, or a predicate of a name; None: all parameters."""


def restrict(loss_fn: LossFn, params: Tree, wrt: Selection) -> tuple[LossFn, Tree]:
    """Return the loss as a function of the selected parameters, a dict by name; the others are constants.

    Raises:
        ValueError: a pattern of ``wrt`` matches no parameter; two parameters have the same dotted name.
    """
    if wrt is None:
        return loss_fn, params
    check_selection(wrt)
    leaves, spec = flatten(params)
    names = Layout.of(params).names
    _check_distinct(names)
    chosen = _select(names, wrt)
    selected = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in chosen}
    pairs = zip(names, leaves, strict=True)
    constants = {name: snapshot(gathered(leaf)) for name, leaf in pairs if name not in chosen}

    def whole(variables: dict[str, Tensor]) -> Tree:
        known = {**constants, **variables}
        return unflatten([known[name] for name in names], spec)

    return composed(loss_fn, whole), selected


def check_selection(wrt: object) -> None:
    """Raise TypeError unless ``wrt`` is a name, names, or a predicate of a name."""
    form = "a name or glob, a list of these, or a function of a name"
    module = isinstance(wrt, nn.Module | type)
    if module or not (callable(wrt) or isinstance(wrt, str | Collection)) or isinstance(wrt, bytes):
        raise TypeError(f"wrt must be {form}, as wrt='head.*'; got {type(wrt).__name__}")
    others = [] if callable(wrt) or isinstance(wrt, str) else [one for one in wrt if not isinstance(one, str)]
    if others:
        raise TypeError(f"wrt must be {form}: its names must be strings, got {type(others[0]).__name__}")


def _select(names: Sequence[str], wrt: Selection) -> set[str]:
    """Return the names that ``wrt`` selects; raise ValueError if a part of it selects none.

    A pattern that is itself a name selects that parameter alone, so that ``w[0]`` is no character class.
    """
    if callable(wrt):
        chosen = {name for name in names if wrt(name)}
        unmatched: list[object] = [] if chosen else [wrt]
    else:
        patterns = [wrt] if isinstance(wrt, str) else list(wrt or ())
        found = {pattern: _matches(pattern, names) for pattern in patterns}
        chosen = set().union(*found.values())
        unmatched = [pattern for pattern, matched in found.items() if not matched]
    if chosen and not unmatched:
        return chosen
    which = "" if not chosen else f": {', '.join(map(repr, unmatched))}"
    raise ValueError(
        f"wrt={wrt!r}{which} matches no parameter; their names: {', '.join(names) or '(one tensor, without)'}"
    )


def _matches(pattern: str, names: Sequence[str]) -> set[str]:
    return {pattern} if pattern in names else {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def _check_distinct(names: Sequence[str]) -> None:
    """Raise ValueError if two leaves share one dotted name: ``wrt`` could not tell them apart."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"params: several leaves have the dotted name {repeated[0]!r}, so that wrt cannot tell them apart; "
            "rename one of their keys"
        )
