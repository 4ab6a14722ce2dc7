"""Forward mode in which values that are computed under ``torch.no_grad`` are constants, as in reverse mode.

torch's forward mode takes no notice of ``no_grad``: a loss with weights that it computes there would have one matrix
in reverse mode, which is meant, and another one, not symmetric, in forward mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from hvpkit.autodiff.overrides import replaced

GRAD_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)


def jvp(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], *, strict: bool = False
) -> tuple[Any, ...]:
    """Return what ``torch.func.jvp`` does, with values under ``no_grad`` as constants; not while torch compiles."""
    if torch.compiler.is_compiling():
        return torch.func.jvp(function, primals, tangents, strict=strict)
    with ExitStack() as stack:
        for kind in GRAD_MODES:
            stack.enter_context(_followed(kind))
        return torch.func.jvp(function, primals, tangents, strict=strict)


@contextmanager
def _followed(kind: Any) -> Iterator[None]:
    """Switch forward mode on and off with a context for reverse mode, but for those that torch's transforms enter."""
    enter, leave, entered = kind.__enter__, kind.__exit__, []

    def enter_both(self: Any) -> Any:
        found = enter(self)
        own = _is_of_transforms(sys._getframe(1))
        entered.append(nullcontext() if own else _set_fwd_grad_enabled(torch.is_grad_enabled()))
        return found

    def leave_both(self: Any, *error: Any) -> Any:
        entered.pop().__exit__(*error)
        return leave(self, *error)

    with replaced(kind, "__enter__", enter_both), replaced(kind, "__exit__", leave_both):
        yield


def _is_of_transforms(frame: FrameType | None) -> bool:
    """Return True if it is torch.func that enters a context, perhaps by an ``ExitStack``, and not the loss."""
    between = ("contextlib", replaced.__module__, __name__)
    while frame is not None and frame.f_globals.get("__name__") in between:
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch._functorch.")
