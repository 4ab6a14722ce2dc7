r"""Traces of functions of an operator by its spectral density: log-determinant, effective dimension, counts.

Method: stochastic Lanczos quadrature, :mod:`hvpkit.estimators.quadrature`: :math:`\operatorname{tr} f(A)` is n times
the mean of f over the density. Errors add up: that of the random vectors, which their spread shows; that of the
quadrature, for which the rules from half of the steps are compared with those from all, and of a count the mass at its
ends that the steps do not resolve; and rounding, where f is steep or an eigenvalue lies at an end.

Cost: one matvec per step and probe. Memory: the basis.
Source: Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075-1099, doi:10.1137/16M1104974; counts: Di Napoli,
Polizzi, Saad, Numer. Linear Algebra Appl. 23 (2016) 674-692, doi:10.1002/nla.2048.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_non_negative, check_number, check_positive
from hvpkit.estimators import quadrature
from hvpkit.estimators.quadrature import Measured
from hvpkit.estimators.spectral_density import check_precision, density_of, make_goal, num_vectors
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.density import Density
from hvpkit.results.estimate import Estimate
from hvpkit.solvers.common.vector_memory import check_room
from hvpkit.solvers.driver import Monitor, full_precision


def trace_of_function(
    op: LinearOperator,
    f: Callable[[Tensor], Tensor],
    *,
    num_steps: int,
    num_probes: int,
    time_limit: float | None,
    seed: Seed,
    monitor: Monitor | None,
    checkpoint: str | os.PathLike[str] | None,
    jumps: tuple[float, ...] = (),
) -> Estimate[float]:
    """Return the trace of f(A) for f on nodes ``[K]``, with all errors in its standard error.

    ``jumps`` are where f is not continuous, if it is constant between them.
    """
    check_precision(op)
    num_steps = check_count("num_steps", num_steps, 1)
    num_probes = check_count("num_probes", num_probes, 2)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    goal = make_goal(op, "lanczos", num_steps, num_probes, None, resolve_seed(seed))
    split = sharded(op)
    check_room(split, num_vectors(op.n, "lanczos", goal), "take fewer num_steps, or fewer parameters (wrt=)")
    found = quadrature.solve(split, goal, time_limit=time_limit, monitor=monitor, checkpoint=checkpoint)
    density = density_of(op, "lanczos", found)
    mean = density.expectation(f)
    if jumps:
        errors = [_unresolved(density, jump) for jump in jumps]
    else:
        errors = [_rounding(op, density, f), _bias(op, found, f, mean.value)]
    error = math.hypot(mean.stderr, *errors)
    return replace(mean, value=op.n * mean.value, stderr=op.n * error, samples=op.n * mean.samples)


@full_precision
def logdet(
    H: LinearOperator,
    *,
    damping: float = 0.0,
    num_steps: int = 100,
    num_probes: int = 10,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[float]:
    r"""Estimate the log-determinant of a positive definite matrix, :math:`\log\det(H + \text{damping}\, I)`.

    It is the sum of :math:`\log(\lambda_i + \text{damping})` over all eigenvalues, as in the Laplace approximation of a
    model's evidence. If ``num_steps * num_probes`` matvecs suffice for all n columns, and n is at most 1,000, the value
    is exact to rounding.

    Args:
        H: symmetric operator; with the damping it must be positive definite.
        damping: multiple of the identity that is added, at least 0.
        num_steps: matvecs with each probe. With little damping more are needed, about :math:`\sqrt\kappa` for the
            condition number :math:`\kappa`; the standard error shows it.
        num_probes: random vectors, at least 2.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.spectral_density`.

    Returns:
        The estimate; its standard error is that over probes, the error of the quadrature, and that of rounding where it
        is amplified, added as squares.

    Raises:
        ValueError: an argument out of its range; ``H + damping I`` is not positive definite, as a Ritz value shows; a
            checkpoint as for :func:`hvpkit.spectral_density`.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        ``num_steps * num_probes`` matvecs, in blocks of at most eight.

    Source:
        Ubaru, Chen, Saad, doi:10.1137/16M1104974.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)))
        >>> round(hk.logdet(op).value, 6)
        2.079442
    """
    check_non_negative("damping", damping)

    def f(nodes: Tensor) -> Tensor:
        return torch.log(_positive(nodes, damping))

    return trace_of_function(
        H,
        f,
        num_steps=num_steps,
        num_probes=num_probes,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
    )


@full_precision
def effective_dimension(
    H: LinearOperator,
    *,
    damping: float,
    num_steps: int = 100,
    num_probes: int = 10,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[float]:
    r"""Estimate the effective dimension, :math:`\operatorname{tr} H (H + \text{damping}\, I)^{-1}`.

    For a positive semidefinite H it counts the eigenvalues above the damping, smoothly: each contributes
    :math:`\lambda / (\lambda + \text{damping})`.

    Args:
        H: symmetric operator; with the damping it must be positive definite.
        damping: positive.
        num_steps: matvecs with each probe.
        num_probes: random vectors, at least 2.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.spectral_density`.

    Returns:
        The estimate, with a standard error as of :func:`logdet`.

    Raises:
        ValueError: an argument out of its range; ``H + damping I`` is not positive definite, as a Ritz value shows; a
            checkpoint as for :func:`hvpkit.spectral_density`.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        ``num_steps * num_probes`` matvecs, in blocks of at most eight.

    Source:
        MacKay, Neural Computation 4 (1992) 415-447, doi:10.1162/neco.1992.4.3.415.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)))
        >>> round(hk.effective_dimension(op, damping=1.0).value, 6)
        1.25
    """
    check_positive("damping", damping)

    def f(nodes: Tensor) -> Tensor:
        return nodes / _positive(nodes, damping)

    return trace_of_function(
        H,
        f,
        num_steps=num_steps,
        num_probes=num_probes,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
    )


@full_precision
def count_eigenvalues(
    H: LinearOperator,
    lower: float,
    upper: float,
    *,
    num_steps: int = 100,
    num_probes: int = 10,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[float]:
    r"""Estimate the number of eigenvalues in an interval, lower < :math:`\lambda` <= upper.

    Converged single eigenvalues, such as outliers, count exactly. Inside of a bulk an end of the interval is resolved
    to about the bulk's width over ``num_steps``, and the standard error holds what lies there, as it holds eigenvalues
    within rounding of an end: those that are zero are on either side of zero.

    Args:
        H: symmetric operator.
        lower: end of the interval, which does not belong to it; may be ``-inf``.
        upper: end of the interval, which does; may be ``inf``.
        num_steps: matvecs with each probe.
        num_probes: random vectors, at least 2.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.spectral_density`.

    Returns:
        The estimate, no whole number in general; its standard error is that over probes and what is not resolved at the
        two ends, added as squares.

    Raises:
        ValueError: an argument out of its range; ``lower`` is not below ``upper``; a checkpoint as for
            :func:`hvpkit.spectral_density`.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        ``num_steps * num_probes`` matvecs, in blocks of at most eight.

    Source:
        Di Napoli, Polizzi, Saad, doi:10.1002/nla.2048.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(0, 1, 11, dtype=torch.float64)))
        >>> round(hk.count_eigenvalues(op, 0.25, 0.75).value, 6)
        5.0
    """
    if not check_number("lower", lower) < check_number("upper", upper):
        raise ValueError(f"lower must be less than upper, got {lower} and {upper}")

    def f(nodes: Tensor) -> Tensor:
        return ((nodes > lower) & (nodes <= upper)).double()

    return trace_of_function(
        H,
        f,
        num_steps=num_steps,
        num_probes=num_probes,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
        checkpoint=checkpoint,
        jumps=(lower, upper),
    )


def _bias(op: LinearOperator, found: Measured, f: Callable[[Tensor], Tensor], mean: float) -> float:
    """Return the error of the quadrature of a smooth f: its change over the second half of the steps."""
    if len(found.shorter) != len(found.measures):
        return math.inf
    shorter = density_of(op, "lanczos", replace(found, measures=[*found.shorter]))
    return abs(shorter.expectation(f).value - mean)


def _rounding(op: LinearOperator, density: Density, f: Callable[[Tensor], Tensor]) -> float:
    """Return the error by the rounding of matvecs, which moves nodes, where it is more than that of the sum of f."""
    nodes, weights = density.nodes, density.weights
    if not len(nodes):
        return math.inf
    width = op.precision * float(nodes.abs().max())
    inward = torch.where(nodes * 2 <= nodes[0] + nodes[-1], width, -width)
    values = f(nodes)
    error = float((weights * (f(nodes + inward) - values)).square().sum()) ** 0.5
    return error if error > 32 * op.precision * float(weights @ values.abs()) else 0.0


def _unresolved(density: Density, jump: float) -> float:
    """Return a standard error of the mass below a jump: that of nodes whose eigenvalues may lie beyond it.

    By the inequalities of Chebyshev, Markov and Stieltjes a Gauss rule's mass below a point is wrong by no more than
    its weight at the next node on either side; of vectors that share a basis, as many nodes lie close together.
    Converged nodes stay on their side, but for those that rounding may move.
    """
    distance, weights = (density.nodes - jump).abs(), density.deflated_weights.mean(dim=0)
    by_rounding = weights[distance <= density.noise].sum()
    unknown = torch.where(density.residual_norms > distance, weights, 0.0)
    num_below, num = int((density.nodes <= jump).sum()), len(density.probe_weights)
    below, above = (
        unknown[max(0, num_below - num) : num_below].sum(),
        unknown[num_below : num_below + num].sum(),
    )
    return math.hypot(float(by_rounding), float(torch.maximum(below, above)) / 3**0.5)  # of a uniform error


def _positive(nodes: Tensor, damping: float) -> Tensor:
    """Return nodes with the damping; raise ValueError unless they are positive."""
    shifted = nodes + damping
    if len(nodes) and not float(shifted.min()) > 0:
        raise ValueError(
            f"damping must make H + damping I positive definite, but H has a Ritz value of {float(nodes.min()):.6g} "
            f"and damping is {damping:g}; raise it, or take a semidefinite matrix, as of hk.ggn"
        )
    return shifted
