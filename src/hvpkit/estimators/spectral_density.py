"""The spectral density and its moments."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_positive
from hvpkit.estimators import kernel_polynomials, quadrature
from hvpkit.estimators.quadrature import Goal, Measured
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.density import Density
from hvpkit.results.estimate import Estimate, mean_of
from hvpkit.results.spectral_measure import grid_around, join, smoothed, smoothing_width
from hvpkit.solvers import lanczos
from hvpkit.solvers.common.vector_memory import check_room, vector_bytes, vectors_that_fit
from hvpkit.solvers.driver import Monitor, full_precision

METHODS = ("lanczos", "chebyshev")

MAX_EXACT_N = 1000
"""Largest n for which all columns are multiplied, and the n by n projection is solved. Chosen by feel."""

DEFAULT_WIDTH = 8
"""Default number of columns of a block matvec. Chosen by feel."""


@full_precision
def spectral_density(
    op: LinearOperator,
    *,
    method: str = "lanczos",
    num_steps: int = 100,
    num_probes: int = 1,
    block_size: int | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Density:
    r"""Estimate the density of all eigenvalues, by stochastic Lanczos quadrature or by kernel polynomials.

    Stochastic Lanczos quadrature resolves outliers to rounding and the rest of the spectrum, of span L, to about
    ``L / num_steps``; kernel polynomials resolve all of it to about ``pi * span / (4 * num_steps)``, without keeping
    vectors. The random part of the error is that of the vectors' components along eigenvectors: its standard error
    falls as ``1 / sqrt(n * num_probes)`` for functions of the whole spectrum.

    If ``num_steps * num_probes`` matvecs suffice for all n columns, and n is at most 1,000, these are multiplied,
    and the spectrum is exact to rounding, with either method.

    Args:
        op: symmetric operator.
        method: ``"lanczos"`` or ``"chebyshev"``.
        num_steps: matvecs with each probe.
        num_probes: random vectors; of one, standard errors are unknown (infinite). With Lanczos, two or more that share
            a basis leave converged single eigenvalues out of the random error: see :meth:`hvpkit.Density.expectation`.
        block_size: probes that are multiplied together and, with Lanczos, share a basis; by default as many as 2 GiB
            hold, or half of the free memory if that is less, in block matvecs of eight columns; eight with Chebyshev.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file. The run is saved there every minute and when it is interrupted, or ends at the time limit.
            The same call continues from it, for one matvec that verifies the operator, to the same bits. Deleted at
            the end. See :func:`hvpkit.lanczos`.

    Returns:
        The density. A time limit, or a matvec that is not finite, is a status, with the density until then.

    Raises:
        ValueError: an argument is out of its range; ``op`` is of less precision than float32; a checkpoint that is
            damaged, of another version or question, or whose path cannot be written.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        ``num_steps * num_probes`` matvecs; with Chebyshev at most 40 more for the ends. Memory: ``num_steps + 1``
        vectors for each probe of a block, or four.

    Source:
        Ghorbani, Krishnan, Xiao, ICML 2019, arXiv:1901.10159; Weisse et al., doi:10.1103/RevModPhys.78.275.

    Example:
        >>> import torch, hvpkit as hk
        >>> entries = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([30.0])])
        >>> d = spectral_density(hk.aslinearoperator((lambda v: entries * v, 2001, torch.float32)), num_steps=40)
        >>> d.outliers()[0], round(float(d.cdf(0.5)), 1)
        (tensor([30.0000], dtype=torch.float64), 0.5)
    """
    check_precision(op)
    check_choice("method", method, METHODS)
    num_steps = check_count("num_steps", num_steps, 1)
    num_probes = check_count("num_probes", num_probes, 1)
    if block_size is not None:
        block_size = check_count("block_size", block_size, 1)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    goal = make_goal(op, method, num_steps, num_probes, block_size, resolve_seed(seed))
    remedy = 'take method="chebyshev", which keeps no basis, or fewer num_steps'
    split = sharded(op)
    check_room(
        split, num_vectors(op.n, method, goal), remedy if method == "lanczos" else "take a smaller block_size"
    )
    by_moments = method == "chebyshev" and not goal.spans(op.n)
    solve = kernel_polynomials.solve if by_moments else quadrature.solve
    found = solve(split, goal, time_limit=time_limit, monitor=monitor, checkpoint=checkpoint)
    return density_of(op, method, found)


def check_precision(op: LinearOperator) -> None:
    """Raise ValueError if the operator is of less precision than float32."""
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"op has dtype {op.dtype}, whose rounding hides most of a spectrum; make the operator of float32 parameters"
        )


def make_goal(
    op: LinearOperator, method: str, num_steps: int, num_probes: int, block_size: int | None, seed: int
) -> Goal:
    """Split the probes into groups; take all n directions at once where the budget allows."""
    width = block_size or DEFAULT_WIDTH
    if op.n <= min(num_steps * num_probes, MAX_EXACT_N):
        return Goal(1, (op.n,), min(width, op.n), seed)
    size = width
    if method == "lanczos" and block_size is None:
        fitting = min(lanczos.BASIS_BYTES // 2 // vector_bytes(op), vectors_that_fit(op))
        size = int(max(1, fitting // (num_steps + 1)))
    size = min(size, num_probes)
    whole, rest = divmod(num_probes, size)
    sizes = (rest,) * (rest > 0) + (size,) * whole  # the small one first: later steps then fit the budget
    return Goal(num_steps, sizes, min(width, size), seed)


def num_vectors(n: int, method: str, goal: Goal) -> int:
    """Return the vectors that an estimate takes memory for: those kept, and what it works with, measured."""
    width = min(goal.width, max(goal.sizes))
    if goal.spans(n):
        return 2 * n + 3 * width
    if method == "lanczos":
        return max(goal.sizes) * (goal.num_steps + 1) + 3 * width + 4  # and a witness for a checkpoint
    ends = lanczos.num_vectors(lanczos.least_ncv(2, 1), 2, 1)  # they come first
    return max(10 * max(goal.sizes) + 4, ends)


def density_of(op: LinearOperator, method: str, found: Measured) -> Density:
    """Return the density of these measures, with its smooth curve."""
    measure = join(found.measures)
    num_sharing = max((len(m.weights) for m in found.measures), default=0)
    noise = quadrature.rounding_of(op, measure.nodes) if len(measure.nodes) else 0.0
    share, curve, width, grid = num_sharing / op.n, mean_of(measure.masses), 0.0, measure.nodes
    if len(grid):
        width = smoothing_width(measure.nodes, noise, num_sharing if method == "lanczos" else 1)
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
        measure.deflated,
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


@full_precision
def moments(
    op: LinearOperator,
    order: int,
    *,
    num_matvecs: float = 100,
    block_size: int | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[Tensor]:
    r"""Estimate the moments of the spectral density, :math:`\frac1n \operatorname{tr} A^p` for p from 0 to ``order``.

    By stochastic Lanczos quadrature with the least number of steps that is exact for these powers,
    ``order // 2 + 1``.

    Args:
        op: symmetric operator.
        order: the highest power.
        num_matvecs: full-data matvecs, at most; if they suffice for all n columns, moments are exact to rounding.
        block_size: as for :func:`hvpkit.spectral_density`.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.spectral_density`.

    Returns:
        Moments ``[order + 1]``, float64, with their standard errors; powers beyond float64's range are infinite.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> moments(op, 2).value
        tensor([1.0000, 2.0000, 4.6667], dtype=torch.float64)
    """
    num_steps = check_count("order", order, 1) // 2 + 1
    num_probes = math.floor(check_positive("num_matvecs", num_matvecs) / op.cost * (1 + 1e-12)) // num_steps
    if num_probes < 1:
        least = num_steps * op.cost
        raise ValueError(
            f"num_matvecs must be at least {least:g}, one probe's for order {order}; got {num_matvecs:g}"
        )
    d = spectral_density(
        op,
        num_steps=num_steps,
        num_probes=num_probes,
        block_size=block_size,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
    )
    return d.integrate(d.nodes[:, None] ** torch.arange(order + 1, device="cpu"))
