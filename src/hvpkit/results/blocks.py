"""Spectra of the diagonal blocks of a Hessian: both ends, trace and density of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvpkit._utils.validation import check_flag
from hvpkit.results.density import Density
from hvpkit.results.drawing import COLORS, WIDTH, styled
from hvpkit.results.eigen import ExtremeResult, Progress
from hvpkit.results.estimate import Estimate, plus_minus
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS, PANEL_HEIGHT = 4, 1.7
"""Panels in a row of a picture, at most, and the height of one in inches. Chosen by feel."""


@dataclass(frozen=True)
class BlocksProgress:
    """Progress of :func:`hvpkit.blocks`: the argument of ``monitor``.

    Attributes:
        num_matvecs: passes over the data so far, which all blocks share.
        seconds: since the first one began.
        num_done: blocks that are done.
        ends: both ends of each block so far, by its name; its ``num_matvecs`` are those of the block.
        seconds_left: infinite: not known.
    """

    num_matvecs: float
    seconds: float
    num_done: int
    ends: dict[str, Progress]
    seconds_left: float = math.inf

    def __str__(self) -> str:
        return f"{self.num_done} of {len(self.ends)} blocks done"


@dataclass(frozen=True, repr=False)
class BlockSpectrum:
    """The spectrum of a diagonal block.

    Attributes:
        name: of the block: of a module, a parameter, or the glob.
        parameters: dotted names of its parameters.
        n: number of its rows.
        extremes: both ends, with their status; vectors are ``[n]``, the parameters in the order of ``parameters``.
        trace: None if it was not asked for.
        density: None if it was not asked for.
    """

    name: str
    parameters: tuple[str, ...]
    n: int
    extremes: ExtremeResult
    trace: Estimate[float] | None
    density: Density | None

    def __repr__(self) -> str:
        ends = f"[{self.extremes.smallest.value:.6g}, {self.extremes.largest.value:.6g}]"
        return f"<BlockSpectrum: {self.name!r}, {self.n} x {self.n}, {ends}, {self.extremes.status}>"


@dataclass(frozen=True, repr=False)
class BlockSpectra(Result):
    """The spectra of the diagonal blocks of a Hessian.

    Attributes:
        blocks: one for each block, in the order of the parameters, or of the globs.
        num_passes: passes over the data that they took together.
        seconds: wall time.
        operator: the whole Hessian, in words.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p["w"]) ** 2 + p["b"] ** 2
        >>> params, data = {"w": torch.zeros(2), "b": torch.tensor(0.0)}, torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> found = hk.blocks(loss_fn, params, data, by="parameter")
        >>> round(found["w"].extremes.largest.value, 3), found.names, found.converged
        (8.0, ('w', 'b'), True)
    """

    blocks: tuple[BlockSpectrum, ...]
    num_passes: int
    seconds: float
    operator: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(block.name for block in self.blocks)

    @property
    def converged(self) -> bool:
        """True if both ends of every block have the accuracy asked for."""
        return all(block.extremes.converged for block in self.blocks)

    @property
    def extremes(self) -> dict[str, ExtremeResult]:
        """Both ends of each block by name, as :func:`hvpkit.plots.layers` takes them."""
        return {block.name: block.extremes for block in self.blocks}

    @property
    def traces(self) -> dict[str, Estimate[float]]:
        """The trace of each block by name, where it was asked for."""
        return {block.name: block.trace for block in self.blocks if block.trace is not None}

    @property
    def densities(self) -> dict[str, Density]:
        """The density of each block by name, where it was asked for."""
        return {block.name: block.density for block in self.blocks if block.density is not None}

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[BlockSpectrum]:
        return iter(self.blocks)

    def __getitem__(self, name: str) -> BlockSpectrum:
        """Return the block of this name.

        Raises:
            KeyError: there is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"no block is named {name!r}; there are {', '.join(self.names)}")

    def __repr__(self) -> str:
        return f"<BlockSpectra: {len(self.blocks)} blocks of {self.operator}, {self.num_passes} passes>"

    def _columns(self) -> Columns:
        """Return a row for each block."""
        ends = ("smallest", "largest")
        pairs = {end: [getattr(block.extremes, end) for block in self.blocks] for end in ends}
        traces = [block.trace for block in self.blocks]
        return {
            "block": list(self.names),
            "rows": [block.n for block in self.blocks],
            **{end: [pair.value for pair in pairs[end]] for end in ends},
            **{
                f"{end}_{name}": [getattr(pair.interval, name) for pair in pairs[end]]
                for end in ends
                for name in ("lower", "upper")
            },
            "trace": [None if trace is None else trace.value for trace in traces],
            "trace_stderr": [None if trace is None else trace.stderr for trace in traces],
            "status": [str(block.extremes.status) for block in self.blocks],
        }

    def summary(self) -> str:
        """Return a table of both ends with intervals, trace and status of each block, and a line of passes and time."""
        heads = ("block", "rows", "smallest", "largest", "trace", "status")
        rows = [
            (
                block.name,
                str(block.n),
                _end(block.extremes, "smallest"),
                _end(block.extremes, "largest"),
                _trace(block.trace),
                str(block.extremes.status),
            )
            for block in self.blocks
        ]
        wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(w) if place == 1 else cell.ljust(w)
                for place, (cell, w) in enumerate(zip(row, wide, strict=True))
            ).rstrip()
            for row in (heads, *rows)
        ]
        close = (
            f"{len(self.blocks)} blocks of {self.operator}: {self.num_passes} passes, {self.seconds:.3g} s"
        )
        return "\n".join([*lines, close])

    @styled
    def plot(self, log: bool = True) -> list[Axes]:
        """Draw the density of each block in a panel of its own, single eigenvalues as spikes; needs ``hvpkit[plots]``.

        Args:
            log: draw the axis of densities logarithmic, from a tenth of what one eigenvalue contributes.

        Returns:
            The axes, one for each block, of one new figure.

        Raises:
            ValueError: there are no densities: call :func:`hvpkit.blocks` with ``density=True``.
            ImportError: matplotlib is not installed.
        """
        from matplotlib import pyplot as plt

        check_flag("log", log)
        densities = self.densities
        if not densities:
            raise ValueError(
                "there are no densities to draw; call hk.blocks(..., density=True), or draw both ends of each block by "
                "hvpkit.plots.layers(found.extremes)"
            )
        columns = min(PANELS, len(densities))
        rows = math.ceil(len(densities) / columns)
        size = (max(WIDTH, WIDTH / 2 * columns), max(2.0, rows) * PANEL_HEIGHT)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        panels: list[Axes] = list(grid.flat)
        for ax, (name, density) in zip(panels, densities.items(), strict=False):
            _panel(ax, name, density, log)
        for ax in panels[len(densities) :]:
            ax.remove()
        figure.supxlabel("eigenvalue", fontsize="medium")
        figure.supylabel("density", fontsize="medium")
        return panels[: len(densities)]


def _panel(ax: Axes, name: str, density: Density, log: bool) -> None:
    """Draw one density without a legend."""
    density = density.resolved()
    values, single, one, bottom = density.values, density.outliers()[0], density.peak, density.floor(log)
    style: Any = {"color": COLORS["measured"], "linewidth": 0}
    ax.fill_between(density.grid, bottom, values.clamp(min=bottom), alpha=0.5, **style)
    ax.plot(density.grid, values, color=COLORS["measured"], linewidth=1.0)
    ax.vlines(single, bottom, one, color=COLORS["single"], linewidth=1.0)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(bottom=bottom)
    ax.set_title(name, fontsize="small")
    ax.tick_params(labelsize="x-small")


def _end(extremes: ExtremeResult, which: str) -> str:
    pair = getattr(extremes, which)
    return f"{pair.value:.5g} in [{pair.interval.lower:.5g}, {pair.interval.upper:.5g}]"


def _trace(trace: Estimate[float] | None) -> str:
    return "" if trace is None else plus_minus(trace.value, trace.stderr, digits=5)
