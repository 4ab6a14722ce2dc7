from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hvpkit as hk
from hvpkit.estimators.spectral_density import spectral_density
from hvpkit.results.density import Density
from hvpkit.results.spectral_measure import Measure, deflate, grid_around, join, smoothed, smoothing_width
from problems import SPECTRA, matrix


@pytest.fixture(scope="module")
def density() -> Density:
    return spectral_density(
        hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])), num_steps=20, num_probes=3
    )


def test_converged_single_eigenvalues_count_without_chance(density: Density) -> None:
    eigenvalues = torch.tensor(SPECTRA["bulk_with_outliers"], dtype=torch.float64)
    deflated, raw = density.deflated_weights, density.probe_weights
    outliers = density.nodes > 10
    assert torch.equal(deflated[:, outliers], torch.full((3, 2), 1 / 300, dtype=torch.float64))
    assert float((raw[:, outliers] - 1 / 300).abs().max()) > 1e-3
    assert torch.allclose(deflated.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert density.expectation(torch.square).value == pytest.approx(
        float(eigenvalues.square().mean()), rel=1e-4
    )


def test_deflation_leaves_copies_that_may_be_more_and_what_has_not_converged() -> None:
    nodes = torch.tensor([0.0, 1.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    weights = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2], [0.5, 0.1, 0.1, 0.1, 0.2]], dtype=torch.float64)
    residuals = torch.tensor([0.5, 0.0, 0.0, 0.1, 0.0], dtype=torch.float64)
    found = deflate(nodes, weights, residuals, n=100, noise=1e-12)
    rest = (
        weights[:, :4] * 0.99 / weights[:, :4].sum(dim=1, keepdim=True)
    )  # of two vectors: two copies or more
    assert torch.allclose(found, torch.cat([rest, torch.full((2, 1), 0.01, dtype=torch.float64)], dim=1))
    alone = deflate(nodes, weights[:1], residuals, n=100, noise=1e-12)
    assert torch.equal(alone, weights[:1])


def test_multiple_eigenvalues_stay_unbiased() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["multiple"]))
    truth = torch.tensor(SPECTRA["multiple"], dtype=torch.float64).square().mean()
    for num_probes in (2, 3, 5):  # fewer, as many and more than there are copies
        found = [
            spectral_density(op, num_steps=12, num_probes=num_probes, seed=seed).expectation(torch.square)
            for seed in range(60)
        ]
        values = torch.tensor([e.value for e in found], dtype=torch.float64)
        assert abs(float((values.mean() - truth) / (values.std() / 60**0.5))) < 3.5


def test_cdf_steps_by_the_mass_of_each_node(density: Density) -> None:
    for place in (0, 7, len(density.nodes) - 1):
        node = density.nodes[place]
        step = density.cdf(node) - density.cdf(torch.nextafter(node, torch.tensor(-torch.inf)))
        assert float(step) == pytest.approx(float(density.masses[place]), rel=1e-9)
    assert density.cdf(torch.tensor([-100.0, 100.0])).tolist() == pytest.approx([0, 1])


def test_curve_is_a_gaussian_at_each_node_wherever_there_is_one() -> None:
    nodes = torch.tensor([0.0, 1.0, 1000.0], dtype=torch.float64)
    grid = grid_around(nodes, 0.1)
    curve = smoothed(nodes, torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64), 0.1, grid)[0]
    normal = torch.distributions.Normal(nodes, 0.1)
    expected = (normal.log_prob(grid[:, None]).exp() * torch.tensor([0.5, 0.25, 0.25])).sum(dim=1)
    assert torch.allclose(curve, expected, atol=1e-12)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-6)
    assert len(grid) < 200
    assert float(grid.diff().min()) == pytest.approx(0.025)


def test_width_follows_the_bulk_and_not_outliers_or_rounding() -> None:
    bulk = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert smoothing_width(bulk, 0.0, 1) == pytest.approx(0.015)
    assert smoothing_width(torch.cat([bulk, torch.tensor([1e5])]), 0.0, 1) == pytest.approx(0.015)
    copies = torch.cat([bulk, bulk + 1e-14]).sort().values
    assert smoothing_width(copies, 1e-12, 2) == pytest.approx(0.03)
    assert smoothing_width(torch.tensor([2.0, 2.0 + 1e-14], dtype=torch.float64), 1e-12, 2) == pytest.approx(
        0.02
    )


def test_measures_of_groups_join_without_mixing_their_probes() -> None:
    def measure(nodes: list[float], weights: list[list[float]], residual_norms: list[float]) -> Measure:
        parts = (nodes, weights, weights, residual_norms, weights)
        return Measure(*(torch.tensor(part, dtype=torch.float64) for part in parts))

    first, second = measure([1.0, 3.0], [[0.5, 0.5]], [0.0, 0.1]), measure([2.0], [[1.0], [1.0]], [0.2])
    both = join([first, second])
    assert both.nodes.tolist() == [1, 2, 3]
    assert both.weights.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0, 1, 0]]
    assert both.residual_norms.tolist() == pytest.approx([0, 0.2, 0.1])


@pytest.mark.parametrize("log", [True, False])
def test_picture_shows_the_curve_outliers_and_both_ends(density: Density, log: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = density.plot(log=log)
    curve, low, high = ax.get_lines()
    drawn = density.resolved()
    assert drawn.width == pytest.approx(max(density.width, (80 + 0.05) / 200), rel=1e-3)
    assert torch.equal(torch.from_numpy(curve.get_xdata()), drawn.grid)
    assert torch.equal(torch.from_numpy(curve.get_ydata()), drawn.values)
    assert torch.equal(replace(density, width=1.0).resolved().values, density.values)
    assert [line.get_xdata()[0] for line in (low, high)] == density.nodes[[0, -1]].tolist()
    spikes = ax.collections[-1].get_segments()
    assert [segment[0][0] for segment in spikes] == pytest.approx(drawn.outliers()[0].tolist())
    assert ax.get_yscale() == ("log" if log else "linear")
    assert density.plot(ax, log=log) is ax
    ax.figure.canvas.draw()
    plt.close(ax.figure)
