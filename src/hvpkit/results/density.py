"""Spectral densities: quadrature nodes and weights, and the smooth curve of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.validation import check_function, check_number
from hvpkit.results.drawing import BELOW, COLORS, ENDS, in_words, styled
from hvpkit.results.eigen import Eigenpair, ExtremeResult, Progress, Status
from hvpkit.results.estimate import Estimate, as_floats, mean_of
from hvpkit.results.saving import Result
from hvpkit.results.spectral_measure import grid_around, smoothed
from hvpkit.results.tables import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTLIER_GAP, OUTLIER_MASS = 3.0, 0.1
"""An outlier's cluster is this many widths from the next node at least, and has less than this share of the mass.
Chosen by feel."""

RESOLUTION = 200
"""Widths that a picture resolves, at least: eigenvalues that are nearer than that are drawn as one curve, and not as a
comb. Chosen by feel."""


@dataclass(frozen=True, repr=False)
class Density(Result):
    r"""The density of an operator's eigenvalues, one in all: :math:`\frac1n \sum_i \delta(\lambda - \lambda_i)`.

    All tensors are float64 on the CPU.

    Attributes:
        grid: ascending ``[G]``; dense wherever the density is not zero, and only there.
        values: the density on the grid: each node's mass as a Gaussian of ``width``.
        stderr: standard error of the values over probes; infinite for one probe.
        nodes: of the quadrature rule, ascending ``[K]``.
        probe_weights: weights of each probe's rule ``[num_probes, K]``.
        probe_masses: the nonnegative masses that the curve and :meth:`cdf` use ``[num_probes, K]``.
        residual_norms: an eigenvalue lies within this distance of the node ``[K]``; infinite where unknown.
        deflated_weights: the weights, exact at converged single eigenvalues, that :meth:`expectation` uses
            ``[num_probes, K]``.
        n: number of eigenvalues.
        width: standard deviation of the smoothing.
        noise: rounding error of eigenvalues: a smaller one may be zero.
        share: dimension of the probes' span over n, 1 where the spectrum is exact: the finite-population correction.
        method: ``"lanczos"`` or ``"chebyshev"``.
        num_matvecs: full-data matvecs spent.
        seconds: wall time.
        status: why it stopped.
        message: the status in words.
        history: both ends against passes, one entry for each assessment.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    nodes: Tensor
    probe_weights: Tensor
    probe_masses: Tensor
    residual_norms: Tensor
    deflated_weights: Tensor
    n: int
    width: float
    noise: float
    share: float
    method: str
    num_matvecs: float
    seconds: float
    status: Status
    message: str
    history: tuple[Progress, ...]

    @property
    def weights(self) -> Tensor:
        """Quadrature weights ``[K]``, the mean over probes; they add up to one."""
        return self.probe_weights.mean(dim=0)

    @property
    def masses(self) -> Tensor:
        """Masses ``[K]``, the mean over probes, none negative; they add up to one."""
        return self.probe_masses.mean(dim=0)

    def __repr__(self) -> str:
        ends = f"[{self.nodes[0]:.6g}, {self.nodes[-1]:.6g}]" if len(self.nodes) else "nothing"
        return f"<Density: {ends}, {len(self.probe_weights)} probes, {self.status}, {self.num_matvecs:g} products>"

    def cdf(self, x: Tensor | float) -> Tensor:
        """Return the share of eigenvalues up to ``x``: a step at each node; NaN if nothing was measured."""
        if not isinstance(x, Tensor):
            check_number("x", x)
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        if not len(self.nodes):
            return torch.full_like(points, torch.nan)
        below = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), self.masses.cumsum(dim=0)])
        return below[torch.searchsorted(self.nodes, points, right=True)]

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate[float]:
        r"""Return the mean of a function over all eigenvalues, :math:`\frac1n \operatorname{tr} f(A)`.

        n times it is the trace of a function: of :math:`\log(\lambda + \delta)` the log-determinant of a shifted
        operator, of :math:`\lambda / (\lambda + \delta)` its effective dimension, of ``(a < x) & (x <= b)`` the
        number of eigenvalues in an interval.

        Where probes share a basis, as by default two or more do, converged single eigenvalues count with their exact
        share 1/n instead of their random weights (:func:`hvpkit.results.spectral_measure.deflate`): on 168 matrices
        with up to six outliers that makes errors of means and second moments five to ten times smaller.

        Args:
            f: from nodes ``[K]`` to values ``[K]``.

        Returns:
            The mean, with its standard error over probes (infinite for one probe). This leaves out the quadrature
            error, which falls with ``num_steps``: fast for smooth functions, as its inverse for step functions.

        Raises:
            TypeError: ``f`` returns complex numbers.
            ValueError: ``f`` returns another shape, NaN or infinity.

        Example:
            >>> import torch, hvpkit as hk
            >>> op = hk.aslinearoperator(torch.diag(torch.linspace(1, 3, 500, dtype=torch.float64)))
            >>> d = hk.spectral_density(op, num_steps=20, num_probes=10)
            >>> log_determinant, exact = op.n * d.expectation(torch.log).value, torch.linspace(1, 3, 500).log().sum()
            >>> abs(log_determinant / exact - 1) < 0.05
            tensor(True)
        """
        check_function("f", f, "f(nodes)", 1)
        values = torch.as_tensor(f(self.nodes.clone()), device="cpu")
        if values.is_complex():
            raise TypeError(
                "f must return real numbers, got complex ones; take its real and imaginary part apart"
            )
        values = values.to("cpu", torch.float64)
        if values.shape != self.nodes.shape:
            raise ValueError(
                f"f must return a tensor of shape {list(self.nodes.shape)}, got {list(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            where = self.nodes[~torch.isfinite(values)][0]
            raise ValueError(
                f"f gave NaN or infinity at {where:.6g}; shift it, or keep it out by torch.where"
            )
        return as_floats(self.integrate(values))

    def integrate(self, values: Tensor) -> Estimate[Tensor]:
        """Return the mean over all eigenvalues of a function with these values ``[K, ...]`` at the nodes."""
        if not isinstance(values, Tensor) or values.shape[:1] != self.nodes.shape:
            given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"values must be a tensor of shape [{len(self.nodes)}, ...], one for each node; got {given}"
            )
        found = mean_of(self.deflated_weights @ values, self.share)
        rest = len(found.samples), self.num_matvecs, self.seconds, self.status, self.message, self.history
        return Estimate(found.value, found.stderr, found.samples, *rest)

    def outliers(self) -> tuple[Tensor, Tensor]:
        """Return isolated eigenvalues and their masses: both ``[q]``, ascending by eigenvalue.

        Nodes nearer to each other than ``OUTLIER_GAP`` widths form a cluster. A cluster that is no wider than one
        width, has converged to within one, and holds less than ``OUTLIER_MASS`` of the mass is an outlier; a
        multiple eigenvalue is one.
        """
        if not len(self.nodes):
            return self.nodes, self.nodes
        ends = (self.nodes.diff() > OUTLIER_GAP * self.width).nonzero().flatten() + 1
        clusters = torch.arange(len(self.nodes), device="cpu").tensor_split(ends)
        masses = torch.stack([self.masses[c].sum() for c in clusters])
        found = [
            place
            for place, c in enumerate(clusters)
            if masses[place] < OUTLIER_MASS
            and self.nodes[c[-1]] - self.nodes[c[0]] <= self.width
            and self.residual_norms[c].max() <= self.width
        ]
        centers = [(self.nodes[clusters[i]] * self.masses[clusters[i]]).sum() / masses[i] for i in found]
        return torch.stack([*centers, self.nodes[0]])[:-1], masses[found]

    def log_density(self, *, width: float = 0.1, num_points: int = 401) -> tuple[Tensor, Tensor, Tensor]:
        """Return the density per decade of magnitude, for spectra over many decades (Papyan, JMLR 21 (2020) 252).

        Args:
            width: standard deviation of the Gaussians, in decades.
            num_points: points of the grid.

        Returns:
            A geometric grid of magnitudes ``[num_points]``, and on it the density of positive and of negative
            eigenvalues. Magnitudes up to ``noise`` are left out; those below the resolution of the method lie in lumps.

        Raises:
            ValueError: every node is zero to rounding.
        """
        sizes = self.nodes.abs()
        seen = sizes > self.noise
        logs = sizes[seen].log10()
        if not len(logs):
            raise ValueError(
                "the density has no eigenvalue that is not zero to rounding, and so no logarithms"
            )
        grid = torch.linspace(
            float(logs.min()) - 4 * width,
            float(logs.max()) + 4 * width,
            num_points,
            dtype=torch.float64,
            device="cpu",
        )
        masses, positive = self.masses[seen], self.nodes[seen] > 0
        both = torch.stack([masses * positive, masses * ~positive])
        up, down = smoothed(logs, both, width, grid)
        return 10**grid, up, down

    @property
    def peak(self) -> float:
        """Height of the curve of one eigenvalue."""
        return 1 / (self.n * self.width * math.sqrt(2 * math.pi)) if self.width else 1.0

    def floor(self, log: bool) -> float:
        """Return where a picture's axis of densities begins: a tenth of what one eigenvalue contributes, or zero."""
        if not log:
            return 0.0
        return 0.1 * min(self.peak, float(self.values.max())) if len(self.values) else self.peak

    def resolved(self, span: float | None = None) -> Density:
        """Return the density as a picture of this span shows it, by default the whole: no finer than it resolves."""
        if span is None:
            span = float(self.nodes[-1] - self.nodes[0]) if len(self.nodes) else 0.0
        width = span / RESOLUTION
        if width <= self.width:
            return self
        grid = grid_around(self.nodes, width)
        curve = mean_of(smoothed(self.nodes, self.probe_masses, width, grid), self.share)
        return replace(self, grid=grid, values=curve.value, stderr=curve.stderr, width=width)

    @styled
    def plot(
        self, ax: Axes | None = None, log: bool = True, *, extremes: ExtremeResult | None = None
    ) -> Axes:
        """Draw the curve with a band of one standard error, outliers as spikes, and both ends; needs ``hvpkit[plots]``.

        Where the smoothing is narrower than a picture of the whole spectrum resolves, the curve is a smoother one than
        ``values``, and eigenvalues that are isolated at that resolution are spikes.

        Args:
            ax: where to draw. Limits that its x-axis has been given are kept, and then the resolution is theirs.
            log: draw the density's axis logarithmic, from a tenth of what one eigenvalue contributes.
            extremes: both ends with their intervals, in place of the density's own ends.

        Returns:
            The axes, with eigenvalues against their density.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib import pyplot as plt

        ax = ax or plt.subplots()[1]
        left, right = ax.get_xlim()
        drawn = self.resolved(None if ax.get_autoscalex_on() else abs(right - left))
        values, outliers, one, bottom = drawn.values, drawn.outliers()[0], drawn.peak, drawn.floor(log)
        if bool(torch.isfinite(drawn.stderr).all()):
            low, high = (values - drawn.stderr).clamp(min=bottom), values + drawn.stderr
            style: Any = {"color": COLORS["measured"], "alpha": 0.3, "linewidth": 0}
            ax.fill_between(drawn.grid, low, high, label="standard error", **style)
        ax.plot(drawn.grid, values, color=COLORS["measured"], label="density")
        if len(outliers):
            ax.vlines(outliers, bottom, one, color=COLORS["single"], label="single eigenvalues")
        known = self.nodes[torch.isfinite(self.residual_norms)]
        if extremes is not None:
            for name in ENDS:
                _mark(ax, name, getattr(extremes, name))
        elif len(known):
            for name, end in zip(ENDS, known[[0, -1]].tolist(), strict=True):
                ax.axvline(end, color=COLORS[name], linestyle=":", linewidth=1.2, label=f"{name} {end:.4g}")
        if log:
            ax.set_yscale("log")
            ax.set_ylim(bottom=bottom)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        ax.legend(**BELOW)
        return ax

    def _columns(self) -> Columns:
        return {
            "node": self.nodes.tolist(),
            "weight": self.weights.tolist(),
            "mass": self.masses.tolist(),
            "residual_norm": self.residual_norms.tolist(),
        }


def _mark(ax: Axes, name: str, pair: Eigenpair) -> None:
    """Draw an end as a vertical line, with its interval as a band."""
    lower, upper = pair.interval.lower, pair.interval.upper
    if not math.isfinite(pair.value):
        return
    ax.axvline(pair.value, color=COLORS[name], linestyle=":", linewidth=1.2, label=in_words(name, pair))
    if math.isfinite(lower) and math.isfinite(upper):
        ax.axvspan(lower, upper, color=COLORS[name], alpha=0.3, linewidth=0)
