"""Power iteration in all its forms: what they share, and what each of them promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from finite_sums import mean_of, scattered
from problems import SPECTRA, matrix

FULL: dict[str, Callable[..., hk.EigenResult]] = {"power": hk.power, "accelerated": hk.accelerated_power}
SAMPLED: dict[str, Callable[..., hk.EigenResult]] = {
    "stochastic_power": hk.stochastic_power,
    "variance_reduced": partial(hk.accelerated_power, variance_reduced=True),
    "oja": hk.oja,
}
each_full = pytest.mark.parametrize("solver", FULL)
each_sampled = pytest.mark.parametrize("solver", SAMPLED)


def wanted(truth: Tensor, k: int, which: str) -> Tensor:
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([truth[:low], truth[len(truth) - (k - low) :]])


@each_full
@pytest.mark.parametrize(("which", "value"), [("LM", -50.0), ("SA", -50.0), ("LA", 2.0)])
def test_a_dominant_negative_eigenvalue_has_its_sign(solver: str, which: str, value: float) -> None:
    op = hk.aslinearoperator(matrix([-50.0, *torch.linspace(-1, 1, 30).tolist(), 2.0]))
    found = FULL[solver](op, which=which, tol=1e-4, max_matvecs=5000)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(value, rel=1e-4)
    assert found.num_matvecs > 2


@pytest.mark.parametrize("momentum", [None, 0.5, 4.0, 20.0])
def test_value_under_momentum_is_the_eigenvalue(momentum: float | None) -> None:
    A = matrix([*torch.linspace(-3, 8, 60).tolist(), 10.0])
    found = hk.accelerated_power(hk.aslinearoperator(A), momentum=momentum, tol=1e-6)
    vector = found.vectors[:, 0]
    assert found.converged
    assert float(found.values[0]) == pytest.approx(10.0, rel=1e-6)
    residual = torch.linalg.vector_norm(A @ vector - found.values[0] * vector)
    assert float(found.residual_norms[0]) == pytest.approx(float(residual), abs=1e-12)


def test_momentum_takes_about_the_square_root_of_the_steps() -> None:
    gap = 1e-2
    A = matrix([*torch.linspace(0, 1 - gap, 80).tolist(), 1.0])
    op, tol = hk.aslinearoperator(A), 1e-5
    plain = hk.power(op, tol=tol, max_matvecs=1e5).num_matvecs
    best = hk.accelerated_power(op, tol=tol, momentum=(1 - gap) ** 2 / 4, max_matvecs=1e5).num_matvecs
    chosen = hk.accelerated_power(op, tol=tol, max_matvecs=1e5).num_matvecs
    steps = math.log(1 / tol)
    assert 0.3 < plain / (steps / gap) < 3
    assert 0.2 < best / (steps / math.sqrt(2 * gap)) < 3
    assert chosen < 0.5 * plain


def test_too_large_a_momentum_ends_at_a_limit_and_not_in_a_number() -> None:
    A = matrix([*torch.linspace(0, 0.9, 50).tolist(), 1.0])
    found = hk.accelerated_power(hk.aslinearoperator(A), momentum=0.5, tol=1e-6, max_matvecs=200)
    assert found.status is hk.Status.MAX_MATVECS
    assert not found.converged
    truth = torch.linalg.eigvalsh(A)
    distance = float((found.values[0] - truth).abs().min())
    assert distance <= float(found.residual_norms[0]) + 1e-12


@each_full
@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_several_pairs_are_deflated_one_from_the_other(solver: str, which: str) -> None:
    A = matrix([-30.0, -20.0, -12.0, *torch.linspace(-1, 1, 40).tolist(), 14.0, 21.0, 33.0])
    found = FULL[solver](hk.aslinearoperator(A), 3, which=which, tol=1e-6, max_matvecs=20_000)
    assert found.converged
    truth = torch.linalg.eigvalsh(A)
    assert found.values.tolist() == pytest.approx(wanted(truth, 3, which).tolist(), rel=1e-6)
    gram = found.vectors.mT @ found.vectors
    assert float((gram - torch.eye(3)).abs().max()) < 1e-10


@each_sampled
@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "spectrum", ["indefinite", "negative_dominant", "rank_deficient", "identity", "n1", "n3"]
)
def test_minibatches_lead_to_the_wanted_pairs_or_say_that_they_did_not(
    solver: str, which: str, dtype: torch.dtype, spectrum: str
) -> None:
    matrices = scattered(SPECTRA[spectrum], dtype=dtype, noise=0.1)
    k = 2 if which == "BE" and len(matrices[0]) > 1 else 1
    found = SAMPLED[solver](mean_of(matrices), k, which=which, tol=1e-2, max_matvecs=600)
    truth = torch.linalg.eigvalsh(matrices.double().mean(0))
    target = wanted(truth, k, "LA" if (which, k) == ("BE", 1) else which)
    norm = float(truth.abs().max())
    if found.converged:
        slack = (1e-2 * target.abs()).clamp(min=40 * torch.finfo(dtype).eps * norm)
        assert bool(((found.values - target).abs() <= slack).all())
    else:
        assert found.status in (hk.Status.MAX_MATVECS, hk.Status.ROUNDING_LIMITED)
        distances = (found.values[:, None] - truth).abs().amin(dim=1)
        assert bool((distances <= found.residual_norms + 1e-5 * norm).all())
    if spectrum in ("identity", "n1"):
        assert found.converged


@each_sampled
def test_minibatches_are_counted_by_their_share(solver: str) -> None:
    matrices = scattered(SPECTRA["indefinite"], num_examples=40)
    spent, drawn = [0.0], []

    def counted(op: hk.LinearOperator) -> hk.LinearOperator:

        def product(v: Tensor) -> Tensor:
            spent[0] += v.shape[1] * op.cost
            drawn.extend([op] if op.cost < 1 else [])
            return op.product(v)

        sample = op.sample
        assert sample is not None
        return replace(op, product=product, sample=lambda size, seed: counted(sample(size, seed)))

    found = SAMPLED[solver](counted(mean_of(matrices)), 2, which="LA", tol=1e-2, max_matvecs=60)
    assert found.num_matvecs == pytest.approx(spent[0])
    assert found.num_matvecs <= 60 * (1 + 1e-12)
    assert drawn


def test_batch_schedule_is_honoured() -> None:
    matrices = scattered(SPECTRA["indefinite"], num_examples=40)
    asked: list[int] = []
    op = mean_of(matrices)

    def sample(size: int, seed: int) -> hk.LinearOperator:
        asked.append(size)
        assert op.sample is not None
        return op.sample(size, seed)

    hk.stochastic_power(replace(op, sample=sample), batch_schedule=lambda number: 3 + number, max_matvecs=30)
    assert asked[:8] == list(range(3, 11))
    with pytest.raises(ValueError, match=r"^batch_schedule\(0\)"):
        hk.stochastic_power(op, batch_schedule=lambda _: 0)
    with pytest.raises(TypeError, match=r"^batch_schedule"):
        hk.stochastic_power(op, batch_schedule=8)


def test_small_minibatches_of_one_size_do_not_claim_to_converge() -> None:
    matrices = scattered(SPECTRA["indefinite"], noise=3.0)
    found = hk.stochastic_power(mean_of(matrices), tol=1e-6, batch_schedule=lambda _: 4, max_matvecs=60)
    assert found.status is hk.Status.MAX_MATVECS


def test_variance_reduction_saves_products_where_minibatches_are_alike() -> None:
    gap = 0.02
    values = [*torch.linspace(0, 1 - gap, 60).tolist(), 1.0]
    op = mean_of(scattered(values, num_examples=64, noise=0.02))
    full = hk.accelerated_power(op, tol=1e-4)
    reduced = hk.accelerated_power(op, tol=1e-4, variance_reduced=True)
    assert full.converged
    assert reduced.converged
    assert float(reduced.values[0]) == pytest.approx(1.0, rel=1e-4)
    assert reduced.num_matvecs < 0.8 * full.num_matvecs


@pytest.mark.parametrize(
    "step_size", [None, 0.05, lambda number: 0.5 / (number + 10)], ids=["rule", "number", "function"]
)
def test_oja_with_any_step_size(step_size: object) -> None:
    op = mean_of(scattered(SPECTRA["indefinite"], noise=0.3))
    found = hk.oja(op, tol=2e-2, step_size=step_size)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(20.0, rel=2e-2)


@each_sampled
def test_same_seed_gives_the_same_bits(solver: str) -> None:
    op = mean_of(scattered(SPECTRA["indefinite"], noise=0.3))
    first, again, other = (SAMPLED[solver](op, seed=seed, max_matvecs=40) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert first.num_matvecs == again.num_matvecs
    assert not torch.equal(first.vectors, other.vectors)


@each_sampled
def test_operator_without_minibatches_is_refused(solver: str) -> None:
    with pytest.raises(TypeError, match=r"^op must be able to draw minibatches"):
        SAMPLED[solver](hk.aslinearoperator(torch.eye(5)))


@each_sampled
def test_minibatch_that_is_not_finite_ends_the_solve(solver: str) -> None:

    op = mean_of(scattered(SPECTRA["indefinite"]))
    broken = replace(op, product=lambda v: torch.full_like(v, float("nan")))
    found = SAMPLED[solver](replace(op, sample=lambda *_: broken), max_matvecs=50)
    assert not found.converged
    assert found.status in (hk.Status.NON_FINITE, hk.Status.MAX_MATVECS)
    assert bool(torch.isfinite(found.values).all())


@pytest.mark.parametrize(
    ("solve", "arguments", "name"),
    [
        (hk.accelerated_power, {"momentum": -1.0}, "momentum"),
        (hk.accelerated_power, {"batch_size": 3}, "batch_size"),
        (hk.accelerated_power, {"variance_reduced": True, "batch_size": 0}, "batch_size"),
        (hk.stochastic_power, {"momentum": -1.0}, "momentum"),
        (hk.oja, {"batch_size": 0}, "batch_size"),
        (hk.oja, {"step_size": -1.0}, "step_size"),
        (hk.oja, {"which": "LM"}, "which"),
        (hk.power, {"tol": 0.0}, "tol"),
    ],
)
def test_bad_argument_is_named(solve: Callable[..., object], arguments: dict[str, object], name: str) -> None:
    op = mean_of(scattered(SPECTRA["n3"]))
    with pytest.raises(ValueError, match=rf"^{name}"):
        solve(op, **arguments)
