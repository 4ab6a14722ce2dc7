r"""Both ends from cheap levels of an operator, corrected on the operator itself.

Method: Rayleigh-Ritz on an orthonormal basis V, with products of the last level only: values are true ones, whatever
the other levels are. V begins with the extreme Ritz vectors of a short Lanczos run on the first level and grows, for
an end with Ritz value :math:`\theta` and residual r, by

.. math:: t = f(A_S)\, r, \qquad f(x) = \frac{1}{\max(d(x), \delta)},

with :math:`A_S` a cheap level and d(x) the distance from :math:`\theta` inwards, negative beyond the end. This is
Davidson's method; the preconditioner is the inverse of the whole cheap level, clamped: it is positive definite, so that
eigenvalues which :math:`A_S` has beyond the end are scaled and not chased. A few Lanczos steps on :math:`A_S` from r
give :math:`f(A_S) r`, and with it :math:`r' f(A_S) r`: by perturbation of second order, by how much :math:`\theta` is
still off, before the next product is spent. What the last direction gained over what was predicted says how good the
level is. Where it is little, the next level takes over; on the last one the direction is the residual itself, and the
method is Lanczos' from where it stands.

Cost: for each direction a product of the last level and ``num_inner`` of a cheap one. Memory: ``2 ncv + num_inner``
vectors.
Source: Davidson, J. Comput. Phys. 17 (1975) 87-94, doi:10.1016/0021-9991(75)90065-0; Morgan and Scott, SIAM J. Sci.
Stat. Comput. 7 (1986) 817-825, doi:10.1137/0907054. The clamped function of a sample is hvpkit's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import check_count
from hvpkit.iterate import Look, Monitor, full_precision, iterate
from hvpkit.operators import LinearOperator
from hvpkit.probes import normal_vector
from hvpkit.results import EigenResult, Status
from hvpkit.solvers.arguments import Request, check_arguments
from hvpkit.solvers.basis import orthonormalise_
from hvpkit.solvers.block import power_of_two, residuals_of, row_norms, turn_
from hvpkit.solvers.bounds import kato_temple
from hvpkit.solvers.finish import (
    Checked,
    concluded,
    eigen_result,
    floor,
    intervals,
    rounding,
    verdict,
)
from hvpkit.solvers.rayleigh_ritz import select
from hvpkit.solvers.subspace import Subspace, drop_non_finite, extend, multiply, rayleigh_ritz, start

START_STEPS = 30
"""Lanczos steps on the first level for the first vectors."""

CLAMP = 0.05
"""Of the spread of the spectrum: the most that the clamp is."""

SAFETY = 2.0
"""What a predicted error is multiplied by."""

FIRST_FALL = 0.75
"""How much a predicted error is taken to fall with a direction, as long as there is only one."""

POOR, PATIENCE = 0.5, 3
"""A level is left if its last directions gained less than this share of what they predicted, in geometric mean."""


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for, with the levels and the number of Lanczos steps on one of them."""

    levels: tuple[LinearOperator, ...]
    num_inner: int


@dataclass(frozen=True)
class State(Subspace):
    """A basis, and the direction that it grows by next.

    Attributes:
        end: which end's: 0 the low one, -1 the high one.
        residual: of that end's Ritz vector ``[n]``.
        direction: what it gave ``[n]``, until the basis grows by it; its length does not matter.
        values: of the ends, over scale.
        errors: what they may still be off by: bounds, or predictions with what they are likely to lack.
        predictions: of each end, what the last direction promised to gain; 0 before there is one.
        gains: of the level's last directions, over what was predicted.
        level: the level that directions come from.
    """

    end: int = -1
    residual: Tensor | None = None
    direction: Tensor | None = None
    values: tuple[float, float] = (math.nan, math.nan)
    errors: tuple[float, float] = (math.inf, math.inf)
    predictions: tuple[float, float] = (0.0, 0.0)
    gains: tuple[float, ...] = ()
    level: int = 0


def init(op: LinearOperator, goal: Goal, ncv: int) -> State:
    """A state with the start of the caller's as new rows, or with room for the first ones."""
    width = 0 if goal.start is None else min(goal.start.shape[1], ncv // 2)
    return State(**vars(start(op, goal, width, ncv)))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Products with new rows; else a direction for the basis to grow by, from a cheap level."""
    if state.num_new:
        return multiply(op, state, 1)
    if state.residual is None:
        return _started(op, goal, state)
    return _directed(op, goal, state)


def _started(op: LinearOperator, goal: Goal, state: State) -> State:
    """The extreme Ritz vectors of the first level as new rows, or a random vector if it is the only level."""
    level = goal.levels[0]
    vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=goal.seed, stream=1)
    if level is op:
        return extend(op, goal, state, vector[None])
    rows, values, coefficients, scale = _krylov(level, vector, min(START_STEPS, op.n), None)
    new = (coefficients[:, [0, -1]] if len(values) > 1 else coefficients).mT.to(rows) @ rows
    if not bool(torch.isfinite(new).all()):
        new = vector[None]
    spent = state.num_matvecs + len(rows) * level.cost
    return extend(op, goal, replace(state, num_matvecs=spent, scale=scale), new)


def _directed(op: LinearOperator, goal: Goal, state: State) -> State:
    r"""The state with :math:`f(A_S) r` and what it predicts that the end will gain."""
    level, residual, end = goal.levels[state.level], state.residual, state.end
    assert residual is not None
    theta, inwards = state.values[end], 1.0 if end == 0 else -1.0
    rows, values, coefficients, _ = _krylov(level, residual, min(goal.num_inner, op.n), state.scale)
    clamp = max(min(abs(theta), CLAMP * (state.values[1] - state.values[0])), floor(op, state.norm))
    weights = coefficients[0] / (inwards * (values - theta)).clamp(min=clamp)
    direction = (coefficients @ weights).to(rows) @ rows
    length = float(op.space.norm(residual))
    prediction = length**2 * float(coefficients[0] @ weights)
    state = replace(state, num_matvecs=state.num_matvecs + len(rows) * level.cost, direction=direction)
    if not math.isfinite(prediction):
        return replace(state, direction=residual)
    before = state.predictions[end]
    fall = min(prediction / before, 0.95) if before > 0 else FIRST_FALL
    likely = SAFETY * max((1.0, *state.gains[-1:])) * prediction / (1 - fall)
    return replace(
        state,
        predictions=_with(state.predictions, end, prediction),
        errors=_with(state.errors, end, min(state.errors[end], likely)),
    )


def _with(pair: tuple[float, float], end: int, value: float) -> tuple[float, float]:
    return (value, pair[1]) if end == 0 else (pair[0], value)


def _krylov(
    op: LinearOperator, vector: Tensor, num_steps: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lanczos from a vector: rows ``[m, n]``, Ritz values over scale and coefficients ``[m, m]`` (CPU, float64)."""
    rows = torch.empty(num_steps, op.n, dtype=op.dtype, device=op.device)
    projected = rows.new_zeros(num_steps, num_steps)
    alive, norm = rows.new_zeros(num_steps), rows.new_zeros(())
    alive[0] = orthonormalise_(op.space, rows, 0, vector / vector.abs().max(), norm)[2]
    for row in range(num_steps):
        image = op.product(rows[row].unsqueeze(1))[:, 0]
        if scale is None:
            scale = power_of_two(image.abs().max())
        image, norm = image / scale, torch.maximum(norm, op.space.norm(image / scale))
        if row + 1 < num_steps:
            projected[: row + 1, row], projected[row + 1, row], alive[row + 1] = orthonormalise_(
                op.space, rows, row + 1, image, norm
            )
        else:
            projected[:, row] = op.space.dots(rows, image)
    kept = alive.cpu().nonzero().flatten()
    small = projected.to("cpu", torch.float64)[kept][:, kept]
    assert scale is not None
    if not bool(torch.isfinite(small).all()):
        small = torch.full_like(small, math.nan)
        return rows[kept], small.diagonal(), small, scale
    values, coefficients = torch.linalg.eigh((small + small.mT) / 2)
    return rows[kept], values, coefficients, scale


def look(op: LinearOperator, goal: Goal, state: State) -> Look[State]:
    """The ends so far, whether they are good enough, and what to do next."""
    nothing = math.nan, math.nan, math.inf, math.inf
    if state.num_fresh:
        state = _seen(op, goal, drop_non_finite(state))
    elif not state.num_rows:
        return Look(state, *nothing, status=None, num_steps=max(1, state.num_new))
    status = _status(op, goal, state)
    if status is None and state.direction is not None:
        state = extend(op, goal, _with_room(op, state), state.direction[None])
        state = replace(state, direction=None, residual=None)
    scale = float(state.scale)
    errors = [max(error, rounding(op, state.norm)) * scale for error in state.errors]
    return Look(
        state,
        smallest=state.values[0] * scale,
        largest=state.values[1] * scale,
        smallest_bound=errors[0],
        largest_bound=errors[1],
        status=status,
        num_steps=max(1, state.num_new),
    )


def _seen(op: LinearOperator, goal: Goal, state: State) -> State:
    """The state with new Ritz pairs: values, errors, what the last direction gained, and the next residual."""
    m = state.num_rows
    if not m:
        return state
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    state = replace(state, norm=max(state.norm, pairs.norm))
    places = select(pairs.values, min(m, 4), "BE")
    turn = (pairs.to_rows @ pairs.vectors[:, places]).mT.to(state.rows)
    vectors, images, values = turn @ state.rows[:m], turn @ state.images[:m], pairs.values[places]
    residuals = residuals_of(vectors, images, values)
    norms = row_norms(op.space, residuals).to("cpu", torch.float64)
    ends = [0, len(places) - 1]
    kept = ends[: len(places)]
    bounds = (kato_temple(values, norms) if m > 3 else norms)[ends].tolist()
    gain = abs(float(values[ends[state.end]]) - state.values[state.end])
    predicted = state.predictions[state.end]
    gains = (*state.gains, gain / predicted)[-PATIENCE:] if predicted > 0 else state.gains
    poor = len(gains) == PATIENCE and math.prod(max(g, 1e-9) for g in gains) < POOR**PATIENCE
    errors = (
        min(bounds[0], state.errors[0] if state.end else math.inf),
        min(bounds[1], state.errors[1] if not state.end else math.inf),
    )
    state = replace(
        state,
        best=Checked(values[kept], vectors[kept].mT, norms[kept]),
        values=(float(values[0]), float(values[-1])),
        errors=errors,
        gains=() if poor else gains,
        level=state.level + poor if state.level + 1 < len(goal.levels) else state.level,
    )
    needs = [error / max(abs(value), 1e-300) for error, value in zip(state.errors, state.values, strict=True)]
    end = -1 if needs[1] > goal.tol or needs[1] > needs[0] else 0
    state = replace(state, end=end, residual=residuals[ends[end]].clone(), direction=None)
    exact = float(norms[ends[end]]) <= floor(op, state.norm)
    return replace(state, direction=state.residual) if exact or goal.levels[state.level] is op else state


def _status(op: LinearOperator, goal: Goal, state: State) -> Status | None:
    """Why it is over, if it is."""
    if state.suspect is not None:
        return Status.NON_FINITE
    if state.num_rows < goal.k:
        return None
    values = torch.tensor(state.values, dtype=torch.float64)
    bounds = torch.tensor(state.errors, dtype=torch.float64) + rounding(op, state.norm)
    whole, least = state.num_rows == op.n, floor(op, state.norm)
    done = ((bounds <= goal.tol * values.abs()) & (values != 0)) | (bounds <= least)
    if not (whole or bool(done.all())):
        return None
    return verdict(Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED, goal.tol, least, values, bounds)


def _with_room(op: LinearOperator, state: State) -> State:
    """The state with room for another row: half of the Ritz vectors from either end, if its basis is full."""
    m = state.num_rows
    if m < len(state.rows) or m == op.n:
        return state
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    kept = select(pairs.values, m // 2, "BE")
    for matrix in (state.rows, state.images):
        turn_(matrix, pairs.to_rows @ pairs.vectors[:, kept])
    return replace(state, num_rows=len(kept))


def finalize(op: LinearOperator, goal: Goal, state: State, status: Status) -> EigenResult:
    """The pairs of both ends, with the residuals that their products give: no further product is needed."""
    unit, best = float(state.scale), state.best
    found = Checked(best.values * unit, best.vectors, best.residual_norms * unit)
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    where = intervals(found, "BE", goal.k, rounding(op, state.norm) * unit, kind)
    bounds = (torch.tensor(state.errors, dtype=torch.float64) + rounding(op, state.norm)) * unit
    return eigen_result(
        found,
        where,
        status,
        num_matvecs=state.num_matvecs,
        seconds=0.0,
        history=(),
        error_bounds=bounds[: len(found.values)],
    )


def multifidelity(
    levels: Sequence[LinearOperator],
    *,
    v0: Tensor | None = None,
    tol: float = 1e-2,
    ncv: int = 60,
    num_inner: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Both ends of the last of several levels, with most of the work on cheaper ones.

    Stops when for both ends ``error_bound <= tol * |value|``. The bound is the residual's norm, its square over the gap
    to the next Ritz value, or, where a cheap level was just asked, twice what it predicts,
    :math:`2\, r' f(A_S)\, r / (1 - \rho)`, with :math:`\rho` by how much predictions fall from one direction to the
    next. The last one is an estimate; the interval of an end rests on the residual alone.

    Use it for a Hessian over many examples: levels are ``H.coarsen(...)`` and H itself. For operators without a cheap
    likeness, and where the interval must hold with a stated confidence, use :func:`hvpkit.lanczos`.

    Args:
        levels: operators of the same size and of rising ``cost``; the last is the one asked about. One alone is
            a Lanczos method without the bounds of :func:`hvpkit.lanczos`.
        v0: start ``[n]`` or ``[n, p]``, as the vectors of an earlier result, instead of 30 steps on the first level.
        tol: relative error of both eigenvalues.
        ncv: the most basis vectors before half of them are dropped.
        num_inner: Lanczos steps on a cheap level for each direction; by default as many as cost one product, but
            from 6 to 20.
        max_matvecs: products of the last level, the others counted at their cost; by default 1,000.
        time_limit: seconds.
        seed: of the start vector.
        monitor: called with a :class:`hvpkit.Progress` after each look; its bounds are the error bounds.

    Returns:
        Two pairs (one for n = 1), with true residuals. ``num_matvecs`` is in products of an operator of cost 1.

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
    return _solve(
        _checked_levels(levels)[-1],
        tuple(levels),
        v0=v0,
        tol=tol,
        ncv=ncv,
        num_inner=num_inner,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        monitor=monitor,
    )


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
    return levels


@full_precision
def _solve(
    op: LinearOperator,
    levels: tuple[LinearOperator, ...],
    *,
    v0: Tensor | None,
    tol: float,
    ncv: int,
    num_inner: int | None,
    max_matvecs: float | None,
    time_limit: float | None,
    seed: Seed,
    monitor: Monitor | None,
) -> EigenResult:
    begin = time.perf_counter()
    check_count("ncv", ncv, 8)
    asked = check_arguments(
        op,
        min(2, op.n),
        "BE",
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        num_checks=0,
    )
    if num_inner is None:
        num_inner = min(20, max(6, round(op.cost / levels[0].cost)))
    check_count("num_inner", num_inner, 1)
    goal = Goal(**vars(asked), levels=levels, num_inner=num_inner)
    run = iterate(
        init(op, goal, ncv),
        lambda state: step(op, goal, state),
        lambda state: look(op, goal, state),
        step_cost=max(op.cost, *(max(START_STEPS, num_inner) * level.cost for level in levels[:-1]), 0.0),
        limits=asked.limits,
        monitor=monitor,
    )
    found = finalize(op, goal, run.state, run.status)
    return concluded(op, found, run.history, begin, run.state.suspect)
