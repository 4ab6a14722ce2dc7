"""Float32 arithmetic in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cudnn, mkldnn

KINDS: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn),  # type: ignore[attr-defined]
    "cpu": (mkldnn.matmul, mkldnn.conv, mkldnn.rnn),  # type: ignore[attr-defined]
}
"""Of arithmetic on a device: where its ``fp32_precision`` is set."""


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Neither TF32 nor bfloat16 inside float32 arithmetic; the process's settings are restored after."""
    if all(kind.fp32_precision in ("none", "ieee") for kind in KINDS.get(device.type, ())):
        yield
        return
    settings = [(kind, kind.fp32_precision) for kinds in KINDS.values() for kind in kinds]
    # torch has older names for the same settings, and raises where they are read while the two disagree.
    matmul, tf32 = _read(torch.get_float32_matmul_precision), _read(lambda: cudnn.allow_tf32)
    try:
        _set_older("highest" if matmul else None, False if tf32 else None)
        for kind, _ in settings:
            kind.fp32_precision = "ieee"
        yield
    finally:
        _set_older(matmul, tf32)
        for kind, precision in settings:
            kind.fp32_precision = "none"  # inherits from a wider setting, which may be all there was
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


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
