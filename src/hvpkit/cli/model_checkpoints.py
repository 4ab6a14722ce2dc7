"""Checkpoint files of models, read as tensors and plain data; code in them is never run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvpkit.autodiff.pytree import flatten, unflatten

WRAPPERS = ("content", "state_dict", "model", "params")
PREFIXES = ("module.", "_orig_mod.")


def load(path: str | os.PathLike[str], *, name: str = "checkpoint") -> Any:
    """Return the content of a file written by ``torch.save``, on the CPU; errors call it by ``name``.

    Raises:
        ValueError: the file cannot be read, or would run code.
        OSError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|'(\S+)' (?:is|was) blocked", str(error))
        if asked:
            raise ValueError(
                f"{name}: {path} asks for {asked[1] or asked[2]}, which is code and not tensors: refused, and not "
                "run. Save tensors instead, as model.state_dict()"
            ) from error
        raise ValueError(f"{name}: {path} cannot be read as tensors alone: refused") from error
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"{name}: {path} cannot be read ({type(error).__name__}: {error})") from error


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the parameters and buffers of a checkpoint into a model.

    The file holds a ``state_dict()``, alone or under ``"state_dict"`` or ``"model"``, as a checkpoint of
    ``hvpkit train`` does. The prefixes of names that ``DataParallel`` and ``torch.compile`` add are removed.

    Raises:
        ValueError: names or shapes differ from the model's; the message lists them. Also as :func:`load`.
    """
    content = _unwrapped(load(path))
    if not isinstance(content, Mapping) or not all(isinstance(item, Tensor) for item in content.values()):
        raise ValueError(
            f"checkpoint: {path} holds no state_dict: want tensors by name, or these under 'state_dict' or 'model'"
        )
    for prefix in PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): item for name, item in content.items()}
    own = model.state_dict()
    differences = [
        ("is missing", [name for name in own if name not in content]),
        ("is unexpected", [name for name in content if name not in own]),
        (
            "has another shape",
            [
                f"{name} {list(content[name].shape)} for {list(item.shape)}"
                for name, item in own.items()
                if name in content and content[name].shape != item.shape
            ],
        ),
    ]
    found = [f"{kind}: {', '.join(names[:5])}{_more(len(names) - 5)}" for kind, names in differences if names]
    if found:
        raise ValueError(
            f"checkpoint: {path} is not of this model; {'; '.join(found)}. Of a built-in network, is --arch right?"
        )
    model.load_state_dict(content)


def load_like(params: Any, path: str | os.PathLike[str]) -> Any:
    """Return the tree of tensors in a checkpoint, on the devices and in the dtypes of ``params``.

    Raises:
        ValueError: its structure or its shapes are not those of ``params``. Also as :func:`load`.
    """
    content = _unwrapped(load(path))
    leaves, spec = flatten(params, name="params")
    try:
        found, other = flatten(content, name="checkpoint")
    except (TypeError, ValueError):
        found, other = [], None
    if other != spec or any(new.shape != old.shape for new, old in zip(found, leaves, strict=True)):
        raise ValueError(
            f"checkpoint: {path} holds other tensors than the params of TARGET; it must hold a tree like them, as "
            "torch.save(params) writes it. For the state_dict() of a module let TARGET return (model, criterion, data)"
        )
    return unflatten([new.to(old) for new, old in zip(found, leaves, strict=True)], spec)


def _unwrapped(content: Any) -> Any:
    """Return what lies under the keys that training scripts save models under."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
