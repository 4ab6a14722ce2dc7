"""Progress on the terminal: a monitor for the loop."""

from __future__ import annotations

from typing import Any

from hvpkit.results.eigen import Progress
from hvpkit.solvers.driver import Monitor


def progress_bar(**options: Any) -> Monitor:
    """A monitor that shows passes so far and both ends on one line of standard error.

    Args:
        options: for ``tqdm``, as ``disable=True``.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.eye(3))
        >>> ex = hk.extreme_eigenvalues(op, monitor=progress_bar(disable=True))
        >>> round(ex.largest.value, 6)
        1.0
    """
    from tqdm.auto import tqdm

    bars: list[Any] = []  # made at the first entry, so that its clock starts with the solve

    def show(entry: Progress) -> None:
        if not bars:
            bars.append(tqdm(bar_format="{n:g} passes, {elapsed}{postfix}", **options))
        bar = bars[0]
        bar.n = entry.num_matvecs
        bar.set_postfix_str(
            f"smallest {entry.smallest:.4g} ± {entry.smallest_bound:.1g}, "
            f"largest {entry.largest:.4g} ± {entry.largest_bound:.1g}"
        )

    return show
