"""Pictures of linear solves."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from hvpkit._utils.validation import check_type
from hvpkit.plots.style import COLORS, styled
from hvpkit.results.linear import SolveResult


@styled
def residuals(found: SolveResult, *, ax: Axes | None = None) -> Axes:
    """Draw the largest relative residual of a solve, from that of zero on, against passes, and the true one at its end.

    Args:
        found: as of :func:`hvpkit.solve`.
        ax: where to draw.

    Returns:
        The axes, with full-data matvecs against residuals by the recurrence, on a logarithmic scale.

    Raises:
        TypeError: ``found`` is of another type.
        ValueError: it has no history.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))
        >>> hk.plots.residuals(hk.solve(A, torch.ones(3, dtype=torch.float64))).get_yscale()
        'log'
    """
    check_type("found", found, SolveResult, "hvpkit.solve")
    if not found.history:
        raise ValueError(f"found has no history to draw: {found.message}")
    points = [(entry.num_matvecs, entry.residual) for entry in found.history if 0 < entry.residual < math.inf]
    ax = ax or plt.subplots()[1]
    passes, sizes = zip((0.0, 1.0), *points, strict=True)
    ax.plot(passes, sizes, color=COLORS["measured"], label="by the recurrence")
    true = float(torch.as_tensor(found.relative_residual, device="cpu").max())
    if 0 < true < math.inf:
        ax.plot(found.num_matvecs, true, "o", color=COLORS["largest"], label="true")
    ax.set_yscale("log")
    ax.set_xlabel("matvecs over all data")
    ax.set_ylabel("relative residual")
    ax.set_title(str(found.status))
    ax.legend(loc="best")
    return ax
