"""Objects that a function or a module refers to: in closures, globals, partials, methods, hooks and containers."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

MAX_OBJECTS = 50_000
"""Objects at most that one search visits; chosen so that it takes less than about 0.1 s."""

MAX_ITEMS = 1_000
"""Items at most of one container that a search visits."""

_SKIPPED = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator),
)


def references(root: object) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, object)`` for ``root`` and all that it refers to, nearest first, each object once.

    The name is the path of variables, attributes, keys and indices from ``root``. Of tensors and classes nothing
    further is visited.
    """
    seen: dict[int, object] = {}  # the objects too, so that no id is used twice
    waiting: deque[tuple[str, object]] = deque([("", root)])
    while waiting and len(seen) < MAX_OBJECTS:
        name, thing = waiting.popleft()
        if id(thing) in seen or isinstance(thing, _SKIPPED):
            continue
        seen[id(thing)] = thing
        yield name, thing
        for key, value in _contents(thing):
            waiting.append((f"{name}.{key}" if name and key else name or key, value))


def _contents(thing: Any) -> Iterable[tuple[str, object]]:
    """Return what an object refers to directly, by name."""
    if isinstance(thing, Tensor):
        return ()
    if isinstance(thing, types.FunctionType):
        defaults = [("", value) for value in (*(thing.__defaults__ or ()), thing.__kwdefaults__)]
        return [*closure(thing).items(), *global_variables(thing).items(), *defaults, *vars(thing).items()]
    if isinstance(thing, types.MethodType):
        return [("", thing.__self__), ("", thing.__func__)]
    if isinstance(thing, functools.partial):
        return [("", thing.func), ("", thing.args), *thing.keywords.items()]
    if isinstance(thing, Mapping):
        return [(str(key), value) for key, value in islice(thing.items(), MAX_ITEMS)]
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return [(str(index), value) for index, value in enumerate(islice(thing, MAX_ITEMS))]
    if isinstance(thing, torch.nn.Module):  # the dicts of its parts are no part of their names
        parts = [
            ("", value) if name.startswith("_") else (name, value) for name, value in vars(thing).items()
        ]
        return parts[::-1]  # registered parts come last in vars, but name what they hold
    return list(getattr(thing, "__dict__", {}).items())


def closure(function: types.FunctionType) -> dict[str, Any]:
    """Return the variables that a function closes over, by name; without those that have no value yet."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not _EMPTY
    except ValueError:
        return False


_EMPTY = object()


def global_variables(function: types.FunctionType) -> dict[str, Any]:
    """Return the global variables that a function may read, by name."""
    names = dict.fromkeys(_global_names(function.__code__))
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def twin_functions(root: object, memo: dict[int, Any]) -> Callable[[], None]:
    """Add a twin to ``memo`` for each function under ``root`` that refers to an object that ``memo`` copies.

    ``copy.deepcopy`` copies no functions, so that a lambda that closes over a module still calls the original one.

    Args:
        root: where to search.
        memo: as of ``copy.deepcopy``: the copy of each object by its id.

    Returns:
        A function that makes the twins refer to the copies in ``memo``; call it once these are complete.
    """
    things = [thing for _, thing in references(root)]
    referring = _referring(things, set(memo))
    originals = [f for f in things if isinstance(f, types.FunctionType) and id(f) in referring]
    cells = {id(cell): (cell, types.CellType()) for f in originals for cell in f.__closure__ or ()}
    twins = [(function, _twin(function, cells)) for function in originals]
    memo.update({id(function): twin for function, twin in twins})

    def complete() -> None:
        for cell, twin_cell in cells.values():
            if _is_filled(cell):
                twin_cell.cell_contents = redirected(cell.cell_contents, memo)
        for function, twin in twins:
            for name, value in global_variables(function).items():
                twin.__globals__[name] = redirected(value, memo)
            twin.__defaults__ = redirected(function.__defaults__, memo)
            twin.__kwdefaults__ = redirected(function.__kwdefaults__, memo)

    return complete


def _referring(things: list[object], known: set[int]) -> set[int]:
    """Return the ids of those things that refer to a known one, through others of them too."""
    referrers: dict[int, list[int]] = {}
    for thing in things:
        for _, value in _contents(thing):
            referrers.setdefault(id(value), []).append(id(thing))
    found, waiting = set(known), list(known)
    while waiting:
        new = [key for key in referrers.get(waiting.pop(), ()) if key not in found]
        found.update(new)
        waiting += new
    return found


def _twin(
    function: types.FunctionType, cells: dict[int, tuple[types.CellType, types.CellType]]
) -> types.FunctionType:
    closed = function.__closure__ and tuple(cells[id(cell)][1] for cell in function.__closure__)
    twin = types.FunctionType(
        function.__code__, {**function.__globals__}, function.__name__, None, closed or None
    )
    vars(twin).update(vars(function))
    return twin


def redirected(value: Any, memo: dict[int, Any]) -> Any:
    """Return ``value`` with the copies of ``memo`` in place of their originals; itself where it holds none."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        owner = redirected(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        func, *args = (redirected(part, memo) for part in (value.func, *value.args))
        keywords = {key: redirected(part, memo) for key, part in value.keywords.items()}
        same = all(a is b for a, b in zip(parts, (func, *args, *keywords.values()), strict=True))
        return value if same else functools.partial(func, *args, **keywords)
    if type(value) is dict:
        entries = {key: redirected(part, memo) for key, part in value.items()}
        return value if all(entries[key] is part for key, part in value.items()) else entries
    if type(value) in (list, tuple, set):
        items = [redirected(part, memo) for part in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    return value
