from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hvpkit as hk
from hvpkit._utils.memory import Allocations
from hvpkit.solvers.common.request import check_arguments
from hvpkit.solvers.driver import Assessment
from hvpkit.solvers.krylov import start, step
from hvpkit.solvers.lanczos import Lanczos, LanczosState
from problems import SPECTRA, matrix, reducing


def solver_of(
    A: Tensor, ncv: int, block_size: int, k: int, *, which: str = "LA", tol: float = 1e-10
) -> Lanczos:
    op = hk.aslinearoperator(A)
    asked = check_arguments(op, k, which, v0=None, tol=tol, max_matvecs=None, time_limit=None, seed=0)
    return Lanczos(op, asked, ncv, block_size, check_copies=True)


def assessed(solver: Lanczos, count: int) -> Iterator[LanczosState]:
    """States after each of ``count`` assessments, with one step in between."""
    found = solver.assess(solver.init())
    for _ in range(count):
        if found.status is not None:
            return
        yield found.state
        found = solver.assess(solver.step(found.state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spectrum", ["indefinite", "clustered", "multiple", "rank_deficient", "identity"])
@pytest.mark.parametrize(
    ("ncv", "block_size", "k"), [(100, 1, 1), (12, 1, 2), (7, 1, 2), (14, 2, 3), (15, 3, 2), (11, 3, 3)]
)
def test_krylov_relation_holds_at_every_assessment_and_after_restarts(
    dtype: torch.dtype, spectrum: str, ncv: int, block_size: int, k: int
) -> None:
    A = matrix(SPECTRA[spectrum], dtype=dtype)
    solver = solver_of(A, ncv, block_size, k, which="BE", tol=torch.finfo(dtype).eps)
    dense, eps = A.double(), torch.finfo(dtype).eps
    norm = float(torch.linalg.matrix_norm(dense, 2))
    count = 0
    for state in assessed(solver, count=60):
        m, rows, count = state.num_multiplied, state.num_rows, count + 1
        slack = (20 + 2 * count) * eps  # each restart rotates the basis, which adds rounding
        V = state.basis[:rows].double()
        T = state.projected[:rows, :m].double() * float(state.scale)
        assert rows <= len(state.basis) == min(ncv + block_size, len(A))
        assert torch.equal(state.alive[:rows], torch.ones(rows, dtype=dtype))
        assert float((V @ V.mT - torch.eye(rows)).abs().max()) <= slack
        if m:
            assert float((dense @ V[:m].mT - V.mT @ T).abs().max()) <= slack * norm
            assert float((T[:m] - T[:m].mT).abs().max()) <= slack * norm
    assert count >= (1 if spectrum == "identity" else 4)


def test_more_start_columns_than_the_block_has_are_all_used() -> None:
    A = matrix(SPECTRA["clustered"])
    vectors = torch.linalg.eigh(A).eigenvectors
    v0 = torch.cat([vectors[:, 30:33], vectors[:, -1:]], dim=1)
    op = hk.aslinearoperator(A)
    first = start(op, 30, 2, 0, v0).basis[:2]
    shares = torch.linalg.vector_norm(first @ v0, dim=0)
    assert bool((shares > 0.5).all())


def parts(state: LanczosState) -> Iterator[Any]:
    """What a state consists of; unused rows of the basis are whatever was there."""
    for name, part in vars(replace(state, basis=state.basis[: state.num_rows])).items():
        yield from vars(part).values() if name == "polynomial" else [part]


@pytest.mark.parametrize("block_size", [1, 2])
def test_resumed_from_a_copied_state_gives_the_same_bits(block_size: int) -> None:
    A = matrix(SPECTRA["multiple"])
    solver = solver_of(A, 13, block_size, 3, tol=1e-8)

    def run(state: LanczosState, count: int) -> Assessment[LanczosState]:
        found = solver.assess(state)
        for _ in range(count):
            if found.status is not None:
                break
            found = solver.assess(solver.step(found.state))
        return found

    for pause in (1, 7, 15, 30):
        halfway = run(solver.init(), pause)
        assert halfway.status is None
        resumed, straight = run(copy.deepcopy(halfway.state), 200), run(halfway.state, 200)
        assert straight.status is hk.Status.CONVERGED
        assert replace(resumed, state=None) == replace(straight, state=None)
        for mine, theirs in zip(parts(resumed.state), parts(straight.state), strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else repr(mine) == repr(theirs)


class NoHostSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.__name__.split(".")[0] in self.waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", ["item", "bool", "float", "nonzero"])
def test_the_guard_against_host_synchronisation_sees_it(wait: str) -> None:
    x = torch.tensor([1.0, 0.0])
    action = {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x[0] > 0),
        "float": lambda: float(x[0]),
        "nonzero": lambda: x.nonzero(),
    }[wait]
    with NoHostSynchronisation(), pytest.raises(AssertionError, match="waits for the device"):
        action()


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("spectrum", ["indefinite", "multiple", "identity", "zero"])
def test_steps_do_not_wait_for_the_device(block_size: int, spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum])
    solver = solver_of(A, 20, block_size, 2)
    state = solver.assess(solver.init()).state
    for _ in range(2):
        with NoHostSynchronisation():
            for _ in range(3):
                state = solver.step(state)
        state = solver.assess(state).state
    assert state.num_products >= 3 * block_size


@pytest.mark.parametrize("block_size", [1, 3])
def test_steps_work_where_no_number_can_be_read(block_size: int) -> None:
    op = hk.LinearOperator(lambda v: 2.0 * v, 50, torch.float32, torch.device("meta"))
    state = start(op, 20, block_size, 0)
    for _ in range(5):
        state = step(op, state, block_size)
    assert state.num_multiplied == 5 * block_size
    assert state.basis.device.type == state.norm.device.type == state.scale.device.type == "meta"


def test_a_step_reads_its_basis_once_for_each_row_and_twice_for_the_last_two() -> None:
    num_dots = []
    space = reducing(lambda partial: num_dots.append(partial.numel()) or partial)
    op = replace(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), space=space)
    state = start(op, 20, 1, seed=0)
    for row in range(1, 12):
        num_dots.clear()
        state = step(op, state)
        near = min(3, row) if row > 2 else row
        assert sorted(num for num in num_dots if num > 1) == sorted(num for num in (row, near) if num > 1)


def test_a_step_works_with_three_vectors_and_holds_none() -> None:
    n = 10_000
    op = hk.LinearOperator(lambda v: 2 * v, n, torch.float32, torch.device("cpu"))
    state = start(op, 20, 1, seed=0)
    for _ in range(6):
        with Allocations() as made:
            state = step(op, state)
        assert made.peak < 3.1 * 4 * n, "the product among them"
        assert made.now < 0.1 * 4 * n
