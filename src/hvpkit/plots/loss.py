"""The loss around the parameters, along the extreme eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from hvpkit._utils.ranks import whole
from hvpkit._utils.typing import LossFn, Tree
from hvpkit._utils.validation import check_count, check_positive, check_type
from hvpkit.autodiff.pytree import Layout
from hvpkit.curvature.functional import grad, loss
from hvpkit.data import as_data
from hvpkit.plots.landscape import loss_along, loss_on_plane
from hvpkit.plots.spectrum import SOURCE, convergence
from hvpkit.plots.style import COLORS, ENDS, INK, styled
from hvpkit.results.eigen import Eigenpair, ExtremeResult

LABELLED = 0.9
"""Share of the frame within which contours are labelled, so that no label is cut."""


@styled
def loss_along_eigenvector(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    pair: Eigenpair,
    *,
    distance: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the loss along an eigenvector u, with the parabola :math:`t\, g \cdot u + \lambda t^2 / 2`.

    Args:
        loss_fn: as for the operator that the eigenpair belongs to.
        params: of that operator.
        data: of that operator.
        pair: eigenvalue and eigenvector.
        distance: half width of the line; by default as far as the parabola roughly holds.
        ax: where to draw.

    Returns:
        The axes, with distance along the unit eigenvector against the change of the mean loss.

    Cost:
        41 forward passes over the data and a gradient, and up to 24 passes to find the distance.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: (batch @ p) ** 2
        >>> params, data = torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> ex = hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data))
        >>> ax = hk.plots.loss_along_eigenvector(loss_fn, params, data, ex.largest, distance=0.5)
        >>> ax.get_legend().get_texts()[1].get_text()
        'parabola of 9'
    """
    check_type("pair", pair, Eigenpair, "ex.largest")
    if distance is not None:
        check_positive("distance", distance)
    ax = ax or plt.subplots()[1]
    here, derivative, distance = _line(loss_fn, params, data, pair, distance)
    t = torch.linspace(-distance, distance, 41, dtype=torch.float64, device="cpu")
    change = loss_along(loss_fn, params, data, pair.vector, t).double().cpu() - here
    parabola = derivative * t + pair.value * t**2 / 2
    ax.plot(t, change, color=COLORS["measured"], label="loss")
    ax.plot(t, parabola, color=COLORS["predicted"], linestyle="--", label=f"parabola of {pair.value:.4g}")
    ax.set_xlabel("distance along the unit eigenvector")
    ax.set_ylabel("change of the mean loss")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.legend(loc="best")
    return ax


def _line(
    loss_fn: LossFn, params: Tree, data: object, pair: Eigenpair, distance: float | None
) -> tuple[float, float, float]:
    """Return the loss, its derivative along the eigenvector, and a distance up to which the parabola roughly holds.

    The distance is halved from the point where the quadratic term is as large as the loss, or from the norm of the
    parameters if that is less.
    """
    layout = Layout.of(params)
    if pair.vector.shape != (layout.n,):
        raise ValueError(
            f"pair is of an operator with n = {len(pair.vector)}, and params has {layout.n} entries"
        )
    examples = as_data(data)
    here = float(loss(loss_fn, params, examples))
    vector = whole(pair.vector)
    derivative = float(layout.flatten(grad(loss_fn, params, examples)) @ vector)
    if distance is not None:
        return here, derivative, distance
    curvature = max(abs(pair.value), 1e-12)
    norm = max(float(layout.flatten(params).norm()), 1.0)
    distance = min(float((2 * max(here, 1e-6) / curvature) ** 0.5), norm)
    for _ in range(12):
        ends = torch.tensor([-distance, distance], dtype=torch.float64, device="cpu")
        change = loss_along(loss_fn, params, examples, vector, ends).double().cpu() - here
        quadratic = curvature * distance**2 / 2
        misfit = change - derivative * ends - pair.value * ends**2 / 2
        if bool((misfit.abs() < 0.4 * quadratic).all()):
            break
        distance /= 2
    return here, derivative, distance


@styled
def loss_landscape(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    ex: ExtremeResult,
    *,
    distances: tuple[float, float] | None = None,
    num_points: int = 15,
    ax: Axes | None = None,
) -> Axes:
    """Draw the loss on the plane of both extreme eigenvectors, as contours of its change; a cross marks the params.

    Rises and falls have each a scale of their own, so that a small fall shows beside a large rise.

    Args:
        loss_fn: as for the operator that the result belongs to.
        params: of that operator.
        data: of that operator.
        ex: both ends; the eigenvector of the smallest goes to the right, that of the largest up.
        distances: half width along each; by default as :func:`loss_along_eigenvector`.
        num_points: along each axis.
        ax: where to draw.

    Returns:
        The axes, with distances along the unit eigenvectors.

    Raises:
        ValueError: both ends have one eigenvector; fewer than 3 points.

    Cost:
        ``num_points ** 2`` forward passes over the data, and up to 50 to find the distances.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: (batch @ p) ** 2
        >>> params, data = torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> ex = hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data))
        >>> hk.plots.loss_landscape(loss_fn, params, data, ex, num_points=5).get_ylabel()
        'along that of the largest, 9'
    """
    check_type("ex", ex, ExtremeResult, SOURCE)
    check_count("num_points", num_points, 3)
    if distances is not None:
        if not isinstance(distances, Sequence) or len(distances) != 2:
            raise TypeError(f"distances must be two half widths, got {distances!r}")
        for distance in distances:
            check_positive("distances", distance)
    pairs = (ex.smallest, ex.largest)
    directions = whole(ex.vectors)
    if not abs(float(directions[:, 0] @ directions[:, 1])) < 0.5:
        raise ValueError("ex: its two ends do not have two eigenvectors, so that there is no plane to draw")
    ax = ax or plt.subplots()[1]
    wished = distances or (None, None)
    reach = [_line(loss_fn, params, data, pair, wish)[2] for pair, wish in zip(pairs, wished, strict=True)]
    s, t = (torch.linspace(-r, r, num_points, dtype=torch.float64, device="cpu") for r in reach)
    here = float(loss(loss_fn, params, data))
    change = loss_on_plane(loss_fn, params, data, directions, s, t).double().cpu().T - here
    levels = _levels(float(change.min()), float(change.max()))
    low, high = levels[0], levels[-1]
    # rises and falls each on a scale of its own, without its darkest colours
    norm = TwoSlopeNorm(0.0, 1.4 * (low or -high), 1.4 * (high or -low))
    filled = ax.contourf(s, t, change, levels=levels, cmap="RdBu_r", norm=norm)
    lines = ax.contour(s, t, change, levels=levels, colors=INK, linewidths=0.7, alpha=0.7)
    ax.clabel(lines, fontsize=8, fmt="%.2g", manual=_label_places(lines, reach))
    ax.plot(0, 0, color=INK, marker="+", markersize=10)
    ax.figure.colorbar(filled, ax=ax, label="change of the mean loss", format="%.2g", ticks=levels)
    ax.locator_params(nbins=5)
    ax.set_xlabel(f"along the eigenvector of the smallest, {ex.smallest.value:.4g}")
    ax.set_ylabel(f"along that of the largest, {ex.largest.value:.4g}")
    return ax


def _levels(low: float, high: float) -> list[float]:
    """Return levels from the lowest to the highest change, half of them below zero if there is anything below."""
    high, num_below = max(high, 0.0), 5 if low < 0 < high else 10
    below = [low * k / num_below for k in range(num_below, 0, -1)] if low < 0 else []
    num_above = 10 - len(below)
    above = [high * k / num_above for k in range(1, num_above + 1)] if high else []
    levels = [*below, 0.0, *above]
    return levels if len(levels) > 1 else [-1.0, 0.0, 1.0]


def _label_places(lines: ContourSet, reach: Sequence[float]) -> list[tuple[float, float]]:
    """Return the point of each contour line that is nearest to the middle; none that is near the frame."""
    size, places = torch.tensor(reach, dtype=torch.float64, device="cpu"), []
    for path in lines.get_paths():
        points = torch.as_tensor(path.vertices, dtype=torch.float64, device="cpu") / size
        if len(points):
            point = points[points.square().sum(1).argmin()]
            if float(point.abs().max()) < LABELLED:
                places.append((float(point[0] * size[0]), float(point[1] * size[1])))
    return places


@styled
def extremes(
    ex: ExtremeResult, loss_fn: LossFn, params: Tree, data: object, *, title: str | None = None
) -> Figure:
    """Draw for each end, on one page, the loss along its eigenvector, and its Ritz value against passes.

    Args:
        ex: both ends.
        loss_fn: as for the operator that the result belongs to.
        params: of that operator.
        data: of that operator.
        title: of the page.

    Returns:
        The figure, with four axes.

    Cost:
        That of two :func:`loss_along_eigenvector`.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: (batch @ p) ** 2
        >>> params, data = torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> ex = hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data))
        >>> len(hk.plots.extremes(ex, loss_fn, params, data, title="A quadratic").axes)
        4
    """
    check_type("ex", ex, ExtremeResult, SOURCE)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    for column, name in enumerate(ENDS):
        pair: Eigenpair = getattr(ex, name)
        loss_along_eigenvector(loss_fn, params, data, pair, ax=axes[0, column])
        axes[0, column].set_title(f"Loss along the eigenvector of the {name} eigenvalue, {pair.value:.4g}")
        convergence(ex, name, ax=axes[1, column])
        axes[1, column].set_title(f"The {name} eigenvalue as it was found")
    if title:
        figure.suptitle(title)
    return figure
