"""The spectral density, and its moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_positive
from hvpkit.estimators import kernel_polynomials, quadrature
from hvpkit.estimators.estimate import Estimate, mean_of
from hvpkit.estimators.quadrature import Goal
from hvpkit.operators.base import LinearOperator
from hvpkit.results.density import Density, density
from hvpkit.solvers.driver import Monitor, full_precision
from hvpkit.solvers.lanczos import BASIS_BYTES

METHODS = ("lanczos", "chebyshev")

WHOLE = 1000
"""The largest n of which all columns are multiplied."""

DEFAULT_WIDTH = 8
"""Columns of a product where the caller does not say, and memory does not."""


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
) -> Density:
    r"""The density of all eigenvalues, by stochastic Lanczos quadrature or by kernel polynomials.

    Stochastic Lanczos quadrature resolves outliers to rounding and the rest of the spectrum, of span L, to about
    ``L / num_steps``; kernel polynomials all of it to about ``pi * span / (4 * num_steps)``, without keeping
    vectors. What is left to chance is the share that random vectors have in eigenvectors: its standard error falls
    as ``1 / sqrt(n * num_probes)`` for functions of the whole spectrum.

    Where ``num_steps * num_probes`` products pay for all n columns, and n is at most 1,000, these are multiplied,
    and the spectrum is exact to rounding, whatever the method.

    Args:
        op: symmetric operator.
        method: ``"lanczos"`` or ``"chebyshev"``.
        num_steps: products with each probe.
        num_probes: random vectors; two or more give standard errors.
        block_size: probes that share a product and, with Lanczos, a basis; by default as many as 2 GiB hold, in
            products of eight columns; eight with Chebyshev.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        The density. A time limit, or a product that is not finite, is a status, with what was known until then.

    Raises:
        ValueError: an argument out of its range, named; ``op`` of less precision than float32.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        ``num_steps * num_probes`` products; with Chebyshev at most 40 more for the ends. Memory: ``num_steps + 1``
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
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"op has dtype {op.dtype}, whose rounding hides most of a spectrum; make the operator of float32 parameters"
        )
    check_choice("method", method, METHODS)
    check_count("num_steps", num_steps, 1)
    check_count("num_probes", num_probes, 1)
    if block_size is not None:
        check_count("block_size", block_size, 1)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    goal = make_goal(op, method, num_steps, num_probes, block_size, resolve_seed(seed))
    by_moments = method == "chebyshev" and not goal.spans(op.n)
    solve = kernel_polynomials.solve if by_moments else quadrature.solve
    found = solve(op, goal, time_limit=time_limit, monitor=monitor)
    return density(op, method, found)


def make_goal(
    op: LinearOperator, method: str, num_steps: int, num_probes: int, block_size: int | None, seed: int
) -> Goal:
    """How probes are put into groups; all directions at once where that many products are made anyway."""
    width = block_size or DEFAULT_WIDTH
    if op.n <= min(num_steps * num_probes, WHOLE):
        return Goal(1, (op.n,), min(width, op.n), seed)
    size = width
    if method == "lanczos" and block_size is None:
        size = max(1, BASIS_BYTES // 2 // ((num_steps + 1) * op.n * op.dtype.itemsize))
    size = min(size, num_probes)
    whole, rest = divmod(num_probes, size)
    sizes = (rest,) * (rest > 0) + (
        size,
    ) * whole  # the small one first: no step costs more than what is left
    return Goal(num_steps, sizes, min(width, size), seed)


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
) -> Estimate[Tensor]:
    r"""Moments of the spectral density, :math:`\frac1n \operatorname{tr} A^p` for p from 0 to ``order``.

    From stochastic Lanczos quadrature with as many steps as make it exact for these powers, ``order // 2 + 1``.

    Args:
        op: symmetric operator.
        order: the highest power.
        num_matvecs: full-data products, at most; where they pay for all n columns, moments are exact to rounding.
        block_size: as for :func:`hvpkit.spectral_density`.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        Moments ``[order + 1]``, float64, with their standard errors; powers beyond float64's range are infinite.

    Raises:
        ValueError: an argument out of its range, named.

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
    )
    powers = d.nodes[:, None] ** torch.arange(order + 1)
    found = mean_of(d.probe_weights @ powers, d.share)
    rest = len(found.samples), d.num_matvecs, d.seconds, d.status, d.message, d.history
    return Estimate(found.value, found.stderr, found.samples, *rest)
