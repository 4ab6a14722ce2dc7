r"""The trace, from matvecs with random probes.

Method: :math:`\operatorname{tr} A = E\,\omega'A\omega` for probes with :math:`E\,\omega\omega' = I` (Hutchinson), of
which the part that a random basis captures is computed exactly (Hutch++, XTrace): see :mod:`hvpkit.estimators.sketch`.

Cost: one, three or two matvecs per probe. Memory: two vectors per probe of a step, and two; beside them, two thirds of
a vector per matvec (Hutch++), or one (XTrace).
Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990) 433-450, doi:10.1080/03610919008812866; Meyer, Musco, Musco,
Woodruff, SOSA 2021, doi:10.1137/1.9781611976496.16; Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23,
doi:10.1137/23M1548323.
"""

from __future__ import annotations

import os

import torch

from hvpkit._utils.typing import Seed
from hvpkit.estimators.leave_one_out import leave_one_out, left_out, samples
from hvpkit.estimators.sampling import Monitor, Plan, estimate, make_plan
from hvpkit.estimators.sketch import COSTS, SketchState, init, small, step, trim
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.estimate import Estimate, Mean, as_floats, mean_of
from hvpkit.solvers.driver import full_precision


def evaluate(op: LinearOperator, plan: Plan, state: SketchState, k: int) -> Mean:
    """Return the trace, over scale, from a state's first k probes."""
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
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[float]:
    r"""Estimate the trace, with its standard error.

    Relative to the trace, standard errors fall with m matvecs as :math:`1/\sqrt m` by Hutchinson's method; by the
    other two as :math:`1/m` for semidefinite operators, and exponentially where the spectrum decays so. XTrace is
    the most accurate per matvec. Where the spectrum is narrow, a basis gains nothing, and Hutchinson's method has
    three samples for each of Hutch++.

    If ``num_matvecs`` suffices for all n columns, these are multiplied, and the value is exact to rounding, with
    every method.

    Args:
        op: symmetric operator.
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        num_matvecs: full-data matvecs, at most. All are spent, but for a remainder of less than one probe's, unless
            ``tol`` ends the run before.
        tol: stop where ``stderr <= tol * |value|``, at 20 samples or more; checked after each block.
        probe: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``: see :mod:`hvpkit.estimators.probe`. With
            ``"sphere"`` the part of a probe outside of a basis is rescaled to the norm expected in its dimension.
        block_size: probes that are multiplied together, as ``[n, block_size]`` (or twice as many columns). The
            value does not depend on it, except for rounding.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.EstimateProgress` after each assessment.
        checkpoint: a file. The samples so far are saved there every minute and when the run is interrupted, or ends at
            the time limit. The same call continues from it, for one matvec that verifies the operator, to the same
            bits; ``tol`` and limits may be changed. Deleted at the end. See :func:`hvpkit.lanczos`.

    Returns:
        The estimate. A matvec that is not finite is a status, with the value from the probes before it.

    Raises:
        ValueError: an argument is out of its range; a checkpoint that is damaged, of another version or question, or
            whose path cannot be written.

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
        COSTS,
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
        init(split, plan),
        step,
        evaluate,
        time_limit=time_limit,
        monitor=monitor,
        checkpoint=checkpoint,
        trim=trim,
    )
    return as_floats(found)
