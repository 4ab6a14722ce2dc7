r"""The Frobenius norm, as the root of the trace of the square.

Method: :math:`\|A\|_F^2 = \operatorname{tr} A^2 = E\,\|A\omega\|^2` (Hutchinson), or with the part that a random basis
captures taken exactly, by XTrace for :math:`A^2`: its small matrices are :math:`Z'Z` and :math:`Z'A\omega`, with
:math:`Z = AQ`.

Cost: one product a probe, or two. Memory: two vectors for each probe in a step; beside them, with XTrace, one and a
half vectors for each product.
Source: as :mod:`hvpkit.estimators.trace`. Departure: the basis is of the range of A, not of :math:`A^2`, which would
take further products.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit.estimators.estimate import Estimate, Mean, Monitor, Plan, as_floats, estimate, make_plan, mean_of
from hvpkit.estimators.leave_one_out import leave_one_out, left_out
from hvpkit.estimators.sketch import PRODUCTS, Small, State, init, small, step
from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.driver import full_precision


def evaluate(op: LinearOperator, plan: Plan, state: State, k: int) -> Mean:
    """The norm from a state's first k probes."""
    if plan.exact:
        return root_of(mean_of(op.n * _squares(state, k), k / op.n))
    if plan.method == "hutchinson":
        return root_of(mean_of(_squares(state, k)))
    found = small(op, state, k)
    lost = left_out(found.crossed, op.precision)
    return root_of(leave_one_out(of_square(op, state, found), lost, normalise=plan.probe == "sphere"))


def _squares(state: State, k: int) -> Tensor:
    return state.squares[:k].to("cpu", torch.float64)


def of_square(op: LinearOperator, state: State, found: Small) -> Small:
    r"""Small matrices of :math:`A^2` from those of A: with Y = QR, :math:`Z'Y = (Q'AQ)'R`."""
    images = state.images[: len(found.projected)]
    return replace(
        found,
        projected=op.space.dots(images, images.mT).to("cpu", torch.float64),
        crossed=found.projected.mT @ found.crossed,
        forms=_squares(state, len(found.forms)),
    )


def root_of(squares: Mean) -> Mean:
    """The root of a mean, with standard error and samples to first order, so that these have that mean."""
    root = squares.value.clamp(min=0).sqrt()
    slope = torch.where(root > 0, 0.5 / root, 0.0)
    stderr = torch.where(squares.stderr > 0, slope * squares.stderr, 0.0)
    return Mean(root, stderr, root + slope * (squares.samples - squares.value))


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
) -> Estimate[float]:
    r"""The Frobenius norm, :math:`\sqrt{\sum_{ij} a_{ij}^2}`: the root of the sum of squared eigenvalues.

    The square's estimate is unbiased, its root to first order: it is too small by about half of
    ``stderr**2 / value``.

    Where ``num_matvecs`` pays for all n columns, these are multiplied, and the value is exact to rounding.

    Args:
        op: symmetric operator.
        method: ``"xtrace"`` or ``"hutchinson"``, which needs no memory, and has a relative standard error of at most
            :math:`1/\sqrt{2m}` with m products.
        num_matvecs: full-data products, at most; all are spent, up to one, unless ``tol`` ends the run before.
        tol: stop where ``stderr <= tol * value``, at ten samples or more.
        probe: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``, as for :func:`hvpkit.trace`.
        block_size: probes that share a product.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        The estimate. A product that is not finite is a status, with the value from the probes before it.

    Raises:
        ValueError: an argument out of its range, named.

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
        {name: PRODUCTS[name] for name in ("xtrace", "hutchinson")},
        num_matvecs=num_matvecs,
        tol=tol,
        block_size=block_size,
        seed=seed,
        probe=probe,
    )
    found = estimate(
        op,
        plan,
        init(op, plan, keep_images=True),
        lambda state: step(op, plan, state),
        lambda state, k: evaluate(op, plan, state, k),
        time_limit=time_limit,
        monitor=monitor,
    )
    return as_floats(found)
