"""Time limits hold inside a matvec: what was found until then is returned, and the operator stays right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit._utils.deadline import DeadlineReached, check_deadline, deadline
from hvpkit.solvers.driver import GRACE
from problems import SPECTRA, matrix, network

NUM_BATCHES = 10
EIGENSOLVERS: dict[str, Callable[..., Any]] = {
    "lanczos": lambda op, **options: hk.lanczos(op, 2, which="BE", **options),
    "lanczos in blocks": lambda op, **options: hk.lanczos(op, 2, which="BE", block_size=2, **options),
    "lobpcg": lambda op, **options: hk.lobpcg(op, 2, which="LA", **options),
    "chebyshev": lambda op, **options: hk.chebyshev(op, 2, which="LA", **options),
    "power": lambda op, **options: hk.power(op, 2, which="LA", **options),
    "eigsh": lambda op, **options: hk.eigsh(op, 2, which="LA", **options),
    "levels": lambda op, **options: hk.multifidelity([cheap(op), op], **options),
}


def cheap(op: hk.LinearOperator) -> hk.LinearOperator:
    """A level that takes no time."""
    return replace(hk.aslinearoperator(matrix(SPECTRA["clustered"])), cost=0.1 * op.cost)


@dataclass
class Slow:
    """A matrix whose matvec has batches of ``seconds`` each for every vector, between which deadlines are checked."""

    A: Tensor
    seconds: float = 1.0
    now: float = 1e6
    products: int = 0

    def product(self, v: Tensor) -> Tensor:
        for _ in range(NUM_BATCHES):
            check_deadline()
            self.now += self.seconds * v.shape[1]
        self.products += v.shape[1]
        return self.A @ v

    def operator(self) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    result = Slow(matrix(SPECTRA["clustered"]))
    monkeypatch.setattr("time.perf_counter", lambda: result.now)
    return result


@pytest.mark.parametrize("solver", EIGENSOLVERS)
@pytest.mark.parametrize("time_limit", [0.5, 5.0, 25.0, 37.0, 118.0])
def test_a_solve_ends_soon_after_its_time_limit(solver: str, time_limit: float, slow: Slow) -> None:
    found = EIGENSOLVERS[solver](slow.operator(), tol=1e-12, time_limit=time_limit)
    assert found.status is hk.Status.TIME_LIMIT
    assert found.seconds <= GRACE * time_limit + 4 * slow.seconds  # a batch with a block of at most four
    assert "time_limit" in found.message
    truth = torch.linalg.eigvalsh(slow.A)
    distances = (found.values[:, None] - truth).abs().amin(dim=1)
    assert bool((distances <= found.residual_norms + 1e-9).all())  # true residuals, verified or not
    assert len(found.values) or time_limit < 40
    if solver != "levels":  # whose first level is counted at its cost
        assert found.num_matvecs <= slow.products
        assert found.num_matvecs or not len(found.values)


@pytest.mark.parametrize("time_limit", [5.0, 118.0])
def test_extremes_say_that_nothing_is_known_or_what_is(time_limit: float, slow: Slow) -> None:
    found = hk.extreme_eigenvalues(slow.operator(), tol=1e-12, time_limit=time_limit)
    assert found.status is hk.Status.TIME_LIMIT
    assert slow.now - 1e6 <= GRACE * time_limit + slow.seconds
    assert math.isnan(found.largest.value) == (time_limit == 5.0)
    assert isinstance(found.summary(), str)
    assert hk.ExtremeResult.from_dict(found.to_dict()).status is found.status


@pytest.mark.parametrize("time_limit", [5.0, 215.0])
@pytest.mark.parametrize("estimator", [hk.trace, hk.diagonal, hk.frobenius_norm])
def test_estimates_end_soon_after_their_time_limit(
    estimator: Callable[..., Any], time_limit: float, slow: Slow
) -> None:
    found = estimator(slow.operator(), num_matvecs=90, block_size=3, time_limit=time_limit)
    assert found.status is hk.Status.TIME_LIMIT
    assert found.seconds <= time_limit + 6 * slow.seconds  # a batch with the columns of a block
    assert (found.num_samples > 0) == (time_limit > 90)


@pytest.mark.parametrize("method", ["lanczos", "chebyshev"])
@pytest.mark.parametrize("time_limit", [5.0, 215.0])
def test_densities_end_soon_after_their_time_limit(method: str, time_limit: float, slow: Slow) -> None:
    found = hk.spectral_density(
        slow.operator(), method=method, num_steps=40, num_probes=3, time_limit=time_limit
    )
    assert found.status is hk.Status.TIME_LIMIT
    assert slow.now - 1e6 <= GRACE * time_limit + 3 * slow.seconds


def test_a_check_that_the_limit_cuts_is_no_convergence(slow: Slow) -> None:
    whole = hk.lanczos(slow.operator(), tol=1e-3)
    last = (whole.num_matvecs - 1) * NUM_BATCHES * slow.seconds
    slow.now = 1e6

    def slower(entry: hk.Progress) -> None:
        if entry.num_matvecs >= whole.num_matvecs - 1:
            slow.now += last  # the machine is busy after the last step

    found = hk.lanczos(slow.operator(), tol=1e-3, time_limit=1.5 * last, monitor=slower)
    assert found.status is hk.Status.TIME_LIMIT
    assert "no time was left to verify" in found.message
    assert found.values.tolist() == whole.values.tolist()
    assert found.num_matvecs == whole.num_matvecs - 1
    assert found.residual_norms.tolist() == pytest.approx(whole.residual_norms.tolist(), rel=1e-6)


def test_a_checkpoint_whose_verification_the_limit_cuts_stays_as_it_is(slow: Slow, tmp_path: Path) -> None:
    op, file = slow.operator(), tmp_path / "solve.pt"
    first = hk.lanczos(op, tol=1e-12, time_limit=118.0, checkpoint=file)
    assert first.status is hk.Status.TIME_LIMIT
    before = file.read_bytes()
    cut = hk.lanczos(op, tol=1e-12, time_limit=5.0, checkpoint=file)  # half of a matvec
    assert (cut.status, cut.num_matvecs, len(cut.values)) == (hk.Status.TIME_LIMIT, 0, 0)
    assert file.read_bytes() == before
    rest = hk.lanczos(op, tol=1e-12, checkpoint=file)
    whole = hk.lanczos(op, tol=1e-12)
    assert rest.values.tolist() == whole.values.tolist()


def make_operator(mode: str, batch_size: int = 2) -> hk.CurvatureOperator:
    problem = network("mlp")
    return hk.hessian(problem.objective, problem.params, problem.data, mode=mode, batch_size=batch_size)


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
@pytest.mark.parametrize("num_before", [0, 1, 2])
@pytest.mark.parametrize("num_batches", [0, 1, 4, 6])
def test_an_operator_that_is_interrupted_stays_right(
    mode: str, num_before: int, num_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, untouched, calls = make_operator(mode), make_operator(mode), 0
    v = torch.randn(interrupted.n, 2, dtype=interrupted.dtype, generator=torch.Generator().manual_seed(0))
    for H in (interrupted, untouched):
        for _ in range(num_before):
            H @ v

    def clock() -> float:
        nonlocal calls
        calls += 1
        return float(calls)

    monkeypatch.setattr("time.perf_counter", clock)
    with pytest.raises(DeadlineReached), deadline(num_batches + 1):
        interrupted.product(v)
    monkeypatch.undo()
    assert calls == num_batches + 1
    kept = interrupted.terms[0][1].cache
    for _ in range(3):
        assert torch.equal(interrupted @ v, untouched @ v)
    assert kept.num_bytes == untouched.terms[0][1].cache.num_bytes
    assert len(kept._linear_maps) == len(untouched.terms[0][1].cache._linear_maps)


def test_a_slow_pass_over_many_batches_ends_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, now = network("mlp", num_examples=400), 1e6

    def forward(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal now
        now += 0.01
        return problem.objective.forward(params, batch)

    slow = hk.Objective(forward, problem.objective.output_loss)
    H = hk.hessian(slow, problem.params, problem.data, batch_size=1, mode="reverse-over-reverse")
    monkeypatch.setattr("time.perf_counter", lambda: now)
    begin = now
    found = hk.extreme_eigenvalues(H, time_limit=0.3)  # a pass takes four seconds and more
    assert now - begin < 1.3
    assert found.status is hk.Status.TIME_LIMIT
    assert found.num_matvecs == 0
