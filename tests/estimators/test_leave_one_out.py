from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.estimators import sketch
from hvpkit.estimators.leave_one_out import leave_one_out, left_out, samples, shared_variance
from hvpkit.estimators.sampling import make_plan
from problems import matrix

N, K = 30, 6
A = matrix([-2.0, *torch.linspace(-1, 1, N - 3).tolist(), 3.0, 9.0])


def state(method: str, block_size: int = 4) -> sketch.SketchState:
    op = hk.aslinearoperator(A)
    options = {"num_matvecs": K * sketch.COSTS[method], "tol": None, "block_size": block_size, "seed": 3}
    plan = make_plan(op, method, sketch.COSTS, probe="sphere", **options)
    found = sketch.init(op, plan, keep_images=True)
    while found.num_probes < K:
        found = sketch.step(op, plan, found)
    return found


def by_definition(probe: Tensor, columns: Tensor, normalise: bool) -> Tensor:
    """The trace estimate of a probe with a basis of the columns' range, from dense matrices."""
    basis, _ = torch.linalg.qr(columns)
    left = probe - basis @ (basis.mT @ probe)
    factor = (N - basis.shape[1]) / (left @ left) if normalise else 1.0
    return (basis.mT @ A @ basis).trace() + factor * (left @ A @ left)


def without(*left: int) -> list[int]:
    return [place for place in range(K) if place not in left]


each_norm = pytest.mark.parametrize("normalise", [False, True])


@each_norm
def test_samples_are_those_of_the_bases_that_the_other_probes_make(normalise: bool) -> None:
    found = state("xtrace")
    probes, images = found.probes.mT, A @ found.probes.mT
    expected = [by_definition(probes[:, i], images[:, without(i)], normalise) for i in range(K)]
    core = sketch.small(hk.aslinearoperator(A), found, K)
    scale = float(found.scale)
    result = scale * samples(core, left_out(core.crossed, 1e-15), normalise=normalise)
    assert result.tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-10)


@each_norm
def test_samples_of_hutchpp_all_meet_the_same_basis(normalise: bool) -> None:
    found = state("hutch++")
    images = A @ found.probes.mT
    assert (
        float((images - found.basis.mT @ (found.basis @ images)).norm() / images.norm()) > 0.1
    )  # not made of these
    expected = [by_definition(probe, found.basis.mT, normalise) for probe in found.probes]
    core = sketch.small(hk.aslinearoperator(A), found, K)
    result = float(found.scale) * samples(core, torch.zeros_like(core.dots), normalise=normalise)
    assert result.tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-10)


@each_norm
def test_shared_variance_is_the_mean_product_of_what_the_other_probe_changes(normalise: bool) -> None:
    found = state("xtrace")
    probes, images = found.probes.mT, A @ found.probes.mT

    def change(i: int, j: int) -> Tensor:
        with_j, without_j = (
            by_definition(probes[:, i], images[:, kept], normalise) for kept in (without(i), without(i, j))
        )
        return with_j - without_j

    expected = sum(change(i, j) * change(j, i) for i, j in itertools.permutations(range(K), 2)) / (
        K * (K - 1)
    )
    core = sketch.small(hk.aslinearoperator(A), found, K)
    result = shared_variance(core, left_out(core.crossed, 1e-15), normalise=normalise)
    assert float(found.scale) ** 2 * float(result) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("block_size", [1, 4, 6])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_small_matrices_are_what_they_are_called(method: str, block_size: int) -> None:
    found = state(method, block_size)
    basis, probes, scale = found.basis, found.probes, float(found.scale)
    expected: dict[str, Callable[[], Tensor]] = {
        "images": lambda: basis @ A,
        "projected": lambda: basis @ A @ basis.mT,
        "crossed": lambda: basis @ A @ probes.mT,
        "forms": lambda: (probes @ A @ probes.mT).diagonal(),
    }
    for name, dense in expected.items():
        assert float((scale * getattr(found, name) - dense()).abs().max()) < 1e-11
    assert float((found.dots - basis @ probes.mT).abs().max()) < 1e-12
    assert float((basis @ basis.mT - torch.eye(K)).abs().max()) < 1e-13
    assert float((scale**2 * found.squares - (probes @ A).square().sum(dim=1)).abs().max()) < 1e-9


def test_direction_left_out_is_orthogonal_to_all_other_columns() -> None:
    R = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).triu()
    lost = left_out(R, 1e-15)
    products = lost.mT @ R
    assert float((products - products.diagonal().diag()).abs().max()) < 1e-12
    assert float((lost.square().sum(dim=0) - 1).abs().max()) < 1e-12


def test_column_that_others_span_leaves_out_nothing() -> None:
    R = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    lost = left_out(R, 1e-15)
    assert lost[:, :2].abs().max() == 0
    assert lost[:, 2].abs().tolist() == pytest.approx([0, 1, 0], abs=1e-12)
    assert left_out(torch.zeros(3, 3, dtype=torch.float64), 1e-15).abs().max() == 0


def test_probes_that_agree_make_no_wrong_trace() -> None:
    found = state("xtrace")
    core = sketch.small(hk.aslinearoperator(A), found, K)
    twice = [0, 0, 1, 2]
    R, W = core.crossed[:3][:, twice], core.dots[:3][:, twice]
    agreeing = sketch.Small(N, 3, core.projected[:3, :3], W, R, core.forms[twice])
    mean = leave_one_out(agreeing, left_out(R, 1e-15), normalise=False)
    probes, images = found.probes.mT, A @ found.probes.mT
    expected = [
        by_definition(probes[:, i], images[:, others], False)
        for i, others in [(0, [0, 1, 2]), (0, [0, 1, 2]), (1, [0, 2]), (2, [0, 1])]
    ]
    scaled = float(found.scale) * mean.samples
    assert scaled.tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-10)
    assert bool(torch.isfinite(mean.stderr))
