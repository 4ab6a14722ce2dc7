"""Discrete spectral measures of random vectors: masses at nodes, and smooth curves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 7
"""Widths from its centre at which a Gaussian counts as zero: exp(-24.5) = 2e-11."""

SMOOTHING = 1.5
"""Width of the smoothing, in median distances of neighbouring nodes. Chosen by feel."""

MAX_BRIDGED = 4
"""Neighbouring nodes that the smoothing bridges, at most, where vectors share a basis. Chosen by feel."""


@dataclass(frozen=True)
class Measure:
    """The spectral measures of some start vectors, each vector one unit of mass; float64, on the CPU.

    Attributes:
        nodes: ``[K]``.
        weights: of a quadrature rule for each vector ``[b, K]``.
        masses: nonnegative, for distributions and curves ``[b, K]``; the weights themselves where these are so.
        residual_norms: an eigenvalue lies within this distance of the node ``[K]``; infinite where nothing is known.
    """

    nodes: Tensor
    weights: Tensor
    masses: Tensor
    residual_norms: Tensor


def join(measures: list[Measure]) -> Measure:
    """Join measures into one, nodes ascending."""
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
    """Return ``SMOOTHING`` times the median distance of neighbours that are further apart than ``noise``.

    Where ``num_sharing`` vectors share a basis, as many nodes lie close together with weights that vary, and up to
    ``MAX_BRIDGED`` are bridged.
    """
    gaps = nodes.diff()
    gaps = gaps[gaps > noise]
    if len(gaps):
        width = SMOOTHING * min(num_sharing, MAX_BRIDGED) * float(gaps.median())
        return min(width, float(nodes[-1] - nodes[0]) / 20)
    return 0.01 * (float(nodes.abs().max()) or 1.0)


def smoothed(nodes: Tensor, masses: Tensor, width: float, grid: Tensor) -> Tensor:
    """Return Gaussians of this width at the nodes, on the grid: ``[b, G]`` for masses ``[b, K]``."""
    kernel = torch.exp(-0.5 * ((grid - nodes[:, None]) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
    curves: Tensor = masses @ kernel
    return curves


def grid_around(nodes: Tensor, width: float) -> Tensor:
    """Return points wherever Gaussians at the nodes are not zero, four to a width."""
    steps = torch.arange(-4 * REACH, 4 * REACH + 1, dtype=torch.float64)
    places: Tensor = torch.unique((nodes[:, None] / width * 4).round() + steps)
    return places * (width / 4)
