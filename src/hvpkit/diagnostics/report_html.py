"""A report of the results for one operator: one page in one HTML file."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvpkit._utils.files import atomic_write, check_file
from hvpkit._utils.validation import check_type
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.operators.base import LinearOperator
from hvpkit.results.density import Density
from hvpkit.results.eigen import ExtremeResult
from hvpkit.results.estimate import Estimate, plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Sequence[str]


class Table(NamedTuple):
    """A table of the page; without a header row, the first cell of each row is a header."""

    caption: str
    header: Row | None
    rows: Sequence[Row]


class Picture(NamedTuple):
    """A picture of the page, as inline SVG without ``<svg``, to which the page adds the caption as a label."""

    caption: str
    svg: str


def report(
    H: LinearOperator,
    ex: ExtremeResult,
    density: Density | None = None,
    *,
    layers: Mapping[str, ExtremeResult | Estimate[float]] | None = None,
    training: Sequence[tuple[float, ExtremeResult]] | None = None,
    landscape: bool = False,
    title: str = "Extreme eigenvalues",
    path: str | os.PathLike[str] = "hvpkit-report.html",
) -> Path:
    """Write tables and pictures of the results to one self-contained HTML file, for light and dark screens.

    Args:
        H: the operator.
        ex: its extreme eigenvalues.
        density: its spectral density.
        layers: results by name of the layer, as for :func:`hvpkit.plots.layers`.
        training: pairs of a step and a result, as for :func:`hvpkit.plots.training`.
        landscape: also draw the loss on the plane of both eigenvectors, if ``H`` was made of a loss.
        title: of the page.
        path: the file; an existing one is replaced, completely or not at all.

    Returns:
        The path.

    Raises:
        ValueError: ``ex`` or ``density`` is of an operator of another size; the file cannot be written.
        ImportError: matplotlib is missing.

    Cost:
        Nothing but drawing for an operator without a loss. Else the loss along both eigenvectors, about 110 forward
        passes over the data, as much as a dozen products; its landscape is 280 more.

    Example:
        >>> import tempfile, torch, hvpkit as hk
        >>> H = hk.aslinearoperator(torch.diag(torch.tensor([-0.5, 1.0, 2.0, 100.0], dtype=torch.float64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report(H, hk.extreme_eigenvalues(H), path=f"{folder}/report.html")
        ...     "-0.5" in path.read_text(encoding="utf-8")
        True
    """
    check_type("H", H, LinearOperator, "hvpkit.hessian")
    check_type("ex", ex, ExtremeResult, "hvpkit.extreme_eigenvalues")
    if density is not None:
        check_type("density", density, Density, "hvpkit.spectral_density")
    target = check_file("path", path)
    if ex.smallest.vector.shape != (H.n,):
        raise ValueError(f"ex is of an operator with n = {len(ex.smallest.vector)}, H has n = {H.n}")
    if density is not None and density.n != H.n:
        raise ValueError(f"density is of an operator with n = {density.n}, H has n = {H.n}")
    tables = [Table("Both ends", *_ends(ex)), Table("How it went", None, _run(H, ex))]
    if density is not None:
        tables.append(Table("Spectral density", None, _spectrum(density)))
    if layers:
        tables.append(Table("Layers", *_layers(layers)))
    pictures = _pictures(H, ex, density, layers, training, landscape)
    with atomic_write(target) as draft:
        draft.write_text(_page(title, tables, pictures), encoding="utf-8")
    return target


def _page(title: str, tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    from jinja2 import Environment, PackageLoader  # slow to import

    pages = Environment(loader=PackageLoader("hvpkit", "diagnostics"), autoescape=True)
    return pages.get_template("report.html.jinja").render(title=title, tables=tables, pictures=pictures)


def _ends(ex: ExtremeResult) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name in ("smallest", "largest"):
        pair = getattr(ex, name)
        interval = pair.interval
        sure = "" if interval.confidence is None else f", {100 * interval.confidence:g} %"
        where = f"[{interval.lower:.8g}, {interval.upper:.8g}]"
        errors = f"{pair.error_bound:.3g}", f"{pair.residual_norm:.3g}"
        rows.append((name, f"{pair.value:.8g}", where, f"{interval.kind}{sure}", *errors))
    return ("end", "eigenvalue", "interval", "rests on", "error bound", "residual norm"), rows


def _run(H: LinearOperator, ex: ExtremeResult) -> list[Row]:
    rows: list[Row] = [
        ("operator", ex.operator),
        ("status", f"{ex.status}: {ex.message}"),
        ("relative error asked for", f"{ex.tol:g}"),
        ("passes over the data", f"{ex.num_matvecs:g}"),
        ("seconds", f"{ex.seconds:.3g}"),
        ("parameters", f"{H.n:,}"),
    ]
    if isinstance(H, CurvatureOperator):
        rows.append(("examples", f"{H.num_examples:,}"))
        if H.mode_reason is not None:
            rows.append(("derivatives", H.mode_reason))
    return rows


def _spectrum(d: Density) -> list[Row]:
    mean = d.expectation(lambda eigenvalues: eigenvalues)
    single = ", ".join(f"{value:.5g}" for value in d.outliers()[0].tolist())
    return [
        ("method", f"{d.method}, {len(d.probe_weights)} probes"),
        ("status", f"{d.status}: {d.message}"),
        ("passes over the data", f"{d.num_matvecs:g}"),
        ("trace", f"{plus_minus(d.n * mean.value, d.n * mean.stderr, digits=5)} (standard error)"),
        ("single eigenvalues", single or "none"),
    ]


def _layers(layers: Mapping[str, ExtremeResult | Estimate[float]]) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name, result in layers.items():
        if isinstance(result, Estimate):
            rows.append((name, f"{result.value:.6g}", f"{result.stderr:.2g}", str(result.status)))
        else:
            rows.append(
                (name, f"{result.smallest.value:.6g}", f"{result.largest.value:.6g}", str(result.status))
            )
    estimated = any(isinstance(result, Estimate) for result in layers.values())
    return ("layer", *(("trace", "standard error") if estimated else ("smallest", "largest")), "status"), rows


def _pictures(
    H: LinearOperator,
    ex: ExtremeResult,
    density: Density | None,
    layers: Mapping[str, ExtremeResult | Estimate[float]] | None,
    training: Sequence[tuple[float, ExtremeResult]] | None,
    landscape: bool,
) -> list[Picture]:
    """Draw all pictures that the results allow."""
    from hvpkit import plots  # matplotlib is an extra

    figures: list[Picture] = []

    def add(caption: str, draw: Callable[..., Axes], height: float = plots.HEIGHT) -> None:
        figures.append(_figure(f"p{len(figures)}", caption, draw, height))

    if density is not None:
        add("The spectral density, with both ends", partial(plots.density, density, extremes=ex))
    found = all(math.isfinite(pair.value) for pair in (ex.smallest, ex.largest))
    if found and ex.history:
        add("Both ends as they were found", partial(plots.convergence, ex))
    if found and isinstance(H, CurvatureOperator) and H.origin is not None:
        point = H.origin.loss_fn, H.origin.params, H.origin.data
        for name, pair in (("smallest", ex.smallest), ("largest", ex.largest)):
            caption = f"The loss along the eigenvector of the {name} eigenvalue"
            add(caption, partial(plots.loss_along_eigenvector, *point, pair))
        if landscape:
            add("The loss on the plane of both", partial(plots.loss_landscape, *point, ex))
    if layers:
        add("Layers", partial(plots.layers, layers), plots.layers_height(len(layers)))
    if training:
        add("Both ends over training", partial(plots.training, training))
    return figures


def _figure(prefix: str, caption: str, draw: Callable[..., Axes], height: float) -> Picture:
    """Return a picture as inline SVG in the page's text colour; its ids begin with ``prefix``."""
    import matplotlib.style
    from matplotlib.figure import Figure

    from hvpkit.plots.style import STYLE

    # text as text, and the same file every time
    settings: Any = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": "hvpkit"}
    with matplotlib.style.context("default"), matplotlib.rc_context(settings):
        figure = Figure()
        figure.set_figheight(height)
        draw(ax=figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg).replace("#000000", "currentColor")
    return Picture(caption, svg.removeprefix("<svg"))
