from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hvpkit as hk
from oracles import relative_error
from problems import matrix, network
from variants import variant

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
factors = st.floats(-1e3, 1e3, allow_subnormal=False)
integers = st.integers(-9, 9)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[hk.LinearOperator, Tensor]:
    """An operator built from three matrices by the algebra, and the matrix that NumPy's rules make of it."""
    seeds = iter(range(3))

    def leaf() -> tuple[hk.LinearOperator, Tensor]:
        dense = matrix([-2.0, 1.0, 3.0, 10.0], seed=next(seeds))
        return hk.aslinearoperator(dense), dense

    op, dense = leaf()
    for _ in range(2):
        other, other_dense = leaf()
        match draw(st.integers(0, 5)):
            case 0:
                op, dense = op + other, dense + other_dense
            case 1:
                op, dense = op - other, dense - other_dense
            case 2:
                factor = draw(factors)
                op, dense = factor * op, factor * dense
            case 3:
                factor = draw(factors | integers)
                op, dense = op * factor, dense * factor
            case 4:
                sigma = draw(factors)
                op, dense = op.shift(sigma), dense + sigma * torch.eye(4, dtype=torch.float64)
            case 5:
                op, dense = other - (-op), other_dense + dense
    return op, dense


@properties
@given(expressions(), st.integers(0, 2**31))
def test_the_algebra_of_operators_is_that_of_matrices(
    pair: tuple[hk.LinearOperator, Tensor], seed: int
) -> None:
    op, dense = pair
    V = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # relative to the terms, which may cancel
    assert float((op @ V - dense @ V).norm()) <= 1e-13 * (20.0 + float(dense.norm())) * float(V.norm())


@properties
@given(factors, factors)
def test_shifting_moves_eigenvalues_and_keeps_vectors(sigma: float, factor: float) -> None:
    values = torch.tensor([-3.0, 1.0, 4.0], dtype=torch.float64)
    moved = factor * hk.aslinearoperator(torch.diag(values)).shift(sigma)
    assert torch.allclose(moved @ torch.eye(3).double(), torch.diag(factor * (values + sigma)))


def test_autocast_does_not_reach_products() -> None:
    A = hk.aslinearoperator(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    v = torch.ones(5) / 3
    expected = A @ v
    with torch.autocast("cpu"):
        assert torch.equal(A @ v, expected)
        assert torch.equal(torch.from_numpy(A.to_scipy() @ v.numpy()), expected)


def test_numbers_of_numpy_scale_as_floats_do() -> None:
    A = hk.aslinearoperator(torch.eye(2))
    for product in (np.float32(2) * A, A * np.float32(2), np.float64(2) * A, A * np.int64(2)):
        assert isinstance(product, hk.LinearOperator)
        assert (product @ torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("factor", [True, "2", None, 1j, torch.eye(2)])
def test_what_is_no_real_number_does_not_scale(factor: object) -> None:
    with pytest.raises(TypeError):
        hk.aslinearoperator(torch.eye(2)) * factor


def test_only_operators_alike_can_be_added() -> None:
    A = hk.aslinearoperator(torch.eye(2))
    with pytest.raises(ValueError, match=r"operators of different shape cannot be combined"):
        A + hk.aslinearoperator(torch.eye(3))
    with pytest.raises(ValueError, match=r"operators of different dtype .* torch.float32 and torch.float64"):
        A - hk.aslinearoperator(torch.eye(2).double())
    with pytest.raises(TypeError):
        A + torch.eye(2)


def test_what_a_sum_costs_and_knows() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    assert (H.cost, H.num_examples, H.dtype, H.shape) == (1.0, 13, torch.float64, (43, 43))
    K = 2.0 * (H + H).shift(1.0)
    assert (K.cost, K.num_examples) == (2.0, 13)
    tree = K @ problem.params
    expected = 4.0 * (H @ H.flatten(problem.params)) + 2.0 * H.flatten(problem.params)
    assert relative_error(K.flatten(tree), expected) < 1e-14
    eye = hk.aslinearoperator(torch.eye(43, dtype=torch.float64))
    assert list((eye - H) @ problem.params) == list(problem.params)


def test_operators_are_divided_and_summed_up_as_numbers_are() -> None:
    dense = matrix([-2.0, 1.0, 3.0, 10.0])
    A = hk.aslinearoperator(dense)
    eye = torch.eye(4, dtype=torch.float64)
    for divisor in (2, -0.3, np.float32(4), np.int64(3)):
        assert relative_error((A / divisor) @ eye, dense / float(divisor)) < 1e-15
    assert relative_error(sum([A, 2.0 * A, A]) @ eye, 4 * dense) < 1e-15
    assert relative_error((A + A) / 2 @ eye, dense) < 1e-15
    with pytest.raises(ZeroDivisionError):
        A / 0
    for divisor in (True, "2", 1j, A, eye):
        with pytest.raises(TypeError):
            A / divisor
    for start in (1, 0.5, None):
        with pytest.raises(TypeError):
            start + A


def test_precision_is_rounding_unless_said_otherwise_and_goes_along() -> None:
    A = hk.aslinearoperator(torch.eye(3))
    assert A.precision == torch.finfo(torch.float32).eps
    assert hk.aslinearoperator(torch.eye(3).double()).precision == torch.finfo(torch.float64).eps
    rough = variant(A, precision=1e-3)
    derived = (2.0 * rough, rough / 2, -rough, rough.shift(1.0), rough + A, A - rough, sum([A, rough]))
    assert {op.precision for op in derived} == {1e-3}


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
        (np.ones(43), TypeError, "v must be a tree of tensors, .* ndarray"),
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
        (np.ones((2, 3)), ValueError, "A must be square"),
        (scipy.sparse.eye_array(2, dtype=np.int64), TypeError, "A must have a real floating dtype"),
        (scipy.sparse.csr_array(np.ones((2, 3))), ValueError, "A must be square"),
        (torch.eye(2).to_sparse(), TypeError, r"A is a sparse tensor \(torch.sparse_coo\); pass \(matvec"),
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
    ],
)
def test_a_product_of_another_shape_is_refused(A: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hk.aslinearoperator(A) @ torch.ones(2, dtype=torch.float64)


def test_a_product_that_is_not_finite_is_an_error_that_names_the_operator() -> None:
    A = hk.aslinearoperator((lambda v: v / 0, 2, torch.float64))
    with pytest.raises(hk.NonFiniteError, match=r"a product of <matvec: 2 x 2, float64, cpu> gave NaN"):
        A @ torch.ones(2, dtype=torch.float64)
