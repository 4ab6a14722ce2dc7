"""One style and one size for every picture, and what they write of a number."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib import pyplot as plt

from hvpkit.results.eigen import Eigenpair

ENDS = ("smallest", "largest")
COLORS = {
    "smallest": "#3b82d6",
    "largest": "#d1602b",
    "measured": "#2a9068",
    "predicted": "#808080",
    "single": "#a064c8",
}
INK = "#202020"
"""On the coloured ground of a landscape, which is light in either style."""

BELOW: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4, "ncols": 2}
"""Where a legend goes if there is no room inside: under the label of the axis."""

WIDTH, HEIGHT = 6.4, 4.0
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.figsize": (WIDTH, HEIGHT),
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """The function drawing in this style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        plt.draw_if_interactive()  # type: ignore[no-untyped-call] # loads a backend: not inside, or a notebook's is undone
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def in_words(name: str, pair: Eigenpair) -> str:
    """An end with its interval and confidence, in the digits that tell the interval's ends apart: 9 at most, else 6."""
    interval = pair.interval
    lower, upper = interval.lower, interval.upper
    digits = next((d for d in range(4, 10) if f"{lower:.{d}g}" != f"{upper:.{d}g}"), 6)
    sure = f" ({100 * interval.confidence:g} %)" if interval.confidence is not None else ""
    return f"{name} {pair.value:.{digits}g} in [{lower:.{digits}g}, {upper:.{digits}g}]{sure}"
