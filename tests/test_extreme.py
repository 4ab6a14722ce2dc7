from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import hvpkit as hk
from hvpkit.extreme import worth_sampling
from oracles import hessian_by_double_backward
from problems import NETWORKS, SPECTRA, matrix, network

EPS = torch.finfo(torch.float64).eps
SIZES = (2, 3, 5, 8, 13, 21, 34, 55, 89, 150)


def spectrum(shape: str, n: int, g: torch.Generator) -> Tensor:
    """Eigenvalues of one of many shapes."""
    u = torch.rand(n, generator=g, dtype=torch.float64)
    values = {
        "outliers": 0.3 * u,
        "network_like": 0.02 * u,
        "triple_ends": 2 * u - 1,
        "rank_deficient": torch.where(u < 0.7, 0.0, 1 + 9 * u),
        "few_values": (5 * u).floor() - 2,
        "decaying": 2.0 ** -torch.arange(n, dtype=torch.float64),
        "negative": -(10.0 ** (-3 * u)),
        "multiple_of_identity": torch.full((n,), -2.5, dtype=torch.float64),
        "uniform": 2 * u - 1,
        "semicircle": torch.cos(math.pi * u),
        "normal": torch.randn(n, generator=g, dtype=torch.float64),
        "exponential": torch.exp(3 * u),
    }[shape]
    if shape == "outliers":
        values[0], values[-1] = -5.0, 20.0
    if shape == "network_like":
        values[0], values[-1] = -0.5, 100.0
    if shape == "triple_ends":
        values[: n // 3][:3], values[n - n // 3 :][:3] = -2.0, 3.0
    return values


GAPPED = (
    "outliers",
    "network_like",
    "triple_ends",
    "few_values",
    "decaying",
    "multiple_of_identity",
)
DENSE_ENDS = ("uniform", "semicircle", "normal", "exponential", "negative", "rank_deficient")


def matrices(shapes: tuple[str, ...], rounds: int) -> Iterator[tuple[Tensor, int]]:
    for index, shape in enumerate(shapes):
        for seed in range(rounds):
            for n in SIZES:
                g = torch.Generator().manual_seed(1000 * index + 100 * seed + n)
                yield matrix(spectrum(shape, n, g).tolist(), seed=seed), seed


@cache
def dense_hessian(name: str, seed: int) -> Tensor:
    problem = network(name, seed=seed)
    return hessian_by_double_backward(problem.objective, problem.params, problem.data)


def ends_of(A: Tensor) -> tuple[float, float, float]:
    truth = torch.linalg.eigvalsh((A + A.mT) / 2)
    return float(truth[0]), float(truth[-1]), float(truth.abs().max())


def failures(found: hk.ExtremeResult, A: Tensor, tol: float) -> list[str]:
    """What does not hold of a result, against the dense spectrum."""
    smallest, largest, norm = ends_of(A)
    failed = [] if found.converged or found.status is hk.Status.ROUNDING_LIMITED else [str(found.status)]
    for pair, truth in ((found.smallest, smallest), (found.largest, largest)):
        rounding = 40 * EPS * norm
        if abs(pair.value - truth) > max(tol * abs(truth), rounding):
            failed.append(f"value {pair!r} for {truth:g}")
        elif not pair.interval.lower - rounding <= truth <= pair.interval.upper + rounding:
            failed.append(f"interval {pair!r} for {truth:g}")
        residual = A @ pair.vector - pair.value * pair.vector
        if abs(float(torch.linalg.vector_norm(residual)) - pair.residual_norm) > rounding:
            failed.append("residual norm")
    return failed


@pytest.mark.parametrize("name", NETWORKS)
def test_both_ends_of_network_hessians_to_tol_and_inside_of_their_intervals(name: str) -> None:
    for seed in range(6):
        problem, A = network(name, seed=seed), dense_hessian(name, seed)
        H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=7)
        assert failures(hk.extreme_eigenvalues(H, seed=seed), A, 1e-2) == []
        for tol in (1e-1, 1e-4):
            found = hk.extreme_eigenvalues(hk.aslinearoperator(A), tol=tol, seed=seed)
            assert failures(found, A, tol) == []


@pytest.mark.parametrize("shape", GAPPED)
def test_both_ends_of_spectra_with_separated_ends(shape: str) -> None:
    for A, seed in matrices((shape,), rounds=3):
        atol = 0.0 if shape == "decaying" else None  # whose lowest value is otherwise zero within atol
        found = hk.extreme_eigenvalues(hk.aslinearoperator(A), atol=atol, seed=seed)
        assert failures(found, A, 1e-2) == []


def test_both_ends_of_spectra_with_dense_ends_but_for_rare_starts() -> None:
    # a start with next to nothing of the last eigenvectors ends at their neighbours, within a few tol
    num_ends, failed = 0, []
    for A, seed in matrices(DENSE_ENDS, rounds=2):
        found = hk.extreme_eigenvalues(hk.aslinearoperator(A), seed=seed)
        smallest, largest, _ = ends_of(A)
        failed += failures(found, A, 1e-2)
        ends = [found.smallest.value, found.largest.value]
        assert ends == pytest.approx([smallest, largest], rel=5e-2, abs=1e-13)
        num_ends += 2
    expected = 0.01 * num_ends
    assert len(failed) <= expected + 3 * math.sqrt(expected), failed


@pytest.mark.parametrize("shape", ["uniform", "normal", "network_like"])
@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize(("max_matvecs", "tol"), [(6, 1e-12), (None, 3e-2)])
def test_intervals_hold_as_often_as_their_confidence_says(
    shape: str, n: int, max_matvecs: int | None, tol: float
) -> None:
    A = matrix(spectrum(shape, n, torch.Generator().manual_seed(5)).tolist())
    smallest, largest, norm = ends_of(A)
    claimed, missed = 0.0, 0
    for seed in range(80):
        found = hk.extreme_eigenvalues(hk.aslinearoperator(A), tol=tol, max_matvecs=max_matvecs, seed=seed)
        for pair, truth in ((found.smallest, smallest), (found.largest, largest)):
            if pair.interval.confidence is not None:
                claimed += 1 - pair.interval.confidence
            slack = 40 * EPS * norm
            missed += not pair.interval.lower - slack <= truth <= pair.interval.upper + slack
    assert missed <= claimed + 3 * math.sqrt(max(claimed, 1 / 9))


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "gru", "attention", "tied_weights"])
def test_agrees_with_scipy_on_the_same_operator(name: str) -> None:
    problem = network(name)
    H = hk.hessian(problem.objective, problem.params, problem.data)
    expected = scipy.sparse.linalg.eigsh(H.to_scipy(), k=2, which="BE", return_eigenvectors=False)
    found = hk.extreme_eigenvalues(H, tol=1e-8)
    assert [found.smallest.value, found.largest.value] == pytest.approx(sorted(expected), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_one_parameter_has_one_eigenvalue_for_both_ends(dtype: torch.dtype, value: float) -> None:
    found = hk.extreme_eigenvalues(hk.aslinearoperator(torch.tensor([[value]], dtype=dtype)))
    assert found.converged
    for pair in (found.smallest, found.largest):
        assert pair.value == pytest.approx(value)
        assert value in pair.interval
        assert pair.vector.abs().tolist() == pytest.approx([1.0])
    assert found.num_matvecs == 2


@pytest.mark.parametrize("values", [[-1.0, 2.0], [3.0, 3.0], [0.0, 0.0], [0.0, 1e-20], [-1e25, 1e-5]])
def test_two_parameters(values: list[float]) -> None:
    A = matrix(values)
    found = hk.extreme_eigenvalues(hk.aslinearoperator(A))
    assert failures(found, A, 1e-2) == []
    assert abs(float(found.smallest.vector @ found.largest.vector)) <= 1e-10


def test_vectors_are_unit_orthogonal_and_of_the_operator_dtype() -> None:
    A = matrix(SPECTRA["indefinite"], dtype=torch.float32)
    found = hk.extreme_eigenvalues(hk.aslinearoperator(A))
    V = torch.stack([found.smallest.vector, found.largest.vector], dim=1)
    assert V.dtype == torch.float32
    assert torch.allclose(V.mT @ V, torch.eye(2), atol=1e-5)


KEYS = {
    "smallest", "largest", "num_matvecs", "seconds", "status", "converged", "message", "tol", "operator", "history",
}  # fmt: skip


@pytest.mark.parametrize("limit", [None, 5])
def test_to_dict_is_strict_json_with_the_documented_keys(limit: int | None) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"]))
    found = hk.extreme_eigenvalues(op, max_matvecs=limit)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) >= KEYS
    for name in ("smallest", "largest"):
        pair = getattr(found, name)
        assert plain[name]["value"] == pair.value
        assert plain[name]["residual_norm"] == pair.residual_norm
        assert set(plain[name]["interval"]) == {"lower", "upper", "kind", "confidence"}
    assert plain["status"] == str(found.status)
    assert plain["operator"] == "dense matrix: 300 x 300, float64, cpu"
    assert len(plain["history"]) == len(found.history)


def test_summary_and_repr_are_short_and_say_the_values() -> None:
    found = hk.extreme_eigenvalues(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), tol=1e-6)
    assert len(repr(found)) <= 200
    assert "\n" not in repr(found)
    lines = found.summary().splitlines()
    assert len(lines) == 5
    assert all(len(line) <= 130 for line in lines)
    assert "0.99 over random starts" in lines[-1]
    for text in (repr(found), found.summary()):
        assert "-5" in text
        assert "20" in text
        assert "converged" in text


@pytest.mark.parametrize("name", ["indefinite", "negative_dominant", "bulk_with_outliers", "multiple"])
def test_history_approaches_both_ends_from_inside(name: str) -> None:
    A = matrix(SPECTRA[name])
    smallest, largest, norm = ends_of(A)
    found = hk.extreme_eigenvalues(hk.aslinearoperator(A), tol=1e-8)
    slack = 20 * EPS * norm
    assert len(found.history) >= 3
    for before, after in pairwise(found.history):
        assert after.num_matvecs > before.num_matvecs
        assert after.seconds >= before.seconds
        assert after.smallest <= before.smallest + slack
        assert after.largest >= before.largest - slack
    for entry in found.history:
        assert smallest - slack <= entry.smallest <= entry.largest <= largest + slack
    last = found.history[-1]
    assert last.num_matvecs < found.num_matvecs <= last.num_matvecs + 2
    assert (last.smallest, last.largest) == pytest.approx(
        (found.smallest.value, found.largest.value), abs=slack
    )
    assert last.smallest_bound >= found.smallest.residual_norm - 10 * slack
    assert last.seconds <= found.seconds


def test_monitor_sees_the_history_as_it_grows() -> None:
    seen: list[hk.Progress] = []
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    found = hk.extreme_eigenvalues(op, monitor=seen.append)
    assert tuple(seen) == found.history


def test_what_a_monitor_raises_comes_through() -> None:
    def stop(entry: hk.Progress) -> None:
        raise TimeoutError(f"{entry.num_matvecs:g}")

    with pytest.raises(TimeoutError, match="1"):
        hk.extreme_eigenvalues(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), monitor=stop)


def failing(A: Tensor, good: int) -> hk.LinearOperator:
    calls = {"num": 0}

    def product(v: Tensor) -> Tensor:
        calls["num"] += v.shape[1]
        return A @ v if calls["num"] <= good else v * torch.nan

    return replace(hk.aslinearoperator(A), product=product)


def test_nothing_is_known_after_a_first_product_that_is_not_finite() -> None:
    found = hk.extreme_eigenvalues(failing(matrix(SPECTRA["indefinite"]), good=0))
    assert found.status is hk.Status.NON_FINITE
    for pair in (found.smallest, found.largest):
        assert math.isnan(pair.value)
        assert (pair.interval.lower, pair.interval.upper) == (-math.inf, math.inf)
        assert pair.vector.shape == (100,)
    plain = found.to_dict()
    assert plain["smallest"]["value"] is None
    json.dumps(plain, allow_nan=False)
    assert "nan" in found.summary()


@pytest.mark.parametrize("good", [1, 2, 6])
def test_what_is_known_before_a_product_that_is_not_finite_stays(good: int) -> None:
    A = matrix(SPECTRA["indefinite"])
    found = hk.extreme_eigenvalues(failing(A, good), tol=1e-12)
    assert found.status is hk.Status.NON_FINITE
    assert not found.converged
    assert -5 <= found.smallest.value <= found.largest.value <= 20
    truth = torch.linalg.eigvalsh(A)
    for pair in (found.smallest, found.largest):
        assert float((truth - pair.value).abs().min()) <= pair.residual_norm
        assert pair.value in pair.interval
    if good == 1:  # one value, and it may lie anywhere between both ends
        assert found.smallest.interval.lower <= found.smallest.value - found.smallest.residual_norm
        assert found.largest.interval.upper >= found.largest.value + found.largest.residual_norm


@pytest.mark.parametrize(
    ("options", "status", "advice"),
    [
        ({"max_matvecs": 6}, hk.Status.MAX_MATVECS, "raise max_matvecs or tol"),
        ({"time_limit": 1e-9}, hk.Status.TIME_LIMIT, "raise time_limit or tol"),
        ({}, hk.Status.ROUNDING_LIMITED, "use float64, or raise tol"),
    ],
)
def test_a_limit_is_a_status_with_advice(options: dict[str, float], status: hk.Status, advice: str) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"], dtype=torch.float32)
    found = hk.extreme_eigenvalues(hk.aslinearoperator(A), tol=1e-7, **options)
    assert found.status is status
    assert not found.converged
    assert advice in found.message
    assert advice in found.summary()
    assert found.num_matvecs <= options.get("max_matvecs", 300)


def test_semidefinite_operator_has_a_smallest_eigenvalue_of_zero_to_rounding() -> None:
    A = matrix(SPECTRA["rank_deficient"])
    found = hk.extreme_eigenvalues(hk.aslinearoperator(A))
    assert found.status is hk.Status.ZERO_TO_ROUNDING
    assert found.converged
    assert abs(found.smallest.value) <= 40 * EPS * 10
    assert found.largest.value == pytest.approx(10, rel=1e-2)


def convex(name: str) -> hk.LinearOperator:
    """A matrix that is positive semidefinite, with a null space and eigenvalues that crowd at zero."""
    x, y = (torch.from_numpy(part[:200]) for part in load_digits(return_X_y=True))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        head = torch.nn.Linear(64 if name == "logistic regression" else 6, 10)
        layers = [] if name == "logistic regression" else [torch.nn.Linear(64, 6), torch.nn.Tanh()]
        model = torch.nn.Sequential(*layers, head).double()
    objective, params = hk.from_module(model, torch.nn.functional.cross_entropy)
    make = {"logistic regression": hk.hessian, "ggn": hk.ggn, "fisher": hk.fisher}[name]
    return make(objective, params, (x.double() / 16, y))


@pytest.mark.parametrize("name", ["logistic regression", "ggn", "fisher"])
def test_zero_end_of_what_is_convex_is_zero_within_atol_for_a_fraction_of_the_passes(name: str) -> None:
    H = convex(name)
    A = H.product(torch.eye(H.n, dtype=H.dtype))
    truth, norm = torch.linalg.eigvalsh((A + A.mT) / 2), float(torch.linalg.matrix_norm(A, 2))
    assert abs(float(truth[0])) <= 1e-13 * norm
    op = hk.aslinearoperator((A + A.mT) / 2)
    for seed in range(3):
        ex = hk.extreme_eigenvalues(op, seed=seed)
        assert ex.status is hk.Status.ZERO_WITHIN_ATOL
        assert ex.converged
        assert ex.num_matvecs <= 160
        assert abs(ex.smallest.value) <= 1e-5 * norm
        assert ex.smallest.interval.lower <= float(truth[0]) <= ex.smallest.interval.upper + 1e-13
        assert ex.smallest.interval.upper - ex.smallest.interval.lower <= 3e-5 * norm
        assert ex.largest.value == pytest.approx(float(truth[-1]), rel=1e-2)
        for text in ("cannot be told from zero", "lower atol", f"{ex.smallest.interval.lower:.6g}"):
            assert text in ex.summary()
    fewer = hk.extreme_eigenvalues(op, atol=1e-3)
    relative = hk.extreme_eigenvalues(op, atol=0.0, max_matvecs=5 * ex.num_matvecs)
    assert fewer.num_matvecs < ex.num_matvecs / 2
    assert relative.status is hk.Status.MAX_MATVECS


def test_atol_goes_to_samples_too() -> None:
    A = matrix([0.0] * 300 + torch.linspace(0.01, 1, 100).tolist() + [50.0])
    like = replace(
        hk.aslinearoperator(A + 1e-4 * matrix(torch.linspace(-1, 1, 401).tolist(), seed=1)), cost=0.05
    )
    loose, tight = (hk.multifidelity([like, hk.aslinearoperator(A)], atol=atol) for atol in (1e-4, 0.0))
    assert loose.status is hk.Status.ZERO_WITHIN_ATOL
    assert tight.status is hk.Status.ZERO_TO_ROUNDING
    assert loose.num_matvecs < tight.num_matvecs


@pytest.mark.parametrize("share", [3.0, -3.0, 100.0])
def test_small_end_that_is_not_zero_within_atol_keeps_its_relative_digits(share: float) -> None:
    A = matrix([share * 1e-5, *torch.linspace(0.01, 0.5, 198).tolist(), 1.0])
    for seed in range(5):
        ex = hk.extreme_eigenvalues(hk.aslinearoperator(A), seed=seed)
        assert ex.status is hk.Status.CONVERGED
        assert ex.smallest.value == pytest.approx(share * 1e-5, rel=2e-2)


def test_small_end_among_crowded_ones_keeps_its_relative_digits() -> None:
    # the Lehmer matrix, whose lowest eigenvalue is 1.5e-4 of the norm
    i = torch.arange(1.0, 81, dtype=torch.float64)
    A = torch.minimum(i[:, None], i) / torch.maximum(i[:, None], i)
    truth = torch.linalg.eigvalsh(A)
    for seed in range(20):
        ex = hk.extreme_eigenvalues(hk.aslinearoperator(A), seed=seed)
        assert ex.status is hk.Status.CONVERGED
        assert ex.smallest.value == pytest.approx(float(truth[0]), rel=2e-2)
        assert ex.largest.value == pytest.approx(float(truth[-1]), rel=2e-2)


def test_same_seed_same_bits_and_v0_is_not_written_to() -> None:
    A = matrix(SPECTRA["indefinite"])
    op = hk.aslinearoperator(A)
    first = hk.extreme_eigenvalues(op, seed=3)
    again = hk.extreme_eigenvalues(op, seed=3)
    assert torch.equal(first.smallest.vector, again.smallest.vector)
    assert first.largest.interval == again.largest.interval
    v0 = torch.stack([first.smallest.vector, first.largest.vector], dim=1)
    before = v0.clone()
    warm = hk.extreme_eigenvalues(op, v0=v0)
    assert torch.equal(v0, before)
    assert failures(warm, A, 1e-2) == []
    assert warm.history[0].largest > 5  # a random start begins near the mean, 0.15


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "method must be one of 'auto', 'lanczos'.*got 'newton'"),
        ({"tol": 0.0}, ValueError, "tol must be positive and less than 1"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs must be at least"),
        ({"max_matvecs": 0}, ValueError, "max_matvecs must be a positive"),
        ({"time_limit": -1}, ValueError, "time_limit must be a positive"),
        ({"seed": -1}, ValueError, "seed must not be negative"),
        ({"v0": torch.ones(3, dtype=torch.float64)}, ValueError, r"v0 must be a tensor of shape \[100\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_argument_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        hk.extreme_eigenvalues(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), **options)


def test_asymmetric_operator_is_refused() -> None:
    A = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(hk.NotSymmetricError, match="not symmetric"):
        hk.extreme_eigenvalues(hk.aslinearoperator(A))


def test_what_is_no_operator_is_refused_with_the_way_to_make_one() -> None:
    for solve in (hk.extreme_eigenvalues, hk.lanczos, hk.top_eigenvalues):
        with pytest.raises(TypeError, match=r"A must be a tensor.*\(matvec, n, dtype\); got function"):
            solve(lambda v: v)
    assert hk.extreme_eigenvalues(torch.eye(3)).largest.value == pytest.approx(1)


def test_multifidelity_finds_the_same_ends_of_a_hessian_over_data_and_counts_scores() -> None:
    problem = network("mlp", num_examples=400)
    H = hk.hessian(problem.objective, problem.params, problem.data)
    truth = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=torch.float64))
    seen: list[hk.Progress] = []
    for seed in range(4):
        ex = hk.extreme_eigenvalues(H, method="multifidelity", seed=seed, monitor=seen.append)
        assert ex.converged
        assert ex.smallest.value == pytest.approx(float(truth[0]), rel=1e-2)
        assert ex.largest.value == pytest.approx(float(truth[-1]), rel=1e-2)
        assert {ex.smallest.interval.kind, ex.largest.interval.kind} <= {"random-start", "exact"}
        assert ex.history[-1] == seen[-1]
        assert ex.num_matvecs == seen[-1].num_matvecs + seen[-1].level  # Lanczos after the sample verifies
        assert ex.history[0].num_matvecs > 2 + 1 / 9  # two products, and scores


def single_layer(
    num_examples: int, n: int = 1000
) -> tuple[hk.Objective, torch.Tensor, tuple[torch.Tensor, ...]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_examples, n, generator=g, dtype=torch.float64) * torch.logspace(0, -2, n)
    y = torch.randn(num_examples, generator=g, dtype=torch.float64)
    objective = hk.Objective(lambda p, batch: torch.tanh(batch[0] @ p), lambda z, batch: (z - batch[1]) ** 2)
    return objective, torch.full((n,), 0.1, dtype=torch.float64), (x, y)


def first(data: tuple[torch.Tensor, ...], num_examples: int) -> tuple[torch.Tensor, ...]:
    return tuple(x[:num_examples] for x in data)


@pytest.mark.parametrize("certify", [False, True])
def test_auto_samples_where_two_samples_agree(certify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, params, data = factors(5000)
    H = hk.hessian(objective, params, data, mode="reverse-over-reverse")
    sampled = hk.extreme_eigenvalues(H, method="multifidelity", certify=certify, seed=1)
    monkeypatch.setattr("hvpkit.extreme.may_save_passes", lambda *_: (True, 0.25))
    ex = hk.extreme_eigenvalues(H, certify=certify, seed=1)
    assert torch.equal(ex.smallest.vector, sampled.smallest.vector)
    assert ex.num_matvecs == pytest.approx(sampled.num_matvecs + 0.25)
    monkeypatch.setattr("hvpkit.extreme.may_save_passes", lambda *_: pytest.fail("not asked for"))
    few = hk.hessian(objective, params, first(data, 4999), mode="reverse-over-reverse")
    assert hk.extreme_eigenvalues(few).converged
    hk.top_eigenvalues(H, 1)
    many = hk.hessian(*factors(20_000, 1000), mode="reverse-over-reverse")
    assert hk.extreme_eigenvalues(many, max_matvecs=9).num_matvecs <= 9


def test_comparing_samples_that_disagree_costs_less_than_a_pass_and_is_counted(tmp_path: Path) -> None:
    H, seen = hk.hessian(*factors(6000), mode="reverse-over-reverse"), list[hk.Progress]()
    alone = hk.extreme_eigenvalues(H, method="lanczos")
    ex = hk.extreme_eigenvalues(H, monitor=seen.append)
    assert torch.equal(ex.smallest.vector, alone.smallest.vector)
    assert alone.num_matvecs < ex.num_matvecs < alone.num_matvecs + 1
    assert ex.num_matvecs == pytest.approx(ex.history[-1].num_matvecs + 1)  # that verifies
    assert seen == list(ex.history)
    limited = hk.extreme_eigenvalues(H, max_matvecs=30.5, tol=1e-6)
    assert limited.num_matvecs <= 30.5
    assert limited.status is hk.Status.MAX_MATVECS
    few = hk.extreme_eigenvalues(H, max_matvecs=29)  # no budget to compare with
    assert few.num_matvecs == alone.num_matvecs

    def interrupt(progress: hk.Progress) -> None:
        if progress.num_matvecs > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hk.extreme_eigenvalues(H, checkpoint=tmp_path / "solve.pt", monitor=interrupt)
    again = hk.extreme_eigenvalues(H, checkpoint=tmp_path / "solve.pt")
    assert torch.equal(again.smallest.vector, ex.smallest.vector)
    assert not (tmp_path / "solve.pt").exists()


def test_auto_samples_the_hessian_of_an_objective_with_enough_parameters_over_enough_data() -> None:
    objective, params, data = single_layer(10_000)

    def sampled(H: hk.LinearOperator, **options: object) -> bool:
        ex = hk.extreme_eigenvalues(H, **options)
        assert ex.converged
        if H is whole:
            assert ex.smallest.value == pytest.approx(truth[0], rel=1e-2)
            assert ex.largest.value == pytest.approx(truth[-1], rel=1e-2)
        return ex.num_matvecs != round(ex.num_matvecs)

    whole = hk.hessian(objective, params, data)
    truth = torch.linalg.eigvalsh(whole @ torch.eye(whole.n, dtype=torch.float64)).tolist()
    assert sampled(whole)  # to compare two samples
    assert sampled(whole, certify=True)
    assert sampled(whole, method="multifidelity")
    assert not sampled(whole, method="lanczos")
    assert not sampled(hk.hessian(objective, params, first(data, 4999)))
    assert not sampled(hk.hessian(*single_layer(10_000, 900)))
    plain = hk.hessian(lambda p, batch: objective(p, batch), params, data)
    assert not sampled(plain)
    assert sampled(plain, method="multifidelity")
    mean = hk.Objective(objective.forward, lambda z, batch: ((z - batch[1]) ** 2).mean())
    assert not sampled(hk.hessian(mean, params, data))
    with pytest.raises(ValueError, match="0-d"):
        hk.extreme_eigenvalues(hk.hessian(mean, params, data), method="multifidelity")
    assert not worth_sampling(hk.ggn(objective, params, data))


def factors(num_examples: int, n: int = 1000) -> tuple[hk.Objective, torch.Tensor, tuple[torch.Tensor, ...]]:
    """A layer on data of 20 factors and noise: a sample knows the outliers."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(num_examples, 20, generator=g, dtype=torch.float64) * torch.logspace(0, -1, 20)
    x = z @ torch.randn(20, n, generator=g, dtype=torch.float64) / 20**0.5
    x += 0.01 * torch.randn(num_examples, n, generator=g, dtype=torch.float64)
    y = torch.randn(num_examples, generator=g, dtype=torch.float64)
    objective = hk.Objective(lambda p, batch: torch.tanh(batch[0] @ p), lambda z, batch: (z - batch[1]) ** 2)
    return objective, torch.full((n,), 0.02, dtype=torch.float64), (x, y)


def test_several_at_an_end_by_samples_are_certified_one_by_one() -> None:
    H = hk.hessian(*factors(10_000), mode="reverse-over-reverse")
    truth = hk.lanczos(H, 4, tol=1e-9, check_copies=False, seed=9).values
    alone = hk.top_eigenvalues(H, 4, method="lanczos")
    assert bool(((alone.values - truth).abs() <= 1e-2 * truth).all())
    certified = []
    for seed in range(4):
        found = hk.top_eigenvalues(H, 4, seed=seed)
        assert found.converged
        assert bool(((found.values - truth).abs() <= 2e-2 * truth).all())
        assert all(exact in one for exact, one in zip(truth.tolist(), found.intervals, strict=True))
        if all((one.kind, one.confidence) == ("random-start", 0.99) for one in found.intervals):
            certified.append(found.num_matvecs)
        assert found.num_matvecs < 1.5 * alone.num_matvecs
    assert len(certified) >= 2
    assert max(certified) < 0.6 * alone.num_matvecs
    assert torch.equal(hk.top_eigenvalues(H, 4, seed=3).vectors, found.vectors)


def test_interrupted_solve_with_a_sample_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    H, file = hk.hessian(*factors(10_000), mode="reverse-over-reverse"), tmp_path / "solve.pt"
    whole = hk.extreme_eigenvalues(H, method="multifidelity", seed=2)
    assert whole.num_matvecs != round(whole.num_matvecs)

    def interrupt(progress: hk.Progress) -> None:
        if progress.num_matvecs > 0.6 * whole.num_matvecs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hk.extreme_eigenvalues(H, method="multifidelity", seed=2, checkpoint=file, monitor=interrupt)
    again = hk.extreme_eigenvalues(H, method="multifidelity", seed=2, checkpoint=file)
    assert torch.equal(again.smallest.vector, whole.smallest.vector)
    assert (again.smallest.interval, again.largest.interval) == (
        whole.smallest.interval,
        whole.largest.interval,
    )
    assert whole.num_matvecs < again.num_matvecs < whole.num_matvecs + 2.5
    assert not file.exists()


def test_sample_that_is_unlike_all_data_costs_few_passes() -> None:
    """With 500 of 10,000 examples the largest eigenvalue is ten times as large: no metric for certificates."""
    H = hk.hessian(*single_layer(10_000), mode="reverse-over-reverse")
    for seed in range(3):
        ex, alone = (
            hk.extreme_eigenvalues(H, method=method, seed=seed) for method in ("multifidelity", "lanczos")
        )
        assert ex.smallest.value == pytest.approx(alone.smallest.value, rel=1e-2)
        assert ex.largest.value == pytest.approx(alone.largest.value, rel=1e-2)
        assert ex.num_matvecs < alone.num_matvecs + 4


def test_several_of_a_matrix_are_those_of_lanczos() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["multiple"]))
    found = hk.top_eigenvalues(op, 3)
    assert found.values.tolist() == pytest.approx([3.0, 3.0, 3.0])
    assert torch.equal(found.vectors, hk.lanczos(op, 3, tol=1e-2).vectors)
    with pytest.raises(ValueError, match=r"^which"):
        hk.top_eigenvalues(op, 3, which="LM")
    with pytest.raises(ValueError, match=r"^k"):
        hk.top_eigenvalues(op, 101)


def perceptron_after_30_steps(
    seed: int,
) -> tuple[hk.Objective, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """A 64-16-10 perceptron on 1,500 digits, early in training: extreme eigenvectors that a tenth does not contain."""
    x, y = (torch.from_numpy(part[:1500]) for part in load_digits(return_X_y=True))
    x = (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
        ).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(30):
            some = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
    objective, params = hk.from_module(model, torch.nn.CrossEntropyLoss())
    return objective, params, (x, y)


@pytest.mark.parametrize("training_seed", [2, 6])
def test_default_finds_the_smallest_eigenvalue_that_small_samples_do_not_contain(training_seed: int) -> None:
    H = hk.hessian(*perceptron_after_30_steps(training_seed))
    truth = torch.linalg.eigvalsh(H @ torch.eye(H.n, dtype=torch.float64))
    assert float(truth[1] / truth[0]) < 0.95
    for seed in range(20):
        ex = hk.extreme_eigenvalues(H, seed=seed)
        assert ex.converged
        assert ex.smallest.value == pytest.approx(float(truth[0]), rel=2e-2)
        assert ex.largest.value == pytest.approx(float(truth[-1]), rel=2e-2)
        assert float(truth[0]) in ex.smallest.interval
        assert float(truth[-1]) in ex.largest.interval


def test_result_is_a_start() -> None:
    H = hk.hessian(*single_layer(2000))
    first = hk.extreme_eigenvalues(H)
    for method in ("multifidelity", "lanczos"):
        by_result, by_vectors = (
            hk.extreme_eigenvalues(H, method=method, v0=v0) for v0 in (first, first.vectors)
        )
        assert torch.equal(by_result.smallest.vector, by_vectors.smallest.vector)
        assert by_result.num_matvecs == by_vectors.num_matvecs


def test_multifidelity_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="not over examples"):
        hk.extreme_eigenvalues(hk.aslinearoperator(torch.eye(5)), method="multifidelity")
