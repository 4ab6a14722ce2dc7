"""A spectral density: quadrature nodes and weights, and the curve that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.files import written_whole
from hvpkit.estimators.estimate import Estimate, Mean, mean_of
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.results.spectral_measure import Measured, grid_around, join, smoothed, smoothing_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MESSAGES = {
    Status.INVARIANT_SUBSPACE: "every column was multiplied: the spectrum is exact to rounding",
    Status.COMPLETED: "all samples that were asked for are taken; a density has no accuracy to converge to",
    Status.MAX_MATVECS: "the budget ended before the last samples, as others had to be taken again on a wider interval",
    Status.TIME_LIMIT: "the time limit is reached; the density is from the products before it",
    Status.NON_FINITE: "a product gave NaN or infinity; the density is from the products before it",
}


@dataclass(frozen=True, repr=False)
class Density:
    r"""The density of an operator's eigenvalues, one in all: :math:`\frac1n \sum_i \delta(\lambda - \lambda_i)`.

    All tensors are float64 on the CPU.

    Attributes:
        grid: ascending ``[G]``; dense wherever there is something, and only there.
        values: the density on the grid: each node's mass as a Gaussian of ``width``.
        stderr: of the values, over probes; infinite for one probe.
        nodes: of the quadrature rule, ascending ``[K]``.
        probe_weights: weights of each probe's rule ``[num_probes, K]``.
        probe_masses: the same, none negative, as the curve and :meth:`cdf` take them ``[num_probes, K]``.
        residual_norms: an eigenvalue lies within so much of the node ``[K]``; infinite where nothing is known.
        n: how many eigenvalues there are.
        width: of the smoothing.
        noise: rounding of the products: an eigenvalue that is smaller may be zero.
        share: of all directions that there are, those that the probes took: 1 where the spectrum is exact.
        method: which made it.
        num_matvecs: full-data products spent.
        seconds: wall time.
        status: why it stopped.
        message: the status in words.
        history: both ends against passes, one entry a look.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    nodes: Tensor
    probe_weights: Tensor
    probe_masses: Tensor
    residual_norms: Tensor
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
        """The share of eigenvalues up to ``x``: a step at each node; NaN if nothing was measured."""
        points = torch.as_tensor(x, dtype=torch.float64)
        if not len(self.nodes):
            return torch.full_like(points, torch.nan)
        below = torch.cat([torch.zeros(1, dtype=torch.float64), self.masses.cumsum(dim=0)])
        return below[torch.searchsorted(self.nodes, points, right=True)]

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate[float]:
        r"""The mean of a function over all eigenvalues, :math:`\frac1n \operatorname{tr} f(A)`.

        n times it is the trace of a function: of :math:`\log(\lambda + \delta)` the log-determinant of a shifted
        operator, of :math:`\lambda / (\lambda + \delta)` its effective dimension, of ``(a < x) & (x <= b)`` the
        number of eigenvalues in an interval.

        Args:
            f: from nodes ``[K]`` to values ``[K]``.

        Returns:
            The mean, with its standard error over probes (infinite for one probe), which does not know the error of
            the quadrature: that falls with ``num_steps``, fast for smooth functions, as its inverse for steps.

        Raises:
            ValueError: ``f`` returns another shape, NaN or infinity.

        Example:
            >>> import torch, hvpkit as hk
            >>> op = hk.aslinearoperator(torch.diag(torch.linspace(1, 3, 500, dtype=torch.float64)))
            >>> d = hk.spectral_density(op, num_steps=20, num_probes=10)
            >>> log_determinant, exact = op.n * d.expectation(torch.log).value, torch.linspace(1, 3, 500).log().sum()
            >>> abs(log_determinant / exact - 1) < 0.05
            tensor(True)
        """
        values = torch.as_tensor(f(self.nodes)).to("cpu", torch.float64)
        if values.shape != self.nodes.shape:
            raise ValueError(
                f"f must return a tensor of shape {list(self.nodes.shape)}, got {list(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            where = self.nodes[~torch.isfinite(values)][0]
            raise ValueError(
                f"f gave NaN or infinity at {where:.6g}; shift it, or keep it out by torch.where"
            )
        return self.estimate(mean_of(self.probe_weights @ values, self.share))

    def estimate(self, mean: Mean) -> Estimate[float]:
        """A mean over the probes as an estimate."""
        rest = len(mean.samples), self.num_matvecs, self.seconds, self.status, self.message, self.history
        return Estimate(float(mean.value), float(mean.stderr), mean.samples, *rest)

    def outliers(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that stand apart from all others, and their masses: both ``[q]``, ascending by eigenvalue.

        Nodes form clusters where they are nearer to each other than three widths. A cluster that is no wider than a
        width, has converged to within one, and holds less than a tenth of the mass is an outlier; a multiple
        eigenvalue is one.
        """
        if not len(self.nodes):
            return self.nodes, self.nodes
        ends = (self.nodes.diff() > 3 * self.width).nonzero().flatten() + 1
        clusters = torch.arange(len(self.nodes)).tensor_split(ends)
        masses = torch.stack([self.masses[c].sum() for c in clusters])
        found = [
            place
            for place, c in enumerate(clusters)
            if masses[place] < 0.1
            and self.nodes[c[-1]] - self.nodes[c[0]] <= self.width
            and self.residual_norms[c].max() <= self.width
        ]
        centers = [(self.nodes[clusters[i]] * self.masses[clusters[i]]).sum() / masses[i] for i in found]
        return torch.stack([*centers, self.nodes[0]])[:-1], masses[found]

    def log_density(self, *, width: float = 0.1, num_points: int = 401) -> tuple[Tensor, Tensor, Tensor]:
        """The density per decade of size, for spectra over many decades (Papyan, JMLR 21 (2020) 252).

        Args:
            width: of the Gaussians, in decades.
            num_points: of the grid.

        Returns:
            A geometric grid of sizes ``[num_points]``, and on it the density of positive and of negative eigenvalues.
            Sizes up to ``noise`` are left out; sizes below the resolution of the method lie in lumps.

        Raises:
            ValueError: there are no others.
        """
        sizes = self.nodes.abs()
        seen = sizes > self.noise
        logs = sizes[seen].log10()
        if not len(logs):
            raise ValueError(
                "the density has no eigenvalue that is not zero to rounding, and so no logarithms"
            )
        grid = torch.linspace(
            float(logs.min()) - 4 * width, float(logs.max()) + 4 * width, num_points, dtype=torch.float64
        )
        masses, positive = self.masses[seen], self.nodes[seen] > 0
        both = torch.stack([masses * positive, masses * ~positive])
        up, down = smoothed(logs, both, width, grid)
        return 10**grid, up, down

    def plot(self, ax: Axes | None = None, log: bool = True) -> Axes:
        """Draws the curve, outliers as spikes, and the two ends; needs ``hvpkit[plots]``.

        Args:
            ax: where to draw.
            log: whether the density's axis is logarithmic.
        """
        plots: Any = import_module("hvpkit.plots")  # by name: pictures lie above estimators
        axes: Axes = plots.density(self, ax=ax, log=log)
        return axes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the density to a file of NumPy's ``.npz`` format, whole or not at all."""
        import numpy as np

        target = Path(path)
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays |= {name: value.numpy() for name, value in arrays.items() if isinstance(value, Tensor)}
        arrays["status"] = str(self.status)
        arrays["history"] = np.array([astuple(entry) for entry in self.history]).reshape(
            -1, len(fields(Progress))
        )
        with written_whole(target) as draft, open(draft, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Density:
        """The density that :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        import numpy as np

        names = [field.name for field in fields(cls)]
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) != set(names):
                raise ValueError(f"path: {os.fspath(path)} is not a density that Density.save wrote")
            found: dict[str, Any] = {
                name: torch.from_numpy(file[name]) if file[name].ndim else file[name].item() for name in names
            }
        found["status"] = Status(found["status"])
        columns = [field.name for field in fields(Progress)]
        entries = [dict(zip(columns, row, strict=True)) for row in found["history"].tolist()]
        found["history"] = tuple(Progress(**entry | {"level": int(entry["level"])}) for entry in entries)
        return cls(**found)


def density(op: LinearOperator, method: str, found: Measured) -> Density:
    """The density of what was measured, with its curve."""
    measure = join(found.measures)
    sharing = max((len(m.weights) for m in found.measures), default=0)
    noise = 32 * op.precision * float(measure.nodes.abs().max()) if len(measure.nodes) else 0.0
    share, curve, width, grid = sharing / op.n, mean_of(measure.masses), 0.0, measure.nodes
    if len(grid):
        width = smoothing_width(measure.nodes, noise, sharing if method == "lanczos" else 1)
        grid = grid_around(measure.nodes, width)
        curve = mean_of(smoothed(measure.nodes, measure.masses, width, grid), share)
    return Density(
        grid,
        curve.value,
        curve.stderr,
        measure.nodes,
        measure.weights,
        measure.masses,
        measure.residual_norms,
        op.n,
        width,
        noise,
        share,
        method,
        found.num_matvecs,
        found.seconds,
        found.status,
        found.message,
        found.history,
    )
