r"""Davidson's method on cheap likenesses of an operator, with a certificate of each end that rests on all of it.

Method, for each level of the likeness until one serves:

1. Lanczos on the likeness S shows its extreme vectors and outliers (:mod:`hvpkit.solvers.sample_space`). The extreme
   vectors are multiplied by H.
2. Rayleigh-Ritz on all vectors with known matvecs, with a few more by :mod:`hvpkit.solvers.davidson`: values are true
   ones for any likeness.
3. For each end a certificate: Lanczos from a random vector on :math:`P^{1/2} (H - \sigma I) P^{1/2}` with P from S,
   until it is unlikely that an eigenvalue of H hides beyond the value by twice the error allowed
   (:mod:`hvpkit.solvers.certificate`). It starts from the value where that is accurate by S's prediction; else it
   searches. What S lacked shows there, and its vector joins 2. Of several values at an end the innermost one is
   certified, with the vectors further out deflated: no more than those lie beyond. How far they may be from their Ritz
   values follows from residuals (:func:`hvpkit.solvers.ends.reach`).

A likeness is poor if a direction gains much less than it predicts, if the certificate's operator is far from the
identity, or if several certificates of an end have no bound. After the last one the solver hands over.

Cost: for each direction a matvec of the last level and a few of a cheap one; for each step of a certificate one of the
last level and up to four of a cheap one. Memory: see :func:`hvpkit.solvers.multifidelity.num_vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import EigenResult, Interval, Progress, Status
from hvpkit.solvers import certificate, davidson
from hvpkit.solvers.certificate import Certificate, Verdict
from hvpkit.solvers.common import block_subspace, convergence
from hvpkit.solvers.common.block_subspace import BlockSubspace
from hvpkit.solvers.common.bounds import TINY, kato_temple
from hvpkit.solvers.common.convergence import attainable_accuracy, rounding
from hvpkit.solvers.common.expected import expected_passes, matvecs_left
from hvpkit.solvers.common.orthogonalize import residuals_of, row_norms
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, most_at_one_end, select
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.congruence import (
    DEAR,
    DEAR_DEGREE,
    MAX_DEGREE,
    CongruentOperator,
    Metric,
    congruent_operator,
    deflated,
    make_metric,
)
from hvpkit.solvers.davidson import Direction
from hvpkit.solvers.driver import Assessment, Limits
from hvpkit.solvers.ends import Bound, End, ascending, distinct, outwards, rank, reach_of, wanted_sides
from hvpkit.solvers.lanczos import HIDDEN_BEYOND
from hvpkit.solvers.low_rank import LowRank, low_rank_space
from hvpkit.solvers.sample_space import SampleSpace, sample_space

MAX_START_STEPS, START_SHARE = 60, 0.5
"""Lanczos steps on the first level, at most, and their share of the budget, at most. With 40 or 90 steps a certificate
on the dense network takes 17 or 15 steps instead of 15."""

MIN_INNER_STEPS, MAX_INNER_STEPS = 6, 15
"""Lanczos steps on a level for a direction, by default: as many as cost a matvec of the last level, within these.
Chosen by feel."""

NUM_DIRECTIONS, MAX_DIRECTIONS, NEARLY = 2, 3, 4.0
"""Directions for an end before its certificate: the first, or up to the second while the error bound is at most the
third times the error allowed, or after a certificate without a bound. What the likeness lacks more directions do not
find, and a search needs but a rough value."""

MAX_REFUTED = 3
"""Certificates of an end that may end without a bound; then the level is left. Chosen by feel."""

MARGIN = 8.0
"""The shift of a search lies beyond the value by the predicted gain and this times the error allowed. With 6 or 8 a
solve takes 55 passes in the mean of 12 of the dense network."""

PREDICTION_FACTOR, CLAMPED_FACTOR, INNER_FACTOR = 1.5, 6.0, 9.0
"""The error bound in units of the predicted error, and of the part of it that the clamp makes small: of an outermost
value, and further in, where more eigenvalues are near. Evidence: docs/multifidelity.md."""

NEAR = 10.0
"""In units of the error allowed: eigenvalues nearer to an end than that count as this far away in its error bound.
Chosen by feel."""

POOR_GAIN, NUM_GAINS = 0.1, 3
"""A level is left if a direction gains less than the first of its predicted gain, where that is less than the value;
error bounds are as much larger as the best of the second gained more. On the dense network directions gain 0.3 to 1.5
of it."""

MIN_SAMPLE_NORM, MAX_SAMPLE_NORM = 0.5, 2.0
"""The norm of a likeness in units of the largest absolute Ritz value of H on its ends: outside of these it is left.
Trained networks have 0.95 to 1.03, a single layer with examples of very different size 8 to 12."""

MAX_SPENT = 2.0
"""Full-data matvecs of the levels, at most, in units of the steps that the likeness took, of which Lanczos takes about
1.5 times as many on all data. The default takes 0.9 of them on trained networks."""

FIRST_SHARE = 0.8
"""Share of the probability of failure for the first certificate of an end; each further one has this share of the rest,
so that all together have no more than was asked for."""

ESTIMATED = (
    "every error bound, an estimate by a sample, is as small as asked for; by random starts over all data nothing is "
    "likely to lie beyond the intervals"
)
"""The message of convergence."""


@dataclass(frozen=True)
class CertifiedDavidsonState(BlockSubspace):
    """A subspace with known matvecs, what it says about the ends, and a certificate in progress.

    Attributes:
        sample: of the first level.
        ends: those that are known, by their places: the wanted ones, and the outermost at either end.
        gram: inner products of their residuals, in the order of the spectrum, float64 on the CPU.
        target: the place to find a direction for.
        certificate: in progress.
        expected: predicted gain of the last direction that was followed.
        gains: of the level's last directions, in units of the predicted ones.
        level: index of the level in use.
        verified: full-data matvecs that verified the operator of a checkpoint.
    """

    sample: SampleSpace | None = None
    ends: Mapping[int, End] = field(default_factory=dict)
    gram: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64, device="cpu"))
    target: int | None = None
    certificate: Certificate | None = None
    expected: float = 0.0
    gains: tuple[float, ...] = ()
    level: int = 0
    verified: float = 0.0


@dataclass(frozen=True)
class CertifiedDavidson:
    """The solver for the cheap levels of :func:`hvpkit.multifidelity`: see :class:`hvpkit.solvers.driver.Solver`.

    It hands over once all cheap levels are left.

    Attributes:
        request: what is asked for.
        levels: operators of rising cost, the last one asked about.
        ncv: the most vectors of each set: the basis before a restart, the sample's and a certificate's Krylov space.
        num_inner: the most Lanczos steps on a level for a direction, or None.
        confidence, certify: as of :func:`hvpkit.multifidelity`.
        spent: full-data matvecs that making the levels has cost.
        large_end: size of the low end in units of the norm, on the first level, from which Lanczos takes few steps: the
            levels are left then.
    """

    request: Request
    levels: tuple[LinearOperator, ...]
    ncv: int
    num_inner: int | None = None
    confidence: float = 0.99
    certify: bool = False
    spent: float = 0.0
    large_end: float = math.inf

    @property
    def op(self) -> LinearOperator:
        """The operator asked about."""
        return self.levels[-1]

    @property
    def limits(self) -> Limits:
        """Of the request."""
        return self.request.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        cheap = self.levels[:-1]
        on_level = max(self.inner_steps(level) * level.cost for level in cheap)
        in_certificate = self.op.cost + max(self._max_degree(level) * level.cost for level in cheap)
        return max(on_level, in_certificate)

    @property
    def sides(self) -> list[list[int]]:
        """The places asked for at each end, from the outermost inwards."""
        return wanted_sides(self.request)

    @property
    def wanted(self) -> list[int]:
        """The places asked for, in the order of the spectrum."""
        return ascending([place for side in self.sides for place in side])

    def inner_steps(self, level: LinearOperator) -> int:
        """Return the most Lanczos steps on a level for a direction."""
        worth = round(self.op.cost / level.cost) if level.cost else MAX_INNER_STEPS
        return min(self.num_inner or min(MAX_INNER_STEPS, max(MIN_INNER_STEPS, worth)), level.n)

    def _max_degree(self, level: LinearOperator) -> int:
        """Return the highest degree of the polynomial of a level in a certificate."""
        return MAX_DEGREE if level.cost < DEAR * self.op.cost else DEAR_DEGREE

    def init(self) -> CertifiedDavidsonState:
        """Return a state with room for the first rows."""
        without_start = replace(self.request, start=None)
        return CertifiedDavidsonState(**vars(block_subspace.start(self.op, without_start, 0, self.ncv)))

    def step(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Multiply a new row or the certificate's vector; else find a direction, or start, on a cheap level."""
        if state.num_new:
            return block_subspace.multiply(self.op, state, 1, is_scaled=state.sample is not None)
        if state.certificate is not None:
            spent = state.num_matvecs + state.certificate.step_cost
            return replace(state, certificate=state.certificate.step(), num_matvecs=spent)
        if state.sample is None:
            return self._start(state)
        return state if state.target is None else self._find_direction(state, state.target)

    def _start(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Append the extreme Ritz vectors of the first level, from the caller's start or a random one."""
        level, asked = self.levels[0], self.request
        remaining = START_SHARE * self.limits.remaining(self.spent)
        affordable = remaining / level.cost if level.cost else MAX_START_STEPS
        # also for the low end alone: the high one is not far, and would else be in every residual
        most = most_at_one_end(asked.k, asked.which)
        k, which = (most, "LA") if asked.which == "LA" else (min(2 * most, self.op.n), "BE")
        num_steps = min(MAX_START_STEPS, self.ncv, int(affordable), self.op.n)
        if isinstance(level, LowRank):
            sample = low_rank_space(level, k)
        else:
            sample = sample_space(level, k, which, v0=asked.start, num_steps=num_steps, seed=asked.seed)
        num_matvecs = self.spent + sample.num_matvecs
        state = replace(state, sample=sample, num_matvecs=num_matvecs, scale=sample.scale)
        finite = len(sample.ends) == k and math.isfinite(float(self.op.space.peak(sample.ends)))
        if not finite or -sample.lowest > self.large_end * sample.norm:
            return replace(state, level=len(self.levels) - 1)
        places = [place % k for place in self._known_places(k) if which == "BE" or place < 0]
        return block_subspace.extend(self.op, asked, state, sample.ends[places])

    def _known_places(self, num_rows: int) -> list[int]:
        """Return the places of which Ritz pairs are kept: the wanted ones, and the outermost at either end."""
        places = ascending(list({0, -1, *self.wanted}))
        return [place for place in places if rank(place) < num_rows]

    def _find_direction(self, state: CertifiedDavidsonState, place: int) -> CertifiedDavidsonState:
        """Find a direction for an end, and its predicted error."""
        level, end = self.levels[state.level], state.ends[place]
        assert state.sample is not None
        direction = davidson.find_direction(
            level,
            state.sample,
            end.residual,
            end.value,
            -outwards(place),
            max(state.norm, abs(end.value)),
            attainable_accuracy(self.op, state.norm),
            num_steps=self.inner_steps(level),
        )
        state = replace(state, num_matvecs=state.num_matvecs + direction.num_steps * level.cost)
        if not math.isfinite(direction.gain):
            return _with_end(state, place, direction=Direction(end.residual, 0.0, 0.0, 0))
        predicted = PREDICTION_FACTOR * (direction.gain - direction.clamped)
        predicted += (INNER_FACTOR if rank(place) else CLAMPED_FACTOR) * direction.clamped
        error = min(end.error, max([1.0, *state.gains]) * predicted)
        return _with_end(state, place, direction=direction, error=error)

    def assess(self, state: CertifiedDavidsonState) -> Assessment[CertifiedDavidsonState]:
        """Update the ends, hear the certificate, test convergence, and decide what comes next."""
        if state.num_fresh:
            state = self._update(block_subspace.drop_non_finite(self.op, state))
        if state.certificate is not None and state.certificate.num_steps:
            state = self._judge(state)
        status, last = self._status(state), len(self.levels) - 1
        if status is None and self._is_too_dear(state):
            state = replace(state, certificate=None, level=last)
        if status is None and not state.num_new and state.certificate is None and state.level < last:
            state = self._next(state)
        handover = status is None and state.level >= last and not state.num_new
        num_steps, progress = max(1, state.num_new), self._progress(state)
        return Assessment(state, progress, num_steps, status, state.suspect, handover, self._num_left(state))

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a solve continues from a checkpoint; tolerances and limits may change."""
        asked = {name: getattr(self.request, name) for name in ("k", "which", "seed")}
        own = {name: getattr(self, name) for name in ("ncv", "num_inner", "certify")}
        start, costs = self.request.start, [level.cost for level in self.levels]
        v0 = None if start is None else digest(start)
        return {"solver": "multifidelity", **self.op.identity(), **asked, "v0": v0, **own, "costs": costs}

    def _num_left(self, state: CertifiedDavidsonState) -> float:
        """Return an estimate of the full-data matvecs that are left; infinite but for both ends."""
        asked = self.request
        if asked.which != "BE":
            return math.inf
        expected = expected_passes(
            "multifidelity", tol=asked.tol, atol=asked.atol, certify=self.certify, n=self.op.n
        )
        return matvecs_left(expected, state.num_matvecs / self.op.cost) * self.op.cost

    def _is_too_dear(self, state: CertifiedDavidsonState) -> bool:
        """Return True if the levels have cost more than Lanczos on all data is likely to."""
        if state.sample is None or state.num_new:
            return False
        return (
            state.num_matvecs - state.verified - self.spent
            > MAX_SPENT * state.sample.num_steps * self.op.cost
        )

    def _update(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Compute new Ritz pairs for the ends, and the gain of the last direction."""
        op, m = self.op, state.num_rows
        if not m:
            return state
        projection = block_subspace.rayleigh_ritz(op, state.rows[:m], state.images[:m])
        state = replace(state, norm=max(state.norm, projection.norm))
        places = self._known_places(m)
        chosen = [place % m for place in places]
        rotation = (projection.to_rows @ projection.vectors[:, chosen]).mT.to(state.rows)
        vectors, images = rotation @ state.rows[:m], rotation @ state.images[:m]
        found = projection.values[chosen]
        residuals = residuals_of(vectors, images, found)
        norms = row_norms(op.space, residuals).to("cpu", torch.float64)
        near = (NEAR * self.request.allowed(found, state.norm)).minimum(_gaps(projection.values)[chosen])
        near = near.clamp(min=TINY)
        bounds = torch.minimum(norms, torch.maximum(kato_temple(found, norms), norms**2 / near))
        new = {
            place: End(value, vectors[index], residuals[index], bound)
            for index, (place, value, bound) in enumerate(
                zip(places, found.tolist(), bounds.tolist(), strict=True)
            )
        }
        gains, poor, short = state.gains, False, 1.0
        if state.target is not None and state.expected > 0:
            before = state.ends[state.target].value
            gains = (*gains, abs(new[state.target].value - before) / state.expected)[-NUM_GAINS:]
            poor = gains[-1] < POOR_GAIN and state.expected < abs(before)
            short = max(1.0, gains[-1])  # the prediction was this much too short, or more
        for place, end in state.ends.items():
            known = replace(end, error=end.error * (short if place == state.target else 1.0))
            new[place] = self._moved(state, projection.values, place, known, new[place])
        wanted = [places.index(place) for place in distinct(self.wanted, m)]
        poor = poor or self._is_unlike(state, projection.norm)
        return replace(
            state,
            best=RitzPairs(found[wanted], vectors[wanted].mT, norms[wanted]),
            ends=new,
            gram=op.space.dots(residuals, residuals.mT).to("cpu", torch.float64),
            target=None,
            expected=0.0,
            gains=gains,
            level=state.level + poor,
        )

    def _is_unlike(self, state: CertifiedDavidsonState, norm: float) -> bool:
        """Return True if the likeness has another norm than H on the likeness's own ends."""
        sample = state.sample
        if sample is None or state.ends or state.num_rows < self.request.k or not norm:
            return False
        return not MIN_SAMPLE_NORM <= sample.norm / norm <= MAX_SAMPLE_NORM

    def _moved(
        self, state: CertifiedDavidsonState, values: Tensor, place: int, known: End, found: End
    ) -> End:
        """Return the end with a new Ritz pair, and what is still known about it; ``values`` are all Ritz values."""
        bound = known.bound
        if bound is not None:
            beyond = outwards(place) * (values - bound.at) > rounding(self.op, state.norm)
            if int(beyond.sum()) > bound.count:
                bound = None  # a certificate that was refuted is void
        moved = abs(found.value - known.value)
        left = known.error - moved if moved <= known.error else math.inf
        return replace(
            known,
            value=found.value,
            vector=found.vector,
            residual=found.residual,
            error=min(found.error, left, known.promised),
            promised=math.inf,
            direction=None if moved else known.direction,
            bound=bound,
        )

    def _judge(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Take over what the certificate says; a vector that the likeness lacked expands the subspace."""
        running = state.certificate
        assert running is not None
        end = state.ends[running.end]
        num_certificates = self._num_certificates(state, running.end)
        share = FIRST_SHARE * (1 - FIRST_SHARE) ** (num_certificates - 1)
        allowed = self._allowed(state, end.value)
        distance = self._multiple * allowed
        verdict = certificate.judge(running, allowed, distance, share * (1 - self.confidence))
        state = replace(state, certificate=verdict.certificate)
        if verdict.suspect is not None:
            return replace(state, certificate=None, suspect=verdict.suspect)
        without_bound = verdict.vector is not None and verdict.bound is None
        if verdict.poor or (without_bound and end.num_refuted + 1 >= MAX_REFUTED):
            return replace(state, certificate=None, level=state.level + 1, gains=())
        if verdict.bound is None and verdict.vector is None:
            return state
        state = replace(state, certificate=None)
        bound = None if verdict.bound is None else Bound(verdict.bound, len(running.amounts))
        state = _with_end(state, running.end, bound=bound)
        if without_bound:
            state = _with_end(state, running.end, num_refuted=end.num_refuted + 1, num_directions=0)
        return state if verdict.vector is None else self._include(state, running, verdict, verdict.vector)

    def _include(
        self, state: CertifiedDavidsonState, ended: Certificate, verdict: Verdict, vector: Tensor
    ) -> CertifiedDavidsonState:
        """Expand by a certificate's vector, with its matvec where that is known."""
        before = self._with_room(state)
        # what was predicted of another vector says nothing of this one
        state = _with_end(before, ended.end, error=math.inf, promised=verdict.error)
        if verdict.image is not None:
            rows = ended.op.metric.rows[: len(ended.amounts)]  # what was deflated
            inside = ended.amounts.to(rows) * self.op.space.dots(rows, vector)
            known = block_subspace.extend_by_known(self.op, state, vector, verdict.image + inside @ rows)
            if known is not None:
                return self._update(known)
        if ended.known and verdict.bound is not None:  # worth no matvec
            return before
        return block_subspace.extend(self.op, self.request, state, vector[None])

    def _next(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Prepare the next step: a direction to find or to follow, or a certificate to begin."""
        if state.num_rows < self.request.k or not state.ends:
            return state
        if not state.norm:  # nothing to build a metric of
            return replace(state, level=len(self.levels) - 1)
        for side in self.sides:
            for place in side:
                end = state.ends[place]
                nearly = end.error <= NEARLY * self._allowed(state, end.value)
                most = MAX_DIRECTIONS if nearly or end.num_refuted else NUM_DIRECTIONS
                may_follow = end.num_directions < most or self._is_certified(state, place)
                if self._is_accurate(state, end):
                    continue
                if may_follow or end.direction is None:
                    return self._follow(state, place)
                return self._certify(state, place)
            for place in reversed(side):  # the innermost one's may serve for all
                if not self._is_certified(state, place):
                    inner = place != side[-1]
                    end = state.ends[place]
                    nearer = inner and end.num_directions < MAX_DIRECTIONS and end.error > 0
                    return self._follow(state, place) if nearer else self._certify(state, place)
        return state

    def _follow(self, state: CertifiedDavidsonState, place: int) -> CertifiedDavidsonState:
        """Expand by the end's direction; if it has none yet, make it the target."""
        end = state.ends[place]
        state = replace(state, target=place)
        if end.direction is None:
            return state
        state = replace(
            _with_end(state, place, num_directions=end.num_directions + 1), expected=end.direction.gain
        )
        return block_subspace.extend(
            self.op, self.request, self._with_room(state), end.direction.vector[None]
        )

    def _certify(self, state: CertifiedDavidsonState, place: int) -> CertifiedDavidsonState:
        """Begin the certificate of a place: of its value if that is accurate, else a search."""
        end, outward = state.ends[place], outwards(place)
        known = self._is_accurate(state, end)
        allowed = self._allowed(state, end.value)
        margin = self._multiple * allowed
        if not known:
            margin = MARGIN * allowed + (end.direction.gain if end.direction else 0.0)
        sigma = end.value + outward * margin
        # those further out are deflated; one so near that the bound holds for it too need not be
        further_out = [
            other
            for other in state.ends
            if outwards(other) == outward
            and rank(other) < rank(place)
            and (not known or outward * (state.ends[other].value - sigma) > 0)
        ]
        exact = [*dict.fromkeys([*further_out, *distinct(state.ends, state.num_rows)])]
        vectors = torch.stack([state.ends[other].vector for other in exact])
        values = torch.tensor([state.ends[other].value for other in exact], dtype=torch.float64, device="cpu")
        # those further out get values inside, where the shift is as far from them as from zero
        distances = outward * (sigma - values[: len(further_out)])
        inside = sigma - outward * distances.clamp(min=abs(sigma))
        amounts = values[: len(further_out)] - inside
        values[: len(further_out)] = inside
        assert state.sample is not None
        metric = make_metric(
            self.likeness(state),
            state.sample,
            vectors,
            values,
            sigma,
            -outward,
            state.norm,
            lifted=known,
            max_degree=self._max_degree(self.levels[state.level]),
        )
        op = self.certificate_operator(state, metric, place, sigma, amounts)
        # independent of the sample's start, of earlier certificates, and of the solve that the caller's start is from
        stream = 4 * self._num_certificates(state, place) + 2 * (place < 0) + (self.request.start is not None)
        seed = self.request.seed + (stream + 1) * 2**32
        running = certificate.begin(
            op, place, sigma, known=known, seed=seed, max_steps=self.ncv, amounts=amounts
        )
        state = _with_end(state, place, num_certificates=end.num_certificates + 1)
        return replace(state, certificate=running, target=None)

    def likeness(self, state: CertifiedDavidsonState) -> LinearOperator:
        """Return the level in use, over scale."""
        level = self.levels[state.level]
        return replace(level, product=lambda v: level.product(v) / state.scale)

    def certificate_operator(
        self,
        state: CertifiedDavidsonState,
        metric: Metric,
        place: int,
        sigma: float,
        amounts: Tensor,
    ) -> CongruentOperator:
        """Return B, with the first rows of the metric deflated by these amounts."""
        op = deflated(self.op, metric.rows[: len(amounts)], amounts * float(state.scale))
        return congruent_operator(op, metric, sigma, -outwards(place), state.scale, state.norm)

    def _num_certificates(self, state: CertifiedDavidsonState, place: int) -> int:
        """Return how many certificates began at the place's end of the spectrum."""
        same = (end for other, end in state.ends.items() if outwards(other) == outwards(place))
        return sum(end.num_certificates for end in same)

    def _reach(self, state: CertifiedDavidsonState, place: int) -> float:
        """Return how far beyond its value the eigenvalue of a place may lie, by certificates of its end."""
        bounds = [end.bound for other, end in state.ends.items() if outwards(other) == outwards(place)]
        reaches = [reach_of(state.ends, state.gram, place, bound) for bound in bounds if bound is not None]
        return min(reaches, default=math.inf)

    def _is_certified(self, state: CertifiedDavidsonState, place: int) -> bool:
        end = state.ends[place]
        return end.bound is not None or self._reach(state, place) <= self._multiple * self._allowed(
            state, end.value
        )

    @property
    def _multiple(self) -> float:
        """Distance beyond a value that may be missed, in units of the error allowed."""
        return 1.0 if self.certify else HIDDEN_BEYOND

    def _allowed(self, state: CertifiedDavidsonState, value: float) -> float:
        """Return the error allowed of a value, over scale: as asked for, or what rounding allows."""
        asked = float(
            self.request.allowed(torch.tensor(value, dtype=torch.float64, device="cpu"), state.norm)
        )
        return max(asked, attainable_accuracy(self.op, state.norm))

    def _is_accurate(self, state: CertifiedDavidsonState, end: End) -> bool:
        return end.error + rounding(self.op, state.norm) <= self._allowed(state, end.value)

    def _status(self, state: CertifiedDavidsonState) -> Status | None:
        """Return the status if the solve is over."""
        if state.suspect is not None:
            return Status.NON_FINITE
        whole = state.num_rows == self.op.n
        if (
            state.num_rows < self.request.k
            or not state.ends
            or state.num_new
            or state.certificate is not None
        ):
            return None
        ends = [state.ends[place] for place in self.wanted]
        done = all(
            self._is_certified(state, place) and self._is_accurate(state, state.ends[place])
            for place in self.wanted
        )
        if not whole and not done:
            return None
        values = torch.tensor([end.value for end in ends], dtype=torch.float64, device="cpu")
        bounds = torch.tensor([end.error for end in ends], dtype=torch.float64, device="cpu")
        best = Status.INVARIANT_SUBSPACE if whole else Status.CONVERGED
        attainable = attainable_accuracy(self.op, state.norm)
        bounds = bounds + rounding(self.op, state.norm)
        return convergence.final_status(best, self.request, state.norm, attainable, values, bounds)

    def _progress(self, state: CertifiedDavidsonState) -> Progress:
        if not state.ends:
            return Progress()
        values, bounds = (
            torch.tensor(
                [getattr(state.ends[place], name) for place in (0, -1)], dtype=torch.float64, device="cpu"
            )
            for name in ("value", "error")
        )
        bounds = bounds.clamp(min=rounding(self.op, state.norm))
        return convergence.progress_of(values, bounds, state.scale, state.level)

    def _with_room(self, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
        """Make room for another row: if the basis is full, keep half of the Ritz vectors, from either end."""
        m = state.num_rows
        if m < len(state.rows) or m == self.op.n:
            return state
        projection = block_subspace.rayleigh_ritz(self.op, state.rows[:m], state.images[:m])
        kept = projection.vectors[:, select(projection.values, m // 2, "BE")]
        return block_subspace.rotate(state, projection, kept)

    def finalize(self, state: CertifiedDavidsonState, status: Status) -> EigenResult:
        """Return the pairs of the ends, with residuals from known matvecs: no further one is needed."""
        unit = float(state.scale)
        found = state.best.scaled(unit)
        kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
        slack = attainable_accuracy(self.op, state.norm) * unit
        where = list(convergence.intervals(found, self.request, slack, kind))
        known = distinct(self.wanted, state.num_rows) if state.ends else []
        errors = torch.tensor([state.ends[place].error for place in known], dtype=torch.float64, device="cpu")
        for index, place in enumerate(known if kind != "exact" else []):
            distance = max(self._reach(state, place), float(errors[index])) * unit
            if math.isfinite(distance):
                value = float(found.values[index])
                low, high = (distance, 0.0) if place >= 0 else (0.0, distance)
                where[index] = Interval(
                    value - low - slack, value + high + slack, "random-start", self.confidence
                )
        bounds = (errors + rounding(self.op, state.norm)) * unit
        message = ESTIMATED if status is Status.CONVERGED else None
        return convergence.eigen_result(
            found, tuple(where), status, state.num_matvecs, message=message, error_bounds=bounds
        )


def _gaps(values: Tensor) -> Tensor:
    """Return the distance of each of the ascending Ritz values ``[m]`` from the next one, infinite for one alone."""
    infinite = values.new_full((1,), math.inf)
    gaps = values.diff()
    return torch.minimum(torch.cat([infinite, gaps]), torch.cat([gaps, infinite]))


def _with_end(state: CertifiedDavidsonState, place: int, **changes: object) -> CertifiedDavidsonState:
    """Return the state with changes to an end."""
    return replace(state, ends={**state.ends, place: replace(state.ends[place], **changes)})  # type: ignore[arg-type]
