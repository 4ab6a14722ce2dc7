"""Both ends from cheap levels of an operator, corrected on the operator itself.

Method: :mod:`hvpkit.solvers.davidson`, with the first cheap level until it is left, then the next one; after the last
of them :func:`hvpkit.lanczos`, with its own bounds. That begins anew: from vectors that are partly right it takes more
products (22 for 17 on a bulk with outliers), as what they may lack has to be excluded all the same.

Cost, memory and source: see there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Progress
from hvpkit.solvers.common.convergence import concluded
from hvpkit.solvers.common.request import Start, check_arguments, check_confidence
from hvpkit.solvers.davidson import ENDS, LEFT, Goal, assess, finalize, init, step
from hvpkit.solvers.driver import Monitor, full_precision, run_solver
from hvpkit.solvers.lanczos import lanczos


def multifidelity(
    levels: Sequence[LinearOperator],
    *,
    which: str = "BE",
    v0: Start | None = None,
    tol: float = 1e-2,
    ncv: int = 60,
    num_inner: int | None = None,
    confidence: float = 0.99,
    spent: float = 0.0,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Both ends of the last of several levels, with most of the work on cheaper ones.

    Stops when for each end asked for ``error_bound <= tol * |value|``. The bound is the residual's norm or, where a
    cheap level was just asked, ten times what it predicts, :math:`10\, r' f(A_S)\, r`, with a clamp of ten
    times ``tol * |value|``, and more if the last directions gained much more than was predicted of them. That is an
    estimate; the interval of an end rests on the residual alone, and says that an eigenvalue is in it, not that it is
    the extreme one.

    Use it for a Hessian over many examples: levels are ``H.coarsen(...)`` and H itself. For operators without a cheap
    likeness, and where the interval must hold with a stated confidence, use :func:`hvpkit.lanczos`.

    Args:
        levels: operators of the same size and of rising ``cost``; the last is the one asked about. One alone is
            solved by :func:`hvpkit.lanczos`, as is what is left once no cheap level helps.
        which: ``"BE"`` both ends, ``"LA"`` the largest alone, ``"SA"`` the smallest alone.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result, for the steps on the first level: the sum of the unit
            columns and a tenth of a random vector.
        tol: relative error of the eigenvalues.
        ncv: the most basis vectors before half of them are dropped.
        num_inner: the most Lanczos steps on a cheap level for each direction; by default as many as cost one product,
            but from 6 to 30. They end when what they predict has settled.
        confidence: of intervals, where these come from :func:`hvpkit.lanczos`.
        spent: what making the levels has cost, as a pass for scores; counted in with the rest; 0 if there is one level.
        max_matvecs: products of the last level, the others counted at their cost; by default 1,000.
        time_limit: seconds.
        seed: of the start vector.
        monitor: called with a :class:`hvpkit.Progress` after each look; its bounds are the error bounds.

    Returns:
        Two pairs (one for n = 1, or for one end), with true residuals. ``num_matvecs`` is in products of an operator
        of cost 1; ``history`` also says which level was drawn on.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named.
        NotSymmetricError: the last level is not symmetric beyond rounding.

    Cost:
        ``2 ncv + num_inner`` vectors of memory.

    Example:
        >>> import torch, hvpkit as hk
        >>> from dataclasses import replace
        >>> values = torch.cat([torch.tensor([-1.0, 30.0]), torch.linspace(-0.5, 1, 500)]).double()
        >>> op = hk.aslinearoperator(torch.diag(values))
        >>> like = replace(hk.aslinearoperator(torch.diag(1.1 * values)), cost=0.05)
        >>> found = multifidelity([like, op])
        >>> found.values.round(decimals=2).tolist(), found.num_matvecs < 8
        ([-1.0, 30.0], True)
    """
    levels = _checked_levels(levels)
    op = levels[-1]
    check_count("ncv", ncv, 8)
    check_confidence(confidence)
    if not 0 <= spent < math.inf or (spent and len(levels) == 1):
        raise ValueError(
            f"spent must be finite and not negative, and 0 where there is one level; got {spent}"
        )
    if num_inner is not None:
        check_count("num_inner", num_inner, 1)
    asked = check_arguments(
        op,
        min(2, op.n) if which == "BE" else 1,
        which,
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=tuple(ENDS),
        num_checks=0,
    )
    goal = Goal(**vars(asked), levels=tuple(levels), num_inner=num_inner, spent=spent)
    return _solve(op, goal, ncv, confidence, monitor)


def _checked_levels(levels: Sequence[LinearOperator]) -> Sequence[LinearOperator]:
    if (
        not isinstance(levels, Sequence)
        or not levels
        or not all(isinstance(x, LinearOperator) for x in levels)
    ):
        raise TypeError("levels must be a list of hvpkit.LinearOperator, the one asked about last")
    last = levels[-1]
    for level in levels[:-1]:
        if (level.n, level.dtype, level.device) != (last.n, last.dtype, last.device):
            raise ValueError(f"levels must agree in size, dtype and device: {level!r} and {last!r}")
    costs = [level.cost for level in levels]
    if sorted(costs) != costs:
        raise ValueError(f"levels must be of rising cost, got {costs}")
    return [*levels[:-1], last.exact or last]  # less arithmetic is for cheap levels


@full_precision
def _solve(
    op: LinearOperator, goal: Goal, ncv: int, confidence: float, monitor: Monitor | None
) -> EigenResult:
    """Davidson's method on the cheap levels, and Lanczos where they did not do."""
    begin, limits = time.perf_counter(), goal.limits
    by_lanczos = partial(
        lanczos, op, goal.k, which=goal.which, tol=goal.tol, confidence=confidence, seed=goal.seed
    )
    if len(goal.levels) == 1:
        return by_lanczos(
            v0=goal.start, max_matvecs=limits.max_matvecs, time_limit=limits.time_limit, monitor=monitor
        )
    ended = run_solver(
        init(op, goal, ncv),
        lambda state: step(op, goal, state),
        lambda state: assess(op, goal, state),
        step_cost=max(op.cost, *(goal.inner_steps(x) * x.cost for x in goal.levels[:-1])),
        limits=limits,
        monitor=monitor,
    )
    cheap = finalize(op, goal, ended.state, ended.status)
    cheap = concluded(op, cheap, ended.history, begin, ended.state.suspect)
    products = goal.left(cheap.num_matvecs)
    time_left = None if limits.time_limit is None else limits.time_limit - cheap.seconds
    over = ended.status is not LEFT or goal.levels[ended.state.level] is not op
    if over or products < (2 * goal.k + 1) * op.cost or (time_left is not None and time_left <= 0):
        return cheap

    def later(entry: Progress) -> Progress:
        spent, seconds = entry.num_matvecs + cheap.num_matvecs, entry.seconds + cheap.seconds
        return replace(entry, num_matvecs=spent, seconds=seconds, level=ended.state.level)

    found = by_lanczos(
        max_matvecs=products,
        time_limit=time_left,
        monitor=monitor and (lambda entry: monitor(later(entry))),
    )
    return replace(
        found,
        num_matvecs=found.num_matvecs + cheap.num_matvecs,
        seconds=found.seconds + cheap.seconds,
        history=(*cheap.history, *map(later, found.history)),
    )
