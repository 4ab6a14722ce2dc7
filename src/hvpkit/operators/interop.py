"""Conversion from and to the matrices, functions and operators of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.ranks import is_shards
from hvpkit._utils.validation import check_count, check_dense, check_device
from hvpkit.operators.base import LinearOperator

if TYPE_CHECKING:
    import scipy.sparse.linalg


def aslinearoperator(A: Any, *, device: torch.device | str | None = None) -> LinearOperator:
    """Wrap a symmetric matrix or the operator of another library as a :class:`LinearOperator`.

    Args:
        A: a dense or sparse tensor or a NumPy array ``[n, n]``, which is copied, and on a CPU multiplied by NumPy; a
            SciPy sparse matrix or operator; an object of another library with ``shape``, ``dtype`` and ``@``; or a
            tuple ``(matvec, n, dtype)`` with ``matvec`` on tensors ``[n]``. Symmetry is assumed here; solvers test it
            as they go.
        device: where vectors live; by default the tensor's own, else the CPU.

    Raises:
        TypeError: ``A`` is none of these, or its dtype is not real floating point.
        ValueError: ``A`` is not square, or holds NaN or infinity.

    Example:
        >>> import torch
        >>> A = aslinearoperator((lambda v: 3.0 * v, 4, torch.float64))
        >>> A @ torch.ones(4, dtype=torch.float64)
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    if isinstance(A, LinearOperator):
        return A
    if device is not None:
        device = check_device("device", device)
    if isinstance(A, tuple):
        return _from_matvec(A, torch.device(device or "cpu"))
    if isinstance(A, np.ndarray):
        matrix = _from_numpy(A)
        return _from_dense(matrix.to(device or "cpu"), by_numpy=True)
    if isinstance(A, Tensor):
        return _from_dense(A.detach() if device is None else A.detach().to(device))
    if hasattr(A, "dtype") and hasattr(A, "__matmul__"):
        size = getattr(A, "size", None)  # hessian-eigenthings has this instead of a shape
        shape = getattr(A, "shape", (size, size) if isinstance(size, int) else None)
        if shape is not None:
            return _from_foreign(A, _check_square(shape), device)
    raise TypeError(
        "A must be a tensor, a SciPy matrix or operator, an object with shape, dtype and @, or a tuple "
        f"(matvec, n, dtype); got {type(A).__name__}"
    )


def _from_numpy(matrix: np.ndarray[Any, Any]) -> Tensor:
    """Return a copy; raise TypeError for entries that are no real floats which torch has, of either byte order."""
    native = matrix.dtype.newbyteorder("=")
    if native not in (np.float16, np.float32, np.float64):
        raise TypeError(
            f"A must have a real floating dtype that torch has, got {matrix.dtype}; convert it first"
        )
    return torch.tensor(np.ascontiguousarray(matrix, dtype=native), device="cpu")


def _check_square(shape: Sequence[int]) -> int:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"A must be square, [n, n] with n >= 1; got shape {list(shape)}")
    return int(shape[0])


def _check_real(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"A must have a real floating dtype, got {dtype}; convert it first")
    return dtype


def _from_dense(matrix: Tensor, by_numpy: bool = False) -> LinearOperator:
    """Wrap a matrix. On a CPU NumPy may multiply by one that was its array, with threads and seconds of NumPy's."""
    n, dtype, name = _check_square(matrix.shape), _check_real(matrix.dtype), "dense matrix"
    if matrix.is_meta or matrix.is_nested or is_shards(matrix):
        check_dense("A", matrix)
    if matrix.layout != torch.strided:
        matrix, name = matrix.to_sparse_coo().coalesce(), "sparse matrix"
    if not bool(torch.isfinite(matrix if name == "dense matrix" else matrix.values()).all()):
        raise ValueError("A contains NaN or infinity")
    by_numpy = by_numpy and matrix.device.type == "cpu" and dtype in (torch.float32, torch.float64)
    product = ArrayProduct(matrix.numpy()) if by_numpy else matrix.mm  # in less time than by @
    return LinearOperator(product, n, dtype, matrix.device, name=name)


class ArrayProduct:
    """A matvec by NumPy.

    Attributes:
        of_arrays: the same on arrays ``[n, k]``.
    """

    def __init__(self, matrix: np.ndarray[Any, Any]) -> None:
        self.of_arrays = matrix.dot  # which does not warn of NaN, as @ does

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiply columns ``[n, k]``."""
        return torch.from_numpy(self.of_arrays(vectors.numpy()))


def _from_matvec(parts: tuple[Any, ...], device: torch.device) -> LinearOperator:
    if len(parts) != 3 or not callable(parts[0]):
        raise TypeError("A: a tuple must be (matvec, n, dtype) with a function, an int and a torch.dtype")
    matvec, n, dtype = parts[0], check_count("n of A", parts[1], 1), _check_real(parts[2])

    def product(vectors: Tensor) -> Tensor:
        with torch.enable_grad():  # it may differentiate
            images = [_checked(matvec(column.clone()), n, dtype) for column in vectors.unbind(1)]
            return torch.stack(images, dim=1)

    return LinearOperator(product, n, dtype, device, name="matvec")


def _checked(result: object, n: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != (n,):
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"A: matvec must return a tensor of shape [{n}], got {found}")
    if result.dtype != dtype:
        raise ValueError(f"A: matvec must return {dtype}, as its argument is, got {result.dtype}")
    return result.detach()


def _from_foreign(A: Any, n: int, device: torch.device | str | None) -> LinearOperator:
    """Wrap an operator of SciPy, or of a library whose operators multiply tensors."""
    if isinstance(A.dtype, torch.dtype):
        own: torch.device | str = getattr(A, "device", "cpu")
        target, dtype = torch.device(own if device is None else device), _check_real(A.dtype)

        def product(vectors: Tensor) -> Tensor:
            with torch.enable_grad():  # it may differentiate
                return torch.stack([_checked(A @ v.clone(), n, dtype) for v in vectors.unbind(1)], dim=1)

        return LinearOperator(product, n, dtype, target, name=type(A).__name__)

    dtype = _check_real(getattr(torch, np.dtype(A.dtype).name, A.dtype))
    target = torch.device(device or "cpu")

    def numpy_product(vectors: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(A @ vectors.cpu().numpy())).to(target, dtype)

    return LinearOperator(numpy_product, n, dtype, target, name=type(A).__name__)


def to_scipy(A: LinearOperator, dtype: Any = None) -> scipy.sparse.linalg.LinearOperator:
    """Implement :meth:`hvpkit.LinearOperator.to_scipy`."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if dtype is None:
        if A.dtype not in (torch.float16, torch.float32, torch.float64):
            raise TypeError(f"NumPy has no {A.dtype}; pass dtype=numpy.float32")
        dtype = str(A.dtype).removeprefix("torch.")
    numpy_dtype = np.dtype(dtype)
    torch_dtype = torch.from_numpy(np.empty(0, numpy_dtype)).dtype

    def apply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if np.iscomplexobj(array):
            complex_result: np.ndarray[Any, Any] = apply(array.real) + 1j * apply(array.imag)
            return complex_result
        vectors = torch.tensor(np.ascontiguousarray(array), device="cpu").to(A.device, A.dtype)
        result: np.ndarray[Any, Any] = (A @ vectors).to("cpu", torch_dtype).numpy()
        return result

    return ScipyOperator(A.shape, matvec=apply, rmatvec=apply, matmat=apply, dtype=numpy_dtype)
