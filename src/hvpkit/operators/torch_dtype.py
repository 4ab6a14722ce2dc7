"""The attribute ``dtype`` of operators: torch's, which SciPy cannot read."""

from __future__ import annotations

import sys
from typing import Any

import torch


class TorchDtype:
    """Descriptor of a dtype that refuses SciPy by name.

    SciPy's functions read ``A.dtype`` before anything else, and fail on a ``torch.dtype`` without a word on the remedy.
    """

    def __get__(self, instance: Any, owner: type) -> torch.dtype:
        if instance is None:
            raise AttributeError("dtype is an attribute of instances")
        if sys._getframe(1).f_globals.get("__name__", "").startswith("scipy."):
            raise TypeError(f"SciPy cannot use {instance!r} as it is: pass H.to_scipy()")
        dtype: torch.dtype = instance.__dict__["dtype"]
        return dtype

    def __set__(self, instance: Any, value: torch.dtype) -> None:
        instance.__dict__["dtype"] = value
