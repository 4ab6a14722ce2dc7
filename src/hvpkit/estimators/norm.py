r"""The Frobenius norm, as the root of the trace of the square.

Method: :math:`\|A\|_F^2 = \operatorname{tr} A^2 = E\,\|A\omega\|^2` (Hutchinson), or with the part that a random basis
captures computed exactly, by XTrace for :math:`A^2`: its small matrices are :math:`Z'Z` and :math:`Z'A\omega`, with
:math:`Z = AQ`.

Cost: one matvec per probe, or two. Memory: two vectors per probe of a step, and two; beside them, with XTrace, one and
a half vectors per matvec.
Source: as :mod:`hvpkit.estimators.trace`. Departure: the basis is of the range of A, not of :math:`A^2`, which would
take further matvecs.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit.estimators.leave_one_out import leave_one_out, left_out
from hvpkit.estimators.sampling import Monitor, Plan, estimate, make_plan
from hvpkit.estimators.sketch import COSTS, SketchState, Small, init, small, step, trim
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.estimate import Estimate, Mean, as_floats, mean_of
from hvpkit.solvers.driver import full_precision


def evaluate(op: LinearOperator, plan: Plan, state: SketchState, k: int) -> Mean:
    """Return the norm, over scale, from a state's first k probes."""
    if plan.exact:
        return root_of(mean_of(op.n * _squares(state, k), k / op.n))
    if plan.method == "hutchinson":
        return root_of(mean_of(_squares(state, k)))
    found = small(op, state, k)
    lost = left_out(found.crossed, op.precision)
    return root_of(leave_one_out(of_square(op, state, found), lost, normalise=plan.probe == "sphere"))


def _squares(state: SketchState, k: int) -> Tensor:
    return state.squares[:k].to("cpu", torch.float64)


def of_square(op: LinearOperator, state: SketchState, found: Small) -> Small:
    r"""Return the small matrices of :math:`A^2` from those of A: with Y = QR, :math:`Z'Y = (Q'AQ)'R`."""
    images = state.images[: len(found.projected)]
    return replace(
        found,
        projected=op.space.dots(images, images.mT).to("cpu", torch.float64),
        crossed=found.projected.mT @ found.crossed,
        forms=_squares(state, len(found.forms)),
    )


def root_of(squares: Mean) -> Mean:
    """Return the root of a mean, with standard error and samples to first order; their mean is the root."""
    root = squares.value.clamp(min=0).sqrt()
    derivative = torch.where(root > 0, 0.5 / root, 0.0)
    stderr = torch.where(squares.stderr > 0, derivative * squares.stderr, 0.0)
    return Mean(root, stderr, root + derivative * (squares.samples - squares.value))


@full_precision
def frobenius_norm(
    op: LinearOperator,
    *,
    method: str = "xtrace",
    num_matvecs: float = 100,
    tol: float | None = None,
    probe: str = "rademacher",
    block_size: int = 8,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[float]:
    r"""Estimate the Frobenius norm, :math:`\sqrt{\sum_{ij} a_{ij}^2}`: the root of the sum of squared eigenvalues.

    The estimate of the square is unbiased, its root to first order: it is too small by about half of
    ``stderr**2 / value``. If ``num_matvecs`` suffices for all n columns, the value is exact to rounding.

    Args:
        op: symmetric operator.
        method: ``"xtrace"`` or ``"hutchinson"``, which needs no memory, and has a relative standard error of at most
            :math:`1/\sqrt{2m}` with m matvecs.
        num_matvecs: budget, as for :func:`hvpkit.trace`.
        tol: stop where ``stderr <= tol * value``, at 20 samples or more.
        probe: kind of probes, as for :func:`hvpkit.trace`.
        block_size: probes that are multiplied together.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.EstimateProgress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.trace`.

    Returns:
        The estimate, as of :func:`hvpkit.trace`.

    Raises:
        ValueError: an argument is out of its range; a checkpoint as for :func:`hvpkit.trace`.

    Cost:
        As ``num_matvecs`` says. Memory: :mod:`hvpkit.estimators.norm`.

    Source:
        Epperly, Tropp, Webber, doi:10.1137/23M1548323.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(0.5 ** torch.arange(500, dtype=torch.float64)))
        >>> found = frobenius_norm(op, num_matvecs=40)
        >>> round(found.value, 4), (4 / 3) ** 0.5
        (1.1547, 1.1547005383792515)
    """
    plan = make_plan(
        op,
        method,
        {name: COSTS[name] for name in ("xtrace", "hutchinson")},
        num_matvecs=num_matvecs,
        tol=tol,
        block_size=block_size,
        seed=seed,
        probe=probe,
    )
    split = sharded(op)
    found = estimate(
        split,
        plan,
        init(split, plan, keep_images=True),
        step,
        evaluate,
        time_limit=time_limit,
        monitor=monitor,
        checkpoint=checkpoint,
        trim=trim,
    )
    return as_floats(found)
