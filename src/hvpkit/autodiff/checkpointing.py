"""Activation checkpointing, switched off: second derivatives do not go through it.

A reentrant checkpoint hides the parameters that its function closes over, so that their derivatives would be zero
without an error; a non-reentrant one works by hooks on saved tensors, which torch.func does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from hvpkit.autodiff.overrides import replaced


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Make ``torch.utils.checkpoint`` call its function plainly, and restore it at the end.

    ``checkpoint`` may have been imported by name, so what is replaced is what it looks up when it is called.
    Checkpoints that were made before recompute as they would have.
    """
    with ExitStack() as stack:
        stack.enter_context(replaced(torch_checkpoint.CheckpointFunction, "apply", _call_reentrant))
        stack.enter_context(replaced(torch_checkpoint, "_checkpoint_without_reentrant_generator", _no_frame))
        # for those who imported the generator by name, as torch.distributed does
        stack.enter_context(replaced(torch_checkpoint, "_checkpoint_hook", nullcontext))
        yield


def _call_reentrant(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def _no_frame(*_: Any, **__: Any) -> Iterator[None]:
    yield
