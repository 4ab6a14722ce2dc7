"""Discrete spectral measures of random vectors: masses at nodes, and smooth curves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 7
"""Widths from its centre at which a Gaussian counts as zero: exp(-24.5) = 2e-11."""

SMOOTHING = 1.5
"""Width of the smoothing, in median distances of neighbouring nodes. Chosen by feel."""

CONVERGED = 0.01
"""Residual norm of a converged Ritz pair over its distance to other nodes: a bound of the sine of its angle to the
eigenvector, the square of which is the relative error in :func:`deflate`. Chosen by feel."""

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
        deflated: the weights, exact at converged single eigenvalues ``[b, K]``: see :func:`deflate`.
    """

    nodes: Tensor
    weights: Tensor
    masses: Tensor
    residual_norms: Tensor
    deflated: Tensor


def join(measures: list[Measure]) -> Measure:
    """Join measures into one, nodes ascending."""
    if not measures:
        nothing = torch.empty(0, 0, dtype=torch.float64, device="cpu")
        return Measure(nothing.flatten(), nothing, nothing, nothing.flatten(), nothing)
    order = torch.argsort(torch.cat([m.nodes for m in measures]), stable=True)
    return Measure(
        torch.cat([m.nodes for m in measures])[order],
        torch.block_diag(*(m.weights for m in measures))[:, order],
        torch.block_diag(*(m.masses for m in measures))[:, order],
        torch.cat([m.residual_norms for m in measures])[order],
        torch.block_diag(*(m.deflated for m in measures))[:, order],
    )


def deflate(nodes: Tensor, weights: Tensor, residual_norms: Tensor, n: int, noise: float) -> Tensor:
    r"""Return the weights ``[b, K]`` with the share 1/n, without chance, at each converged eigenvalue.

    The weight of a random vector at an eigenvalue has the mean 1/n and a standard deviation of :math:`\sqrt 2 / n`, and
    that of an outlier may dominate all others. Where Ritz vectors have converged, the trace splits into that over
    them, which is known, and that over their complement, in which the rest of a random vector is uniform:

    .. math:: \operatorname{tr} f(A) = \sum_{j \le q} f(\theta_j) + (n - q)\,
              E\, \frac{\sum_{j > q} w_j f(\theta_j)}{\sum_{j > q} w_j}.

    Nodes whose residual intervals overlap form a cluster. It has converged if its residuals are at most ``CONVERGED``
    of its distance to other nodes. A Krylov space of b vectors has no more than b copies of a multiple eigenvalue:
    clusters of b nodes may have further ones, and are left as they are; of a single vector, so are all.
    """
    ends = (nodes.diff() > residual_norms[1:] + residual_norms[:-1] + noise).nonzero().flatten() + 1
    known = torch.zeros(len(nodes), dtype=torch.bool, device="cpu")
    for cluster in torch.arange(len(nodes), device="cpu").tensor_split(ends):
        first, last = int(cluster[0]), int(cluster[-1])
        outside = torch.cat([nodes[first] - nodes[:first], nodes[last + 1 :] - nodes[last]])
        apart = bool(len(outside)) and residual_norms[cluster].max() <= CONVERGED * outside.min()
        known[cluster] = bool(apart) and len(cluster) < len(weights)
    rest, num_rest = weights[:, ~known].sum(dim=1, keepdim=True), n - int(known.sum())
    if not bool(known.any()) or num_rest <= 0 or not bool((rest > 0).all()):
        return weights
    return torch.where(known, 1 / n, weights * (num_rest / n) / rest)


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
    steps = torch.arange(-4 * REACH, 4 * REACH + 1, dtype=torch.float64, device="cpu")
    places: Tensor = torch.unique((nodes[:, None] / width * 4).round() + steps)
    return places * (width / 4)
