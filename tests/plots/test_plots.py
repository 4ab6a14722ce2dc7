import math
import subprocess
import sys
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import hvpkit as hk
from hvpkit import plots
from hvpkit.plots.landscape import loss_along, loss_on_plane
from hvpkit.plots.style import COLORS, in_words
from problems import SPECTRA, matrix

matplotlib.use("agg")

CURVATURES = torch.tensor([-2.0, 1.0, 6.0], dtype=torch.float64)
POINT, DATA = torch.zeros(3, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)


def quadratic(p, batch):
    return (p * p * CURVATURES).sum() / 2 + 5 + 0 * batch.sum(-1)


def tilted_quartic(p, batch):
    return batch[:, 0] * (0.5 * p[0] - p[1] ** 2 + 3 * p[1] * p[0] + p[2] ** 4)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def ex():
    return hk.extreme_eigenvalues(hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])))


@pytest.fixture(scope="module")
def saddle():
    return hk.extreme_eigenvalues(hk.hessian(quadratic, POINT, DATA))


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def band(collection):
    """Lowest and highest y of a filled band at each of its x."""
    points = collection.get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in points[:, 0]}


def test_density_marks_both_ends_with_their_intervals(ex):
    d = hk.spectral_density(
        hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])), num_steps=30, num_probes=2
    )
    ax = plots.density(d, extremes=ex)
    assert [line.get_xdata()[0] for line in ax.get_lines()[1:]] == [ex.smallest.value, ex.largest.value]
    spans = [
        (patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches if patch.get_height() == 1
    ]
    assert spans == [
        pytest.approx((pair.interval.lower, pair.interval.upper), rel=1e-12)
        for pair in (ex.smallest, ex.largest)
    ]
    assert labels(ax)[-2:] == [in_words("smallest", ex.smallest), in_words("largest", ex.largest)]
    assert ax.get_yscale() == "log"


def test_density_leaves_out_a_band_without_ends_and_an_end_that_was_not_found(ex):
    d = hk.spectral_density(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), num_steps=20)
    endless = replace(ex.largest, interval=hk.Interval(-math.inf, math.inf, "none"))
    unknown = replace(ex.smallest, value=math.nan)
    ax = plots.density(d, extremes=replace(ex, smallest=unknown, largest=endless))
    assert len(ax.patches) == 0
    assert [line.get_xdata()[0] for line in ax.get_lines()[1:]] == [ex.largest.value]


def test_density_of_close_eigenvalues_is_one_curve_and_not_a_comb():
    bulk, comb = (torch.linspace(*ends, dtype=torch.float64) for ends in ((0, 1, 300), (1.5, 6, 16)))
    far = torch.tensor([60.0, 100.0], dtype=torch.float64)
    d = hk.spectral_density(hk.aslinearoperator(torch.diag(torch.cat([bulk, comb, far]))), num_steps=60)
    assert len(d.outliers()[0]) == 18, "at the resolution of the density each is single"
    ax = plots.density(d)
    (spikes,) = (drawn for drawn in ax.collections if hasattr(drawn, "get_segments"))
    assert [segment[0][0] for segment in spikes.get_segments()] == pytest.approx([60, 100])
    x, y = ax.get_lines()[0].get_data()
    assert d.resolved().width == pytest.approx(0.5)
    assert np.trapezoid(y, x) == pytest.approx(1, abs=0.01)
    part = plt.subplots()[1]
    part.set_xlim(0, 10)
    (spikes,) = (drawn for drawn in plots.density(d, ax=part).collections if hasattr(drawn, "get_segments"))
    assert len(spikes.get_segments()) == 18, "a picture of a part of the spectrum tells them apart"
    assert part.get_xlim() == (0, 10)
    assert y[(x > 1.5) & (x < 6)].min() > 0.9 * d.resolved().peak, "no gaps that a picture cannot show"


@pytest.mark.parametrize(
    ("lower", "upper", "confidence", "words"),
    [
        (1.0, 2.0, 0.99, "largest 1.235 in [1, 2] (99 %)"),
        (1.23456, 1.23467, 0.999, "largest 1.2346 in [1.2346, 1.2347] (99.9 %)"),
        (1.23456789, 1.23456789, None, "largest 1.23457 in [1.23457, 1.23457]"),
    ],
)
def test_words_have_the_digits_that_tell_the_ends_of_an_interval_apart(ex, lower, upper, confidence, words):
    pair = replace(
        ex.largest, value=1.23456789, interval=hk.Interval(lower, upper, "random-start", confidence)
    )
    assert in_words("largest", pair) == words


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_convergence_of_one_end_is_its_history_with_residuals_outwards(ex, end):
    ax = plots.convergence(ex, end)
    curve, interval, result = ax.get_lines()
    values = [getattr(entry, end) for entry in ex.history]
    assert curve.get_xdata().tolist() == [entry.num_matvecs for entry in ex.history]
    assert curve.get_ydata().tolist() == values
    pair = getattr(ex, end)
    assert list(interval.get_xdata()) == [ex.num_matvecs] * 2
    assert list(interval.get_ydata()) == [pair.interval.lower, pair.interval.upper]
    assert list(result.get_ydata()) == [pair.value] * 2
    drawn = band(ax.collections[0])
    for entry, value in zip(ex.history, values, strict=True):
        bound = getattr(entry, f"{end}_bound")
        reach = (value - bound, value) if end == "smallest" else (value, value + bound)
        assert drawn[entry.num_matvecs] == pytest.approx(reach)
    low, high = ax.get_ylim()
    assert low < pair.value < high


def test_convergence_of_both_ends_is_over_the_size_of_each(ex):
    ax = plots.convergence(ex)
    smallest, _, at_smallest, largest, _, at_largest = ax.get_lines()
    assert smallest.get_ydata()[-1] == pytest.approx(-1, rel=0.02)
    assert largest.get_ydata()[-1] == pytest.approx(1, rel=0.02)
    assert (at_smallest.get_ydata()[0], at_largest.get_ydata()[0]) == (-1, 1)
    assert largest.get_ydata()[0] == ex.history[0].largest / ex.largest.value
    assert labels(ax) == [in_words("smallest", ex.smallest), in_words("largest", ex.largest)]
    assert "over the size" in ax.get_ylabel()


def test_convergence_puts_an_end_that_is_zero_to_rounding_on_the_scale_of_the_other():
    ex = hk.extreme_eigenvalues(hk.aslinearoperator(matrix(SPECTRA["rank_deficient"])))
    assert ex.status is hk.Status.ZERO_TO_ROUNDING
    lines = plots.convergence(ex).get_lines()
    assert abs(lines[0].get_ydata()[-1]) < 1e-6
    assert lines[0].get_ydata()[0] == ex.history[0].smallest / ex.largest.value


def test_convergence_refuses_what_it_cannot_draw(ex):
    with pytest.raises(ValueError, match="end must be one of"):
        plots.convergence(ex, "middle")
    with pytest.raises(ValueError, match="ex has nothing to draw"):
        plots.convergence(replace(ex, history=()))
    with pytest.raises(ValueError, match="ex has nothing to draw"):
        plots.convergence(replace(ex, largest=replace(ex.largest, value=math.nan)))


def test_loss_on_a_plane_is_that_on_its_lines():
    directions = torch.linalg.qr(
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    point = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    s, t = [-1.0, 0.0, 0.5], [0.0, 2.0]
    found = loss_on_plane(tilted_quartic, point, DATA, directions, s, t)
    for row, shift in zip(found, s, strict=True):
        at = [point + shift * directions[:, 0] + step * directions[:, 1] for step in t]
        torch.testing.assert_close(row, torch.stack([tilted_quartic(p, DATA)[0] for p in at]))
    torch.testing.assert_close(found[:, 0], loss_along(tilted_quartic, point, DATA, directions[:, 0], s))
    with pytest.raises(ValueError, match="directions must have shape \\[3, 2\\]"):
        loss_on_plane(tilted_quartic, point, DATA, directions.T, s, t)


def test_loss_along_an_eigenvector_goes_as_far_as_asked(saddle):
    ax = plots.loss_along_eigenvector(quadratic, POINT, DATA, saddle.largest, distance=0.25)
    loss, parabola = ax.get_lines()
    assert (loss.get_xdata()[0], loss.get_xdata()[-1]) == (-0.25, 0.25)
    np.testing.assert_allclose(loss.get_ydata(), 3 * loss.get_xdata() ** 2, atol=1e-14)
    np.testing.assert_allclose(parabola.get_ydata(), loss.get_ydata(), atol=1e-14)
    assert labels(ax) == ["loss", "parabola of 6"]


def test_loss_along_a_flat_direction_stays_within_the_length_of_the_parameters(saddle):
    flat = replace(saddle.smallest, value=0.0, vector=torch.eye(3, dtype=torch.float64)[0])
    ax = plots.loss_along_eigenvector(lambda p, batch: 5 + p[1] ** 2 + 0 * batch.sum(-1), POINT, DATA, flat)
    assert ax.get_lines()[0].get_xdata()[-1] <= 1.0


def test_landscape_puts_the_smallest_across_and_the_largest_up(saddle):
    ax = plots.loss_landscape(quadratic, POINT, DATA, saddle, distances=(2.0, 0.5), num_points=9)
    filled, lines = ax.collections[:2]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-2, 2), (-0.5, 0.5))
    # a level set of a saddle: -s^2 + 3 t^2 is the level wherever its contour goes
    cell = 0.25 * 4 + 3 * 0.25  # change within a cell of the grid, at most
    checked = 0
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        for s, t in path.vertices:
            assert abs(-(s**2) + 3 * t**2 - level) < cell / 4
            checked += 1
    assert checked > 20
    # a fall of 4 and a rise of 0.75, each on its own scale, and not in the darkest colours
    assert filled.levels[[0, 5, -1]].tolist() == pytest.approx([-4, 0, 0.75])
    assert (filled.norm.vmin, filled.norm.vmax) == pytest.approx((-1.4 * 4, 1.4 * 0.75))
    assert len(ax.texts) >= 4
    for label in ax.texts:
        s, t = label.get_position()
        assert abs(s) < 0.95 * 2
        assert abs(t) < 0.95 * 0.5
    assert [line.get_marker() for line in ax.get_lines()] == ["+"]
    assert "smallest, -2" in ax.get_xlabel()
    assert "largest, 6" in ax.get_ylabel()
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["change of the mean loss"]


def test_landscape_of_a_minimum_has_no_levels_below_zero(saddle):
    bowl = lambda p, batch: (p * p * CURVATURES.abs()).sum() / 2 + 0 * batch.sum(-1)  # noqa: E731
    ax = plots.loss_landscape(bowl, POINT, DATA, saddle, distances=(2.0, 0.5), num_points=9)
    assert ax.collections[0].levels.min() == 0
    flat = lambda p, batch: 0 * p.sum() + 0 * batch.sum(-1)  # noqa: E731
    plots.loss_landscape(flat, POINT, DATA, saddle, distances=(2.0, 0.5), num_points=3)


def test_landscape_refuses_a_plane_that_is_none(saddle):
    with pytest.raises(ValueError, match=r"^ex: .*no plane"):
        plots.loss_landscape(quadratic, POINT, DATA, replace(saddle, largest=saddle.smallest))
    with pytest.raises(ValueError, match="num_points"):
        plots.loss_landscape(quadratic, POINT, DATA, saddle, num_points=2)


def test_layers_draw_both_ends_with_intervals_and_values(ex, saddle):
    results = {"first.weight": ex, "last.bias": saddle}
    ax = plots.layers(results)
    smallest, largest = (bars for bars in ax.containers if hasattr(bars, "patches"))
    for bars, name in ((smallest, "smallest"), (largest, "largest")):
        pairs = [getattr(result, name) for result in results.values()]
        assert [bar.get_width() for bar in bars] == [pair.value for pair in pairs]
        ends = [
            tuple(segment[:, 0]) for segment in bars.errorbar.lines[2][0].get_segments()
        ]  # of the error bars
        assert ends == [pytest.approx((pair.interval.lower, pair.interval.upper)) for pair in pairs]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(results)
    assert ax.yaxis_inverted()
    values = [f"{getattr(r, name).value:.3g}" for name in ("smallest", "largest") for r in results.values()]
    assert [text.get_text() for text in ax.texts] == values
    assert labels(ax) == ["smallest", "largest"]
    least = min(abs(getattr(r, name).value) for name in ("smallest", "largest") for r in results.values())
    assert ax.get_xscale() == "symlog"
    assert ax.xaxis.get_transform().linthresh <= least
    assert plots.layers(results, log=False).get_xscale() == "linear"


def test_layers_draw_traces_with_standard_errors_and_grow_with_their_number():
    traces = {
        f"layer{i}": hk.trace(hk.aslinearoperator(matrix(SPECTRA["indefinite"], seed=i)), num_matvecs=30)
        for i in range(12)
    }
    ax = plots.layers(traces, quantity="trace of the block")
    (bars,) = (bars for bars in ax.containers if hasattr(bars, "patches"))
    assert [bar.get_width() for bar in bars] == [trace.value for trace in traces.values()]
    ends = [tuple(segment[:, 0]) for segment in bars.errorbar.lines[2][0].get_segments()]
    assert ends == [pytest.approx((t.value - t.stderr, t.value + t.stderr)) for t in traces.values()]
    assert ax.get_xlabel() == "trace of the block"
    assert ax.get_legend() is None
    assert ax.figure.get_figheight() == plots.layers_height(12) > plots.layers_height(3) == 4


def test_layers_leave_out_an_error_that_is_not_known_and_refuse_mixtures(ex):
    trace = hk.trace(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), num_matvecs=30)
    ax = plots.layers({"a": replace(trace, stderr=math.inf)})
    ax.figure.canvas.draw()
    assert [bar.get_width() for bar in ax.containers[-1]] == [trace.value]
    (value,) = ax.texts
    assert value.xy[0] == trace.value
    assert all(map(math.isfinite, ax.get_xlim()))
    endless = replace(ex.largest, interval=hk.Interval(-math.inf, math.inf, "none"))
    ax = plots.layers({"a": replace(ex, largest=endless)})
    ax.figure.canvas.draw()
    assert [value.xy[0] for value in ax.texts] == pytest.approx([ex.smallest.interval.lower, endless.value])
    with pytest.raises(TypeError, match="results must be all of"):
        plots.layers({"a": trace, "b": ex})
    with pytest.raises(TypeError, match=r"results must be all of .*, got float"):
        plots.layers({"a": 1.0})
    with pytest.raises(TypeError, match="not of a tensor"):
        plots.layers({"a": hk.diagonal(hk.aslinearoperator(matrix(SPECTRA["n3"])))})
    with pytest.raises(ValueError, match="results is empty"):
        plots.layers({})


@pytest.mark.parametrize("log", [True, False])
def test_training_draws_both_ends_with_intervals(ex, saddle, log):
    ax = plots.training([(0, saddle), (10, ex), (30, saddle)], log=log)
    largest, smallest, zero = ax.get_lines()
    assert largest.get_xdata().tolist() == smallest.get_xdata().tolist() == [0, 10, 30]
    assert smallest.get_ydata().tolist() == [r.smallest.value for r in (saddle, ex, saddle)]
    assert largest.get_ydata().tolist() == [r.largest.value for r in (saddle, ex, saddle)]
    assert list(zero.get_ydata()) == [0, 0]
    for collection, pair in zip(ax.collections, (ex.largest, ex.smallest), strict=True):
        assert band(collection)[10] == pytest.approx((pair.interval.lower, pair.interval.upper))
    assert ax.get_yscale() == ("symlog" if log else "linear")
    if log:
        threshold = ax.yaxis.get_transform().linthresh
        assert threshold <= abs(ex.smallest.value) < 10 * threshold
    assert labels(ax) == ["largest", "smallest"]
    assert ax.get_xlabel() == "training step"
    ax = plots.training([(0, saddle), (1, ex)], log=log, unit="epoch")
    assert ax.get_xlabel() == "epoch"
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    with pytest.raises(ValueError, match="results is empty"):
        plots.training([])


def luminance(color):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("color", COLORS.values(), ids=COLORS.keys())
def test_colours_have_the_contrast_of_graphics_on_white_and_on_black(color):
    # WCAG 2.1, success criterion 1.4.11
    assert 1.05 / (luminance(color) + 0.05) >= 3
    assert (luminance(color) + 0.05) / 0.05 >= 3


def pictures(ex, saddle):
    d = hk.spectral_density(hk.aslinearoperator(matrix(SPECTRA["indefinite"])), num_steps=20)
    return [
        lambda ax=None: plots.density(d, extremes=ex, ax=ax),
        lambda ax=None: plots.convergence(ex, ax=ax),
        lambda ax=None: plots.loss_along_eigenvector(quadratic, POINT, DATA, saddle.largest, ax=ax),
        lambda ax=None: plots.loss_landscape(quadratic, POINT, DATA, saddle, num_points=5, ax=ax),
        lambda ax=None: plots.layers({"a": ex, "b": saddle}, ax=ax),
        lambda ax=None: plots.training([(0, ex), (5, saddle)], ax=ax),
    ]


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("number", range(6))
def test_every_picture_has_the_size_keeps_its_text_inside_and_the_style_to_itself(ex, saddle, number, style):
    with plt.style.context(style):
        before = dict(matplotlib.rcParams)
        ax = pictures(ex, saddle)[number]()
        assert dict(matplotlib.rcParams) == before
        assert not ax.spines["top"].get_visible()
        figure = ax.figure
        assert tuple(figure.get_size_inches()) == (6.4, 4.0)
        figure.canvas.draw()
        whole, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert whole.x0 <= drawn.x0 + 1
        assert whole.y0 <= drawn.y0 + 1
        assert drawn.x1 <= whole.x1 + 1
        assert drawn.y1 <= whole.y1 + 1
        ink, ground = luminance(ax.xaxis.label.get_color()), luminance(figure.get_facecolor())
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 7


@pytest.mark.parametrize("number", range(6))
def test_every_picture_draws_where_it_is_told(ex, saddle, number):
    axes = plt.subplots(1, 2)[1]
    assert pictures(ex, saddle)[number](ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert axes[1].has_data()
    assert len(plt.get_fignums()) == 1


def test_missing_matplotlib_is_said_with_what_to_install():
    script = """
import sys
sys.modules["matplotlib"] = None
import torch
import hvpkit
try:
    import hvpkit.plots
except ImportError as error:
    print(error)
try:
    hvpkit.spectral_density(hvpkit.aslinearoperator(torch.eye(3))).plot()
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.count("pip install 'hvpkit[plots]'") == 2
