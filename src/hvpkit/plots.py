"""Pictures. Each function draws one and returns its axes; matplotlib comes with ``hvpkit[plots]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hvpkit._typing import LossFn, Tree
from hvpkit.data import as_data
from hvpkit.estimators.density import Density
from hvpkit.landscape import loss_along
from hvpkit.products import grad, loss
from hvpkit.results import Eigenpair, ExtremeResult
from hvpkit.trees import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED, PREDICTED = "#1f5fa8", "#d1602b"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def _new_axes() -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def loss_along_eigenvector(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    pair: Eigenpair,
    *,
    distance: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The loss along an eigenvector u, beside the parabola :math:`t\, g \cdot u + \lambda t^2 / 2`.

    Args:
        loss_fn: as for the operator that the eigenpair belongs to.
        params: likewise.
        data: likewise.
        pair: eigenvalue and eigenvector.
        distance: how far to go to both sides; by default as far as the parabola holds roughly.
        ax: where to draw.

    Returns:
        The axes, with distance along the unit eigenvector against the change of the loss.
    """
    ax = ax or _new_axes()
    layout = Layout.of(params)
    examples = as_data(data)
    here = float(loss(loss_fn, params, examples))
    slope = float(layout.flatten(grad(loss_fn, params, examples)) @ pair.vector)
    if distance is None:
        distance = _telling_distance(loss_fn, params, examples, pair, here, slope)
    t = torch.linspace(-distance, distance, 41, dtype=torch.float64)
    change = loss_along(loss_fn, params, examples, pair.vector, t).double().cpu() - here
    parabola = slope * t + pair.value * t**2 / 2
    ax.plot(t, change, color=MEASURED, label="loss")
    ax.plot(t, parabola, color=PREDICTED, linestyle="--", label="parabola of the eigenvalue")
    ax.set_xlabel("distance along the unit eigenvector")
    ax.set_ylabel("change of the mean loss")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.legend(loc="best")
    return ax


def _telling_distance(
    loss_fn: LossFn, params: Tree, data: object, pair: Eigenpair, here: float, slope: float
) -> float:
    """The distance, halved from where the parabola alone is the size of the loss, at which it about holds."""
    curvature = max(abs(pair.value), 1e-12)
    distance = float((2 * max(here, 1e-6) / curvature) ** 0.5)
    for _ in range(12):
        ends = torch.tensor([-distance, distance], dtype=torch.float64)
        change = loss_along(loss_fn, params, data, pair.vector, ends).double().cpu() - here
        bend = curvature * distance**2 / 2
        if bool(((change - slope * ends - pair.value * ends**2 / 2).abs() < 0.4 * bend).all()):
            break
        distance /= 2
    return distance


def convergence(ex: ExtremeResult, end: str, *, ax: Axes | None = None) -> Axes:
    """One end's Ritz value against passes over the data, with its residual interval as a band.

    Args:
        ex: a result.
        end: ``"smallest"`` or ``"largest"``.
        ax: where to draw.

    Returns:
        The axes, cut to the second half of the values if the first ones are far off.
    """
    ax = ax or _new_axes()
    passes = [entry.num_matvecs for entry in ex.history]
    values = [getattr(entry, end) for entry in ex.history]
    outward = -1.0 if end == "smallest" else 1.0
    bounds = [getattr(entry, end) + outward * getattr(entry, f"{end}_bound") for entry in ex.history]
    pair: Eigenpair = getattr(ex, end)
    ax.fill_between(
        passes, values, bounds, color=MEASURED, alpha=0.18, linewidth=0, label="residual interval"
    )
    ax.plot(passes, values, color=MEASURED, marker="o", markersize=3, label="Ritz value")
    ax.axhline(pair.value, color=PREDICTED, linestyle="--", linewidth=1.2, label=f"result {pair.value:.4g}")
    settled = values[len(values) // 3 :]
    spread = max(max(settled) - min(settled), abs(pair.value), 1e-30)
    low, high = min(settled), max(settled)
    ax.set_ylim(min(low, pair.value) - 0.6 * spread, max(high, pair.value) + 0.6 * spread)
    ax.set_xlabel("passes over the data")
    ax.set_ylabel(f"{end} eigenvalue")
    ax.legend(loc="best")
    return ax


def density(d: Density, *, ax: Axes | None = None, log: bool = True) -> Axes:
    """A spectral density: its curve with a band of one standard error, outliers as spikes, and both ends marked.

    Args:
        d: a density of :func:`hvpkit.spectral_density`.
        ax: where to draw.
        log: whether the density's axis is logarithmic, from a tenth of what one eigenvalue makes up.

    Returns:
        The axes, with eigenvalues against their density.
    """
    ax = ax or _new_axes()
    values, outliers = d.values, d.outliers()[0]
    one = 1 / (d.n * d.width * (2 * torch.pi) ** 0.5) if d.width else 1.0
    floor = 0.1 * min(one, float(values.max())) if len(values) else one
    if bool(torch.isfinite(d.stderr).all()):
        low, high = (values - d.stderr).clamp(min=floor if log else 0), values + d.stderr
        ax.fill_between(d.grid, low, high, color=MEASURED, alpha=0.18, linewidth=0, label="standard error")
    ax.plot(d.grid, values, color=MEASURED, label="density")
    if len(outliers):
        ax.vlines(outliers, floor if log else 0, one, color=PREDICTED, label="single eigenvalues")
    known = d.nodes[torch.isfinite(d.residual_norms)]
    for end in known[[0, -1]].tolist() if len(known) else []:
        ax.axvline(end, color=PREDICTED, linestyle=":", linewidth=1.2, label=f"end at {end:.4g}")
    if log:
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    ax.legend(loc="best")
    return ax


def extremes(
    ex: ExtremeResult, loss_fn: LossFn, params: Tree, data: object, *, title: str | None = None
) -> Figure:
    """For each end on one page: the loss along its eigenvector, and its Ritz value against passes."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        for column, end in enumerate(("smallest", "largest")):
            pair: Eigenpair = getattr(ex, end)
            loss_along_eigenvector(loss_fn, params, data, pair, ax=axes[0, column])
            axes[0, column].set_title(f"Loss along the eigenvector of the {end} eigenvalue, {pair.value:.4g}")
            convergence(ex, end, ax=axes[1, column])
            axes[1, column].set_title(f"The {end} eigenvalue as it was found")
        if title:
            figure.suptitle(title)
    return figure
