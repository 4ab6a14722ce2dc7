from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import hvpkit as hk


def test_scipy_may_be_shown_another_dtype_but_only_on_request() -> None:
    A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 3.0])))
    assert A.to_scipy().dtype == np.float32
    wide = A.to_scipy(dtype=np.float64)
    assert wide.dtype == np.float64
    assert (wide @ np.array([1.0, 1 + 1e-12])).dtype == np.float64
    assert (wide @ np.array([1.0, 1 + 1e-12])).tolist() == [1.0, 3.0]
    half = hk.aslinearoperator(torch.eye(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"NumPy has no torch.bfloat16; pass dtype=numpy.float32"):
        half.to_scipy()
    assert half.to_scipy(dtype=np.float32).matvec(np.ones(2)).dtype == np.float32


def test_scipy_leaves_its_own_arrays_alone() -> None:
    array = np.arange(3.0)[::-1]
    array.flags.writeable = False
    A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
    assert A.to_scipy().matvec(array).tolist() == [2.0, 2.0, 0.0]


def test_scipy_multiplies_by_complex_vectors() -> None:
    matrix = np.array([[2.0, 1.0], [1.0, -3.0]])
    v = np.array([1.0 + 2.0j, 3.0 - 1.0j])
    A = hk.aslinearoperator(matrix).to_scipy()
    assert np.allclose(A @ v, matrix @ v)
    flow = scipy.sparse.linalg.expm_multiply(-1j * A, v, traceA=1j)
    assert np.allclose(flow, scipy.linalg.expm(-1j * matrix) @ v)


@pytest.mark.parametrize("dtype", [">f8", ">f4", "g"])
def test_arrays_of_either_byte_order_and_wide_floats_are_converted(dtype: str) -> None:
    matrix, v = np.array([[2.0, 1.0], [1.0, -3.0]]), np.array([1.0, 2.0], dtype=dtype)
    assert (hk.aslinearoperator(matrix) @ v).tolist() == [4.0, -5.0]
    if dtype != "g":
        assert (hk.aslinearoperator(matrix.astype(dtype)) @ v).tolist() == [4.0, -5.0]


def test_a_matvec_may_write_to_its_argument() -> None:
    entries, v = torch.arange(1.0, 31.0, dtype=torch.float64), torch.ones(30, dtype=torch.float64)
    A = hk.aslinearoperator((lambda w: w.mul_(entries), 30, torch.float64))
    assert torch.equal(A @ v, entries)
    assert torch.equal(v, torch.ones_like(v))
    assert hk.lanczos(A, tol=1e-6).values.item() == pytest.approx(30.0)


@pytest.mark.parametrize("layout", ["read-only", "reversed", "fortran"])
def test_numpy_matrices_may_lie_in_memory_as_they_like(layout: str) -> None:
    array = np.diag([1.0, 2.0, 3.0])
    if layout == "read-only":
        array.flags.writeable = False
    elif layout == "reversed":
        array = array[::-1, ::-1]
    else:
        array = np.asfortranarray(array)
    A = hk.aslinearoperator(array)
    assert (A @ torch.ones(3).double()).tolist() == array.sum(1).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_matrices_multiply_as_tensors_do(dtype: type) -> None:
    array = np.random.default_rng(0).standard_normal((30, 30)).astype(dtype)
    of_array, of_tensor = hk.aslinearoperator(array), hk.aslinearoperator(torch.from_numpy(array))
    assert of_array.dtype == of_tensor.dtype
    v = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).to(of_array.dtype)
    eps = torch.finfo(of_array.dtype).eps
    for vectors in (v, v[:, 0], v.mT.contiguous().mT):
        torch.testing.assert_close(of_array @ vectors, of_tensor @ vectors, rtol=0, atol=200 * eps)
    array[:] = 0  # the operator keeps a copy
    assert (of_array @ v).any()


def test_numpy_matrices_give_nan_without_a_warning() -> None:
    A = hk.aslinearoperator(np.full((2, 2), 1e300))
    assert not torch.isfinite(A.product(torch.tensor([[1e300], [-torch.inf]], dtype=torch.float64))).any()


def test_an_operator_is_its_own_operator() -> None:
    A = hk.aslinearoperator(torch.eye(2))
    assert hk.aslinearoperator(A) is A


class Foreign:
    def __init__(self, dtype: object = torch.float64, shape: tuple[int, ...] = (2, 2)) -> None:
        self.dtype, self.shape = dtype, shape

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("A", "error", "reason"),
    [
        (torch.ones(2, 3), ValueError, r"A must be square, .* got shape \[2, 3\]"),
        (torch.ones(2), ValueError, r"A must be square"),
        (torch.ones(0, 0), ValueError, r"A must be square, \[n, n\] with n >= 1"),
        (torch.ones(2, 2).long(), TypeError, "A must have a real floating dtype, got torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "A must have a real floating dtype"),
        (torch.full((2, 2), float("nan")), ValueError, "A contains NaN or infinity"),
        (np.full((2, 2), np.inf), ValueError, "A contains NaN or infinity"),
        (np.ones((2, 2), dtype=np.int32), TypeError, "A must have a real floating dtype"),
        (np.eye(2).astype(object), TypeError, "A must have a real floating dtype that torch has, got object"),
        (np.eye(2, dtype="g"), TypeError, "A must have a real floating dtype that torch has, got"),
        (np.ones((2, 3)), ValueError, "A must be square"),
        (scipy.sparse.eye_array(2, dtype=np.int64), TypeError, "A must have a real floating dtype"),
        (scipy.sparse.csr_array(np.ones((2, 3))), ValueError, "A must be square"),
        (torch.ones(2, 3).to_sparse(), ValueError, "A must be square"),
        (torch.full((2, 2), float("nan")).to_sparse(), ValueError, "A contains NaN or infinity"),
        (torch.eye(2, dtype=torch.int64).to_sparse(), TypeError, "A must have a real floating dtype"),
        (Foreign(shape=(2, 3)), ValueError, "A must be square"),
        (Foreign(dtype=torch.int64), TypeError, "A must have a real floating dtype"),
        (Foreign(dtype=np.complex128), TypeError, "A must have a real floating dtype"),
        ((lambda v: v, 2), TypeError, r"A: a tuple must be \(matvec, n, dtype\)"),
        ((torch.eye(2), 2, torch.float64), TypeError, r"A: a tuple must be \(matvec, n, dtype\)"),
        ((lambda v: v, 0, torch.float64), ValueError, "n of A must be at least 1, got 0"),
        ((lambda v: v, 2.0, torch.float64), TypeError, "n of A must be an int"),
        ((lambda v: v, 2, torch.int32), TypeError, "A must have a real floating dtype, got torch.int32"),
        ((lambda v: v, 2, np.float64), TypeError, "A must have a real floating dtype"),
        ([[1.0]], TypeError, "A must be a tensor, a SciPy matrix .* got list"),
        (None, TypeError, "A must be a tensor, .* got NoneType"),
        (torch.nn.Linear(2, 2), TypeError, "A must be a tensor, .* got Linear"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(A: object, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        hk.aslinearoperator(A)


@pytest.mark.parametrize(
    ("A", "reason"),
    [
        ((lambda v: v[:1], 2, torch.float64), r"A: matvec must return a tensor of shape \[2\], got \[1\]"),
        ((lambda v: v.numpy(), 2, torch.float64), r"A: matvec must return .* got ndarray"),
        (Foreign(), r"A: matvec must return a tensor of shape \[2\], got \[3\]"),
        (
            (lambda v: v.float(), 2, torch.float64),
            r"A: matvec must return torch.float64, as .* got torch.float32",
        ),
    ],
)
def test_a_product_of_another_shape_is_refused(A: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hk.aslinearoperator(A) @ torch.ones(2, dtype=torch.float64)
