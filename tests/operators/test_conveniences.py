"""The operator as people of other libraries expect it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import hvpkit as hk
from hvpkit.operators import base
from oracles import hessian_by_double_backward, relative_error
from problems import SPECTRA, matrix, network

F64 = torch.float64
A = matrix(SPECTRA["indefinite"])


def small_hessian() -> tuple[hk.CurvatureOperator, torch.Tensor]:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    return H, hessian_by_double_backward(problem.objective, problem.params, problem.data)


def test_several_names_of_one_product() -> None:
    H, dense = small_hessian()
    v = torch.arange(H.n, dtype=F64)
    for found in (H @ v, H(v), H.matvec(v), H.T @ v, v @ H):
        assert torch.equal(found, H @ v)
    assert H.T is H
    tree = H.unflatten(v)
    assert torch.equal(H.flatten(H(tree)), H @ v)
    rows = torch.eye(H.n, dtype=F64)[:3]
    assert relative_error(rows @ H, rows @ dense) < 1e-12


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_numpy_vectors_come_out_as_arrays_of_the_operators_dtype(dtype: type) -> None:
    for op in (hk.aslinearoperator(A), hk.aslinearoperator(A.float())):
        v = np.arange(100).astype(dtype)
        block = np.stack([v, 2 * v, -v], axis=1)
        for found, expected in ((op @ v, A.numpy() @ v), (op @ block, A.numpy() @ block)):
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.dtype(str(op.dtype).removeprefix("torch."))
            assert relative_error(torch.from_numpy(found), torch.as_tensor(expected)) < 1e-6
        assert isinstance(v @ op, np.ndarray)
        assert np.array_equal(v @ op, op @ v)
        assert np.array_equal(block.T @ op, (op @ block).T)
    frozen = np.ones(100)[::-1]
    frozen.flags.writeable = False
    assert relative_error(torch.from_numpy(hk.aslinearoperator(A) @ frozen), A.sum(1)) < 1e-12
    with pytest.raises(TypeError, match=r"v is an array of dtype .*real numbers"):
        hk.aslinearoperator(A) @ np.array(["a"] * 100)


def test_numpy_scalars_multiply() -> None:
    op = hk.aslinearoperator(A)
    v = torch.ones(100, dtype=F64)
    assert relative_error((np.float64(2) * op) @ v, 2 * A @ v) < 1e-12


def test_powers_are_of_one_operator() -> None:
    H, dense = small_hessian()
    v = torch.ones(H.n, dtype=F64)
    square, cube = H @ H, H @ (H @ H)
    assert relative_error(square @ v, dense @ dense @ v) < 1e-11
    assert relative_error(cube @ v, torch.linalg.matrix_power(dense, 3) @ v) < 1e-11
    assert relative_error((square @ square) @ v, torch.linalg.matrix_power(dense, 4) @ v) < 1e-11
    assert (square.cost, cube.cost) == (2, 3)
    largest = hk.lanczos(square, 1, which="LA", tol=1e-8).values[0]
    assert float(largest) == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()) ** 2, rel=1e-6)
    other = hk.aslinearoperator(dense)
    with pytest.raises(TypeError, match=r"not symmetric in general"):
        H @ other
    assert (square @ H.unflatten(v)).keys() == H.unflatten(v).keys()


def test_power_of_lowered_arithmetic_knows_its_precision_and_the_exact_one() -> None:
    problem = network("mlp")
    objective, params = hk.from_module(problem.model.float(), torch.nn.CrossEntropyLoss())
    H = hk.ggn(objective, params, (problem.data[0].float(), problem.data[1]), arithmetic="bf16")
    square = H @ H
    assert square.precision == 2 * H.precision
    assert square.exact is not None
    assert square.exact.precision < 1e-6
    assert H.to(F64).precision == H.precision
    assert H.to(F64).exact is not None


def test_blame_reaches_the_batch_at_fault() -> None:
    problem = network("mlp")
    x = problem.data[0].clone()
    x[7] = torch.inf
    H = hk.hessian(
        problem.objective, problem.params, (x, problem.data[1]), batch_size=5, mode="reverse-over-reverse"
    )
    v = torch.ones(H.n, dtype=F64)
    for op in (H @ H, H.to(torch.float32)):
        with pytest.raises(hk.NonFiniteError, match="batch 1"):
            op @ v.to(op.dtype)


def test_dense_matrix_in_blocks() -> None:
    H, dense = small_hessian()
    for block_size in (1, 7, 64):
        assert relative_error(H.to_dense(block_size), dense) < 1e-12
    assert H.to_dense().dtype == F64


def test_dense_matrix_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = hk.aslinearoperator((lambda v: v, 10**7, torch.float32))
    with pytest.raises(MemoryError, match="takes 400000 GB"):
        huge.to_dense()
    monkeypatch.setattr(base, "free_memory", lambda _: 79_999)
    with pytest.raises(MemoryError, match="80 kB are free"):
        hk.aslinearoperator(A).to_dense()
    monkeypatch.setattr(base, "free_memory", lambda _: 80_000)
    assert torch.equal(hk.aslinearoperator(A).to_dense(), A)


def test_dtype_of_vectors_is_converted() -> None:
    op = hk.aslinearoperator(A)
    low = op.to(torch.float32)
    assert op.to(F64) is op
    assert (low @ torch.ones(100)).dtype == torch.float32
    assert relative_error(low @ torch.ones(100), A.sum(1)) < 1e-6
    up = hk.aslinearoperator(A.float()).to(F64)
    assert up.precision == torch.finfo(torch.float32).eps
    assert hk.lanczos(up, 1, tol=1e-4).values[0] == pytest.approx(20, rel=1e-4)
    for dtype in (torch.int64, torch.complex64, np.float32, "float32"):
        with pytest.raises(TypeError, match=r"^dtype must be a real floating dtype"):
            op.to(dtype)


def test_scipy_and_numpy_are_told_the_remedy() -> None:
    H, _ = small_hessian()
    for op in (H, hk.aslinearoperator(A), 2 * H):
        for function in (
            scipy.sparse.linalg.eigsh,
            scipy.sparse.linalg.svds,
            scipy.sparse.linalg.aslinearoperator,
        ):
            with pytest.raises(TypeError, match=r"pass H.to_scipy\(\)"):
                function(op)
        with pytest.raises(TypeError, match=r"pass H.to_scipy\(\)"):
            scipy.sparse.linalg.cg(op, np.ones(op.n))
        with pytest.raises(TypeError, match=r"H.to_scipy\(\).*H.to_dense\(\)"):
            np.asarray(op)
        assert op.dtype == F64


MATRICES: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda A: A,
    "array": lambda A: A.numpy(),
    "coo": lambda A: A.to_sparse(),
    "csr": lambda A: A.to_sparse_csr(),
    "csc": lambda A: A.to_sparse_csc(),
    "scipy": lambda A: scipy.sparse.csr_array(A.numpy()),
    "uncoalesced": lambda A: torch.sparse_coo_tensor(
        torch.cat([A.to_sparse().indices()] * 2, dim=1), torch.cat([A.to_sparse().values() / 2] * 2), A.shape
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant)")  # of torch, at the first sparse tensor
@pytest.mark.parametrize("kind", MATRICES)
def test_solvers_and_estimators_take_matrices(kind: str) -> None:
    M = MATRICES[kind](A)
    assert hk.lanczos(M, 1, tol=1e-8).values[0] == pytest.approx(20)
    assert hk.extreme_eigenvalues(M).smallest.value == pytest.approx(-5, rel=1e-2)
    assert hk.lobpcg(M, 1, tol=1e-4).values[0] == pytest.approx(20)
    assert hk.eigsh(M, 1, which="LA").values[0] == pytest.approx(20)
    assert hk.trace(M).value == pytest.approx(float(A.trace()))
    assert hk.spectral_density(M).n == 100
    assert hk.check(M).ok
    b = torch.ones(100, dtype=F64)
    assert relative_error(hk.solve(M, b, tol=1e-10).x, torch.linalg.solve(A, b)) < 1e-7


def test_what_is_no_matrix_is_refused_by_solvers() -> None:
    for bad in (3.0, None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"^A must be a tensor"):
            hk.lanczos(bad)
    with pytest.raises(ValueError, match="A must be square"):
        hk.trace(torch.ones(2, 3))
