r"""Power iteration on minibatches of increasing size.

Method: :mod:`hvpkit.solvers.baselines.momentum_block` with the operator of a fresh minibatch in each step, drawn
without replacement, with sizes by a schedule. As long as minibatches are of one size, the iterate stays a random walk
about the eigenvector; it converges as they are enlarged to all of the data.

Cost: k minibatch matvecs per step, counted by their share of the examples, and k with all data whenever minibatches
have cost twice that. Memory: as :mod:`hvpkit.solvers.baselines.power`.
Source: Hardt and Price, NeurIPS 2014, arXiv:1311.2495; batch sizes and momentum: Xu, He, De Sa, Mitliagkas, Re,
AISTATS 2018, PMLR 84:58-67, arXiv:1707.02670, algorithms 1 and 2.

Departures: the papers draw from a distribution for a given number of steps; here the data is finite, the last
minibatches are all of it, and the stop is by full-data assessments.
"""

from __future__ import annotations

from typing import Any

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult
from hvpkit.solvers.baselines.momentum_block import Goal, solve
from hvpkit.solvers.baselines.sampling import Schedule, check_samples
from hvpkit.solvers.common.request import Start, check_arguments
from hvpkit.solvers.driver import Monitor, full_precision

FIRST_SHARE, GROWTH = 64, 1.2
"""Default schedule: from one 64th of the data, a fifth more at each step: 23 steps, 6 full-data matvecs in all. Chosen
by feel."""

PERIOD = 2.0
"""Full-data matvecs per vector that minibatches may cost between two full-data assessments. Chosen by feel."""


def geometric(num_examples: int) -> Schedule:
    """Return the default schedule: sizes that increase geometrically to all of the examples.

    Example:
        >>> schedule = geometric(6400)
        >>> [schedule(number) for number in (0, 1, 12, 26, 1000)]
        [100, 120, 892, 6400, 6400]
    """

    def schedule(number: int) -> int:
        return max(1, round(num_examples * min(GROWTH ** min(number, 100) / FIRST_SHARE, 1.0)))

    return schedule


@full_precision
def stochastic_power(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LM",
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    batch_schedule: Schedule | None = None,
    momentum: float = 0.0,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at the ends of the spectrum, by power iteration on minibatches of increasing size.

    Stops as :func:`hvpkit.power` does, by residuals with all data only.

    It saves full-data matvecs while a minibatch's operator is near that of all data, which holds for outliers; for
    an end that is not dominant it saves almost nothing. For comparison: ``accelerated_power`` with
    ``variance_reduced=True`` takes fewer matvecs, and :func:`hvpkit.lanczos` on ``op`` fewer or as many.

    Args:
        op: symmetric operator with ``op.sample``, as of :func:`hvpkit.hessian`.
        k: number of pairs.
        which: ``"LM"`` the largest in magnitude, ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from
            each end (the odd one from the high end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result, as of :func:`hvpkit.power`.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        batch_schedule: from a minibatch's number, counted from 0, to its number of examples; more than there are
            means all. By default a 64th at first, and a fifth more each time. With a schedule that does not reach
            all data the error stays at the level of the last minibatches, and the status says so.
        momentum: :math:`\beta`, in units of eigenvalues squared. It amplifies the noise as well (the paper's
            section 3), and helps with large minibatches only.
        max_matvecs: full-data matvecs, at most, minibatches counted by their share; by default 1,000, or ten
            for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors and minibatches.
        monitor: called with a :class:`hvpkit.Progress` after each full-data assessment.

    Returns:
        As :func:`hvpkit.power`. ``converged`` rests on full-data residuals alone.

    Raises:
        TypeError: ``op`` has no minibatches.
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        As ``num_matvecs`` says; ``8 k`` vectors of memory.

    Source:
        Hardt and Price, NeurIPS 2014, arXiv:1311.2495; Xu, He, De Sa, Mitliagkas, Re, AISTATS 2018,
        arXiv:1707.02670.

    Example:
        >>> import torch, hvpkit as hk
        >>> x = torch.randn(640, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([4, 1, 1, 1, 1])
        >>> H = hk.hessian(lambda p, batch: 0.5 * (batch @ p) ** 2, torch.zeros(5), x)
        >>> found, exact = stochastic_power(H), torch.linalg.eigvalsh(x.T @ x / 640)
        >>> found.converged, bool((found.values - exact[-1]).abs() < 1e-3 * exact[-1])
        (True, True)
    """
    num_examples = check_samples(op, "stochastic_power")
    if batch_schedule is not None and not callable(batch_schedule):
        raise TypeError(
            "batch_schedule must be a function from a minibatch's number to a number of examples, got "
            f"{batch_schedule!r}; for as many each time: lambda number: {batch_schedule!r}"
        )
    if momentum:
        check_positive("momentum", momentum)
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        block_size=k,
    )
    schedule = batch_schedule or geometric(num_examples)
    samples: Any = {"num_examples": num_examples, "schedule": schedule, "period": PERIOD}
    return solve(op, Goal(**vars(asked), momentum=momentum, **samples), monitor)
