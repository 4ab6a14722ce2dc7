r"""The trace, from products with random probes.

Method: :math:`\operatorname{tr} A = E\,\omega'A\omega` for probes with :math:`E\,\omega\omega' = I` (Hutchinson), of
which the part that a random basis captures is taken exactly (Hutch++, XTrace): see :mod:`hvpkit.estimators.sketch`.

Cost: one, three or two products a probe. Memory: two vectors for each probe in a step; beside them, two thirds of a
vector for each product (Hutch++), or one (XTrace).
Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990) 433-450, doi:10.1080/03610919008812866; Meyer, Musco, Musco,
Woodruff, SOSA 2021, doi:10.1137/1.9781611976496.16; Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23,
doi:10.1137/23M1548323.
"""

from __future__ import annotations

import torch

from hvpkit._utils.typing import Seed
from hvpkit.estimators.estimate import Estimate, Mean, Monitor, Plan, as_floats, estimate, make_plan, mean_of
from hvpkit.estimators.leave_one_out import leave_one_out, left_out, samples
from hvpkit.estimators.sketch import PRODUCTS, State, init, small, step
from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.driver import full_precision


def evaluate(op: LinearOperator, plan: Plan, state: State, k: int) -> Mean:
    """The trace from a state's first k probes."""
    found, normalise = small(op, state, k), plan.probe == "sphere"
    if plan.exact:
        return mean_of(op.n * found.forms, k / op.n)
    if plan.method == "xtrace":
        return leave_one_out(found, left_out(found.crossed, op.precision), normalise=normalise)
    return mean_of(samples(found, torch.zeros_like(found.dots), normalise=normalise))


@full_precision
def trace(
    op: LinearOperator,
    *,
    method: str = "hutch++",
    num_matvecs: float = 100,
    tol: float | None = None,
    probe: str = "rademacher",
    block_size: int = 8,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> Estimate[float]:
    r"""The trace, with its standard error.

    Relative to the trace, standard errors fall with m products as :math:`1/\sqrt m` by Hutchinson's method; by the
    other two as :math:`1/m` for semidefinite operators, and exponentially where the spectrum decays so. XTrace makes
    more of the same products. Where the spectrum is narrow, nothing is gained by a basis, and
    Hutchinson's method has three samples for each of Hutch++.

    Where ``num_matvecs`` pays for all n columns, these are multiplied, and the value is exact to rounding, whatever
    the method.

    Args:
        op: symmetric operator.
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        num_matvecs: full-data products, at most. They are all spent, up to two, unless ``tol`` ends the run before.
        tol: stop where ``stderr <= tol * |value|``, at ten samples or more; looked at after each block.
        probe: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``: see :mod:`hvpkit.estimators.probe`. With
            ``"sphere"`` what a basis leaves of a probe gets the length that its dimension asks for.
        block_size: probes that share a product with ``[n, block_size]`` (or twice as many columns). The values do
            not depend on it, but for rounding.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each block.

    Returns:
        The estimate. A product that is not finite is a status, with the value from the probes before it.

    Raises:
        ValueError: an argument out of its range, named.

    Cost:
        As ``num_matvecs`` says. Memory: :mod:`hvpkit.estimators.trace`.

    Source:
        Meyer et al., doi:10.1137/1.9781611976496.16; Epperly, Tropp, Webber, doi:10.1137/23M1548323.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(1.5 ** -torch.arange(500, dtype=torch.float64)))
        >>> found = trace(op, num_matvecs=60)
        >>> round(found.value, 2), found.stderr < 0.01, found.num_matvecs
        (3.0, True, 60.0)
    """
    plan = make_plan(
        op,
        method,
        PRODUCTS,
        num_matvecs=num_matvecs,
        tol=tol,
        block_size=block_size,
        seed=seed,
        probe=probe,
    )
    found = estimate(
        op,
        plan,
        init(op, plan),
        lambda state: step(op, plan, state),
        lambda state, k: evaluate(op, plan, state, k),
        time_limit=time_limit,
        monitor=monitor,
    )
    return as_floats(found)
