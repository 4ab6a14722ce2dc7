"""The loss around the parameters, along the extreme eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from hvpkit._utils.typing import LossFn, Tree
from hvpkit._utils.validation import check_count, check_positive, check_type
from hvpkit.autodiff.pytree import Layout
from hvpkit.curvature.functional import grad, loss
from hvpkit.data import as_data
from hvpkit.plots.landscape import loss_along, loss_on_plane
from hvpkit.plots.spectrum import SOURCE, convergence
from hvpkit.plots.style import COLORS, ENDS, INK, styled
from hvpkit.results.eigen import Eigenpair, ExtremeResult


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
    """
    check_type("pair", pair, Eigenpair, "ex.largest")
    if distance is not None:
        check_positive("distance", distance)
    ax = ax or plt.subplots()[1]
    here, derivative, distance = _line(loss_fn, params, data, pair, distance)
    t = torch.linspace(-distance, distance, 41, dtype=torch.float64)
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
    derivative = float(layout.flatten(grad(loss_fn, params, examples)) @ pair.vector)
    if distance is not None:
        return here, derivative, distance
    curvature = max(abs(pair.value), 1e-12)
    norm = max(float(layout.flatten(params).norm()), 1.0)
    distance = min(float((2 * max(here, 1e-6) / curvature) ** 0.5), norm)
    for _ in range(12):
        ends = torch.tensor([-distance, distance], dtype=torch.float64)
        change = loss_along(loss_fn, params, examples, pair.vector, ends).double().cpu() - here
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
    """
    check_type("ex", ex, ExtremeResult, SOURCE)
    check_count("num_points", num_points, 3)
    if distances is not None:
        if not isinstance(distances, Sequence) or len(distances) != 2:
            raise TypeError(f"distances must be two half widths, got {distances!r}")
        for distance in distances:
            check_positive("distances", distance)
    pairs = (ex.smallest, ex.largest)
    directions = torch.stack([pair.vector for pair in pairs], dim=1)
    if not abs(float(directions[:, 0] @ directions[:, 1])) < 0.5:
        raise ValueError("ex: its two ends do not have two eigenvectors, so that there is no plane to draw")
    ax = ax or plt.subplots()[1]
    wished = distances or (None, None)
    reach = [_line(loss_fn, params, data, pair, wish)[2] for pair, wish in zip(pairs, wished, strict=True)]
    s, t = (torch.linspace(-r, r, num_points, dtype=torch.float64) for r in reach)
    here = float(loss(loss_fn, params, data))
    change = loss_on_plane(loss_fn, params, data, directions, s, t).double().cpu().T - here
    norm = CenteredNorm(halfrange=1.4 * float(change.abs().max()) or 1.0)  # without its darkest colours
    filled = ax.contourf(s, t, change, levels=14, cmap="RdBu_r", norm=norm)
    every_other = list(filled.levels)[::2]
    lines = ax.contour(s, t, change, levels=every_other, colors=INK, linewidths=0.7, alpha=0.7)
    ax.clabel(lines, fontsize=8)
    ax.plot(0, 0, color=INK, marker="+", markersize=10)
    ax.figure.colorbar(filled, ax=ax, label="change of the mean loss")
    ax.set_xlabel(f"along the eigenvector of the smallest, {ex.smallest.value:.4g}")
    ax.set_ylabel(f"along that of the largest, {ex.largest.value:.4g}")
    return ax


@styled
def extremes(
    ex: ExtremeResult, loss_fn: LossFn, params: Tree, data: object, *, title: str | None = None
) -> Figure:
    """Draw for each end, on one page, the loss along its eigenvector, and its Ritz value against passes."""
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
