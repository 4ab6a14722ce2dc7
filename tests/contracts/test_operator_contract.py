"""What every operator does, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from oracles import ggn_by_jacobian, hessian_by_double_backward, relative_error, second_moment
from problems import matrix, network

DENSE = matrix([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 7.0])


class Foreign:
    """An operator as other libraries have them: shape, dtype, and @ on one vector."""

    shape, dtype = DENSE.shape, DENSE.dtype

    def __matmul__(self, v: Tensor) -> Tensor:
        assert v.shape == (7,)
        return DENSE @ v


@cache
def oracle(name: str) -> Tensor:
    problem = network(name)
    return hessian_by_double_backward(problem.objective, problem.params, problem.data)


def hessian(
    name: str, dtype: torch.dtype, mode: str, batch_size: int | None
) -> tuple[hk.LinearOperator, Tensor]:
    problem = network(name)
    objective, params = hk.from_module(problem.model.to(dtype), torch.nn.CrossEntropyLoss())
    x, y = problem.data
    data = TensorDataset(x.to(dtype) if x.is_floating_point() else x, y)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    return hk.hessian(objective, params, loader, mode=mode, batch_size=batch_size), oracle(name)


def curvature(kind: str, dtype: torch.dtype) -> tuple[hk.LinearOperator, Tensor]:
    problem = network("conv_layernorm")
    forward, output_loss = problem.objective.forward, problem.objective.output_loss
    objective, params = hk.from_module(problem.model.to(dtype), torch.nn.CrossEntropyLoss())
    x, y = problem.data
    data = [(x[:5].to(dtype), y[:5]), (x[5:].to(dtype), y[5:])]
    if kind == "empirical_fisher":
        return hk.empirical_fisher(objective, params, data), second_moment(
            problem.objective, problem.params, problem.data
        )
    if kind == "coarse":
        all_of_them = hk.hessian(objective, params, (x.to(dtype), y)).coarsen(len(x))
        return all_of_them, oracle("conv_layernorm")
    dense = ggn_by_jacobian(forward, output_loss, problem.params, problem.data)
    if kind == "combination":
        H, G = (make(objective, params, data) for make in (hk.hessian, hk.ggn))
        eye = torch.eye(len(dense), dtype=torch.float64)
        return 2.0 * (H - G / 4).shift(-0.5), 2 * (oracle("conv_layernorm") - dense / 4 - 0.5 * eye)
    return getattr(hk, kind)(objective, params, data), dense


def given(make: Callable[[Tensor], object]) -> Callable[[], tuple[hk.LinearOperator, Tensor]]:
    return lambda: (hk.aslinearoperator(make(DENSE)), DENSE)


def square() -> hk.LinearOperator:
    H = hk.aslinearoperator(DENSE)
    return H @ H


def algebra() -> tuple[hk.LinearOperator, Tensor]:
    H, dense = hessian("mlp", torch.float64, "reverse-over-reverse", 4)
    other = matrix(torch.linspace(-1, 1, H.n).tolist(), seed=3)
    K = hk.aslinearoperator(other)
    expected = 2 * (dense - other - 0.5 * torch.eye(H.n, dtype=torch.float64)) + 0.25 * other
    return 2.0 * (H - K).shift(-0.5) + K * 0.25, expected


F64, F32 = torch.float64, torch.float32
OPERATORS: dict[str, Callable[[], tuple[hk.LinearOperator, Tensor]]] = {
    "dense": given(lambda A: A),
    "dense float32": given(lambda A: A.float()),
    "numpy": given(lambda A: A.numpy()),
    "sparse": given(lambda A: scipy.sparse.csr_array(A.numpy())),
    "sparse tensor": given(lambda A: A.to_sparse()),
    "square": lambda: (square(), DENSE @ DENSE),
    "converted": given(lambda A: hk.aslinearoperator(A).to(torch.float32)),
    "sparse matrix": given(lambda A: scipy.sparse.coo_matrix(A.numpy())),
    "scipy": given(lambda A: scipy.sparse.linalg.aslinearoperator(A.numpy())),
    "scipy float32": given(lambda A: scipy.sparse.linalg.aslinearoperator(A.float().numpy())),
    "matvec": given(lambda A: (lambda v: A @ v, 7, F64)),
    "foreign": given(lambda _: Foreign()),
    "there and back": given(lambda A: hk.aslinearoperator(A).to_scipy()),
    "algebra": algebra,
    "hessian": lambda: hessian("conv_batchnorm", F64, "reverse-over-reverse", None),
    "hessian forward": lambda: hessian("tied_weights", F64, "forward-over-reverse", 4),
    "hessian attention": lambda: hessian("attention", F64, "auto", 4),
    "hessian float32": lambda: hessian("conv_layernorm", F32, "reverse-over-reverse", None),
    "ggn": lambda: curvature("ggn", F64),
    "ggn float32": lambda: curvature("ggn", F32),
    "fisher": lambda: curvature("fisher", F64),
    "empirical fisher": lambda: curvature("empirical_fisher", F64),
    "coarse": lambda: curvature("coarse", F64),
    "combination": lambda: curvature("combination", F64),
    "combination float32": lambda: curvature("combination", F32),
    "hessian float32 forward": lambda: hessian("gru", F32, "forward-over-reverse", 6),
}
for_each = pytest.mark.parametrize("name", OPERATORS)


def rounding(H: hk.LinearOperator) -> float:
    return 200 * torch.finfo(H.dtype).eps


def block(H: hk.LinearOperator, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(H.n, k, generator=g, dtype=torch.float64).to(H.dtype)


@for_each
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    H, dense = OPERATORS[name]()
    V = block(H, 3)
    assert H.shape == dense.shape
    assert relative_error(H @ V, dense @ V.double()) < rounding(H)


@for_each
def test_it_is_symmetric_to_rounding(name: str) -> None:
    H, _ = OPERATORS[name]()
    M = H @ torch.eye(H.n, dtype=H.dtype)
    assert relative_error(M, M.mT) < rounding(H)


@for_each
def test_it_repeats_bitwise(name: str) -> None:
    H, _ = OPERATORS[name]()
    V = block(H, 2)
    assert torch.equal(H @ V, H @ V)
    assert torch.equal(H @ V[:, 0], H @ V[:, 0])


@for_each
def test_it_is_linear(name: str) -> None:
    H, _ = OPERATORS[name]()
    u, v = block(H, 2).unbind(1)
    assert relative_error(H @ (3.0 * u - 0.5 * v), 3.0 * (H @ u) - 0.5 * (H @ v)) < rounding(H)
    assert not (H @ torch.zeros_like(u)).any()


@for_each
def test_a_block_is_its_columns(name: str) -> None:
    H, _ = OPERATORS[name]()
    V = block(H, 3)
    columns = torch.stack([H @ v for v in V.unbind(1)], dim=1)
    assert relative_error(H @ V, columns) < rounding(H)
    assert (H @ V[:, :1]).shape == (H.n, 1)


@for_each
def test_results_are_fresh_tensors_like_their_argument(name: str) -> None:
    H, _ = OPERATORS[name]()
    v = block(H, 1)[:, 0].requires_grad_()
    before = v.detach().clone()
    result = H @ v
    assert (result.dtype, result.device, result.shape) == (H.dtype, H.device, v.shape)
    assert not result.requires_grad
    result.zero_()
    assert torch.equal(v.detach(), before)
    assert (H @ before).any()


@for_each
def test_strides_of_the_argument_do_not_matter(name: str) -> None:
    H, _ = OPERATORS[name]()
    V = block(H, 4)
    assert relative_error(H @ V[:, ::2], H @ V[:, ::2].contiguous()) < rounding(H)
    assert relative_error(H @ V.mT.contiguous().mT, H @ V) < rounding(H)


@for_each
def test_scipy_sees_the_same_operator_in_the_same_dtype(name: str) -> None:
    H, _ = OPERATORS[name]()
    A, V = H.to_scipy(), block(H, 3)
    assert A.shape == H.shape
    assert torch.from_numpy(np.zeros(1, dtype=A.dtype)).dtype == H.dtype
    for found, expected in (
        (A.matvec(V[:, 0].numpy()), H @ V[:, 0]),
        (A.matvec(V[:, :1].numpy()), H @ V[:, :1]),
        (A.matmat(V.numpy()), H @ V),
        (A @ V.numpy(), H @ V),
        (A.rmatvec(V[:, 0].numpy()), H @ V[:, 0]),
        (A.H @ V.numpy(), H @ V),
    ):
        assert found.dtype == A.dtype
        assert relative_error(torch.from_numpy(found), expected) < rounding(H)


@for_each
def test_scipys_arpack_finds_both_ends_of_the_dense_matrix(name: str) -> None:
    H, dense = OPERATORS[name]()
    v0 = block(H, 1)[:, 0].numpy()
    expected = torch.linalg.eigvalsh(dense)[[0, -1]]
    scale = float(expected.abs().max())
    # SciPy's ARPACK multiplies its start first, and loses an end that is zero: also that of the dense matrix
    sigma = scale if float(expected.abs().min()) < 1e-12 * scale else 0.0
    A = (H.shift(sigma) if sigma else H).to_scipy()
    values = scipy.sparse.linalg.eigsh(A, k=2, which="BE", v0=v0, return_eigenvectors=False) - sigma
    assert np.abs(np.sort(values) - expected.numpy()).max() < 1e3 * torch.finfo(H.dtype).eps * scale


@for_each
def test_lanczos_finds_both_ends_of_the_dense_matrix(name: str) -> None:
    H, dense = OPERATORS[name]()
    found = hk.lanczos(H, 2, which="BE", tol=1e-4)
    expected = torch.linalg.eigvalsh(dense)[[0, -1]]
    zero = (
        40 * torch.finfo(H.dtype).eps * float(expected.abs().max())
    )  # a singular end has no relative digits
    assert torch.allclose(found.values.double(), expected, rtol=1e-4, atol=zero)


@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "encoder_layer"])
def test_a_hessian_does_not_depend_on_how_its_data_is_batched(
    name: str, dtype: torch.dtype, mode: str
) -> None:
    whole, _ = hessian(name, dtype, mode, 100)
    V = block(whole, 3)
    for batch_size in (1, 3, 5, None):
        H, _ = hessian(name, dtype, mode, batch_size)
        assert relative_error(H @ V, whole @ V) < rounding(H)


def test_a_hessian_by_differences_is_symmetric_to_its_own_error() -> None:
    H, dense = hessian("mlp", F64, "finite-difference", 5)
    M = H @ torch.eye(H.n, dtype=H.dtype)
    assert relative_error(M, M.mT) < 1e-8
    assert torch.equal(M, H @ torch.eye(H.n, dtype=H.dtype))
    assert relative_error(M, dense) < 1e-8
