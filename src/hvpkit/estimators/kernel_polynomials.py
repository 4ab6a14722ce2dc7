r"""Kernel polynomial method: spectral measures from Chebyshev moments, damped against Gibbs oscillations.

Method: with :math:`x = (A - c)/h` scaled into [-1, 1], :math:`\mu_j = v'T_j(x)v` for unit vectors v, by
:math:`T_{j+1} = 2xT_j - T_{j-1}`. Each matvec gives two moments: :math:`\mu_{2j} = 2\|T_jv\|^2 - 1` and
:math:`\mu_{2j+1} = 2\,(T_{j+1}v)'T_jv - \mu_1`. The density is :math:`\frac{1}{\pi\sqrt{1-x^2}} (g_0\mu_0 + 2\sum_j
g_j\mu_jT_j(x))`: with Jackson's factors g nowhere negative, and a peak has the width :math:`\pi h/N` for N moments.
Without them it integrates polynomials of degree below N exactly.

Cost: one matvec per step and vector, and a few for the ends of the spectrum. Memory: four vectors for each of a
group, and two.
Source: Weisse, Wellein, Alvermann, Fehske, Rev. Mod. Phys. 78 (2006) 275-306, doi:10.1103/RevModPhys.78.275.

Departures:
1. The ends are those of Lanczos' intervals, beyond which an eigenvalue is unlikely. If there is one, moments exceed
   one: the interval is widened, and the recurrence restarts.
2. Start vectors are orthonormal, as in :mod:`hvpkit.estimators.quadrature`.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from hvpkit._utils.files import beside
from hvpkit._utils.ranks import agreed
from hvpkit.estimators.quadrature import MESSAGES, Goal, Measured
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.results.plain_data import LONG
from hvpkit.results.spectral_measure import Measure
from hvpkit.solvers import krylov
from hvpkit.solvers.checkpoint import Checkpoint, Witness, delete
from hvpkit.solvers.driver import Assessment, Limits, Monitor, run
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.plain_state import restored

MARGIN, WIDER = 1.01, 1.5
"""Factors of the interval's half width: at once, and whenever an eigenvalue is found outside. Chosen by feel."""

END_MATVECS, CONFIDENCE = 40, 1 - 1e-6
"""For the ends of the spectrum: matvecs at most, and confidence that no eigenvalue lies outside. Chosen by feel."""


@dataclass(frozen=True)
class Band:
    """The interval that is mapped to [-1, 1]."""

    center: float
    half_width: float

    @classmethod
    def around(cls, ends: EigenResult, dtype: torch.dtype) -> Band:
        """Return the hull of both ends' intervals, not narrower than rounding allows."""
        low, high, limits = ends.intervals[0].lower, ends.intervals[-1].upper, torch.finfo(dtype)
        rounding = limits.eps**0.5 * max(abs(low), abs(high))
        return cls((low + high) / 2, max(MARGIN * (high - low) / 2, rounding, limits.tiny / limits.eps))


@dataclass(frozen=True)
class Ends:
    """The ends of the spectrum, as they were found before the recurrences.

    Attributes:
        band: around them.
        num_matvecs: full-data matvecs that they took.
        seconds: wall time that they took.
        history: of their solve.
    """

    band: Band
    num_matvecs: float = 0.0
    seconds: float = 0.0
    history: tuple[Progress, ...] = ()


@dataclass(frozen=True)
class KernelState:
    """The Chebyshev recurrences of the present group of vectors, and the measures of the groups before.

    Attributes:
        band: of the present vectors.
        start: orthonormal rows ``[b, n]``.
        current, previous: ``T_j`` and ``T_{j-1}`` times them.
        moments: each ``[b]``, two for each step.
        finished: of the vectors before.
        witness: a random combination of all vectors multiplied so far, and of their matvecs, over the half width of
            the first band.
        ends: of the spectrum.
        num_matvecs: full-data matvecs so far.
    """

    band: Band
    start: Tensor = field(metadata=LONG)
    current: Tensor = field(metadata=LONG)
    previous: Tensor = field(metadata=LONG)
    witness: Witness
    ends: Ends
    moments: tuple[Tensor, ...] = ()
    finished: tuple[Measure, ...] = ()
    num_matvecs: float = 0.0

    @property
    def degree(self) -> int:
        """Degree of the current polynomial: matvecs with each vector."""
        return len(self.moments) // 2


def init(op: LinearOperator, goal: Goal, ends: Ends, group: int = 0) -> KernelState:
    """Return the state before the first matvec of a group of vectors."""
    start = _start(op, goal, group)
    zero, witness = torch.zeros_like(start), Witness.empty(op)
    return KernelState(ends.band, start, start, zero, witness, ends, num_matvecs=ends.num_matvecs)


def _start(op: LinearOperator, goal: Goal, group: int) -> Tensor:
    size = goal.sizes[group]
    return krylov.start(op, size, size, goal.seed_of(group)).basis


def _restarted(state: KernelState, band: Band, start: Tensor) -> KernelState:
    """Return the state before the first matvec of other vectors, or in another band."""
    return replace(state, band=band, start=start, current=start, previous=torch.zeros_like(start), moments=())


def step(op: LinearOperator, state: KernelState) -> KernelState:
    """Compute the next polynomial and its two moments."""
    band, current = state.band, state.current
    factor = (2 if state.degree else 1) / band.half_width
    images = op.product(current.mT).mT.contiguous()  # sums over rows have the same bits again
    new = torch.add(images, current, alpha=-band.center) * factor - state.previous
    odd, even = (op.space.reduce((new * other).sum(dim=1)) for other in (current, new))
    if state.degree:
        odd = 2 * odd - state.moments[0]
    return replace(
        state,
        current=new,
        previous=current,
        witness=state.witness.including(op.space, current, images / state.ends.band.half_width),
        moments=(*state.moments, odd, 2 * even - 1),
        num_matvecs=state.num_matvecs + len(new) * op.cost,
    )


def jackson(count: int) -> Tensor:
    """Return Jackson's damping factors of ``count`` moments.

    Example:
        >>> jackson(3)
        tensor([1.0000, 0.7071, 0.2500], dtype=torch.float64)
    """
    j, angle = torch.arange(count, dtype=torch.float64, device="cpu"), math.pi / (count + 1)
    return ((count - j + 1) * torch.cos(j * angle) + torch.sin(j * angle) / math.tan(angle)) / (count + 1)


def measure(band: Band, moments: Tensor) -> Measure:
    """Return the rules ``[b, 2 N]`` at Chebyshev's nodes with these moments ``[b, N]``, the first of them one."""
    count = moments.shape[1]
    angles = (torch.arange(2 * count, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / (2 * count))
    series = torch.cos(torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * angles) / count
    series[0] /= 2
    weights, masses = moments @ series, (moments * jackson(count)) @ series
    nodes = band.center + band.half_width * torch.cos(angles)
    unknown = torch.full_like(nodes, math.inf)
    weights = weights.flip(1)
    return Measure(nodes.flip(0), weights, masses.clamp(min=0).flip(1), unknown, weights)


def assess(op: LinearOperator, goal: Goal, state: KernelState) -> Assessment[KernelState]:
    """Check that moments are finite and at most one; go on to the next group if this one is done."""
    status, suspect = None, None
    moments = known_moments(state)
    if moments.shape[1] <= 2 * state.degree:
        status, suspect = Status.NON_FINITE, state.previous.mT
    elif bool((moments.abs() > 1 + torch.finfo(op.dtype).eps ** 0.5).any()):
        wider = replace(state.band, half_width=WIDER * state.band.half_width)
        state = _restarted(state, wider, state.start)
    elif state.degree == goal.num_steps and len(state.finished) == len(goal.sizes) - 1:
        status = Status.COMPLETED
    elif state.degree == goal.num_steps:
        finished = (*state.finished, measure(state.band, moments))
        state = replace(_restarted(state, state.band, _start(op, goal, len(finished))), finished=finished)
    low, high = state.band.center - state.band.half_width, state.band.center + state.band.half_width
    num_steps = max(1, min(goal.num_steps - state.degree, state.degree // 4))
    progress = Progress(0.0, 0.0, low, high, math.nan, math.nan)
    num_done = sum(goal.sizes[: len(state.finished)]) * goal.num_steps + len(state.start) * state.degree
    num_left = (sum(goal.sizes) * goal.num_steps - num_done) * op.cost
    return Assessment(state, progress, num_steps, status, suspect, num_left=num_left)


def known_moments(state: KernelState) -> Tensor:
    """Return the moments ``[b, N]`` before the first that is not finite, from that of degree zero, which is one."""
    ones = torch.ones_like(state.start[:, 0])
    moments = torch.stack([ones, *state.moments], dim=1).to("cpu", torch.float64)
    finite = torch.isfinite(moments).all(dim=0).tolist()
    return moments[:, : finite.index(False)] if False in finite else moments


def measures(state: KernelState, is_done: bool = False) -> list[Measure]:
    """Return the measures of complete groups; if there is none, of the group that a limit cut.

    ``is_done`` if the present group is the last and complete.
    """
    moments = known_moments(state)
    if (state.finished and not is_done) or moments.shape[1] < 2:
        return list(state.finished)
    return [*state.finished, measure(state.band, moments)]


@dataclass(frozen=True)
class KernelPolynomials:
    """The functions of this file as a :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        goal: the checked arguments.
        ends: of the spectrum.
        time_limit: seconds, or None.
    """

    op: LinearOperator
    goal: Goal
    ends: Ends
    time_limit: float | None

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return max(self.goal.sizes) * self.op.cost

    @property
    def limits(self) -> Limits:
        """The time limit, and the matvecs of the goal."""
        spent = self.ends.num_matvecs
        budget = spent + sum(self.goal.sizes) * self.goal.num_steps * self.op.cost
        return Limits(budget, self.time_limit, 0.0, spent + self.step_cost)

    def init(self) -> KernelState:
        return init(self.op, self.goal, self.ends)

    def step(self, state: KernelState) -> KernelState:
        return step(self.op, state)

    def assess(self, state: KernelState) -> Assessment[KernelState]:
        return assess(self.op, self.goal, state)

    def finalize(self, state: KernelState, status: Status) -> Measured:
        found = measures(state, is_done=status is Status.COMPLETED)
        return Measured(found, state.num_matvecs, status, MESSAGES[status])


def solve(
    op: LinearOperator,
    goal: Goal,
    *,
    time_limit: float | None,
    monitor: Monitor | None,
    checkpoint: str | os.PathLike[str] | None,
) -> Measured:
    """Find the ends of the spectrum, and measure all groups, or as many as the time allows.

    Until the recurrences have a checkpoint, that of the ends lies beside it, in a file of its own.
    """
    file, of_ends, ends = None, None, None
    if checkpoint is not None:
        identity = {"estimator": "kernel polynomials", **asdict(goal), **op.identity()}
        file = Checkpoint[KernelState](
            checkpoint,
            identity,
            op,
            verify=lambda state: verify(op, state),
            unpack=lambda saved: restored(
                init(op, goal, Ends(Band(0.0, 1.0)), len(saved["finished"])), saved
            ),
        )
        of_ends = beside(file.path, "ends")
        saved = file.read()
        ends = None if saved is None else restored(Ends(Band(0.0, 1.0)), saved["state"]["ends"])
    if ends is None:
        found = lanczos(
            op,
            2,
            which="BE",
            confidence=CONFIDENCE,
            max_matvecs=END_MATVECS * op.cost,
            time_limit=time_limit,
            seed=goal.seed,
            monitor=monitor,
            checkpoint=of_ends,
        )
        is_finite = found.status is not Status.NON_FINITE
        if not is_finite or len(found.values) < min(2, op.n):  # the second: no time for that many matvecs
            message = MESSAGES[found.status]
            message += "" if is_finite else f"; {op.blame(_start(op, goal, 0).mT)}"
            return Measured([], found.num_matvecs, found.status, message, found.seconds, found.history)
        if time_limit is not None:
            time_limit = agreed(op.space.ranks, max(time_limit - found.seconds, 1e-9))
        ends = Ends(Band.around(found, op.dtype), found.num_matvecs, found.seconds, found.history)
    measured = run(KernelPolynomials(op, goal, ends, time_limit), monitor=monitor, checkpoint=file)
    if of_ends is not None and measured.status is Status.COMPLETED:
        delete(of_ends)
    return replace(measured, seconds=ends.seconds + measured.seconds, history=ends.history + measured.history)


def verify(op: LinearOperator, state: KernelState) -> KernelState:
    """Verify by one matvec, counted, that a loaded state belongs to the operator."""
    cost = state.witness.check(op, state.ends.band.half_width)
    return replace(state, num_matvecs=state.num_matvecs + cost)
