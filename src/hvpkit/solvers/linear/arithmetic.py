"""The arithmetic of rows: vectors ``[n]`` as NumPy's arrays where they are short and on a CPU, else as torch's tensors.

The two share memory, and recurrences are written once, over what both have and the functions here. On vectors of 400
an update takes NumPy 1.0 us and torch 1.8, an inner product 0.4 and 1.4; on long vectors torch's update is one pass of
several threads, and NumPy's two of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator, Product
from hvpkit.operators.space import LOCAL, inner_product_of

SHORT_VECTOR = 2**13
"""Entries of vectors that are NumPy's, at most: from there on an update takes both as long."""

Vector: TypeAlias = Any
"""A vector ``[n]`` of a row: a tensor or an array."""


class Arithmetic:
    """Torch's.

    Attributes:
        space: of the vectors.
        eps: of the dtype.
        is_short: True if vectors are arrays.
        waits: True if :attr:`dot` is not known at once, as on a GPU, or where each rank has a part: then rows ask
            :meth:`numbers` for theirs together.
        dot: of two vectors: the number; where that waits, a sum over what is here, 0-d.
    """

    is_short = False

    def __init__(self, op: LinearOperator) -> None:
        self.space, self.waits = op.space, not _is_here(op)
        self.eps = torch.finfo(op.dtype).eps
        self.dot: Callable[[Vector, Vector], Any] = self._dot_of(op)

    def _dot_of(self, op: LinearOperator) -> Callable[[Vector, Vector], Any]:
        dot = inner_product_of(op.dtype, op.device, op.space.size(op.n))
        return dot if self.waits else lambda v, w: dot(v, w).item()

    @staticmethod
    def add(v: Vector, w: Vector, factor: float) -> Vector:
        """Return v + factor w."""
        return torch.add(v, w, alpha=factor)

    def numbers(self, asked: Sequence[Sequence[Any]]) -> Sequence[Sequence[float]]:
        """Return the numbers of several lists of inner products."""
        if not self.waits:
            return asked
        sums = torch.stack([one for several in asked for one in several])
        found = iter(self.space.reduce(sums).tolist())
        return [[next(found) for _ in several] for several in asked]

    def inner_product(self, left: Tensor, right: Tensor) -> float:
        """Return the inner product of two tensors."""
        return self.numbers([[self.dot(*self.vectors((left, right)))]])[0][0]

    def norms(self, tensors: Sequence[Tensor]) -> list[float]:
        """Return the norms of tensors."""
        squares = [self.dot(one, one) for one in self.vectors(tensors)]
        return [math.sqrt(square) for square in self.numbers([squares])[0]] if squares else []

    def vectors(self, tensors: Sequence[Tensor]) -> Sequence[Vector]:
        """Return tensors as vectors, of the same memory."""
        return tensors

    def tensors(self, vectors: Sequence[Vector]) -> Sequence[Tensor]:
        """Return vectors as tensors, of the same memory."""
        return vectors

    def images(self, product: Product, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return the images of vectors by one matvec with all, each of consecutive entries."""
        if len(vectors) == 1:
            return (product(vectors[0].unsqueeze(1)).reshape(-1),)
        return product(torch.stack([*vectors]).mT).mT.contiguous().unbind()

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of steps, in which numbers may be out of range: rows look for that."""
        return nullcontext()


class ShortArithmetic(Arithmetic):
    """NumPy's."""

    is_short = True

    def _dot_of(self, op: LinearOperator) -> Callable[[Vector, Vector], Any]:  # noqa: ARG002
        return lambda v, w: float(v.dot(w))

    @staticmethod
    def add(v: Vector, w: Vector, factor: float) -> Vector:
        """Return v + factor w."""
        return v + factor * w

    def vectors(self, tensors: Sequence[Tensor]) -> Sequence[Vector]:
        """Return tensors as vectors, of the same memory."""
        return [_array(one) for one in tensors]

    def tensors(self, vectors: Sequence[Vector]) -> Sequence[Tensor]:
        """Return vectors as tensors, of the same memory."""
        return [torch.from_numpy(one) for one in vectors]

    def images(self, product: Product, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return the images of vectors by one matvec with all, each of consecutive entries."""
        if len(vectors) == 1:
            return (_array(product(torch.from_numpy(vectors[0].reshape(-1, 1)))).reshape(-1),)
        return [*np.ascontiguousarray(_array(product(torch.from_numpy(np.array(vectors).T))).T)]

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of steps: no warnings, as of matvecs, where numbers are out of range."""
        return np.errstate(all="ignore")


def arithmetic_of(op: LinearOperator) -> Arithmetic:
    """Return the arithmetic for the vectors of an operator."""
    is_short = op.n <= SHORT_VECTOR and op.dtype in (torch.float32, torch.float64) and _is_here(op)
    return (ShortArithmetic if is_short else Arithmetic)(op)


def _is_here(op: LinearOperator) -> bool:
    """Return True if vectors are whole, in the memory of this process."""
    return op.device.type == "cpu" and op.space is LOCAL


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as an array, of the same memory."""
    array: np.ndarray[Any, Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array
