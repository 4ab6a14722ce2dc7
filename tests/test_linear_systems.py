"""Linear systems against dense float64 answers, SciPy's solvers, and the identities that define a solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit._utils.deadline import check_deadline
from hvpkit.linear_systems import make_system
from hvpkit.operators.space import Space
from hvpkit.solvers import checkpoint as checkpoint_module
from hvpkit.solvers.checkpoint import Saved
from hvpkit.solvers.driver import _Loop
from hvpkit.solvers.linear import arithmetic as arithmetic_module
from hvpkit.solvers.linear import system as system_module
from oracles import hessian_by_double_backward, relative_error
from problems import SPECTRA, matrix, network

TOL = {torch.float64: 1e-8, torch.float32: 1e-4}
F64 = torch.float64

each_method = pytest.mark.parametrize("method", ["cg", "minres"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
each_arithmetic = pytest.mark.usefixtures("arithmetic")


@pytest.fixture(params=["numpy", "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vectors count as short, as all of these are, or as long."""
    if request.param == "torch":
        monkeypatch.setattr(arithmetic_module, "SHORT_VECTOR", 0)


def block(n: int, k: int, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def definite(spectrum: str) -> list[float]:
    """The spectrum, shifted so that its lowest value is a hundredth of its norm."""
    values = torch.tensor(SPECTRA[spectrum], dtype=F64)
    return (values - values.min() + 0.01 * values.abs().max().clamp(min=1)).tolist()


def check_solution(found: hk.SolveResult, A: Tensor, b: Tensor, tol: float) -> None:
    """All that must hold of whatever is returned: true residuals, and a status that they bear out."""
    x, b = found.x.double().reshape(len(A), -1), b.double().reshape(len(A), -1)
    sizes = torch.linalg.vector_norm(b, dim=0)
    true = torch.linalg.vector_norm(b - A.double() @ x, dim=0)
    claimed = torch.as_tensor(found.residual_norm, dtype=F64).reshape(-1)
    noise = 20 * torch.finfo(A.dtype).eps * (torch.linalg.matrix_norm(A.double(), 2) * x.norm(dim=0) + sizes)
    assert bool(((claimed - true).abs() <= noise).all())
    relative = torch.as_tensor(found.relative_residual, dtype=F64).reshape(-1)
    assert torch.allclose(relative * sizes, claimed, rtol=1e-6, atol=0)
    for status, residual in zip(found.statuses, relative.tolist(), strict=True):
        assert status.converged == (residual <= tol) or status is hk.Status.NEGATIVE_CURVATURE
    assert found.status in found.statuses
    assert found.converged == all(status.converged for status in found.statuses)
    assert found.message


@each_arithmetic
@each_method
@each_spectrum
@each_dtype
def test_definite_systems_are_solved(method: str, spectrum: str, dtype: torch.dtype) -> None:
    A = matrix(definite(spectrum), dtype=dtype)
    for b in (block(len(A), 1, dtype)[:, 0], block(len(A), 3, dtype)):
        found = hk.solve(hk.aslinearoperator(A), b, method=method, tol=TOL[dtype])
        check_solution(found, A, b, TOL[dtype])
        assert found.status is hk.Status.CONVERGED
        assert found.x.shape == b.shape
        assert found.x.dtype == dtype
        exact = torch.linalg.solve(A.double(), b.double())
        condition = torch.linalg.cond(A.double())
        assert relative_error(found.x, exact) <= 2 * TOL[dtype] * condition


@each_arithmetic
@each_spectrum
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_minres_takes_every_spectrum_at_every_scale(spectrum: str, dtype: torch.dtype, scale: float) -> None:
    A = (matrix(SPECTRA[spectrum]) * scale).to(dtype)
    b = block(len(A), 2, dtype)
    found = hk.solve(hk.aslinearoperator(A), b, tol=TOL[dtype])
    check_solution(found, A, b, TOL[dtype])
    sizes = torch.linalg.eigvalsh(A.double()).abs()
    if float(sizes.max()) * torch.finfo(dtype).eps < 0.01 * TOL[dtype] * float(sizes.min()):
        assert found.converged
    assert bool((found.relative_residual <= 1).all())


@each_arithmetic
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_method
def test_scales_of_matrix_and_right_hand_side_do_not_matter(scale: float, method: str) -> None:
    A, b = matrix(definite("indefinite"), dtype=torch.float32), block(100, 2, torch.float32)
    plain = hk.solve(hk.aslinearoperator(A), b, method=method, tol=1e-4)
    both = hk.solve(hk.aslinearoperator(A * scale), b * scale, method=method, tol=1e-4)
    assert both.converged
    assert relative_error(both.x, plain.x) < 1e-3
    assert abs(both.num_matvecs - plain.num_matvecs) <= 2  # rounding of the scaled entries


@each_arithmetic
def test_solution_out_of_the_range_of_the_dtype_is_not_converged() -> None:
    A, b = torch.eye(4) * 1e30, torch.full((4,), 1e-30)
    found = hk.solve(hk.aslinearoperator(A), b)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.residual_norm == float("inf")


def consistent(A: Tensor) -> Tensor:
    return A @ block(len(A), 2)


@each_arithmetic
@pytest.mark.parametrize("spectrum", ["rank_deficient", "clustered"])
def test_singular_consistent_system_is_solved_and_inconsistent_one_is_reported(spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum])
    op = hk.aslinearoperator(A)
    b = consistent(A)
    found = hk.solve(op, b, tol=1e-8)
    check_solution(found, A, b, 1e-8)
    assert found.converged
    b = block(len(A), 2)
    found = hk.solve(op, b, tol=1e-8)
    check_solution(found, A, b, 1e-8)
    assert set(found.statuses) == {hk.Status.SINGULAR}
    least = torch.linalg.lstsq(A, b, driver="gelsd", rcond=1e-12).solution
    expected = torch.linalg.vector_norm(b - A @ least, dim=0)
    assert torch.allclose(found.residual_norm, expected, rtol=1e-6)
    found = hk.solve(op, b, method="cg", tol=1e-8)
    check_solution(found, A, b, 1e-8)
    assert not found.converged


@each_arithmetic
def test_conjugate_gradients_report_a_direction_of_negative_curvature() -> None:
    for spectrum in ("indefinite", "negative_dominant", "multiple", "n1", "n2"):
        A = matrix(SPECTRA[spectrum])
        b = block(len(A), 2)
        found = hk.solve(hk.aslinearoperator(A), b, method="cg")
        negative = found.negative_curvature
        assert found.status is hk.Status.NEGATIVE_CURVATURE
        assert negative is not None
        v = negative.direction
        assert v.shape == (len(A),)
        assert float(v.norm()) == pytest.approx(1)
        assert negative.curvature < 0
        assert float(v @ A @ v) == pytest.approx(negative.curvature, rel=1e-9)
        assert found.statuses[negative.column] is hk.Status.NEGATIVE_CURVATURE
        check_solution(found, A, b, 1e-6)
    assert hk.solve(hk.aslinearoperator(A), b).negative_curvature is None


def test_damping_is_added() -> None:
    A, b = matrix(SPECTRA["indefinite"]), block(100, 1)[:, 0]
    found = hk.solve(hk.aslinearoperator(A), b, damping=6.0, method="cg", tol=1e-10)
    assert found.converged
    assert relative_error(found.x, torch.linalg.solve(A + 6 * torch.eye(100, dtype=F64), b)) < 1e-9


@each_method
def test_zero_right_hand_side_is_solved_by_zero_without_a_matvec(method: str) -> None:
    op = hk.aslinearoperator(matrix(definite("indefinite")))
    found = hk.solve(op, torch.zeros(100, dtype=F64), method=method)
    assert (found.status, found.num_matvecs, found.residual_norm) == (hk.Status.CONVERGED, 0, 0)
    assert not found.x.any()
    b = block(100, 3)
    b[:, 1] = 0
    found = hk.solve(op, b, method=method)
    assert found.converged
    assert not found.x[:, 1].any()
    assert bool(found.x[:, [0, 2]].any(dim=0).all())


@dataclass
class Counting:
    """A matrix whose products are counted, and are not finite once ``good`` of them are through."""

    A: Tensor
    good: float = float("inf")
    columns: int = 0
    calls: int = 0

    def product(self, v: Tensor) -> Tensor:
        self.columns += v.shape[1]
        self.calls += 1
        return self.A @ v if self.calls <= self.good else torch.full_like(v, torch.nan)

    def operator(self, cost: float = 1.0) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product, cost=cost)


@each_method
@pytest.mark.parametrize("cost", [1.0, 0.25, 3.0])
def test_matvecs_and_passes_are_those_put_through_the_operator(method: str, cost: float) -> None:
    counting = Counting(matrix(definite("clustered")))
    found = hk.solve(counting.operator(cost), block(100, 3), method=method)
    assert found.num_matvecs == pytest.approx(cost * counting.columns)
    assert found.num_passes == pytest.approx(cost * counting.calls)
    assert counting.calls < counting.columns / 2.5


@each_arithmetic
@each_method
def test_columns_converge_separately(method: str) -> None:
    A = matrix(definite("clustered"))
    values, vectors = torch.linalg.eigh(A)
    b = torch.stack([vectors[:, 3], block(100, 1)[:, 0]], dim=1)
    counting = Counting(A)
    found = hk.solve(counting.operator(), b, method=method, tol=1e-8)
    alone = hk.solve(hk.aslinearoperator(A), b[:, 1], method=method, tol=1e-8)
    assert found.converged
    assert counting.columns <= alone.num_matvecs + 4
    assert relative_error(found.x[:, 0], vectors[:, 3] / values[3]) < 1e-7
    assert relative_error(found.x[:, 1], alone.x) < 1e-7


@pytest.mark.parametrize("spectrum", ["indefinite", "bulk_with_outliers", "clustered"])
def test_no_more_matvecs_than_scipy_takes_to_the_same_residual(spectrum: str) -> None:
    A, b = matrix(definite(spectrum)), block(len(SPECTRA[spectrum]), 1)[:, 0]
    for method, solver in (("cg", scipy.sparse.linalg.cg), ("minres", scipy.sparse.linalg.minres)):
        residuals: list[float] = []

        def note(x: np.ndarray, residuals: list[float] = residuals) -> None:
            residuals.append(float((b - A @ torch.from_numpy(x)).norm() / b.norm()))

        solver(A.numpy(), b.numpy(), rtol=1e-12, callback=note)
        steps = 1 + next(step for step, residual in enumerate(residuals) if residual <= 1e-8)
        found = hk.solve(hk.aslinearoperator(A), b, method=method, tol=1e-8)
        assert found.converged
        assert found.num_matvecs <= steps + 2  # one for the true residual, and a step for rounding


@each_method
def test_state_that_is_assessed_goes_on(method: str) -> None:
    A, b = matrix(definite("clustered")), block(100, 1)
    system = make_system(hk.aslinearoperator(A), b, 0.0, method, 0.5, None, None, None)
    state = system.init()
    while not state.is_ready:
        state = system.step(state)
    assert state.rows[0].size <= 0.5 * float(b.norm())
    # as from a checkpoint of a larger tol
    loop = _Loop(replace(system, tol=1e-8), Saved(state, 0, (), 0.0), math.inf, None, None)
    assert loop.assess().status is None
    loop.advance()
    assert loop.state.num_steps > state.num_steps
    assert loop.state.rows[0].size < state.rows[0].size


def test_minres_takes_no_more_matvecs_than_conjugate_gradients() -> None:
    for spectrum in SPECTRA:
        A = matrix(definite(spectrum))
        op, b = hk.aslinearoperator(A), block(len(A), 1)[:, 0]
        counts = [hk.solve(op, b, method=method).num_matvecs for method in ("minres", "cg")]
        assert counts[0] <= counts[1]


@each_arithmetic
@each_method
def test_residual_is_refined_to_the_accuracy_that_rounding_allows(method: str) -> None:
    A, b = matrix(definite("bulk_with_outliers"), dtype=torch.float32), block(300, 1, torch.float32)[:, 0]
    found = hk.solve(hk.aslinearoperator(A), b, method=method, tol=1e-9)
    check_solution(found, A, b, 1e-9)
    assert found.status is hk.Status.ROUNDING_LIMITED
    assert found.relative_residual < 1e-4
    assert found.num_matvecs < 200


@each_method
@pytest.mark.parametrize("budget", [2, 5, 9.5])
def test_used_up_budget_gives_the_iterate_with_its_residual(method: str, budget: float) -> None:
    counting = Counting(matrix(definite("clustered")))
    b = block(100, 1)[:, 0]
    found = hk.solve(counting.operator(), b, method=method, tol=1e-12, max_matvecs=budget)
    assert found.status is hk.Status.MAX_MATVECS
    assert "max_matvecs" in found.message
    assert budget - 1 < found.num_matvecs == counting.columns <= budget
    check_solution(found, counting.A, b, 1e-12)


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(matrix(definite("clustered")))
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + counting.columns)
    found = hk.solve(counting.operator(), block(100, 1)[:, 0], tol=1e-12, time_limit=7.0)
    assert found.status is hk.Status.TIME_LIMIT
    assert counting.columns <= 7


@each_arithmetic
@each_method
@pytest.mark.parametrize("budget", [None, 17, 40])
def test_steps_taken_at_once_are_those_taken_one_by_one(
    method: str, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, b = matrix(definite("clustered")), block(100, 3)
    b[:, 1] = torch.linalg.eigh(A).eigenvectors[:, 3]

    def solved(short: float) -> hk.SolveResult:
        monkeypatch.setattr(system_module, "SHORT", short)
        return hk.solve(hk.aslinearoperator(A), b, method=method, max_matvecs=budget)

    at_once, one_by_one = solved(10.0), solved(0.0)
    assert torch.equal(at_once.x, one_by_one.x)
    assert (at_once.statuses, at_once.num_matvecs) == (one_by_one.statuses, one_by_one.num_matvecs)
    assert [entry.num_matvecs for entry in at_once.history] == [
        entry.num_matvecs for entry in one_by_one.history
    ]


@each_method
def test_rows_that_wait_for_their_numbers_have_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic_module, "SHORT_VECTOR", 0)  # rows that wait are torch's
    A, b = matrix(definite("clustered")), block(100, 3)
    b[:, 1] = torch.linalg.eigh(A).eigenvectors[:, 3]
    op = hk.aslinearoperator(A)
    found, waiting = (hk.solve(replace(op, space=space), b, method=method) for space in (op.space, Space()))
    assert torch.equal(found.x, waiting.x)
    assert found.num_matvecs == waiting.num_matvecs


@each_method
def test_deadline_in_the_final_check_leaves_what_was_verified(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, now = matrix(definite("clustered")), 0.0

    def product(v: Tensor) -> Tensor:
        nonlocal now
        now += 1.0 if now < 4 else 5.0
        check_deadline()
        return A @ v

    monkeypatch.setattr("time.perf_counter", lambda: now)
    op = replace(hk.aslinearoperator(A), product=product)
    found = hk.solve(op, block(100, 1)[:, 0], method=method, tol=1e-12, time_limit=5.5)
    assert found.status is hk.Status.TIME_LIMIT
    assert found.relative_residual == 1.0
    assert not found.x.any()


@each_arithmetic
@each_method
def test_matvec_that_is_not_finite_keeps_the_iterate_before(method: str) -> None:
    counting = Counting(matrix(definite("clustered")), good=6)
    b = block(100, 2)
    found = hk.solve(counting.operator(), b, method=method)
    assert found.status is hk.Status.NON_FINITE
    assert "NaN or infinity" in found.message
    assert bool(torch.isfinite(found.x).all())
    first = hk.solve(Counting(counting.A, good=0).operator(), b, method=method)
    assert first.status is hk.Status.NON_FINITE
    assert not first.x.any()


@each_arithmetic
@each_method
def test_same_bits_again_and_nothing_of_the_callers_changes(method: str) -> None:
    op, b = hk.aslinearoperator(matrix(definite("indefinite"))), block(100, 3)
    state, before = torch.random.get_rng_state(), b.clone()
    found, again = (hk.solve(op, b, method=method) for _ in range(2))
    assert torch.equal(found.x, again.x)
    assert torch.equal(b, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    found.x.zero_()
    assert torch.equal(b, before)


@each_arithmetic
@each_method
@pytest.mark.parametrize("k", [1, 3])
def test_matvec_may_keep_its_argument_and_reuse_its_result(method: str, k: int) -> None:
    A, kept, copies = matrix(definite("bulk_with_outliers")), [], []
    n = len(A)
    buffers = {k: torch.empty(n, k, dtype=F64) for k in range(1, 4)}

    def product(vectors: Tensor) -> Tensor:
        kept.append(vectors)
        copies.append(vectors.clone())
        return torch.mm(A, vectors, out=buffers[vectors.shape[1]])

    b = block(n, k)
    found = hk.solve(hk.LinearOperator(product, n, F64, torch.device("cpu")), b, method=method)
    assert found.converged
    check_solution(found, A, b, 1e-6)
    assert all(torch.equal(one, copy) for one, copy in zip(kept, copies, strict=True))


@each_arithmetic
@each_method
def test_solves_are_assessed_each_so_many_steps_and_saved_between(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_module, "SHORT", 0.0)
    monkeypatch.setattr(checkpoint_module, "SAVE_INTERVAL", 0.0)
    A, file, saved = matrix(torch.linspace(1e-3, 1, 200).tolist()), tmp_path / "solve.pt", []

    def product(v: Tensor) -> Tensor:
        saved.append(file.exists())
        return A @ v

    op = replace(hk.aslinearoperator(A), product=product)
    is_short = arithmetic_module.arithmetic_of(op).is_short
    found = hk.solve(op, block(200, 1)[:, 0], method=method, tol=1e-10, max_matvecs=80, checkpoint=file)
    counts = [entry.num_matvecs for entry in found.history]
    assert counts == ([64, 79] if is_short else [*range(8, 73, 8), 79])
    assert saved == [False, *[True] * 79]


@each_method
def test_steps_over_examples_are_assessed_each_eighth_time(method: str) -> None:
    """They may take seconds, however short the vectors are."""
    x = torch.randn(50, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = hk.hessian(lambda p, batch: (batch @ p) ** 2, torch.ones(200, dtype=torch.float64), x)
    found = hk.solve(H, block(200, 1)[:, 0], damping=1e-3, method=method, tol=1e-12, max_matvecs=20)
    assert [entry.num_matvecs for entry in found.history] == [8, 16, 19]


@each_method
def test_monitor_sees_the_history(method: str) -> None:
    seen: list[hk.SolveProgress] = []
    op = hk.aslinearoperator(matrix(definite("clustered")))
    found = hk.solve(op, block(100, 2), method=method, monitor=seen.append)
    assert tuple(seen) == found.history
    assert seen[-1].num_converged == 2
    assert [entry.num_matvecs for entry in seen] == sorted({entry.num_matvecs for entry in seen})
    assert "converged" in str(seen[0])


class Interrupted(Exception):
    pass


@each_arithmetic
@each_method
@pytest.mark.parametrize("fails_at", [3, 11, 30])
def test_interrupted_solve_goes_on_to_the_same_bits(method: str, fails_at: int, tmp_path: Path) -> None:
    A, file = matrix(definite("clustered")), tmp_path / "solve.pt"
    b = torch.stack([torch.linalg.eigh(A).eigenvectors[:, 3], block(100, 1)[:, 0]], dim=1)
    whole = hk.solve(hk.aslinearoperator(A), b, method=method, tol=1e-8)
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise Interrupted
        return A @ v

    op = replace(hk.aslinearoperator(A), product=product)
    with pytest.raises(Interrupted):
        hk.solve(op, b, method=method, tol=1e-8, checkpoint=file)
    found = hk.solve(op, b, method=method, tol=1e-8, checkpoint=file)
    assert torch.equal(found.x, whole.x)
    assert found.num_matvecs == whole.num_matvecs + 1
    assert not file.exists()


def test_checkpoint_of_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SAVE_INTERVAL", 0.0)
    A, b, file = matrix(definite("clustered")), block(100, 1)[:, 0], tmp_path / "solve.pt"
    op = hk.aslinearoperator(A)
    hk.solve(op, b, max_matvecs=10, checkpoint=file)
    for other, arguments in (
        (op, {"b": 2 * b}),
        (op, {"b": b, "damping": 1.0}),
        (op, {"b": b, "method": "cg"}),
    ):
        with pytest.raises(ValueError, match="another solve"):
            hk.solve(other, checkpoint=file, **arguments)
    with pytest.raises(ValueError, match="another operator"):
        hk.solve(hk.aslinearoperator(A + 0.1 * torch.eye(100, dtype=F64)), b, checkpoint=file)


def test_checkpoint_of_a_solve_names_what_differs_of_a_hessian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "SAVE_INTERVAL", 0.0)
    problem, file = network("mlp"), tmp_path / "solve.pt"

    def solved(factor: float, **options: Any) -> hk.SolveResult:
        params = {name: factor * leaf for name, leaf in problem.params.items()}
        H = hk.ggn(problem.objective, params, problem.data)
        return hk.solve(H, block(H.n, 2, H.dtype), damping=0.1, tol=1e-6, checkpoint=file, **options)

    solved(1.0, max_matvecs=8)
    with pytest.raises(ValueError, match=r"another solve \(parameters differs\)"):
        solved(1.1)
    assert solved(1.0).converged


def small_hessian() -> tuple[hk.CurvatureOperator, Tensor, dict[str, Tensor]]:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    return H, hessian_by_double_backward(problem.objective, problem.params, problem.data), problem.params


def test_forms_of_b_are_those_of_x() -> None:
    H, dense, params = small_hessian()
    tree = {name: torch.ones_like(value) for name, value in params.items()}
    exact = torch.linalg.solve(dense + 0.5 * torch.eye(H.n, dtype=F64), H.flatten(tree))
    found = hk.solve(H, tree, damping=0.5, tol=1e-10)
    assert isinstance(found.residual_norm, float)
    assert found.x.keys() == params.keys()
    assert relative_error(H.flatten(found.x), exact) < 1e-8
    array = hk.solve(H, H.flatten(tree).numpy(), damping=0.5, tol=1e-10).x
    assert isinstance(array, np.ndarray)
    assert relative_error(torch.from_numpy(array), exact) < 1e-8
    negative = hk.solve(H, tree, method="cg", tol=1e-12).negative_curvature
    assert negative is not None
    v = H.flatten(negative.direction)
    assert float(v @ dense @ v) == pytest.approx(negative.curvature)


def test_lowered_arithmetic_has_true_residuals_in_native_arithmetic() -> None:
    problem = network("mlp")
    objective, params = hk.from_module(problem.model.float(), torch.nn.CrossEntropyLoss())
    data = problem.data[0].float(), problem.data[1]
    native = hk.ggn(objective, params, data)
    H = hk.ggn(objective, params, data, arithmetic="bf16")
    b = block(H.n, 1, torch.float32)[:, 0]
    found = hk.solve(H, b, damping=0.1, tol=1e-5)
    residual = b - (native @ found.x + 0.1 * found.x)
    assert found.residual_norm == pytest.approx(float(residual.norm()), rel=0.05)
    assert found.converged


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"b": torch.ones(99, dtype=F64)}, ValueError, "b"),
        ({"b": torch.ones(100)}, ValueError, "b"),
        ({"b": torch.full((100,), torch.nan, dtype=F64)}, ValueError, "b"),
        ({"b": torch.ones(100, 2, 2, dtype=F64)}, ValueError, "b"),
        ({"b": {"weight": torch.ones(100)}}, TypeError, "b"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": float("nan")}, ValueError, "damping"),
        ({"method": "lu"}, ValueError, "method"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"preconditioner": "jacobi"}, ValueError, "preconditioner"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs"),
        ({"time_limit": 0}, ValueError, "time_limit"),
        ({"seed": -1}, ValueError, "seed"),
        ({"checkpoint": 3}, TypeError, "checkpoint"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_bad_argument_is_named(arguments: dict[str, object], error: type[Exception], name: str) -> None:
    op = hk.aslinearoperator(matrix(definite("indefinite")))
    with pytest.raises(error, match=rf"^{name}\b"):
        hk.solve(op, **{"b": torch.ones(100, dtype=F64), **arguments})


def test_sample_needs_examples_and_damping() -> None:
    op, b = hk.aslinearoperator(matrix(definite("indefinite"))), torch.ones(100, dtype=F64)
    with pytest.raises(TypeError, match="not over examples"):
        hk.solve(op, b, damping=1.0, preconditioner="sample")
    H, _, _ = small_hessian()
    with pytest.raises(ValueError, match="needs damping"):
        hk.solve(H, torch.ones(H.n, dtype=F64), preconditioner="sample")


def teacher(num_examples: int, seed: int = 0) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """A least-squares problem whose Hessian has eigenvalues from 1 to 1e-4."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, 60, generator=g, dtype=F64) * torch.logspace(0, -2, 60, dtype=F64)
    return (lambda p, batch: 0.5 * (batch @ p) ** 2), torch.zeros(60, dtype=F64), x


@each_arithmetic
@each_method
def test_sample_preconditions_to_the_same_solution_in_fewer_passes(method: str) -> None:
    loss, params, x = teacher(4000)
    H = hk.hessian(loss, params, x)
    dense = x.mT @ x / len(x)
    damping = 1e-3 * float(torch.linalg.eigvalsh(dense)[-1])
    A, b = dense + damping * torch.eye(60, dtype=F64), block(60, 2)
    plain = hk.solve(H, b, damping=damping, method=method, tol=1e-8)
    found = hk.solve(H, b, damping=damping, method=method, tol=1e-8, preconditioner="sample")
    for result in (plain, found):
        check_solution(result, A, b, 1e-8)
        assert result.converged
    assert relative_error(found.x, torch.linalg.solve(A, b)) < 1e-5
    assert found.num_matvecs < plain.num_matvecs
    again = hk.solve(H, b, damping=damping, method=method, tol=1e-8, preconditioner="sample")
    assert torch.equal(found.x, again.x)


def test_any_sample_leaves_an_indefinite_system_what_it_is() -> None:
    problem = network("mlp", num_examples=400)
    H = hk.hessian(problem.objective, problem.params, problem.data)
    dense = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    values = torch.linalg.eigvalsh(dense)
    damping = -0.3 * float(values[0])
    A, b = dense + damping * torch.eye(H.n, dtype=F64), block(H.n, 2)
    assert float(torch.linalg.eigvalsh(A)[0]) < 0
    found = hk.solve(H, b, damping=damping, preconditioner="sample", tol=1e-8)
    check_solution(found, A, b, 1e-8)
    assert found.converged
    assert (
        hk.solve(H, b, damping=damping, preconditioner="sample", method="cg").negative_curvature is not None
    )


def test_inverse_is_the_operator_of_solves() -> None:
    H, dense, params = small_hessian()
    A = dense + 0.5 * torch.eye(H.n, dtype=F64)
    K = hk.inverse(H, damping=0.5, tol=1e-12)
    exact = torch.linalg.inv(A)
    V = block(H.n, 3)
    assert K.shape == H.shape
    assert relative_error(K @ V, exact @ V) < 1e-10
    tree = H.unflatten(V[:, 0])
    assert (K @ tree).keys() == params.keys()
    assert hk.extreme_eigenvalues(K, tol=1e-6).largest.value == pytest.approx(
        float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-5
    )
    assert hk.trace(K, num_matvecs=H.n).value == pytest.approx(float(exact.trace()))
    assert "inverse" in repr(K)


def test_inverse_raises_where_a_solve_does_not_converge() -> None:
    K = hk.inverse(hk.aslinearoperator(matrix(SPECTRA["rank_deficient"])))
    with pytest.raises(hk.NotConvergedError, match=r"singular.*damping"):
        K @ block(100, 1)[:, 0]
    with pytest.raises(ValueError, match=r"^damping"):
        hk.inverse(hk.aslinearoperator(torch.eye(3)), damping=-1.0)
