"""What random vectors see of a spectrum: masses at nodes, and curves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit.results.eigen import Progress, Status

REACH = 7
"""Widths of a Gaussian after which it counts as zero."""


@dataclass(frozen=True)
class Measure:
    """What some start vectors see of the spectrum, each vector one unit of mass; float64, on the CPU.

    Attributes:
        nodes: ``[K]``.
        weights: of a quadrature rule for each vector ``[b, K]``.
        masses: not negative, for distributions and curves ``[b, K]``; the weights themselves where these are so.
        residual_norms: an eigenvalue lies within so much of the node ``[K]``; infinite where nothing is known.
    """

    nodes: Tensor
    weights: Tensor
    masses: Tensor
    residual_norms: Tensor


@dataclass(frozen=True)
class Measured:
    """What a method found.

    Attributes:
        measures: of its groups of vectors.
        num_matvecs: full-data matvecs spent.
        status: why it stopped.
        message: the status in words.
        seconds: wall time.
        history: one entry for each assessment.
    """

    measures: list[Measure]
    num_matvecs: float
    status: Status
    message: str
    seconds: float = 0.0
    history: tuple[Progress, ...] = ()


def join(measures: list[Measure]) -> Measure:
    """All of them as one, nodes ascending."""
    if not measures:
        nothing = torch.empty(0, 0, dtype=torch.float64)
        return Measure(nothing[0:0].flatten(), nothing, nothing, nothing.flatten())
    order = torch.argsort(torch.cat([m.nodes for m in measures]), stable=True)
    return Measure(
        torch.cat([m.nodes for m in measures])[order],
        torch.block_diag(*(m.weights for m in measures))[:, order],
        torch.block_diag(*(m.masses for m in measures))[:, order],
        torch.cat([m.residual_norms for m in measures])[order],
    )


def smoothing_width(nodes: Tensor, noise: float, num_sharing: int) -> float:
    """One and a half times the median distance of neighbours that are further apart than ``noise``.

    Where vectors share a basis, as many nodes lie close together with weights that vary, and up to four are bridged.
    """
    gaps = nodes.diff()
    gaps = gaps[gaps > noise]
    if len(gaps):
        return min(1.5 * min(num_sharing, 4) * float(gaps.median()), float(nodes[-1] - nodes[0]) / 20)
    return 0.01 * (float(nodes.abs().max()) or 1.0)


def smoothed(nodes: Tensor, masses: Tensor, width: float, grid: Tensor) -> Tensor:
    """Gaussians of this width at the nodes, on the grid: ``[b, G]`` for masses ``[b, K]``."""
    kernel = torch.exp(-0.5 * ((grid - nodes[:, None]) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
    curves: Tensor = masses @ kernel
    return curves


def grid_around(nodes: Tensor, width: float) -> Tensor:
    """Points wherever Gaussians at the nodes are not zero, four to a width."""
    steps = torch.arange(-4 * REACH, 4 * REACH + 1, dtype=torch.float64)
    places: Tensor = torch.unique((nodes[:, None] / width * 4).round() + steps)
    return places * (width / 4)
