from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.baselines.scipy_eigs import eigsh, scipy_lobpcg
from problems import SPECTRA, matrix
from variants import explained

Foreign = Callable[..., Any]
each_solver = pytest.mark.parametrize("solve", [eigsh, scipy_lobpcg])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """SciPy's function, with the arguments of each call noted."""
    calls: list[dict[str, Any]] = []
    original: Foreign = getattr(scipy.sparse.linalg, name)

    def call(A: Any, X: Any = None, **options: Any) -> Any:
        calls.append({"dtype": A.dtype, "X": np.copy(X), **options})
        return original(A, X, **options)

    monkeypatch.setattr(scipy.sparse.linalg, name, call)
    return calls


@each_dtype
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_end_that_is_zero_is_found(dtype: torch.dtype, k: int, seed: int) -> None:
    # SciPy 1.17 and 1.18 multiply the start by the matrix, and never find its null space.
    values = torch.arange(100, dtype=dtype)
    found = eigsh(hk.aslinearoperator(torch.diag(values)), k, which="SA", tol=1e-3, atol=0.0, seed=seed)
    assert torch.allclose(found.values, values[:k].double(), atol=1e-2)
    assert found.status is hk.Status.ZERO_TO_ROUNDING


@each_solver
@each_dtype
@pytest.mark.parametrize(("value", "status"), [(0.0, "zero-to-rounding"), (3.0, "converged")])
def test_multiples_of_the_identity_need_vectors_that_scipy_does_not_give(
    solve: Foreign, dtype: torch.dtype, value: float, status: str
) -> None:
    op = hk.aslinearoperator(value * torch.eye(100, dtype=dtype))
    found = solve(op, 3)
    assert torch.allclose(found.values, torch.full((3,), value, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(3, dtype=dtype), atol=1e-5)
    assert found.status == status


@pytest.mark.skipif(
    "rng" not in inspect.signature(scipy.sparse.linalg.eigsh).parameters,
    reason="ARPACK before SciPy 1.17 draws start vectors of its own, without a seed",
)
def test_start_vectors_that_arpack_draws_are_seeded() -> None:
    op = hk.aslinearoperator(torch.eye(100))
    first, again, other = (eigsh(op, 3, seed=seed).vectors for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_solver
@pytest.mark.parametrize("n", [1, 2, 7, 20, 40])
def test_small_spaces_are_multiplied_whole(solve: Foreign, n: int) -> None:
    values = torch.arange(1.0, n + 1, dtype=torch.float64)
    for k in {1, (n + 1) // 2, n}:
        found = solve(hk.aslinearoperator(torch.diag(values)), k, which="SA")
        assert torch.allclose(found.values, values[:k], rtol=1e-12)
        assert found.num_matvecs == n + k
        assert {interval.kind for interval in found.intervals} == {"exact"}


@each_solver
def test_a_budget_smaller_than_a_small_space_gives_the_partial_answer(solve: Foreign) -> None:
    A = matrix(SPECTRA["decaying"])
    found = solve(hk.aslinearoperator(A), 2, max_matvecs=12)
    assert found.status is hk.Status.MAX_MATVECS
    assert found.num_matvecs == 12
    assert torch.allclose(found.values, torch.linalg.eigvalsh(A[:10, :10])[-2:])


@each_dtype
def test_arpack_sees_the_operators_dtype_half_of_tol_and_no_less_than_eps(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, op = watched(monkeypatch, "eigsh"), hk.aslinearoperator(matrix(SPECTRA["indefinite"], dtype=dtype))
    for tol in (1e-2, 1e-12, 1e-30):
        eigsh(op, tol=tol, ncv=30)
    eps = torch.finfo(dtype).eps
    assert [call["tol"] for call in calls] == pytest.approx([max(tol, eps) for tol in (5e-3, 5e-13, 0)])
    assert {call["dtype"] for call in calls} == {np.dtype(str(dtype)[6:])}
    assert {call["ncv"] for call in calls} == {30}
    assert calls[0]["v0"].dtype == calls[0]["dtype"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # SciPy blames what called it, which is this file here
def test_lobpcg_sees_half_of_tol_times_the_smallest_value_once_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, A = watched(monkeypatch, "lobpcg"), matrix(SPECTRA["indefinite"]) * 1e10
    scipy_lobpcg(hk.aslinearoperator(A), 3, tol=1e-4)
    assert [call["largest"] for call in calls] == [True, True]
    assert calls[0]["maxiter"] == 5
    assert calls[0]["tol"] < 1e-30
    scale = 2.0 ** np.floor(np.log2(np.abs(A.numpy() @ calls[0]["X"][:, 0]).max()))
    assert calls[1]["tol"] == pytest.approx(0.5 * 1e-4 * 0.98e10 / scale, rel=0.1)
    top = calls[1]["X"][:, -1]  # goes on from where the first call ended
    assert top @ A.numpy() @ top == pytest.approx(20e10, rel=1e-3)


@each_solver
def test_single_precision_with_tiny_tol_ends_at_rounding(solve: Foreign) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"], dtype=torch.float32))
    found = solve(op, 2, tol=1e-12)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.num_matvecs < 200
    assert torch.allclose(found.values, torch.tensor([50.0, 80.0], dtype=torch.float64), rtol=1e-5)


def test_bfloat16_is_single_precision_for_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(monkeypatch, "eigsh")
    A = torch.diag(torch.tensor([*[1.0] * 98, 64.0, 128.0])).bfloat16()
    found = eigsh(hk.aslinearoperator(A), tol=0.05)
    assert calls[0]["dtype"] == np.float32
    assert found.vectors.dtype == torch.bfloat16
    assert float(found.values) == pytest.approx(128.0, rel=0.05)


@pytest.mark.parametrize("name", ["indefinite", "clustered", "bulk_with_outliers"])
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_takes_no_more_products_than_arpack_alone_beside_the_check(name: str, tol: float) -> None:
    A, columns = matrix(SPECTRA[name]).numpy(), 0

    def product(x: np.ndarray) -> np.ndarray:
        nonlocal columns
        columns += 1
        return A @ x

    v0 = np.random.default_rng(0).normal(size=len(A))
    alone = scipy.sparse.linalg.LinearOperator(A.shape, matvec=product, dtype=float)
    scipy.sparse.linalg.eigsh(alone, 1, which="LA", tol=tol / 2, v0=v0)
    found = eigsh(hk.aslinearoperator(A), tol=tol)
    assert found.num_matvecs <= columns + 1


def test_an_eigenvalue_that_arpack_left_out_is_found_in_another_call_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = scipy.sparse.linalg.eigsh, []

    def forgetful(A: Any, k: int, **options: Any) -> Any:
        calls.append(k)
        values, vectors = original(A, k + 1, **options)
        kept = slice(0, k) if len(calls) == 1 else slice(1, k + 1)  # at first, all but the largest
        return values[kept], vectors[:, kept]

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", forgetful)
    found = eigsh(hk.aslinearoperator(matrix(SPECTRA["clustered"])), 3, tol=1e-6)
    assert torch.allclose(found.values, torch.tensor([1, 1 + 1e-4, 1 + 2e-4], dtype=torch.float64))
    assert len(calls) == 2
    assert found.converged
    assert "left out that its own products show" in found.message


def test_values_that_may_lack_a_neighbour_say_so() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    assert ["hvpkit.lanczos" in eigsh(op, k, which="BE").message for k in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize(
    ("solve", "name", "error"),
    [
        (eigsh, "eigsh", scipy.sparse.linalg.ArpackError(-9999)),
        (eigsh, "eigsh", scipy.sparse.linalg.ArpackNoConvergence("no", np.zeros(0), np.zeros((100, 0)))),
        (scipy_lobpcg, "lobpcg", np.linalg.LinAlgError("no solution")),
    ],
    ids=["breakdown", "no-convergence", "small-problem"],
)
def test_where_scipy_gives_up_it_is_called_again(
    solve: Foreign, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(scipy.sparse.linalg, name), []

    def failing(A: Any, *args: Any, **options: Any) -> Any:
        calls.append(A)
        if len(calls) == 1:
            A @ np.eye(100)[:, :1]
            raise error
        return original(A, *args, **options)

    monkeypatch.setattr(scipy.sparse.linalg, name, failing)
    found = solve(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), tol=1e-6)
    assert found.converged
    assert found.values.tolist() == pytest.approx([20.0])
    assert len(calls) > 1


@each_solver
@pytest.mark.parametrize("where", ["product", "monitor"])
def test_errors_of_the_caller_come_through(solve: Foreign, where: str) -> None:
    def raising(_: object) -> Any:
        raise ValueError("of mine")

    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    if where == "product":
        op = replace(op, product=raising)
    with pytest.raises(ValueError, match="of mine"):
        solve(op, monitor=raising if where == "monitor" else None)


@each_solver
def test_warnings_of_the_caller_come_through_and_those_of_scipy_do_not(solve: Foreign) -> None:
    A = matrix(SPECTRA["clustered"])

    def product(v: Tensor) -> Tensor:
        warnings.warn("of mine", UserWarning, stacklevel=1)
        return A @ v

    op = replace(hk.aslinearoperator(A), product=product)
    with pytest.warns(UserWarning, match="of mine") as caught:
        solve(op, 2, which="SA", max_matvecs=100)
    assert {str(entry.message) for entry in caught} == {"of mine"}


def test_numpy_random_state_is_not_touched() -> None:
    before = np.random.get_state()[1].tolist()
    eigsh(hk.aslinearoperator(torch.eye(100)), 3)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(("ncv", "error"), [(2, ValueError), (0, ValueError), (20.0, TypeError)])
def test_ncv_must_be_more_than_k(ncv: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^ncv\b"):
        eigsh(hk.aslinearoperator(torch.eye(100)), 2, ncv=ncv)


@each_solver
def test_history_has_an_entry_for_each_product_before_the_check(solve: Foreign) -> None:
    op = replace(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), cost=0.5)
    found = solve(op, 2)
    assert [entry.num_matvecs for entry in found.history] == [
        0.5 * (i + 1) for i in range(len(found.history))
    ]
    assert found.num_matvecs == found.history[-1].num_matvecs + 1.0
    assert found.history[-1].largest == pytest.approx(20.0, rel=1e-3)
    assert 0.0 < found.history[-1].largest_bound < 0.1


def test_product_that_is_not_finite_names_the_batch_at_fault() -> None:
    A, columns = matrix(SPECTRA["indefinite"]), 0

    def product(v: Tensor) -> Tensor:
        nonlocal columns
        columns += v.shape[1]
        return A @ v if columns < 12 else torch.full_like(v, torch.nan)

    op = replace(hk.aslinearoperator(A), product=product)
    op = explained(op, lambda v: f"batch {len(v)} is at fault")
    for solve in (eigsh, scipy_lobpcg):
        columns = 0
        found = solve(op, tol=1e-12)
        assert found.status is hk.Status.NON_FINITE
        assert "batch 100 is at fault" in found.message
        assert float(found.values[-1]) == pytest.approx(20.0, rel=1e-3)


@each_solver
def test_values_and_vectors_belong_together_where_the_check_fails(solve: Foreign) -> None:
    A, columns = matrix(SPECTRA["indefinite"]), 0

    def product(v: Tensor) -> Tensor:
        nonlocal columns
        columns += v.shape[1]
        return A @ v if columns <= good else torch.full_like(v, torch.nan)

    op, good = replace(hk.aslinearoperator(A), product=product), 10**6
    solve(op, 3)
    good, columns = columns - 3, 0
    found = solve(op, 3)
    assert found.status is hk.Status.NON_FINITE
    quotients = (found.vectors * (A @ found.vectors)).sum(dim=0)
    assert torch.allclose(quotients, found.values, rtol=1e-6)
