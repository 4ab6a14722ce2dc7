"""The arithmetic of rows: vectors ``[n]`` as NumPy's arrays where they are short and on a CPU, else as torch's tensors.

The two share memory, and recurrences are written once, over what both have and the functions here. On vectors of 400
an update in place takes BLAS, by SciPy, 0.4 us, NumPy 1.3 and torch 1.8; an inner product 0.3, 0.5 and 1.4. Updates of
long vectors are torch's, by several threads.
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
from hvpkit.operators.interop import ArrayProduct
from hvpkit.operators.space import LOCAL, inner_product_of

SHORT_VECTOR = 2**13
"""Entries of vectors that are NumPy's, at most: from there on an update takes both as long."""

Vector: TypeAlias = Any
"""A vector ``[n]`` of a row: a tensor or an array."""

Add: TypeAlias = Callable[[Vector, Vector, float], Vector]
"""A function that adds to a vector another one, times a number."""


class Arithmetic:
    """Torch's.

    Attributes:
        space: of the vectors.
        eps: of the dtype.
        is_short: True if vectors are arrays.
        waits: True if :attr:`dot` is not known at once, as on a GPU, or where each rank has a part: then rows ask
            :meth:`numbers` for theirs together.
        dot: of two vectors: the number; where that waits, a sum over what is here, 0-d.
        add, add_: add to a vector another one, times a number; the second in place.
    """

    is_short = False

    def __init__(self, op: LinearOperator) -> None:
        self.space, self.waits = op.space, not _is_here(op)
        self.eps = torch.finfo(op.dtype).eps
        self.dot, self.add, self.add_ = self._functions(op)

    def _functions(self, op: LinearOperator) -> tuple[Callable[[Vector, Vector], Any], Add, Add]:
        dot = inner_product_of(op.dtype, op.device, op.space.size(op.n))
        return (
            dot if self.waits else lambda v, w: dot(v, w).item(),
            lambda v, w, factor: torch.add(v, w, alpha=factor),
            lambda v, w, factor: v.add_(w, alpha=factor),
        )

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

    def copies(self, tensors: Sequence[Tensor]) -> Sequence[Vector]:
        """Return tensors as vectors, of memory of their own."""
        return [one.clone() for one in tensors]

    def tensors(self, vectors: Sequence[Vector]) -> Sequence[Tensor]:
        """Return vectors as tensors, of the same memory."""
        return vectors

    def image(self, product: Product, vector: Vector) -> Vector:
        """Return the image of a vector."""
        return product(vector.unsqueeze(1)).reshape(-1)

    def images(self, product: Product, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return the images of vectors by one matvec with all, each of consecutive entries."""
        return product(torch.stack([*vectors]).mT).mT.contiguous().unbind()

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of steps, in which numbers may be out of range: rows look for that."""
        return nullcontext()


class ShortArithmetic(Arithmetic):
    """NumPy's, and BLAS's of SciPy."""

    is_short = True

    def _functions(self, op: LinearOperator) -> tuple[Callable[[Vector, Vector], Any], Add, Add]:
        from scipy.linalg import blas  # a tenth of a second to import

        is_double = op.dtype == torch.float64
        dot, axpy = (blas.ddot, blas.daxpy) if is_double else (blas.sdot, blas.saxpy)
        return (
            dot,
            lambda v, w, factor: axpy(w, v.copy(), a=factor),
            lambda v, w, factor: axpy(w, v, a=factor),
        )

    def vectors(self, tensors: Sequence[Tensor]) -> Sequence[Vector]:
        """Return tensors as vectors, of the same memory."""
        return [_array(one) for one in tensors]

    def copies(self, tensors: Sequence[Tensor]) -> Sequence[Vector]:
        """Return tensors as vectors, of memory of their own."""
        return [_array(one).copy() for one in tensors]

    def tensors(self, vectors: Sequence[Vector]) -> Sequence[Tensor]:
        """Return vectors as tensors, of the same memory."""
        return [torch.from_numpy(one) for one in vectors]

    def image(self, product: Product, vector: Vector) -> Vector:
        """Return the image of a vector."""
        return _product_of_arrays(product, vector.reshape(-1, 1)).reshape(-1)

    def images(self, product: Product, vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Return the images of vectors by one matvec with all, each of consecutive entries."""
        return [*np.ascontiguousarray(_product_of_arrays(product, np.array(vectors).T).T)]

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


def _product_of_arrays(product: Product, columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the matvec with columns ``[n, k]``, without the detour by tensors where the matrix is an array."""
    if isinstance(product, ArrayProduct):
        found: np.ndarray[Any, Any] = product.of_arrays(columns)
        return found
    return _array(product(torch.from_numpy(columns)))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as an array, of the same memory."""
    array: np.ndarray[Any, Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array
