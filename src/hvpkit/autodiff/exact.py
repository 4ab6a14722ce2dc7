"""The settings under which second derivatives exist."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpkit.autodiff.overrides import DEFINITIONS, WrittenOut
from hvpkit.autodiff.precision import full_float32

_TURN = threading.RLock()

_CHECKPOINTED = (
    "loss_fn saves its activations by hooks (activation checkpointing, offloading), which second derivatives do not "
    "go through; switch that off, and save memory by a smaller batch_size"
)


@contextmanager
def exact_derivatives(device: torch.device) -> Iterator[None]:
    """The settings under which second derivatives exist and have full precision; restored after.

    Attention runs on its MATH backend and without the fused encoder path, whose kernels have no second
    derivative; the functions of :mod:`hvpkit.autodiff.overrides` are written out; float32 is not rounded to TF32 or
    bfloat16; a caller's autocast and inference mode do not reach inside. Threads take turns, as some of the
    settings belong to the process.
    """
    with _TURN, ExitStack() as stack:
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(disable_saved_tensors_hooks(_CHECKPOINTED))
        stack.enter_context(full_float32(device))
        stack.enter_context(WrittenOut(DEFINITIONS))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
