"""The global settings under which second derivatives exist and are exact."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.backends import cudnn, mkldnn

from hvpkit.autodiff.checkpointing import without_checkpointing
from hvpkit.autodiff.overrides import OVERRIDES, FunctionOverrides, replaced

_LOCK = threading.RLock()

_HOOKED = (
    "loss_fn saves its activations by hooks (as torch.autograd.graph.save_on_cpu), which second derivatives do not "
    "go through; switch that off, and save memory by a smaller batch_size"
)

_AUTOCAST = (
    "hvpkit: the loss opens torch.autocast, which is off in exact derivatives; where dtypes disagree without it, "
    "convert to the dtype of the parameters"
)

FLOAT32_BACKENDS: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn),  # type: ignore[attr-defined]
    "cpu": (mkldnn.matmul, mkldnn.conv, mkldnn.rnn),  # type: ignore[attr-defined]
}
"""The objects that hold ``fp32_precision``, by device type."""


@contextmanager
def exact_derivatives(device: torch.device) -> Iterator[None]:
    """Set what exact second derivatives need, and restore the caller's settings at the end.

    The functions in :mod:`hvpkit.autodiff.overrides` are replaced, attention and with it the fused encoder path among
    them, whose kernels have no second derivative; activation checkpoints are plain calls; float32 is not rounded to
    TF32 or bfloat16; autocast is off, the caller's and what the loss opens itself, except :class:`Autocast`; so is
    inference mode.

    Other threads keep their settings, except those that torch has for the process alone: TF32 and bfloat16 in
    float32 arithmetic, if they are on, and cuDNN during a recurrent layer. So one thread at a time is inside.
    """
    with _LOCK, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_without_autocast())
        stack.enter_context(without_checkpointing())
        stack.enter_context(disable_saved_tensors_hooks(_HOOKED))
        stack.enter_context(full_float32(device))
        stack.enter_context(FunctionOverrides(OVERRIDES))
        yield


@contextmanager
def without_fused_encoder() -> Iterator[None]:
    """Switch the fused encoder path off, for all threads; restore it at the end.

    For compiled matvecs: torch's compiler asks for this setting, where others see that functions are overridden.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _free_lock() -> None:
    """Replace the lock in a forked process if it is held by a thread that only the parent has."""
    global _LOCK
    if _LOCK.acquire(blocking=False):
        _LOCK.release()
    else:
        _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_lock)


class Autocast(torch.autocast):
    """``torch.autocast`` that :func:`exact_derivatives` leaves on, for arithmetic that was asked for."""

    __enter__ = torch.autocast.__enter__


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Leave autocast as it is where the loss switches it on: rounded forward passes give asymmetric matvecs.

    Raises:
        RuntimeError: torch's own, with a note if the loss relied on autocast to make dtypes equal.
    """
    enter: Callable[[torch.autocast], Any] = torch.autocast.__enter__
    ignored = False

    def enter_if_on(self: torch.autocast) -> Any:
        nonlocal ignored
        enabled, on = self._enabled, torch.is_autocast_enabled(self.device)
        ignored |= enabled and not on
        self._enabled = enabled and on
        try:
            return enter(self)
        finally:
            self._enabled = enabled  # the caller may use it again

    with replaced(torch.autocast, "__enter__", enter_if_on):
        try:
            yield
        except RuntimeError as error:
            if ignored and _AUTOCAST not in getattr(error, "__notes__", ()):
                error.add_note(_AUTOCAST)
            raise


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch TF32 and bfloat16 off in float32 arithmetic, and restore the process's settings at the end."""
    if all(backend.fp32_precision in ("none", "ieee") for backend in FLOAT32_BACKENDS.get(device.type, ())):
        yield
        return
    settings = [
        (backend, backend.fp32_precision) for backends in FLOAT32_BACKENDS.values() for backend in backends
    ]
    # torch has older names for the same settings, and raises where they are read while the two disagree.
    matmul, tf32 = _read(torch.get_float32_matmul_precision), _read(lambda: cudnn.allow_tf32)
    try:
        _set_older("highest" if matmul else None, False if tf32 else None)
        for backend, _ in settings:
            backend.fp32_precision = "ieee"
        yield
    finally:
        _set_older(matmul, tf32)
        for backend, precision in settings:
            backend.fp32_precision = "none"  # inherits from a wider setting, which may be all there was
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _read(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:
        return None


def _set_older(matmul: str | None, tf32: bool | None) -> None:
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if tf32 is not None:
        cudnn.allow_tf32 = tf32
