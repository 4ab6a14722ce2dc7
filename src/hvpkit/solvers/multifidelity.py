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
level is. Where it is little, the next level takes over, and after the last cheap one :func:`hvpkit.lanczos`, with its
own bounds. That begins anew: from vectors that are partly right it takes more products (22 for 17 on a bulk with
outliers), as what they may lack has to be excluded all the same.

An end is also looked at from its neighbour: where the Ritz pair next to it may still gain enough to pass it, V grows by
that pair first. Else the method could stop at an inner eigenvalue, as one can that follows residuals alone; where the
next eigenvalue is only a few ``tol`` away it still can, now and then: docs/multifidelity.md has figures.

Cost: for each direction a product of the last level and ``num_inner`` of a cheap one. Memory: ``2 ncv + num_inner``
vectors.
Source: Davidson, J. Comput. Phys. 17 (1975) 87-94, doi:10.1016/0021-9991(75)90065-0; Morgan and Scott, SIAM J. Sci.
Stat. Comput. 7 (1986) 817-825, doi:10.1137/0907054. The clamped function of a sample is hvpkit's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import check_count
from hvpkit.iterate import Look, Monitor, full_precision, iterate
from hvpkit.operators import LinearOperator
from hvpkit.probes import normal_vector
from hvpkit.results import EigenResult, Progress, Status
from hvpkit.solvers.arguments import Request, Start, check_arguments, check_confidence
from hvpkit.solvers.basis import orthonormalise_
from hvpkit.solvers.block import mixed_start, power_of_two, residuals_of, row_norms, turn_
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
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.rayleigh_ritz import select
from hvpkit.solvers.subspace import Subspace, drop_non_finite, extend, multiply, rayleigh_ritz, start

START_STEPS = 30
"""Lanczos steps on the first level for the first vectors, at most."""

START_ACCURACY = 0.03
"""These end early if residuals on the first level are at most this share of their values."""

INNER_STEPS = 6, 30
"""Lanczos steps on a level for a direction: by default as many as cost a product, but at least and at most these."""

SETTLED = 0.1
"""They end early if the last of them changed what is predicted by no more than this share of it."""

STRIDE = 3
"""Lanczos steps on a level from one look at them to the next."""

CLAMP = 0.05
"""Of the spread of the spectrum: the most that a clamp is."""

NEAR = 10.0
"""In units of ``tol * |value|``: eigenvalues nearer to an end than that count as this far away in what bounds it."""

SAFETY = 3.0
"""What a predicted error is multiplied by."""

POOR, PATIENCE = 0.5, 3
"""A level is left if its last directions gained less than this share of what they predicted, in geometric mean; one
direction is enough if it gained very little."""

LEFT = Status.MAX_MATVECS
"""How the loop ends once all cheap levels were left: what they may do is done."""

ESTIMATED = (
    "every error is at most tol * |value| by a sample's estimate; that the values are the extreme ones is likely, not "
    'certain: method="lanczos" says how likely'
)
"""What convergence means here."""

ENDS = {"BE": (0, -1), "SA": (0,), "LA": (-1,)}


@dataclass(frozen=True)
class Goal(Request):
    """What is asked for, with the levels, the most Lanczos steps on one for a direction, and what levels have cost."""

    levels: tuple[LinearOperator, ...]
    num_inner: int | None
    spent: float

    @property
    def ends(self) -> tuple[int, ...]:
        """Which ends: 0 the low one, -1 the high one."""
        return ENDS[self.which]

    def inner_steps(self, level: LinearOperator) -> int:
        """The most Lanczos steps on a level for a direction."""
        least, most = INNER_STEPS
        worth = round(self.levels[-1].cost / level.cost) if level.cost else most
        return min(self.num_inner or min(most, max(least, worth)), level.n)


@dataclass(frozen=True)
class State(Subspace):
    """A basis, and the direction that it grows by next.

    Ritz pairs go by their place: 0 the lowest, 1 the next, -1 the highest, -2 the next.

    Attributes:
        place: of the pair to grow by.
        residuals: of these pairs ``[4, n]``; fewer on a smaller basis.
        direction: what that pair's residual gave ``[n]``; its length does not matter.
        values: of the pairs, over scale.
        errors: what they may be off by: bounds, or predictions.
        predictions: what the ends' last directions promised to gain.
        gains: of the level's last directions, over what was predicted.
        level: the level that directions come from.
    """

    place: int = -1
    residuals: Tensor | None = None
    direction: Tensor | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)
    predictions: Mapping[int, float] = field(default_factory=dict)
    gains: tuple[float, ...] = ()
    level: int = 0


def init(op: LinearOperator, goal: Goal, ncv: int) -> State:
    """A state with room for the first rows."""
    return State(**vars(start(op, replace(goal, start=None), 0, ncv)))


def step(op: LinearOperator, goal: Goal, state: State) -> State:
    """Products with new rows; else a direction for the basis to grow by, from a cheap level."""
    if state.num_new:
        return multiply(op, state, 1)
    if not state.num_rows:
        return _started(op, goal, state)
    if state.residuals is None:
        return state  # the start gave fewer rows than it might
    return _directed(op, goal, state)


def _started(op: LinearOperator, goal: Goal, state: State) -> State:
    """The extreme Ritz vectors of the first level as new rows, from the caller's start or a random one."""
    level, ends = goal.levels[0], list(goal.ends)
    if goal.start is None:
        vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=goal.seed, stream=1)
    else:
        vector = mixed_start(goal.start, 1, goal.seed)[0]

    def close(found: Krylov) -> bool:
        residuals = found.tail * found.coefficients[-1, ends].abs()
        return bool((residuals <= START_ACCURACY * found.values[ends].abs()).all())

    found = _krylov(level, vector, min(START_STEPS, op.n), None, close)
    kept = (
        [-1] if goal.which == "LA" else [0, -1]
    )  # the high end is not far, and would else be in every residual
    new = found.coefficients[:, kept[: len(found.values)]].mT.to(found.rows) @ found.rows
    if not bool(torch.isfinite(new).all()):
        new = vector[None]
    spent = goal.spent + len(found.rows) * level.cost
    return extend(op, goal, replace(state, num_matvecs=spent, scale=found.scale), new)


def _directed(op: LinearOperator, goal: Goal, state: State) -> State:
    r"""The state with :math:`f(A_S) r` and what it predicts that its pair will gain."""
    assert state.residuals is not None
    level, place = goal.levels[state.level], state.place
    end, residual = _end(place), state.residuals[place]
    theta, inwards = state.values[place], 1.0 if end == 0 else -1.0
    size, spread = abs(state.values[end]), max(state.values[-1] - state.values[0], abs(theta))

    def weights(found: Krylov, share: float) -> Tensor:
        """The function f at the level's Ritz values, with a clamp of this share of the end's size."""
        clamp = max(min(share * size, CLAMP * spread), floor(op, state.norm))
        return found.coefficients[0] / (inwards * (found.values - theta)).clamp(min=clamp)

    def settled(found: Krylov) -> bool:
        before.append(float(found.coefficients[0] @ weights(found, NEAR * goal.tol)))
        return abs(before[-1] - before[-2]) <= SETTLED * before[-1]

    before = [0.0]
    found = _krylov(level, residual, goal.inner_steps(level), state.scale, settled)
    state = replace(state, num_matvecs=state.num_matvecs + len(found.rows) * level.cost)
    squared = float(op.space.norm(residual)) ** 2
    gain, most = (
        squared * float(found.coefficients[0] @ weights(found, share)) for share in (1.0, NEAR * goal.tol)
    )
    if not math.isfinite(gain):
        return replace(state, direction=residual)
    likely = SAFETY * max((1.0, *state.gains)) * most
    return replace(
        state,
        direction=(found.coefficients @ weights(found, 1.0)).to(found.rows) @ found.rows,
        predictions={**state.predictions, place: gain} if place == end else state.predictions,
        errors={**state.errors, place: min(state.errors[place], likely)},
    )


def _end(place: int) -> int:
    """The place of the end that a place is at."""
    return 0 if place >= 0 else -1


@dataclass(frozen=True)
class Krylov:
    """A Krylov space of a level.

    Attributes:
        rows: its orthonormal basis ``[m, n]``.
        values: Ritz values over scale ``[m]``, on the CPU in float64; NaN if a product was not finite.
        coefficients: of Ritz vectors, in columns ``[m, m]``, likewise.
        tail: length, over scale, of what the last product adds to the basis; 0 at the end.
        scale: what products are divided by, 0-d.
    """

    rows: Tensor
    values: Tensor
    coefficients: Tensor
    tail: float
    scale: Tensor


def _krylov(
    op: LinearOperator,
    vector: Tensor,
    num_steps: int,
    scale: Tensor | None,
    enough: Callable[[Krylov], bool],
) -> Krylov:
    """Lanczos from a vector, for so many steps or until they are enough."""
    rows = torch.empty(num_steps, op.n, dtype=op.dtype, device=op.device)
    projected = rows.new_zeros(num_steps + 1, num_steps)
    alive, norm = rows.new_zeros(num_steps), rows.new_zeros(())
    alive[0] = orthonormalise_(op.space, rows, 0, vector / vector.abs().max(), norm)[2]
    for row in range(num_steps):
        image = op.product(rows[row].unsqueeze(1))[:, 0]
        if scale is None:
            scale = power_of_two(image.abs().max())
        image, norm = image / scale, torch.maximum(norm, op.space.norm(image / scale))
        count = row + 1
        if count == num_steps:
            projected[:count, row] = op.space.dots(rows, image)
        else:
            projected[:count, row], projected[count, row], alive[count] = orthonormalise_(
                op.space, rows, count, image, norm
            )
        if count % STRIDE == 0 or count == num_steps:
            found = _ritz(rows[:count], projected[: count + 1, :count], alive[:count], scale)
            if count < num_steps and (not math.isfinite(found.tail) or enough(found)):
                break
    return found


def _ritz(rows: Tensor, projected: Tensor, alive: Tensor, scale: Tensor) -> Krylov:
    """Ritz pairs on those rows that are not zero."""
    kept = alive.cpu().nonzero().flatten()
    small = projected.to("cpu", torch.float64)
    tail, small = float(small[-1, -1]), small[kept][:, kept]
    if not bool(torch.isfinite(small).all()):
        nothing = torch.full_like(small, math.nan)
        return Krylov(rows[kept], nothing.diagonal(), nothing, math.nan, scale)
    values, coefficients = torch.linalg.eigh((small + small.mT) / 2)
    return Krylov(rows[kept], values, coefficients, tail, scale)


def look(op: LinearOperator, goal: Goal, state: State) -> Look[State]:
    """The ends so far, whether they are good enough, and what to do next."""
    if state.num_fresh:
        state = _seen(op, goal, drop_non_finite(state))
    if not state.num_rows:
        nothing = math.nan, math.nan, math.inf, math.inf
        status = None if state.suspect is None else Status.NON_FINITE
        return Look(state, *nothing, status=status, num_steps=3)
    place = _neediest(op, goal, state)
    status = _status(op, goal, state, place is None)
    if status is None and place is not None:
        state = _aimed(op, goal, state, place)
    scale = float(state.scale)
    errors = [max(state.errors[end], rounding(op, state.norm)) * scale for end in (0, -1)]
    return Look(
        state,
        smallest=state.values[0] * scale,
        largest=state.values[-1] * scale,
        smallest_bound=errors[0],
        largest_bound=errors[1],
        status=status,
        num_steps=max(1, state.num_new),
        level=state.level,
    )


def _aimed(op: LinearOperator, goal: Goal, state: State, place: int) -> State:
    """The state about to grow by a pair: by its direction, if that is known, or by a residual that is rounding."""
    direction = state.direction if place == state.place else None
    if direction is None and state.residuals is not None and state.errors[place] <= floor(op, state.norm):
        direction = state.residuals[place]
    state = replace(state, place=place, direction=None)
    if direction is None:
        return state
    return extend(op, goal, _with_room(op, state), direction[None])


def _seen(op: LinearOperator, goal: Goal, state: State) -> State:
    """The state with new Ritz pairs: their values, errors and residuals, and what the last direction gained."""
    m = state.num_rows
    if not m:
        return state
    pairs = rayleigh_ritz(op, state.rows[:m], state.images[:m])
    state = replace(state, norm=max(state.norm, pairs.norm))
    chosen = select(pairs.values, min(m, 4), "BE")
    turn = (pairs.to_rows @ pairs.vectors[:, chosen]).mT.to(state.rows)
    vectors, images, found = turn @ state.rows[:m], turn @ state.images[:m], pairs.values[chosen]
    residuals = residuals_of(vectors, images, found)
    norms = row_norms(op.space, residuals).to("cpu", torch.float64)
    near = (NEAR * goal.tol * found.abs()).clamp(min=1e-300)
    bounds = torch.minimum(norms, torch.maximum(kato_temple(found, norms), norms**2 / near))
    places = [place for place in (0, 1, -2, -1) if -len(found) <= place < len(found)]
    values = {place: float(found[place]) for place in places}
    moved = {place: abs(value - state.values.get(place, math.inf)) for place, value in values.items()}
    gains, predicted = state.gains, state.predictions.get(state.place, 0.0)
    if predicted > 0:
        gains = (*gains, moved[state.place] / predicted)[-PATIENCE:]
    poor = math.prod(gains) < POOR**PATIENCE

    def error(place: int) -> float:
        """What was claimed before, where it still holds, or what is known now."""
        before = state.errors.get(place, math.inf)
        stale = poor or place == state.place or moved[place] > before
        return min(float(bounds[place]), math.inf if stale else before)

    asked = [end % len(found) for end in goal.ends][: len(found)]
    return replace(
        state,
        best=Checked(found[asked], vectors[asked].mT, norms[asked]),
        residuals=residuals,
        direction=None,
        values=values,
        errors={place: error(place) for place in places},
        gains=() if poor else gains,
        level=state.level + poor,
    )


def _neediest(op: LinearOperator, goal: Goal, state: State) -> int | None:
    """The pair to grow by, if any: the high end while it is not good enough, then the low one, then those next to them.

    Such a pair is good enough where what it may still gain does not take it past its end: else it may turn out to be
    the extreme one.
    """
    if state.num_rows < goal.k:
        return goal.ends[0]
    noise, least = rounding(op, state.norm), floor(op, state.norm)
    for end in reversed(goal.ends):
        if not state.errors[end] + noise <= max(goal.tol * abs(state.values[end]), least):
            return end
    for end in goal.ends if state.num_rows > 2 else ():
        beside = 1 if end == 0 else -2
        room = abs(state.values[beside] - state.values[end]) + goal.tol * abs(state.values[end])
        if not state.errors[beside] <= max(room, least):
            return beside
    return None


def _status(op: LinearOperator, goal: Goal, state: State, done: bool) -> Status | None:
    """Why it is over, if it is."""
    if state.suspect is not None:
        return Status.NON_FINITE
    whole, least = state.num_rows == op.n, floor(op, state.norm)
    if state.num_rows < goal.k or not (whole or done):
        return LEFT if goal.levels[state.level] is op else None
    values = torch.tensor([state.values[end] for end in goal.ends], dtype=torch.float64)
    bounds = torch.tensor([state.errors[end] for end in goal.ends], dtype=torch.float64)
    best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
    return verdict(best, goal.tol, least, values, bounds + rounding(op, state.norm))


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
    where = intervals(found, goal.which, goal.k, rounding(op, state.norm) * unit, kind)
    errors = [state.errors[end] for end in goal.ends[: len(found.values)]]
    bounds = (torch.tensor(errors, dtype=torch.float64) + rounding(op, state.norm)) * unit
    result = eigen_result(
        found,
        where,
        status,
        num_matvecs=state.num_matvecs,
        seconds=0.0,
        history=(),
        error_bounds=bounds,
    )
    return replace(result, message=ESTIMATED) if status is Status.CONVERGED else result


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
    cheap level was just asked, three times what it predicts, :math:`3\, r' f(A_S)\, r`, with a clamp of ten
    times ``tol * |value|``, and more if the last directions gained more than was predicted of them. That is an
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
    return _solve(
        _checked_levels(levels)[-1],
        tuple(levels),
        which=which,
        v0=v0,
        tol=tol,
        ncv=ncv,
        num_inner=num_inner,
        confidence=confidence,
        spent=spent,
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
    which: str,
    v0: Start | None,
    tol: float,
    ncv: int,
    num_inner: int | None,
    confidence: float,
    spent: float,
    max_matvecs: float | None,
    time_limit: float | None,
    seed: Seed,
    monitor: Monitor | None,
) -> EigenResult:
    begin = time.perf_counter()
    check_count("ncv", ncv, 8)
    check_confidence(confidence)
    if not 0 <= spent < math.inf or (spent and len(levels) == 1):
        raise ValueError(
            f"spent must be finite and not negative, and 0 where there is one level; got {spent}"
        )
    if num_inner is not None:
        check_count("num_inner", num_inner, 1)
    k = min(2, op.n) if which == "BE" else 1
    asked = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=tuple(ENDS),
        num_checks=0,
    )
    goal = Goal(**vars(asked), levels=levels, num_inner=num_inner, spent=spent)
    by_lanczos = partial(
        lanczos, op, k, which=goal.which, tol=goal.tol, confidence=confidence, seed=goal.seed
    )
    if len(levels) == 1:
        return by_lanczos(v0=v0, max_matvecs=max_matvecs, time_limit=time_limit, monitor=monitor)
    run = iterate(
        init(op, goal, ncv),
        lambda state: step(op, goal, state),
        lambda state: look(op, goal, state),
        step_cost=max(op.cost, *(max(START_STEPS, goal.inner_steps(x)) * x.cost for x in levels[:-1])),
        limits=asked.limits,
        monitor=monitor,
    )
    cheap = finalize(op, goal, run.state, run.status)
    cheap = concluded(op, cheap, run.history, begin, run.state.suspect)
    left = None if time_limit is None else time_limit - cheap.seconds
    if run.state.level + 1 < len(levels) or run.status is not LEFT:
        return cheap
    if asked.left(cheap.num_matvecs) < (2 * k + 1) * op.cost or (left is not None and left <= 0):
        return cheap

    def later(entry: Progress) -> Progress:
        spent, seconds = entry.num_matvecs + cheap.num_matvecs, entry.seconds + cheap.seconds
        return replace(entry, num_matvecs=spent, seconds=seconds, level=run.state.level)

    found = by_lanczos(
        max_matvecs=asked.left(cheap.num_matvecs),
        time_limit=left,
        monitor=monitor and (lambda entry: monitor(later(entry))),
    )
    return replace(
        found,
        num_matvecs=found.num_matvecs + cheap.num_matvecs,
        seconds=found.seconds + cheap.seconds,
        history=(*cheap.history, *map(later, found.history)),
    )
