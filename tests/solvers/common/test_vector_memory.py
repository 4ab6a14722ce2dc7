"""Sets of vectors follow the memory that is free, and what does not fit is said before the first matvec."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit._utils.memory import Allocations, in_words
from hvpkit.estimators import sketch, spectral_density
from hvpkit.estimators.sampling import make_plan
from hvpkit.extreme import method_for
from hvpkit.linear_systems import VECTORS_PER_COLUMN
from hvpkit.solvers import lanczos, multifidelity, recycling
from hvpkit.solvers.common import vector_memory
from hvpkit.solvers.common.vector_memory import check_room, vectors_that_fit

N = 20_000
VECTOR = 4 * N


def spectrum() -> Tensor:
    bulk = torch.rand(N - 5, generator=torch.Generator().manual_seed(0)) - 0.3
    return torch.cat([torch.tensor([-3.0, -2.0, 40.0, 60.0, 100.0]), bulk])


def diagonal(entries: Tensor) -> hk.LinearOperator:
    return replace(hk.aslinearoperator(torch.eye(1)), n=len(entries), product=lambda v: entries[:, None] * v)


def levels() -> list[hk.LinearOperator]:
    noise = torch.randn(N, generator=torch.Generator().manual_seed(1))
    return [replace(diagonal(spectrum() * (1 + 0.05 * noise)), cost=0.05), diagonal(spectrum())]


def free(monkeypatch: pytest.MonkeyPatch, num_vectors: float) -> None:
    monkeypatch.setattr(vector_memory, "SMALL", 0)
    monkeypatch.setattr(vector_memory, "free_memory", lambda _: num_vectors * VECTOR)


LANCZOS = [
    {"k": 2, "which": "BE", "ncv": 20},
    {"k": 2, "which": "BE", "ncv": 60, "v0": torch.ones(N)},
    {"k": 4, "which": "BE", "ncv": 30},
    {"k": 4, "which": "LA", "ncv": 30, "block_size": 2},
    {"k": 1, "which": "SA", "ncv": 9},
]


@pytest.mark.parametrize("case", LANCZOS, ids=str)
def test_lanczos_takes_no_more_vectors_than_it_says(case: dict[str, Any]) -> None:
    op, said = diagonal(spectrum()), lanczos.num_vectors(case["ncv"], case["k"], case.get("block_size", 1))
    with Allocations() as made:
        hk.lanczos(op, **case, tol=1e-3, max_matvecs=150)
    assert case["ncv"] * VECTOR < made.peak <= (said + 0.5) * VECTOR  # and small matrices


@pytest.mark.parametrize("ncv", [8, 12, 20, 60])
def test_levels_take_no_more_vectors_than_they_say(ncv: int) -> None:
    both = levels()
    with Allocations() as made:
        found = hk.multifidelity(both, ncv=ncv)
    assert found.converged
    assert 0.5 * multifidelity.num_vectors(ncv) * VECTOR < made.peak
    assert made.peak <= (multifidelity.num_vectors(ncv) + 2) * VECTOR


def test_what_is_recycled_takes_no_more_vectors_than_it_says() -> None:
    op, rank, ncv = diagonal(spectrum()), 20, 12
    _, space = hk.follow_top(op, rank=rank)
    said = multifidelity.num_vectors(ncv) + recycling.COPIES * rank
    with Allocations() as made:
        found, _ = hk.follow_top(diagonal(1.1 * spectrum()), space=space, rank=rank, ncv=ncv)
    assert found.converged
    assert made.peak <= (said + 2) * VECTOR


def test_merging_takes_as_many_vectors_as_it_says() -> None:
    rank, rows = 20, torch.linalg.qr(torch.randn(N, 20, generator=torch.Generator().manual_seed(1))).Q.mT
    said = (recycling.COPIES - 1) * rank  # the space was there before
    recycled = recycling.Recycled(diagonal(spectrum()), rows, torch.arange(20.0).double(), rank)
    vectors = torch.randn(N, rank, generator=torch.Generator().manual_seed(2))
    with Allocations() as made:
        recycled.add(vectors, vectors)
    assert not recycled.waiting
    assert 0.8 * said * VECTOR < made.peak <= (said + 1) * VECTOR


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_take_no_more_vectors_than_they_say(method: str) -> None:
    op, options = diagonal(spectrum()), {"num_matvecs": 60, "block_size": 4}
    plan = make_plan(op, method, sketch.COSTS, tol=None, seed=0, **options)
    with Allocations() as made:
        hk.trace(op, method=method, **options)
    said = sketch.num_vectors(plan)
    assert 0.4 * said * VECTOR < made.peak <= (said + 1) * VECTOR


@pytest.mark.parametrize("method", ["lanczos", "chebyshev"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_densities_take_no_more_vectors_than_they_say(
    method: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = diagonal(torch.rand(10 * N, generator=torch.Generator().manual_seed(0)))
    goal = spectral_density.make_goal(op, method, 20, 6, block_size, 0)
    said = 10 * spectral_density.num_vectors(op.n, method, goal)
    free(monkeypatch, 1.02 * said)  # Lanczos for the ends of Chebyshev's band takes what there is
    with Allocations() as made:
        hk.spectral_density(op, method=method, num_steps=20, num_probes=6, block_size=block_size)
    assert 0.3 * said * VECTOR < made.peak <= (said + 1) * VECTOR  # and a little for the curve


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("k", [1, 4])
def test_linear_systems_take_no_more_vectors_than_they_say(
    method: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # single steps, as on a slow machine, take fewer
    monkeypatch.setattr("hvpkit.solvers.linear.system.SHORT", 10.0)
    said = k * VECTORS_PER_COLUMN[method]
    b = torch.randn(N, k, generator=torch.Generator().manual_seed(0))
    with Allocations() as made:
        assert hk.solve(diagonal(spectrum().abs()), b, damping=0.01, method=method, tol=1e-3).converged
    assert 0.8 * said * VECTOR < made.peak <= (said + 1) * VECTOR


def test_solves_and_traces_of_functions_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    op, b = diagonal(spectrum()), torch.ones(N)
    free(monkeypatch, 10)
    with pytest.raises(MemoryError, match=r"13 vectors .* take fewer columns at a time"):
        hk.solve(op, b, method="cg")
    with pytest.raises(MemoryError, match="take fewer num_steps"):
        hk.count_eigenvalues(op, 0.0, 1.0)
    found = hk.matrix_function(op, lambda x: x.abs().sqrt(), b)
    assert (found.status, found.num_matvecs) == (hk.Status.MAX_MATVECS, 5)


def test_levels_continue_with_the_vectors_of_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, file = levels(), tmp_path / "solve.pt"
    whole = hk.multifidelity(both)
    hk.multifidelity(both, max_matvecs=10, checkpoint=file)
    free(monkeypatch, 330)  # room for 60 vectors of each set, but by default half as many
    found = hk.multifidelity(both, checkpoint=file)
    assert torch.equal(found.vectors, whole.vectors)


def test_the_default_follows_n_alone_unless_memory_is_short() -> None:
    def ncv(n: int, fitting: float, k: int = 2) -> int:
        return lanczos.default_ncv(n, 4, k, 1, fitting)

    assert ncv(1000, 1e9) == ncv(1000, 500) == 300
    assert ncv(5_000_000, 1e9) == ncv(5_000_000, 300) == 214
    assert ncv(124_000_000, 1e9) == ncv(124_000_000, 72) == 60
    assert ncv(124_000_000, 40) == 28
    assert [ncv(124_000_000, fitting) for fitting in (30, 23, 16, 12)] == [25, 24, 13, 7]
    assert ncv(5_000_000, 112) == 100
    assert ncv(5_000_000, 1) == ncv(5_000_000, -5) == 7
    assert ncv(1000, 1e9, k=100) == 400
    assert multifidelity.default_ncv(1e9) == multifidelity.default_ncv(392) == 60
    assert multifidelity.default_ncv(152) == 20
    assert multifidelity.default_ncv(0) == 8


def test_a_small_basis_gives_the_same_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    op = diagonal(spectrum())
    whole = hk.extreme_eigenvalues(op)
    free(monkeypatch, 60)
    assert vectors_that_fit(op) == 30
    short = hk.extreme_eigenvalues(op)
    assert short.converged
    assert short.largest.value == pytest.approx(100, rel=0.02)
    assert short.smallest.value == pytest.approx(-3, rel=0.02)
    again = hk.extreme_eigenvalues(op, ncv=lanczos.default_ncv(N, 4, 2, 1, 30))
    assert (again.smallest.value, again.largest.value) == (short.smallest.value, short.largest.value)
    assert whole.largest.value == pytest.approx(short.largest.value, rel=0.02)


@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (
            lambda op: hk.lanczos(op),
            "13 vectors of 20,000 numbers in float32 take 1.0 MB.*take fewer parameters",
        ),
        (lambda op: hk.extreme_eigenvalues(op, ncv=100), "112 vectors.*smaller ncv \\(at least 7\\), fewer"),
        (
            lambda op: hk.multifidelity([replace(op, cost=0.1), op]),
            "80 vectors.*hvpkit.lanczos, which keeps fewer",
        ),
        (lambda op: hk.trace(op), "148 vectors.*fewer num_matvecs.*hutchinson"),
        (lambda op: hk.trace(op, method="hutchinson"), "34 vectors.*smaller block_size"),
        (lambda op: hk.diagonal(op), "smaller block_size"),
        (lambda op: hk.frobenius_norm(op), "vectors.*fewer num_matvecs"),
        (lambda op: hk.spectral_density(op), "108 vectors.*chebyshev"),
        (lambda op: hk.lobpcg(op), "vectors.*hvpkit.lanczos"),
        (lambda op: hk.chebyshev(op), "vectors.*hvpkit.lanczos"),
        (lambda op: hk.eigsh(op), "vectors.*hvpkit.lanczos"),
        (lambda op: hk.power(op), "vectors.*hvpkit.lanczos"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_matvec(
    solve: Callable[[hk.LinearOperator], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(_: Tensor) -> Tensor:
        raise AssertionError("a matvec")

    free(monkeypatch, 4)
    with pytest.raises(MemoryError, match=words):
        solve(replace(diagonal(spectrum()), product=product))


def test_the_remedy_for_a_device_is_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cpu", 0)  # another device by name
    room = {there: 5.0 * VECTOR, torch.device("cpu"): 1000.0 * VECTOR}
    monkeypatch.setattr(vector_memory, "SMALL", 0)
    monkeypatch.setattr(vector_memory, "free_memory", room.__getitem__)
    op = replace(diagonal(spectrum()), device=there)
    with pytest.raises(MemoryError, match=r"400 kB are free on cpu:0 \(80 MB in host memory\).*offload=True"):
        hk.extreme_eigenvalues(op)
    assert hk.extreme_eigenvalues(op, offload=True).converged


def test_samples_are_left_out_where_their_vectors_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvpkit.extreme.worth_sampling", lambda *_: True)
    op = diagonal(spectrum())
    for fitting, method in ((220.0, "multifidelity"), (200.0, "lanczos")):
        assert method_for(op, "auto", fitting=fitting) == method
        assert method_for(op, "auto", fitting=fitting, ncv=30) == "multifidelity"  # what is named is taken
        assert method_for(op, "auto", fitting=fitting, ncv=29) == "lanczos"
        assert method_for(op, "multifidelity", fitting=fitting) == "multifidelity"


def test_a_solve_continues_with_its_own_basis_on_a_machine_with_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, file = diagonal(spectrum()), tmp_path / "solve.pt"
    free(monkeypatch, 120)
    whole = hk.extreme_eigenvalues(op, tol=1e-5)
    hk.extreme_eigenvalues(op, tol=1e-5, max_matvecs=12, checkpoint=file)
    free(monkeypatch, 70)  # of which half would hold a smaller basis
    rest = hk.extreme_eigenvalues(op, tol=1e-5, checkpoint=file)
    assert (rest.smallest.value, rest.largest.value) == (whole.smallest.value, whole.largest.value)


def test_bytes_in_words() -> None:
    assert [in_words(x) for x in (12, 4e3, 5.25e6, 1.5e9)] == ["12 bytes", "4.0 kB", "5.2 MB", "1.5 GB"]


def test_for_small_vectors_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_memory(_: object) -> float:
        raise AssertionError("it was asked")

    monkeypatch.setattr(vector_memory, "free_memory", free_memory)
    op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 1000)))
    assert vectors_that_fit(op) == math.inf
    check_room(op, 1000, "")
    assert hk.extreme_eigenvalues(op).converged
    with pytest.raises(AssertionError, match="it was asked"):
        hk.extreme_eigenvalues(diagonal(torch.linspace(-1, 2, 500_000)))


FIVE_MILLION = """
import sys, resource, torch, hvpkit as hk
n = 5_000_000
d = torch.linspace(-1, 2, n); d[0], d[1] = -5.0, 50.0
op = hk.aslinearoperator((lambda v: d * v, n, torch.float32))
op @ torch.ones(n)  # what torch itself needs for a matvec
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(float(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    ex = hk.extreme_eigenvalues(op, tol=1e-3, checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
except MemoryError as error:
    print("MemoryError:", error)
else:
    print(ex.smallest.value, ex.largest.value, ex.status)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are read from /proc")
@pytest.mark.parametrize(("room", "fits"), [(9e8, True), (2e8, False)])
def test_five_million_parameters_under_a_limit_are_solved_or_refused(
    room: float, fits: bool, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", FIVE_MILLION, str(room), str(tmp_path / "solve.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if fits:
        smallest, largest, status = done.stdout.split()
        assert (float(smallest), float(largest)) == pytest.approx((-5, 50), rel=2e-3)
        assert status == "converged"
    else:
        assert "vectors of 5,000,000 numbers in float32 take" in done.stdout
        assert "are free on cpu" in done.stdout
        assert "fewer parameters" in done.stdout
