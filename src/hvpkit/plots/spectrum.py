"""Pictures of a spectrum and of its two ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hvpkit._utils.validation import check_choice, check_flag, check_type
from hvpkit.plots.style import BELOW, COLORS, ENDS, HEIGHT, WIDTH, in_words, styled
from hvpkit.results.density import Density
from hvpkit.results.eigen import Eigenpair, EigenResult, ExtremeResult
from hvpkit.results.estimate import Estimate

SOURCE = "hvpkit.extreme_eigenvalues"

DECADES = 1e-4
"""The least size on a logarithmic axis, over the largest one: what is smaller counts as zero. Chosen by feel."""


def density(
    d: Density, *, extremes: ExtremeResult | None = None, ax: Axes | None = None, log: bool = True
) -> Axes:
    """Draw a spectral density: see :meth:`hvpkit.Density.plot`.

    Args:
        d: a density.
        extremes: both ends with their intervals, in place of the density's own ends.
        ax: where to draw.
        log: draw the density's axis logarithmic.

    Returns:
        The axes, with eigenvalues against their density.

    Example:
        >>> import torch, hvpkit as hk
        >>> H = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 300, dtype=torch.float64)))
        >>> d = hk.spectral_density(H, num_steps=20)
        >>> hk.plots.density(d, extremes=hk.extreme_eigenvalues(H)).get_ylabel()
        'density'
    """
    check_type("d", d, Density, "hvpkit.spectral_density")
    if extremes is not None:
        check_type("extremes", extremes, ExtremeResult, SOURCE)
    return d.plot(ax, log, extremes=extremes)


@styled
def convergence(ex: ExtremeResult, end: str = "both", *, ax: Axes | None = None) -> Axes:
    """Draw Ritz values against passes over the data, residual intervals as bands and the last interval as a bar.

    Args:
        ex: a result.
        end: ``"smallest"``, ``"largest"``, or ``"both"`` on one axis: then each is divided by the magnitude of its
            result, so that both converge to one or minus one, however far apart they are.
        ax: where to draw.

    Returns:
        The axes, scaled to the last two thirds of the values.

    Raises:
        ValueError: another ``end``; a result without a history or without a finite value.

    Example:
        >>> import torch, hvpkit as hk
        >>> H = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 300, dtype=torch.float64)))
        >>> hk.plots.convergence(hk.extreme_eigenvalues(H), "largest").get_xlabel()
        'passes over the data'
    """
    check_type("ex", ex, ExtremeResult, SOURCE)
    ends = ENDS if check_choice("end", end, ("both", *ENDS)) == "both" else (end,)
    pairs: dict[str, Eigenpair] = {name: getattr(ex, name) for name in ends}
    if not ex.history or not all(math.isfinite(pair.value) for pair in pairs.values()):
        raise ValueError(f"ex has nothing to draw: {ex.message}")
    ax = ax or plt.subplots()[1]
    passes = [entry.num_matvecs for entry in ex.history]
    most = max(abs(pair.value) for pair in pairs.values()) or 1.0
    shown, sizes = [], []
    for name, pair in pairs.items():
        # an end that is zero to rounding has no size of its own
        size = 1.0 if end != "both" else abs(pair.value) if pair.error_bound < abs(pair.value) else most
        outward = -1.0 if name == "smallest" else 1.0
        values = [getattr(entry, name) / size for entry in ex.history]
        reach = [
            value + outward * getattr(entry, f"{name}_bound") / size
            for value, entry in zip(values, ex.history, strict=True)
        ]
        ax.fill_between(passes, values, reach, color=COLORS[name], alpha=0.3, linewidth=0)
        ax.plot(passes, values, color=COLORS[name], marker="o", markersize=3, label=in_words(name, pair))
        bar = [pair.interval.lower / size, pair.interval.upper / size]
        ax.plot([ex.num_matvecs] * 2, bar, color=COLORS[name], marker="_", markersize=9)
        ax.axhline(pair.value / size, color=COLORS["predicted"], linestyle="--", linewidth=1)
        shown += [*values[len(values) // 3 :], pair.value / size]
        sizes.append(abs(pair.value) / size)
    margin = 0.35 * max(max(shown) - min(shown), *sizes, 1e-30)
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.set_xlabel("passes over the data")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(f"{end} eigenvalue" if end != "both" else "Ritz value over the size of the result")
    ax.legend(loc="best")
    return ax


@styled
def layers(
    results: Mapping[str, ExtremeResult | Estimate[float]],
    *,
    quantity: str = "trace",
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw both ends, or an estimate, of each layer: bars with intervals or standard errors, and their values.

    Args:
        results: by name of the layer, all of one type.
        quantity: name of the estimated quantity.
        log: draw the axis of values logarithmic, to both sides of zero, so that small ends show beside large ones.
        ax: where to draw; by default of :func:`layers_height`.

    Returns:
        The axes, with a group of bars for each layer, the first on top.

    Raises:
        ValueError: no results.
        TypeError: results of several types, or of another one.

    Example:
        >>> import torch, hvpkit as hk
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> loss_fn = lambda p, batch: (batch @ p["w"] + p["b"]) ** 2
        >>> found = hk.blocks(loss_fn, params, torch.tensor([[1.0, 0.0], [0.0, 3.0]]), by="parameter")
        >>> ax = hk.plots.layers({block.name: block.extremes for block in found})
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['w', 'b']
    """
    if not isinstance(results, Mapping):
        raise TypeError(
            f"results must be a dict of results by name of the layer, got {type(results).__name__}"
        )
    if not results:
        raise ValueError("results is empty; pass a result for each layer by its name")
    kinds = {type(result) for result in results.values()}
    if len(kinds) > 1 or not kinds <= {ExtremeResult, Estimate}:
        named = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"results must be all of ExtremeResult or all of Estimate, got {named}")
    if any(
        isinstance(result, Estimate) and isinstance(result.value, torch.Tensor) for result in results.values()
    ):
        raise TypeError(
            "results must be estimates of a number, as of a trace, not of a tensor, as of a diagonal"
        )
    check_flag("log", log)
    ax = ax or plt.subplots(figsize=(WIDTH, layers_height(len(results))))[1]
    bars: dict[str, list[tuple[float, float, float]]] = {}
    for result in results.values():
        if isinstance(result, Estimate):
            bars.setdefault(quantity, []).append((result.value, result.stderr, result.stderr))
            continue
        for name in ENDS:
            pair = getattr(result, name)
            below, above = pair.value - pair.interval.lower, pair.interval.upper - pair.value
            bars.setdefault(name, []).append((pair.value, max(below, 0.0), max(above, 0.0)))
    thickness = 0.8 / len(bars)
    for place, (name, rows) in enumerate(bars.items()):
        values, *errors = zip(*rows, strict=True)
        at = [row + (place + 0.5) * thickness - 0.4 for row in range(len(rows))]
        color = COLORS.get(name, COLORS["measured"])
        style = {"ecolor": COLORS["predicted"], "capsize": 2}
        drawn = ax.barh(at, values, thickness, xerr=errors, color=color, error_kw=style, label=name)
        ax.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    ax.axvline(0, color=COLORS["predicted"], linewidth=1)
    ax.set_yticks(range(len(results)), list(results))
    ax.invert_yaxis()
    ax.margins(x=0.18)
    sizes = [abs(value) for rows in bars.values() for value, *_ in rows]
    if log:
        _set_symmetric_log(ax, "x", sizes)
    ax.set_xlabel("eigenvalue" if len(bars) > 1 else quantity)
    if len(bars) > 1:
        ax.legend(**BELOW)
    return ax


def layers_height(num_layers: int) -> float:
    """Return the height of a picture of so many layers, in inches.

    Example:
        >>> import hvpkit as hk
        >>> hk.plots.layers_height(3), hk.plots.layers_height(20)
        (4.0, 9.4)
    """
    return max(HEIGHT, 1.0 + 0.42 * num_layers)


@styled
def eigenvalues(found: EigenResult, *, ax: Axes | None = None) -> Axes:
    """Draw several eigenvalues by their place, the largest on top, with their intervals.

    Args:
        found: as of :func:`hvpkit.top_eigenvalues`.
        ax: where to draw.

    Returns:
        The axes, with eigenvalues against their place from the top.

    Raises:
        TypeError: ``found`` is of another type.
        ValueError: there is no eigenvalue in it.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)))
        >>> hk.plots.eigenvalues(hk.top_eigenvalues(A, 2)).get_xlabel()
        'eigenvalue'
    """
    check_type("found", found, EigenResult, "hvpkit.top_eigenvalues")
    pairs = [found.pair(place) for place in reversed(range(len(found.values)))]
    if not pairs:
        raise ValueError("found has no eigenvalue; raise max_matvecs or time_limit")
    ax = ax or plt.subplots(figsize=(WIDTH, layers_height(len(pairs))))[1]
    values, places = [pair.value for pair in pairs], range(1, len(pairs) + 1)
    below = [max(pair.value - pair.interval.lower, 0.0) for pair in pairs]
    above = [max(pair.interval.upper - pair.value, 0.0) for pair in pairs]
    reach = [[size if math.isfinite(size) else 0.0 for size in side] for side in (below, above)]
    colors = [COLORS["smallest" if value < 0 else "largest"] for value in values]
    bars = ax.barh(places, values, 0.6, color=colors)
    ax.errorbar(values, places, xerr=reach, fmt="none", ecolor=COLORS["predicted"], capsize=3)
    ax.bar_label(bars, [f"{value:.5g}" for value in values], padding=4, fontsize=8)
    ax.axvline(0, color=COLORS["predicted"], linewidth=1)
    ax.set_yticks(places)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("place from the top")
    return ax


@styled
def training(
    results: Sequence[tuple[float, ExtremeResult | EigenResult]],
    *,
    log: bool = True,
    unit: str = "training step",
    ax: Axes | None = None,
) -> Axes:
    """Draw both ends over training, or several eigenvalues, with their intervals as bands.

    Args:
        results: pairs of a step and the result there.
        log: draw the axis of eigenvalues logarithmic, to both sides of zero.
        unit: what the steps count, as ``"epoch"``.
        ax: where to draw.

    Returns:
        The axes, with steps against eigenvalues.

    Raises:
        ValueError: no results.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: (batch @ p) ** 4
        >>> tracker = hk.train.SpectrumTracker(loss_fn, torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> for epoch in range(3):
        ...     _ = tracker(torch.full((2,), 1.0 - 0.1 * epoch), step=epoch)
        >>> hk.plots.training(tracker.results, unit="epoch").get_xlabel()
        'epoch'
    """
    if not isinstance(results, Sequence) or not all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in results
    ):
        raise TypeError("results must be a list of pairs (step, result), as SpectrumTracker.results")
    if not results:
        raise ValueError("results is empty; pass pairs of a step and its result")
    check_flag("log", log)
    check_type("unit", unit, str)
    several = isinstance(results[0][1], EigenResult)
    for _, result in results:
        check_type("each result of results", result, EigenResult if several else ExtremeResult, SOURCE)
    ax = ax or plt.subplots()[1]
    sizes = []
    for number, (color, found) in enumerate(_curves(results)):
        steps, pairs = zip(*found, strict=True)
        name = None if several and number else color if not several else "eigenvalues"
        values = [pair.value for pair in pairs]
        lower, upper = ([getattr(pair.interval, side) for pair in pairs] for side in ("lower", "upper"))
        known = [math.isfinite(low) and math.isfinite(high) for low, high in zip(lower, upper, strict=True)]
        ax.fill_between(steps, lower, upper, where=known, color=COLORS[color], alpha=0.3, linewidth=0)
        ax.plot(steps, values, color=COLORS[color], marker="o", markersize=3, label=name)
        sizes += [abs(value) for value in values]
    if log:
        _set_symmetric_log(ax, "y", sizes)
    if all(float(step).is_integer() for step, _ in results):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.axhline(0, color=COLORS["predicted"], linewidth=1)
    ax.set_xlabel(unit)
    ax.set_ylabel("eigenvalue")
    ax.legend(loc="best")
    return ax


def _set_symmetric_log(ax: Axes, axis: str, sizes: Sequence[float]) -> None:
    """Make an axis logarithmic to both sides of zero, linear below the power of ten of the smallest size."""
    known = [size for size in sizes if size and math.isfinite(size)]
    if known:
        least = max(min(known), DECADES * max(known))
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=10 ** math.floor(math.log10(least)))
        labels = {"x": 6, "y": 9}[axis]  # side by side they need more room than one above the other
        getattr(ax, f"{axis}axis").get_major_locator().set_params(numticks=labels)


def _curves(results: Sequence[tuple[float, Any]]) -> list[tuple[str, list[tuple[float, Eigenpair]]]]:
    """Return the colour and the points of each curve: an end, or a place among several eigenvalues from the top."""
    if isinstance(results[0][1], ExtremeResult):
        return [
            (name, [(step, getattr(result, name)) for step, result in results]) for name in reversed(ENDS)
        ]
    most = max(len(result.values) for _, result in results)
    return [
        (
            "measured",
            [
                (at, found.pair(len(found.values) - place))
                for at, found in results
                if len(found.values) >= place
            ],
        )
        for place in range(1, most + 1)
    ]
