from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import hvpkit as hk
from oracles import relative_error
from problems import network


def test_autocast_does_not_reach_products() -> None:
    A = hk.aslinearoperator(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    v = torch.ones(5) / 3
    expected = A @ v
    with torch.autocast("cpu"):
        assert torch.equal(A @ v, expected)
        assert torch.equal(torch.from_numpy(A.to_scipy() @ v.numpy()), expected)


def test_trees_and_vectors_are_two_views_of_one_product() -> None:
    problem = network("tied_weights")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    v = torch.randn(H.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tree = H @ H.unflatten(v)
    assert {name: leaf.shape for name, leaf in tree.items()} == {
        name: p.shape for name, p in problem.params.items()
    }
    assert torch.equal(H.flatten(tree), H @ v)
    assert torch.equal(H.flatten(H.unflatten(v)), v)


def test_parameters_that_are_one_tensor_are_vectors_too() -> None:
    def loss_fn(p: Tensor, x: Tensor) -> Tensor:
        return (x @ p).pow(2).sum(1)

    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = hk.hessian(loss_fn, torch.ones(2, 3, dtype=torch.float64), x)
    oracle = torch.kron(2 * x.mT @ x / 5, torch.eye(3, dtype=torch.float64))
    v = torch.arange(6, dtype=torch.float64)
    assert relative_error(H @ v, oracle @ v) < 1e-14
    assert relative_error((H @ v.view(2, 3)).reshape(6), oracle @ v) < 1e-14
    assert relative_error(H @ torch.eye(6, dtype=torch.float64), oracle) < 1e-14
    scalar = hk.hessian(lambda p, x: x[:, 0] * p**2, torch.tensor(1.0).double(), torch.ones(3, 1).double())
    for shape in ((), (1,), (1, 4)):
        assert torch.equal(scalar @ torch.ones(shape).double(), torch.full(shape, 2.0).double())


@pytest.mark.parametrize(
    ("v", "error", "reason"),
    [
        (torch.ones(42).double(), ValueError, r"v must have shape \[43\] or \[43, k\], got \[42\]"),
        (torch.ones(43, 2, 1).double(), ValueError, r"v must have shape .* got \[43, 2, 1\]"),
        (torch.ones(1, 43).double(), ValueError, r"v must have shape .* got \[1, 43\]"),
        (torch.ones(43, 0).double(), ValueError, r"v must have shape .* got \[43, 0\]"),
        (torch.tensor(1.0).double(), ValueError, r"v must have shape .* got \[\]"),
        (torch.ones(43), ValueError, r"v has dtype torch.float32, expected torch.float64"),
        (torch.ones(43, dtype=torch.int64), ValueError, r"v has dtype torch.int64, expected torch.float64"),
        (torch.ones(43, device="meta").double(), ValueError, "v has device meta, expected cpu"),
        (torch.full((43,), float("nan")).double(), ValueError, "v contains NaN or infinity"),
        (torch.full((43, 2), float("inf")).double(), ValueError, "v contains NaN or infinity"),
        ({"0.weight": torch.ones(5, 4).double()}, ValueError, "v must be a tree shaped like the parameters"),
        (np.ones(42), ValueError, r"v must have shape \[43\] or \[43, k\], got \[42\]"),
        (
            np.ones(43, dtype=complex),
            TypeError,
            "v is an array of dtype complex128; real numbers are expected",
        ),
        (np.full(43, np.nan), ValueError, "v contains NaN or infinity"),
        ([1.0] * 43, TypeError, "v must be a tree of tensors, .* float"),
        (None, TypeError, "v must be a tree of tensors, .* NoneType"),
    ],
)
def test_what_is_no_vector_of_the_operators_space_is_refused(
    v: object, error: type[Exception], reason: str
) -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    with pytest.raises(error, match=reason):
        H @ v


def test_trees_of_another_shape_dtype_or_content_are_refused() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    with pytest.raises(ValueError, match=r"v must be shaped like the parameters: leaf '0\.bias'"):
        H @ (problem.params | {"0.bias": torch.ones(4).double()})
    with pytest.raises(ValueError, match=r"v has dtype torch.float32"):
        H @ (problem.params | {"0.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="v contains NaN or infinity"):
        H @ (problem.params | {"0.bias": torch.full((5,), float("nan")).double()})
    with pytest.raises(ValueError, match=r"tree must be a tree shaped like the parameters"):
        H.flatten([torch.ones(43)])
    with pytest.raises(ValueError, match=r"vector must have shape \[43\]"):
        H.unflatten(torch.ones(42))


def test_an_operator_without_parameters_takes_no_trees() -> None:
    A = hk.aslinearoperator(torch.eye(2))
    for use in (lambda: A @ {"a": torch.ones(2)}, lambda: A.flatten({}), lambda: A.unflatten(torch.ones(2))):
        with pytest.raises(TypeError, match="knows no tree of parameters"):
            use()


def test_an_operators_repr_says_what_it_is() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data, mode="finite-difference")
    assert repr(H) == "<Hessian: 43 x 43, float64, cpu, 13 examples, finite-difference>"
    assert repr(hk.aslinearoperator(torch.eye(3))) == "<dense matrix: 3 x 3, float32, cpu>"
    assert repr(2.0 * H.shift(-1.0)).startswith("<2 * (Hessian - 1 I): 43 x 43")


def test_a_product_that_is_not_finite_is_an_error_that_names_the_operator() -> None:
    A = hk.aslinearoperator((lambda v: v / 0, 2, torch.float64))
    with pytest.raises(hk.NonFiniteError, match=r"a product of <matvec: 2 x 2, float64, cpu> gave NaN"):
        A @ torch.ones(2, dtype=torch.float64)
