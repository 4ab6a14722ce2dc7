"""A monitor for people: a bar for each solve, in terminals and notebooks."""

from __future__ import annotations

import math
from typing import Any, cast

from hvpkit.results.eigen import Progress
from hvpkit.solvers.driver import Entry

BAR = "{desc}|{bar}| {elapsed}<{remaining}{postfix}"

WHOLE = "full data"
"""The stage that is not said where it is the only one, so that both ends fit on a line of 80 characters."""


class ProgressBar:
    """A monitor that shows a bar from the begin of a solve to its end.

    Its methods beside the call are those of :mod:`hvpkit._utils.monitoring`.
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._bar = options, cast(Any, None)
        self._reset()

    def _reset(self) -> None:
        self._passes, self._left, self._values = 0.0, math.inf, ""
        self._stage, self._has_stages = WHOLE, False

    def begin(self) -> None:
        """Open a bar. It is over the share of the work that is done, as the number of passes is only estimated."""
        from tqdm.auto import tqdm

        self._reset()
        known = {"total": 1, "bar_format": BAR, "miniters": 0, "smoothing": 0, "dynamic_ncols": True}
        desc = self._options.get("desc")
        self._bar = tqdm(**{**known, **self._options, "desc": f"{desc}: " if desc else None})

    def expect(self, num_passes: float) -> None:
        """Take an estimate of the passes that are left."""
        self._left = num_passes
        self._show()

    def advance(self, num_passes: float, stage: str) -> None:
        """Count a batch."""
        self._passes, self._stage = self._passes + num_passes, stage
        self._has_stages |= stage != WHOLE
        self._left = max(self._left - num_passes, 0.0)
        self._show()

    def __call__(self, entry: Entry) -> None:
        """Take an entry of the history: passes, values, and the time left."""
        if self._bar is None:
            self.begin()
        self._passes, self._values = entry.num_matvecs, _values(entry)
        self._left = entry.seconds_left * entry.num_matvecs / entry.seconds if entry.seconds else math.inf
        if not self._bar.disable:  # a solve that continues began before its bar
            self._bar.start_t = min(self._bar.start_t, self._bar._time() - entry.seconds)
        self._show()

    def end(self) -> None:
        """Close the bar, with the last entry on it."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _show(self) -> None:
        if self._bar is None:
            return
        total = self._passes + self._left
        passes = (
            f"{self._passes:.1f}/{total:.0f} passes" if math.isfinite(total) else f"{self._passes:.1f} passes"
        )
        stage = self._stage if self._has_stages else ""
        text = ", ".join(part for part in (stage, passes, self._values) if part)
        self._bar.set_postfix_str(text, refresh=False)
        share = self._passes / total if math.isfinite(total) and total else 0.0
        self._bar.update(share - self._bar.n)


def progress_bar(**options: Any) -> ProgressBar:
    """Return a monitor that shows a bar for each solve, in a terminal or a notebook.

    On the bar are the time so far and an estimate of the time left, whether a sample or the full data is worked on (if
    there is a sample), passes and those expected, and the values so far. It moves with each batch. One monitor serves
    any number of solves, one after the other, as those of a :class:`hvpkit.train.SpectrumTracker`.

    A monitor of your own is a function of entries of the history. It may have more methods, as this one does:
    ``begin()`` and ``end()`` of a solve, ``advance(num_passes, stage)`` after each batch, with its share of a pass, and
    ``expect(num_passes)``, an estimate of the passes that are left.

    Args:
        options: for ``tqdm``, as ``desc="epoch 3"``, ``leave=False`` or ``disable=None``, which shows bars on
            terminals alone.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.eye(3))
        >>> ex = hk.extreme_eigenvalues(op, monitor=hk.progress_bar(disable=True))
        >>> round(ex.largest.value, 6)
        1.0
    """
    return ProgressBar(**options)


def _values(entry: Entry) -> str:
    """Return the values of an entry, if there are any; both ends in few characters, so that they fit beside a bar."""
    if not isinstance(entry, Progress):
        return f"{entry}"
    if math.isnan(entry.smallest):
        return ""
    ends = (entry.smallest, entry.smallest_bound), (entry.largest, entry.largest_bound)
    return " … ".join(f"{value:.3g} ± {bound:.1g}" for value, bound in ends)
