from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.operators.recorded import recorded
from hvpkit.solvers.low_rank import low_rank
from hvpkit.solvers.recycling import follow_top, merged
from problems import SPECTRA, matrix

TOL = {torch.float32: 1e-2, torch.float64: 1e-4}
F64 = torch.float64


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)


def symmetric(n: int, seed: int) -> Tensor:
    A = random_matrix(n, n, seed)
    return (A + A.mT) / torch.linalg.matrix_norm(A + A.mT, 2)


def spectrum(*outliers: float, n: int = 300, high: float = 1.0) -> Tensor:
    """A dense matrix with these outliers above a bulk from -0.1 to ``high``."""
    values = torch.cat(
        [torch.linspace(-0.1, high, n - len(outliers), dtype=F64), torch.tensor(outliers).double()]
    )
    basis = torch.linalg.qr(random_matrix(n, n, 3)).Q
    return basis * values @ basis.mT


def path(step: int, n: int = 300) -> Tensor:
    """A matrix whose outliers, and their vectors, move step by step."""
    return spectrum(6.0, 7.5, 8.0, 10.0, n=n) * (1 + 0.02 * step) + 0.1 * step * symmetric(n, 7)


def op_of(A: Tensor) -> hk.LinearOperator:
    return hk.aslinearoperator(A)


def tops(A: Tensor, k: int) -> Tensor:
    return torch.linalg.eigvalsh(A.double())[-k:]


@pytest.mark.parametrize("num_known", [0, 5])
def test_pairs_agree_with_matvecs_and_elsewhere_with_what_was_known(num_known: int) -> None:
    n, m = 30, 8
    H, S = symmetric(n, 0), symmetric(n, 1)
    values, basis = torch.linalg.eigh(S)
    known, values = basis[:, -num_known:].mT[:num_known], values[-num_known:][:num_known]
    X = random_matrix(m, n, 2)
    X[-1] = X[0] + X[1]  # dependent
    rows, found = merged(op_of(H), X, X @ H, known, values, rank=n)
    assert len(rows) == m - 1 + num_known
    assert bool((found.diff() >= 0).all())
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=F64), atol=1e-10, rtol=0)
    model = rows.mT @ (found[:, None] * rows)
    Q = torch.linalg.qr(X[:-1].mT).Q
    outside = torch.eye(n, dtype=F64) - Q @ Q.mT
    Z = torch.linalg.qr(outside @ known.mT).Q
    likeness = known.mT @ (values[:, None] * known)
    for one, other, truth in ((Q, Q, H), (Z, Q, H), (Z, Z, likeness)):
        torch.testing.assert_close(one.mT @ model @ other, one.mT @ truth @ other, atol=1e-9, rtol=0)
    few, largest = merged(op_of(H), X, X @ H, known, values, rank=3)
    assert torch.equal(largest, found[-3:])
    torch.testing.assert_close(few, rows[-3:])


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_values_of_a_changing_matrix_for_a_fraction_of_the_passes(k: int, dtype: torch.dtype) -> None:
    space, followed, cold = None, 0.0, 0.0
    for step in range(6):
        A = path(step).to(dtype)
        found, space = follow_top(op_of(A), k, space)
        truth = tops(A, k)
        assert found.converged
        assert bool(((found.values - truth).abs() <= 1e-2 * truth).all())
        for value, interval in zip(truth.tolist(), found.intervals, strict=True):
            assert value in interval
            assert interval.kind == "random-start" or step == 0
        residuals = A.double() @ found.vectors.double() - found.vectors.double() * found.values
        norms = torch.linalg.vector_norm(residuals, dim=0)
        torch.testing.assert_close(norms, found.residual_norms, atol=1e-4, rtol=1e-3)
        followed += found.num_matvecs
        cold += hk.lanczos(op_of(A), k, which="LA", seed=step).num_matvecs
        assert space.num_solves == step + 1
        assert space.vectors.dtype == dtype
    assert followed < 0.75 * cold


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("change", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_every_spectrum_however_much_it_has_changed(
    name: str, dtype: torch.dtype, change: float, k: int
) -> None:
    A = matrix(SPECTRA[name]).double()
    k = min(k, len(A))
    norm = float(torch.linalg.matrix_norm(A, 2))
    before = A + change * norm * symmetric(len(A), 1)
    options: dict[str, Any] = {"tol": TOL[dtype], "atol": 0.0}
    _, space = follow_top(op_of(before.to(dtype)), k, **options)
    found, _ = follow_top(op_of(A.to(dtype)), k, space, **options)
    truth = tops(A.to(dtype), k)
    rounding = 64 * torch.finfo(dtype).eps * norm
    assert found.converged or found.status is hk.Status.ROUNDING_LIMITED
    assert bool(((found.values - truth).abs() <= (TOL[dtype] * truth.abs()).clamp(min=rounding)).all())


def test_a_top_that_the_space_lacks_is_missed_as_seldom_as_stated() -> None:
    old, new = 4.0, 4.3
    values = torch.cat([torch.linspace(-0.1, 1, 298, dtype=F64), torch.tensor([old, new], dtype=F64)])
    op, unit = op_of(torch.diag(values)), torch.eye(300, dtype=F64)
    space = hk.RecycledSpace(values[-12:-1], unit[:, -12:-1], 10.0, 1)
    missed = 0
    for seed in range(100):
        found, _ = follow_top(op, 1, space, seed=seed)
        wrong = abs(float(found.values[0]) - new) > 2e-2 * new
        assert wrong == (new not in found.intervals[0])
        missed += wrong
    assert missed <= 4  # of a hundred with a probability of 0.01 each: one time in 300


def test_a_space_of_another_matrix_costs_at_most_as_many_passes_again() -> None:
    A, other = spectrum(3.0, 8.0), symmetric(300, 5)
    _, space = follow_top(op_of(other))
    found, _ = follow_top(op_of(A), space=space)
    assert float(found.values[0]) == pytest.approx(8.0, rel=1e-2)
    assert found.num_matvecs <= 3 * hk.lanczos(op_of(A), 1, which="LA").num_matvecs


def test_the_same_call_gives_the_same_bits_and_changes_no_space() -> None:
    _, space = follow_top(op_of(path(0)), seed=5)
    kept = space.vectors.clone()
    one, after = follow_top(op_of(path(1)), 2, space, seed=5)
    two, again = follow_top(op_of(path(1)), 2, space, seed=5)
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(after.vectors, again.vectors)
    assert torch.equal(space.vectors, kept)


def test_starts_of_consecutive_solves_are_independent_of_the_space() -> None:
    drawn: list[Tensor] = []

    def watched(A: Tensor) -> hk.LinearOperator:
        return recorded(op_of(A), lambda vectors, _: drawn.append(vectors.clone()))

    _, space = follow_top(watched(path(0)), seed=5)
    start = drawn[0] / torch.linalg.vector_norm(drawn[0])
    drawn.clear()
    follow_top(watched(path(0)), space=space, seed=5)
    units = [vector / torch.linalg.vector_norm(vector) for vector in drawn[1:]]
    assert max(abs(float((start * unit).sum())) for unit in units) < 0.5


def test_a_saved_space_continues_to_the_same_bits(tmp_path: Path) -> None:
    _, space = follow_top(op_of(path(0)), 2)
    space.save(tmp_path / "space.json")
    loaded = hk.load(tmp_path / "space.json")
    assert repr(loaded) == repr(space) == f"<RecycledSpace: {len(space.values)} vectors of 1 solves>"
    one, _ = follow_top(op_of(path(1)), 2, space)
    two, _ = follow_top(op_of(path(1)), 2, loaded)
    assert torch.equal(one.vectors, two.vectors)


def test_more_values_than_before_and_fewer() -> None:
    _, space = follow_top(op_of(path(0)), 1, rank=2)
    assert len(space.values) == 2
    found, space = follow_top(op_of(path(1)), 3, space)
    torch.testing.assert_close(found.values, tops(path(1), 3), rtol=1e-2, atol=0)
    found, space = follow_top(op_of(path(2)), 1, space, rank=4)
    torch.testing.assert_close(found.values, tops(path(2), 1), rtol=1e-2, atol=0)
    assert len(space.values) == 4


def test_a_limit_keeps_what_was_found_and_nan_is_not_recycled() -> None:
    _, space = follow_top(op_of(path(0)))
    cut, _ = follow_top(op_of(spectrum(2.0, 2.05, high=1.95)), space=space, max_matvecs=6)
    assert cut.status is hk.Status.MAX_MATVECS
    assert cut.num_matvecs <= 6
    calls = 0

    def failing(vectors: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return path(1) @ vectors * (float("nan") if calls == 3 else 1.0)

    broken, after = follow_top(replace(op_of(path(1)), product=failing), space=space)
    assert broken.status is hk.Status.NON_FINITE
    assert bool(torch.isfinite(after.vectors).all())
    found, _ = follow_top(op_of(path(1)), space=after)
    torch.testing.assert_close(found.values, tops(path(1), 1), rtol=1e-2, atol=0)


def test_a_zero_operator_has_the_top_zero() -> None:
    found, space = follow_top(op_of(torch.zeros(50, 50)))
    again, _ = follow_top(op_of(torch.zeros(50, 50)), space=space)
    assert float(found.values[0]) == float(again.values[0]) == 0.0
    assert again.converged


def test_a_likeness_that_costs_nothing_is_as_good_as_one_that_costs_little() -> None:
    A = spectrum(5.0, 9.0) * 1e6
    values, basis = torch.linalg.eigh(A)
    like = low_rank(op_of(A), basis.mT[-20:], values[-20:], 10)
    dense = op_of(basis[:, -20:] * values[-20:] @ basis[:, -20:].mT)
    for level in (like, replace(dense, cost=0.0), replace(dense, cost=1e-9)):
        found = hk.multifidelity([level, op_of(A)], 1, which="LA")
        assert found.num_matvecs < 6
        assert float(found.values[0]) == pytest.approx(9e6, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, ValueError, "^k must"),
        ({"k": 301}, ValueError, "^k must"),
        ({"k": 3, "rank": 2}, ValueError, "^rank must"),
        ({"space": 3}, TypeError, "^space must"),
        (
            {"space": hk.RecycledSpace(torch.ones(2), torch.ones(7, 2), 3.0, 1)},
            ValueError,
            r"^space.vectors must",
        ),
        ({"tol": -1.0}, ValueError, "^tol must"),
        ({"seed": -1}, ValueError, "^seed must"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        follow_top(op_of(path(0)), **options)
