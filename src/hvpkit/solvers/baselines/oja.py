r"""Oja's rule: stochastic gradient ascent on the Rayleigh quotient, orthogonalised for several pairs.

Method: for a block W of orthonormal vectors and the operator :math:`A_t` of a fresh minibatch, drawn without
replacement,

.. math:: W_{t+1} = \mathrm{orth}\big(W_t \pm \eta_t A_t W_t\big),

plus for the high end, minus for the low one. It is :mod:`hvpkit.solvers.baselines.momentum_block` with the shift
:math:`\sigma_t = \pm 1 / \eta_t`. The step size is that of AdaOja,

.. math:: \eta_t = \Big(\sum_{s \le t} \tfrac{1}{k} \|A_s W_s\|_F^2\Big)^{-1/2},

about :math:`1 / (|\lambda| \sqrt t)`: it needs to know neither the scale of the operator nor a gap.

Cost: k minibatch matvecs per step, counted by their share of the examples, and k with all data whenever minibatches
have cost twice that. Memory: as :mod:`hvpkit.solvers.baselines.power`.
Source: Oja, J. Math. Biology 15 (1982) 267-273, doi:10.1007/BF00275687; step size: Henriksen and Ward, AdaOja,
arXiv:1905.12115.

Departures from the papers:
1. One step size for the whole block, where AdaOja has one for each vector.
2. Full-data assessments are steps too; the result is the best block of all assessments, not the last.
3. The operator is divided by a power of two near its first matvec.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_positive
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult
from hvpkit.solvers.baselines.momentum_block import Goal, MomentumBlockState, solve
from hvpkit.solvers.baselines.sampling import check_samples
from hvpkit.solvers.baselines.stochastic_power import PERIOD
from hvpkit.solvers.common.request import Start, check_arguments
from hvpkit.solvers.driver import Monitor, full_precision

NUM_BATCHES = 16
"""Default number of minibatches that the data is split into. Chosen by feel."""

StepSize = float | Callable[[int], float]


def adaptive(op: LinearOperator, state: MomentumBlockState) -> Tensor:
    """Return one over AdaOja's step size, over scale, from the one before."""
    assert state.images is not None
    return torch.hypot(state.shift[0, 0], op.space.norm(state.images.flatten()) / len(state.images) ** 0.5)


def given(step_size: StepSize, state: MomentumBlockState) -> Tensor:
    """Return one over the caller's step size, over scale."""
    number = state.num_steps - 1
    eta = step_size(number) if callable(step_size) else step_size
    return 1 / (check_positive(f"step_size({number})", eta) * state.scale)


@full_precision
def oja(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-2,
    atol: float | None = None,
    batch_size: int | None = None,
    step_size: StepSize | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Find a few eigenpairs at the ends of the spectrum, by Oja's rule on minibatches.

    :math:`W \leftarrow \mathrm{orth}(W \pm \eta_t A_t W)`, plus for the high end and minus for the low one. Stops as
    :func:`hvpkit.power` does, by residuals with all data only, computed whenever minibatches have cost two full-data
    matvecs.

    For comparison, and where two digits are enough: the step size falls as the inverse root of the steps, the error
    of the vectors as the inverse fourth root, so that a small ``tol`` is rarely reached; the status says so.
    :func:`hvpkit.accelerated_power` with ``variance_reduced=True`` and :func:`hvpkit.lanczos` take fewer matvecs.

    Args:
        op: symmetric operator with ``op.sample``, as of :func:`hvpkit.hessian`.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the high
            end).
        v0: start ``[n]`` or ``[n, p]``, or an earlier result, as of :func:`hvpkit.power`.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        batch_size: examples in a minibatch; by default a sixteenth of all.
        step_size: :math:`\eta`, in units of one over eigenvalues, or a function from a step, counted from 0, to it.
            By default AdaOja's: one over the root of the sum of all :math:`\|A_s W_s\|_F^2 / k` so far.
        max_matvecs: full-data matvecs, at most, minibatches counted by their share; by default 1,000, or ten
            for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors and minibatches.
        monitor: called with a :class:`hvpkit.Progress` after each full-data assessment.

    Returns:
        As :func:`hvpkit.power`, from the best block of all assessments.

    Raises:
        TypeError: ``op`` has no minibatches.
        ValueError: an argument is out of its range.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        As ``num_matvecs`` says; ``8 k`` vectors of memory.

    Source:
        Oja, J. Math. Biology 15 (1982) 267-273, doi:10.1007/BF00275687; Henriksen and Ward, arXiv:1905.12115.

    Example:
        >>> import torch, hvpkit as hk
        >>> x = torch.randn(640, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([4, 1, 1, 1, 1])
        >>> H = hk.hessian(lambda p, batch: 0.5 * (batch @ p) ** 2, torch.zeros(5), x)
        >>> found, exact = oja(H), torch.linalg.eigvalsh(x.T @ x / 640)
        >>> found.converged, bool((found.values - exact[-1]).abs() < 0.01 * exact[-1])
        (True, True)
    """
    num_examples = check_samples(op, "oja")
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
        offered=("LA", "SA", "BE"),
        block_size=k,
    )
    size = check_count(
        "batch_size",
        max(1, num_examples // NUM_BATCHES) if batch_size is None else batch_size,
        1,
        num_examples,
    )
    if step_size is not None and not callable(step_size):
        check_positive("step_size", step_size)
    next_shift = partial(adaptive, op) if step_size is None else partial(given, step_size)
    samples: Any = {"num_examples": num_examples, "schedule": lambda _: size, "period": PERIOD}
    return solve(op, Goal(**vars(asked), next_shift=next_shift, **samples), monitor)
