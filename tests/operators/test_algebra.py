from __future__ import annotations

import numpy as np
import pytest
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
