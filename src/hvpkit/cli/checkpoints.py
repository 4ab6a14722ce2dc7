"""Checkpoints of models: tensors and plain data, never code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")


def load(path: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Raises:
        ValueError: the file cannot be read, or asks for code to be run.
        OSError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|'(\S+)' (?:is|was) blocked", str(error))
        if asked:
            raise ValueError(
                f"checkpoint: {path} asks for {asked[1] or asked[2]}, which is code and not tensors: refused, and not "
                "run. Save model.state_dict() instead"
            ) from error
        raise ValueError(f"checkpoint: {path} cannot be read as tensors alone: refused") from error
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"checkpoint: {path} cannot be read ({type(error).__name__}: {error})") from error


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Gives a model the parameters and buffers of a checkpoint.

    The file holds a ``state_dict()``, plain or under ``"state_dict"`` or ``"model"``, its names also as
    ``DataParallel`` and ``torch.compile`` begin them.

    Raises:
        ValueError: other names or shapes than the model's, named; :func:`load`.
    """
    content = load(path)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(item, Tensor) for item in content.values()):
        raise ValueError(
            f"checkpoint: {path} holds no state_dict: want tensors by name, or these under 'state_dict' or 'model'"
        )
    for prefix in PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): item for name, item in content.items()}
    own = model.state_dict()
    wrong = [
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
    found = [f"{what}: {', '.join(names[:5])}{_more(len(names) - 5)}" for what, names in wrong if names]
    if found:
        raise ValueError(f"checkpoint: {path} is not of this model; {'; '.join(found)}. Is --arch right?")
    model.load_state_dict(content)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
