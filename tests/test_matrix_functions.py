"""f(H) b against dense eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error
from problems import SPECTRA, matrix, network

F64 = torch.float64
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: torch.exp(-x / 50),
    "polynomial": lambda x: 3 * x**2 - x + 1,
    "resolvent": lambda x: 1 / (x**2 + 1),
    "root": lambda x: x.abs().sqrt(),
}


def block(n: int, k: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def dense(A: Tensor, f: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A.double())
    weights = f(values)
    return vectors @ (weights[:, None] * (vectors.mT @ b.double().reshape(len(A), -1))).reshape(
        len(A), *b.shape[1:]
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_that_of_the_dense_matrix(name: str, spectrum: str, dtype: torch.dtype) -> None:
    A, f = matrix(SPECTRA[spectrum], dtype=dtype), FUNCTIONS[name]
    tol = 1e-7 if dtype == F64 else 1e-4
    for b in (block(len(A), 1, dtype)[:, 0], block(len(A), 2, dtype)):
        found = hk.matrix_function(hk.aslinearoperator(A), f, b, tol=tol)
        expected = dense(A, f, b)
        assert found.x.shape == b.shape
        assert found.x.dtype == dtype
        error = torch.linalg.vector_norm(found.x.double() - expected, dim=0)
        several = 4 if name == "root" else 1  # it is not smooth
        rounding = 1e3 * torch.finfo(dtype).eps * float(expected.norm())
        assert bool((error <= several * torch.as_tensor(found.error_estimate) + rounding).all())
        zeros = name == "root" and spectrum in (
            "rank_deficient",
            "decaying",
        )  # the root of zero has no digits
        assert found.converged or (zeros and found.status is hk.Status.ROUNDING_LIMITED)
        assert found.num_matvecs <= len(A) * (b.shape[1] if b.ndim == 2 else 1)


def test_estimate_says_how_good_a_cut_result_is() -> None:
    A, b = matrix(SPECTRA["indefinite"]), block(100, 1)[:, 0]
    expected = dense(A, FUNCTIONS["resolvent"], b)
    for budget in (12, 18, 24, 33):
        found = hk.matrix_function(
            hk.aslinearoperator(A), FUNCTIONS["resolvent"], b, tol=1e-12, max_matvecs=budget
        )
        assert found.status is hk.Status.MAX_MATVECS
        assert found.num_matvecs == budget
        assert float((found.x - expected).norm()) <= found.error_estimate < float(expected.norm())
    assert hk.matrix_function(hk.aslinearoperator(A), torch.exp, b, max_matvecs=4).error_estimate == float(
        "inf"
    )


def test_smooth_functions_take_few_matvecs() -> None:
    A, b = matrix(SPECTRA["indefinite"]), block(100, 1)[:, 0]
    found = hk.matrix_function(hk.aslinearoperator(A), lambda x: torch.exp(-0.1 * x), b, tol=1e-8)
    assert found.num_matvecs <= 24
    assert relative_error(found.x, dense(A, lambda x: torch.exp(-0.1 * x), b)) < 1e-8


STEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": lambda x: 1 / (x + 1e-6),
    "root": lambda x: x.clamp(min=0).sqrt(),
    "log": lambda x: (x.abs() + 1e-9).log(),
}


@pytest.mark.parametrize("name", STEEP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_rounding_changes_is_in_the_estimate(name: str, dtype: torch.dtype) -> None:
    """Eigenvalues that rounding hides: the space is invariant, and the result has few digits or none."""
    Q = torch.linalg.qr(block(50, 50)).Q
    values = torch.cat([torch.logspace(-12, 0, 49, dtype=F64), torch.zeros(1, dtype=F64)])
    A = Q @ torch.diag(values) @ Q.mT
    A, b = ((A + A.mT) / 2).to(dtype), block(50, 1, dtype)[:, 0]
    found = hk.matrix_function(hk.aslinearoperator(A), STEEP[name], b, tol=100 * torch.finfo(dtype).eps)
    error = float((found.x.double() - dense(A, STEEP[name], b)).norm())
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert error <= 10 * found.error_estimate
    assert found.error_estimate >= 1e3 * torch.finfo(dtype).eps * float(found.x.norm())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    A, b = matrix(SPECTRA["indefinite"], dtype=torch.float32), block(100, 1, torch.float32)[:, 0]
    plain = hk.matrix_function(hk.aslinearoperator(A), FUNCTIONS["resolvent"], b, tol=1e-4)
    found = hk.matrix_function(
        hk.aslinearoperator(A * scale), lambda x: FUNCTIONS["resolvent"](x / scale), b, tol=1e-4
    )
    assert relative_error(found.x, plain.x) < 1e-4


def test_zero_and_forms_of_b() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    exact = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    tree = {name: torch.ones_like(value) for name, value in problem.params.items()}
    found = hk.matrix_function(H, FUNCTIONS["resolvent"], tree)
    assert isinstance(found.error_estimate, float)
    expected = dense(exact, FUNCTIONS["resolvent"], H.flatten(tree))
    assert relative_error(H.flatten(found.x), expected) < 1e-6
    array = hk.matrix_function(H, FUNCTIONS["resolvent"], H.flatten(tree).numpy()).x
    assert isinstance(array, np.ndarray)
    assert relative_error(torch.from_numpy(array), expected) < 1e-6
    nothing = hk.matrix_function(H, torch.exp, torch.zeros(H.n, dtype=F64))
    assert (nothing.num_matvecs, nothing.error_estimate, bool(nothing.x.any())) == (0, 0, False)


def test_matvec_that_is_not_finite_is_a_status() -> None:
    A = matrix(SPECTRA["indefinite"])
    for good in (0, 8):
        left = [A] * good

        def product(v: Tensor, left: list[Tensor] = left) -> Tensor:
            return left.pop() @ v if left else torch.full_like(v, torch.nan)

        op = replace(hk.aslinearoperator(A), product=product)
        found = hk.matrix_function(op, FUNCTIONS["resolvent"], block(100, 1)[:, 0], tol=1e-12)
        assert found.status is hk.Status.NON_FINITE
        assert "NaN or infinity" in found.message
        assert bool(torch.isfinite(found.x).all())


def test_bad_arguments_are_named() -> None:
    op, b = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), torch.ones(100, dtype=F64)
    with pytest.raises(ValueError, match=r"^f gave NaN or infinity at a Ritz value of -"):
        hk.matrix_function(op, torch.log, b)
    with pytest.raises(ValueError, match=r"^f must return a tensor of shape"):
        hk.matrix_function(op, torch.sum, b)
    with pytest.raises(TypeError, match=r"^f must return real numbers, got complex ones"):
        hk.matrix_function(op, lambda x: torch.exp(1j * x), b)
    with pytest.raises(ValueError, match=r"^tol\b"):
        hk.matrix_function(op, torch.exp, b, tol=0.0)
    with pytest.raises(ValueError, match=r"^max_matvecs\b"):
        hk.matrix_function(op, torch.exp, b, max_matvecs=0.5)
    with pytest.raises(ValueError, match=r"^b\b"):
        hk.matrix_function(op, torch.exp, torch.ones(3, dtype=F64))
    skew = torch.zeros(100, 100, dtype=F64)
    skew[0, 1], skew[1, 0] = 1, -1
    with pytest.raises(hk.NotSymmetricError):
        hk.matrix_function(hk.aslinearoperator(matrix(SPECTRA["indefinite"]) + skew), torch.exp, b)
