"""Operators whose vectors lie in host memory, whatever device their matvecs are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.wrapped import Wrapped

HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False)
class HostOperator(Wrapped):
    """An operator on another device, with vectors in host memory: a solver keeps its basis there and works there."""

    @property
    def exact(self) -> LinearOperator | None:
        """The operator in native arithmetic, with vectors in host memory; None if this one is."""
        exact = self.operand.exact
        return None if exact is None else on_host(exact)

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator."""
        return super().blame(vectors.to(self.operand.device))


def on_host(op: LinearOperator) -> LinearOperator:
    """Return the operator with vectors in host memory; itself if they are there.

    A matvec copies its vectors to the device and back, on CUDA by pinned memory, and waits for it.
    """
    if op.device == HOST:
        return op

    def product(vectors: Tensor) -> Tensor:
        return _to_host(op.product(_to_device(vectors, op.device)))

    return HostOperator(
        product, op.n, op.dtype, HOST, op.name, cost=op.cost, layout=op.layout, space=op.space, inner=op
    )


def _to_device(vectors: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return vectors.to(device)
    return vectors.pin_memory().to(device, non_blocking=True)


def _to_host(vectors: Tensor) -> Tensor:
    if vectors.device.type != "cuda":
        return vectors.to(HOST)
    result = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    result.copy_(vectors, non_blocking=True)
    torch.cuda.current_stream(vectors.device).synchronize()
    return result
