"""Problems of the user's: a function in a file or module that returns a loss, parameters and data."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from hvpkit.autodiff.pytree import flatten, unflatten
from hvpkit.cli.builtin_problems import NAMES
from hvpkit.cli.targets import Network, Target

FORMS = f"{', '.join(NAMES)}, file.py:function, or package.module:function"
RETURNED = "(loss_fn, params, data) or (model, criterion, data)"


def load_target(
    text: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Target | Network:
    """Call a function of the user's, which returns a loss, parameters and data, or a module, a criterion and data.

    Args:
        text: ``file.py:function`` or ``package.module:function``; modules are also searched for in the working folder.
        device: to move parameters, and tensors in the data, to; None: they stay.
        dtype: to convert their floating tensors to; None: they stay.

    Raises:
        ValueError: no such file, module or function, or it returns something else.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"TARGET must be {FORMS}; got {text}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise ValueError(f"TARGET: {place} has no function {name}; it has {', '.join(functions) or 'none'}")
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise ValueError(f"TARGET: {text} must take no arguments and return {RETURNED}") from None
    found = function()
    if not isinstance(found, tuple) or len(found) != 3 or not callable(found[0]):
        shape = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"TARGET: {text} must return {RETURNED}, got {shape}")
    loss_fn, params, data = found
    if isinstance(data, Tensor | tuple | Mapping):
        leaves, spec = flatten(data, name="data")
        data = unflatten([_converted(leaf, device, dtype) for leaf in leaves], spec)
    if isinstance(loss_fn, nn.Module) and (params is None or callable(params)):
        return Network(text, loss_fn.to(device, dtype), params, data)
    if isinstance(loss_fn, type):
        raise ValueError(
            f"TARGET: {text} returns the class {loss_fn.__name__} as its loss; return a function of (params, batch), "
            "as hvpkit.from_module(model, criterion) makes one"
        )
    leaves, spec = flatten(params, name="params")
    params = unflatten([_converted(leaf, device, dtype) for leaf in leaves], spec)
    return Target(text, loss_fn, params, data)


def _converted(tensor: Tensor, device: str | None, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"TARGET: there is no file {path}")
    name = f"hvpkit_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"TARGET: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles defined in it look it up there
    with _import_path(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> ModuleType:
    with _import_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"TARGET: there is no module {name}") from None
            raise


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """Put a folder on the import path, inside ``with``."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
