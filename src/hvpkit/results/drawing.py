"""One style and one size for every picture, and how they label a number. Imports matplotlib only when drawing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from hvpkit.results.eigen import Eigenpair

NO_MATPLOTLIB = "pictures need matplotlib: pip install 'hvpkit[plots]'"

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
"""Place of a legend that has no room inside: below the label of the axis."""

WIDTH, HEIGHT = 6.4, 4.0
"""Size of a picture, in inches."""

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
    """Make a function draw in this style.

    Raises:
        ImportError: on call, if matplotlib is not installed.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(NO_MATPLOTLIB) from error
        from matplotlib import pyplot as plt

        plt.draw_if_interactive()  # type: ignore[no-untyped-call] # loads a backend: not inside, or a notebook's is undone
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def in_words(name: str, pair: Eigenpair) -> str:
    """Label an end with its interval and confidence, in the 4 to 9 digits that separate the interval's ends, else 6."""
    interval = pair.interval
    lower, upper = interval.lower, interval.upper
    digits = next((d for d in range(4, 10) if f"{lower:.{d}g}" != f"{upper:.{d}g}"), 6)
    sure = f" ({100 * interval.confidence:g} %)" if interval.confidence is not None else ""
    return f"{name} {pair.value:.{digits}g} in [{lower:.{digits}g}, {upper:.{digits}g}]{sure}"
