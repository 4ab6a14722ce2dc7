r"""Lanczos with thick restart and full reorthogonalisation.

Method: an orthonormal basis V of a Krylov space is expanded by matvecs with the vectors at its frontier F, so
that :math:`A V = V T + F B` always holds; Ritz pairs of T approximate eigenpairs from the ends of the
spectrum inwards. When the basis is full it is replaced by some of its Ritz vectors, the frontier stays, and
the relation holds as before. One start vector gives the classical method; several, a block method; a random
vector added to the frontier later finds further copies of a multiple eigenvalue.

Cost: one matvec a step for each vector of a block; beside it, orthogonalisation reads the basis twice where
one start vector is all there is, else four times (passes of classical Gram-Schmidt, two reads each).
Memory: ``ncv + block_size`` vectors, and ``4 k + 3 block_size`` for work.
Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

Departures from the paper:
1. T is kept whole and not as an arrowhead: full reorthogonalisation gives all its entries, and those that should
   be zero or symmetric show an operator that is not symmetric.
2. The frontier may hold several vectors: each matvec's residual joins it, so that blocks of any size
   (also changing) are one algorithm, and a residual that vanishes does not join.
3. The operator is divided by a power of two near its first matvec, so that no inner product overflows or
   underflows.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_flag
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.offload import HOST, on_host
from hvpkit.operators.sharded import sharded
from hvpkit.results.eigen import EigenResult, Status
from hvpkit.solvers import krylov
from hvpkit.solvers.checkpoint import Checkpoint, argument_of
from hvpkit.solvers.common import convergence
from hvpkit.solvers.common.bounds import kato_temple, uniform_distance
from hvpkit.solvers.common.convergence import MIN_STEPS
from hvpkit.solvers.common.expected import expected_passes, matvecs_left
from hvpkit.solvers.common.orthogonalize import row_norms
from hvpkit.solvers.common.rayleigh_ritz import WHICH, RitzPairs, most_at_one_end, num_at_low_end, select
from hvpkit.solvers.common.request import Request, Start, check_arguments, check_certainty, check_sigma
from hvpkit.solvers.common.vector_memory import check_room, vectors_that_fit
from hvpkit.solvers.driver import (
    Assessment,
    Limits,
    Monitor,
    assessment_interval,
    full_precision,
    run,
    with_vectors_of,
)
from hvpkit.solvers.krylov import KrylovState

BASIS_BYTES = 4 * 2**30
"""Bytes of the basis, at most, under the default ``ncv``. Chosen by feel."""

MAX_NCV, EXTRA_NCV = 300, 53
"""The default ``ncv``: at most the first, or 4 k (chosen by feel); at least the second above the least that is
possible, unless memory is short. For both ends of the dense network of docs/multifidelity.md 300 vectors take 65
passes, 60 66, 40 74, 25 86, 16 125, 12 187 and 9 374."""

MODEST_NCV, MODEST_SHARE = 18, 1.6
"""Basis vectors above the least that is possible with less than which restarts cost most passes: for so many the
default takes up to the second times its usual share of the free memory. Chosen by feel."""

SMALL_SPACE = 500
"""The largest n for which ``MIN_STEPS`` hold always: there they cost next to nothing. For larger n the probability of a
hidden eigenvalue takes their place."""

HIDDEN_BEYOND = 2.0
"""In units of the error allowed: an eigenvalue hides if it lies further out than this from its Ritz value."""

INSIDE = {
    Status.CONVERGED: "every residual norm is at most tol * |value|, so that an eigenvalue is as close to each value",
    Status.MAX_MATVECS: (
        "the matvec budget is used up; each interval holds an eigenvalue, but there may be some closer to sigma; raise "
        "max_matvecs or tol"
    ),
    Status.TIME_LIMIT: (
        "the time limit is reached; each interval holds an eigenvalue, but there may be some closer to sigma; raise "
        "time_limit or tol"
    ),
}
"""Messages for eigenvalues inside of the spectrum, where they are not those of the status."""


@dataclass(frozen=True)
class LanczosState(KrylovState):
    """A Krylov space, and the search for further copies of the wanted values in it.

    Attributes:
        search_steps: matvecs that the search takes; 0 before it begins.
        search_until: matvecs at which it ends.
        search_from: the values that it began with.
    """

    search_steps: int = 0
    search_until: int = 0
    search_from: tuple[float, ...] = ()


@dataclass(frozen=True)
class Lanczos:
    """The solver of :func:`lanczos`: see :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        request: what is asked for.
        ncv: the most basis vectors before a restart.
        block_size, check_copies, confidence, certify: as of :func:`lanczos`.
    """

    op: LinearOperator
    request: Request
    ncv: int
    block_size: int = 1
    check_copies: bool = False
    confidence: float = 0.99
    certify: bool = False

    @property
    def limits(self) -> Limits:
        """Of the request."""
        return self.request.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step."""
        return self.block_size * self.op.cost

    @property
    def min_products(self) -> int:
        """Minimum matvecs before a convergence test is accepted: in small spaces, or if it rests on residuals."""
        return self.request.k + MIN_STEPS * self.block_size

    def init(self) -> LanczosState:
        """Return a state with the start vectors at the frontier."""
        width, asked = min(self.block_size, self.op.n), self.request
        start = krylov.start(self.op, self.ncv + self.block_size, width, asked.seed, asked.start)
        return LanczosState(**vars(start))

    def step(self, state: LanczosState) -> LanczosState:
        """Multiply one block of the frontier."""
        return krylov.step(self.op, state, self.block_size)

    def assess(self, state: LanczosState) -> Assessment[LanczosState]:
        """Compute Ritz pairs, test convergence, and restart a basis that is full."""
        op, (state, non_finite) = self.op, krylov.compact(state)
        pairs, norms = krylov.project(op, state)
        m, noise = state.num_multiplied, self._noise(state, pairs)
        shown = self._wanted(state, pairs) if self.request.which == "CLOSEST" else [*range(m)]
        values, bounds = pairs.values[shown], pairs.residual_norms[shown] + noise
        progress = convergence.progress_of(values, bounds, state.scale)
        status, needs_random, suspect = None, False, None
        if non_finite:
            status, suspect = Status.NON_FINITE, state.basis[m].unsqueeze(1)
        elif m:
            status, needs_random, state = self._test(state, pairs, norms)
        if status is None:
            whole = len(state.basis) == op.n
            if not whole and state.num_rows + needs_random + self.block_size > len(state.basis):
                state = krylov.restart(state, pairs, norms, self._kept(state, pairs))
            if needs_random and state.num_rows < op.n:
                state = krylov.append_random(op, state, self.request.seed)
        room = (len(state.basis) - state.num_rows) // self.block_size
        num_steps = max(1, min(room, assessment_interval(op, m)))
        return Assessment(state, progress, num_steps, status, suspect, num_left=self._num_left(state))

    def _num_left(self, state: LanczosState) -> float:
        """Return an estimate of the full-data matvecs that are left; infinite but for both ends of the spectrum."""
        asked = self.request
        if (asked.k, asked.which, self.block_size) != (2, "BE", 1):
            return math.inf
        expected = expected_passes(
            "lanczos", tol=asked.tol, atol=asked.atol, certify=self.certify, n=self.op.n
        )
        return matvecs_left(expected, state.num_products) * self.op.cost

    def _kept(self, state: LanczosState, pairs: RitzPairs) -> list[int]:
        """Return the Ritz vectors that a restart keeps: the wanted ones and half of the others, from the same ends."""
        room, k = len(state.basis) - state.num_frontier - self.block_size - 1, self.request.k
        return self._wanted(state, pairs, min(k + (state.num_multiplied - k) // 2, room))

    def _wanted(self, state: LanczosState, pairs: RitzPairs, k: int | None = None) -> list[int]:
        """Return the indices of the ``k`` wanted pairs, by default as many as are asked for."""
        asked = self.request
        return select(pairs.values, k or asked.k, asked.which, asked.sigma / float(state.scale))

    def _test(
        self, state: LanczosState, pairs: RitzPairs, norms: Tensor
    ) -> tuple[Status | None, bool, LanczosState]:
        """Test convergence: the status if the solve is over, and if not, whether it needs a random vector."""
        op, asked, m = self.op, self.request, state.num_multiplied
        exhausted = state.num_frontier == 0
        early = state.num_products < self.min_products and not (self._uses_gap(state) and op.n > SMALL_SPACE)
        if m < asked.k or (early and not exhausted):
            return None, exhausted, state
        wanted, attainable = self._wanted(state, pairs), self._attainable(state, pairs)
        values = pairs.values[wanted]
        bounds = self._error_bounds(state, pairs)[wanted] + self._noise(state, pairs)
        if not exhausted:
            allowed = asked.allowed(values, self._norm(state, pairs)).clamp(min=attainable)
            if bool((bounds > allowed).any()) or self._may_hide(state, pairs, norms, attainable):
                return None, False, state
        if m < op.n and self.check_copies and most_at_one_end(asked.k, asked.which) > 1:
            searching, state = self._search_copies(state, values, bounds)
            if searching:
                return None, state.search_until == state.num_products + state.search_steps, state
        best = Status.INVARIANT_SUBSPACE if exhausted else Status.CONVERGED
        status = convergence.final_status(best, asked, self._norm(state, pairs), attainable, values, bounds)
        return status, False, state

    def _uses_gap(self, state: LanczosState) -> bool:
        """Return True if error bounds use gaps: the polynomial of the start says how likely an eigenvalue hides."""
        k, which = self.request.k, self.request.which
        return bool(state.polynomial.share) and which != "CLOSEST" and most_at_one_end(k, which) == 1

    def _error_bounds(self, state: LanczosState, pairs: RitzPairs) -> Tensor:
        """Return error bounds ``[m]``; they use the gap only where it is known how likely an eigenvalue hides in it."""
        if not self._uses_gap(state):
            return pairs.residual_norms
        return kato_temple(pairs.values, pairs.residual_norms)

    def _may_hide(self, state: LanczosState, pairs: RitzPairs, norms: Tensor, attainable: float) -> bool:
        """Return True if an eigenvalue is too likely to hide beyond a wanted end; False where this is not known.

        If one does, the start's component along its vector is one of the smallest that it can be, with probability
        ``1 - confidence``. This is an event of the start alone, so that testing at every step costs no confidence.
        Inside of the spectrum the event is that of any of k vectors: those of the eigenvalues closest to sigma.
        """
        polynomial = state.polynomial
        if not polynomial.share:
            return False
        failure, residual_norms = 1 - self.confidence, pairs.residual_norms
        if self.request.which == "CLOSEST":
            failure, residual_norms = failure / self.request.k, torch.zeros_like(residual_norms)
        for at in self._hiding_places(state, pairs, attainable):
            component = polynomial.log_component(at, pairs.values, residual_norms, norms)
            if polynomial.probability(component) > failure:
                return True
        return False

    def _hiding_places(self, state: LanczosState, pairs: RitzPairs, attainable: float) -> list[float]:
        """Return where a wanted eigenvalue hides most easily, if it is missed, at least."""
        asked, norm = self.request, self._norm(state, pairs)
        values = pairs.values[self._wanted(state, pairs)]
        multiple = 1.0 if self.certify else HIDDEN_BEYOND
        beyond = (multiple * asked.allowed(values, norm)).clamp(min=attainable)
        if asked.which == "CLOSEST":
            return _gaps_around(values, beyond, asked.sigma / float(state.scale), state.polynomial.roots)
        num_low, size = num_at_low_end(asked.k, asked.which), values.abs().max()
        ends = [(-1.0, values[0])] * (num_low > 0) + [(1.0, values[-1])] * (num_low < asked.k)
        if asked.which == "LM":  # it may hide at the other end
            ends = [(-1.0, -size), (1.0, size)]
        return [
            float(value + outward * (multiple * asked.allowed(value, norm)).clamp(min=attainable))
            for outward, value in ends
        ]

    def _search_copies(
        self, state: LanczosState, values: Tensor, bounds: Tensor
    ) -> tuple[bool, LanczosState]:
        """Start, continue or end the search for further copies of the wanted values; True while it lasts.

        A Krylov space holds one vector of a multiple eigenvalue. A copy appears when a new random vector has had
        as many matvecs as the first one took; where one does, another may follow.
        """
        if state.num_products < state.search_until and state.num_frontier:
            return True, state
        before = torch.tensor(state.search_from, dtype=torch.float64, device="cpu")
        allowed = bounds + self.request.allowed(values, float(state.norm))
        if len(before) and not bool(((values - before).abs() > allowed).any()):
            return False, state
        if (
            state.num_frontier >= self.block_size + self.request.k
        ):  # more copies are not wanted, nor have room
            return False, state
        num_steps = state.search_steps or max(state.num_products, self.min_products)
        return True, replace(
            state,
            search_steps=num_steps,
            search_until=state.num_products + num_steps,
            search_from=tuple(values.tolist()),
        )

    def _norm(self, state: LanczosState, pairs: RitzPairs) -> float:
        """Return the operator's norm as far as it is known, over scale."""
        return max(pairs.norm, float(state.norm))

    def _noise(self, state: LanczosState, pairs: RitzPairs) -> float:
        """Return what rounding may add to an error bound: by the dtype, or as much as was seen."""
        return max(convergence.rounding(self.op, pairs.norm), pairs.asymmetry, float(state.dropped))

    def _attainable(self, state: LanczosState, pairs: RitzPairs) -> float:
        """Return the attainable accuracy: an error bound that further matvecs do not make smaller."""
        return max(convergence.attainable_accuracy(self.op, pairs.norm), 2 * self._noise(state, pairs))

    def finalize(self, state: LanczosState, status: Status) -> EigenResult:
        """Return the wanted pairs, their residuals verified by a matvec with the sum of their vectors.

        Full reorthogonalisation keeps the residuals of the recurrence true to rounding. The difference between their
        sum and the sum of the true ones shows how large that is, or that the operator does not repeat itself.
        """
        op, asked = self.op, self.request
        pairs, lanczos_norms = krylov.project(op, state)
        norm = self._norm(state, pairs)
        convergence.warn_asymmetric(op, pairs.asymmetry, norm)
        wanted, m, noise = (
            self._wanted(state, pairs),
            state.num_multiplied,
            self._noise(state, pairs),
        )
        coefficients = pairs.vectors[:, wanted].to(state.basis)
        vectors = (coefficients.mT @ state.basis[:m]).mT
        found = RitzPairs(pairs.values[wanted], vectors, pairs.residual_norms[wanted])
        if op.exact is not None:
            return convergence.check_pairs(
                op, asked, found, state.scale, pairs.norm, status=status, num_matvecs=state.num_matvecs
            )
        bounds, num_matvecs, message = self._error_bounds(state, pairs)[wanted], state.num_matvecs, None
        if wanted and status is not Status.NON_FINITE:
            difference = self._verify(state, found, coefficients)
            if difference is None:
                status = status if status is Status.MAX_MATVECS else Status.TIME_LIMIT
                message = convergence.UNVERIFIED.format(status.advice)
            elif not math.isfinite(difference):
                status, num_matvecs = Status.NON_FINITE, num_matvecs + op.cost
            else:
                num_matvecs += op.cost
                norms = found.residual_norms.hypot(
                    torch.tensor(difference, dtype=torch.float64, device="cpu")
                )
                found = replace(found, residual_norms=norms)
                bounds, noise = bounds + difference, max(noise, difference)
                if status not in (Status.MAX_MATVECS, Status.TIME_LIMIT):
                    attainable = max(self._attainable(state, pairs), 4 * difference)
                    status = convergence.final_status(status, asked, norm, attainable, found.values, bounds)
        scale = float(state.scale)
        found = replace(found, vectors=vectors / row_norms(op.space, vectors.mT)).scaled(scale)
        kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
        inside = asked.which == "CLOSEST"
        message = message or (INSIDE.get(status) if inside else None)
        outer = None if kind == "exact" or inside else self._outer(state, pairs, lanczos_norms)
        # a statement wants more slack than a stop
        slack = max(noise, convergence.attainable_accuracy(op, pairs.norm)) * scale
        where = convergence.intervals(found, asked, slack, kind, outer)
        return convergence.eigen_result(
            found, where, status, num_matvecs, message=message, error_bounds=bounds * scale
        )

    def _verify(self, state: LanczosState, found: RitzPairs, coefficients: Tensor) -> float | None:
        """Return the norm by which one matvec, with the sum of the vectors, differs from the recurrence.

        None: there is no time for it.
        """
        m, rows = state.num_multiplied, state.num_rows
        residuals = state.basis[m:rows].mT @ (state.projected[m:rows, :m] @ coefficients)
        image = convergence.product_in_time(self.op, found.vectors.sum(dim=1, keepdim=True))
        if image is None:
            return None
        expected = (found.vectors * found.values.to(image) + residuals).sum(dim=1, keepdim=True)
        return float(self.op.space.norm((image / state.scale - expected)[:, 0]))

    def _outer(self, state: LanczosState, pairs: RitzPairs, norms: Tensor) -> convergence.Outer | None:
        """Return how far beyond the Ritz values the spectrum may reach."""
        if not len(pairs.values):
            return None
        scale, polynomial = float(state.scale), state.polynomial
        if polynomial.share:
            bounds = self._error_bounds(state, pairs)  # an unlucky start must not hide what is known anyway
            arguments = self.confidence, pairs.values, pairs.residual_norms, norms
            low, high = (
                max(polynomial.distance(end, *arguments), float(bounds[end])) * scale for end in (0, -1)
            )
            return convergence.Outer(low, high, "random-start", self.confidence)
        num_steps = state.num_products // self.block_size
        if state.num_random == self.block_size and not state.num_kept and num_steps:  # random, not restarted
            spread = float(pairs.values[-1] - pairs.values[0])
            reach = uniform_distance(spread, polynomial.n, num_steps, self.confidence) * scale
            return convergence.Outer(reach, reach, "random-block", self.confidence)
        return None

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a solve continues from a checkpoint; tolerances and limits may change."""
        asked = {name: getattr(self.request, name) for name in ("k", "which", "seed")}
        own = {name: getattr(self, name) for name in ("ncv", "block_size", "check_copies", "certify")}
        start = self.request.start
        v0 = None if start is None else digest(start)
        sigma = {"sigma": self.request.sigma} if self.request.which == "CLOSEST" else {}
        return {"solver": "lanczos", **self.op.identity(), **asked, **sigma, "v0": v0, **own}


def _gaps_around(values: Tensor, beyond: Tensor, sigma: float, roots: Tensor) -> list[float]:
    """Return the ends of the gaps between values ``[k]``, out to the distance of the farthest from sigma.

    Between two roots the logarithm of the start's polynomial is concave, so that it is smallest at the ends of a gap.
    An eigenvalue nearer than ``beyond`` to a value is not missed. Roots that restarts left in a gap count as its ends.
    """
    farthest = (values - sigma).abs().argmax()
    radius = float((values[farthest] - sigma).abs() - beyond[farthest])
    inner = torch.cat([values - beyond, values + beyond, roots])
    inner = inner[(inner - sigma).abs() < radius]
    places = torch.cat(
        [inner, torch.tensor([sigma - radius, sigma + radius][: 2 * (radius > 0)], device="cpu").to(inner)]
    )
    near = ((places[:, None] - values).abs() < beyond * (1 - 1e-9)).any(dim=1)
    return places[~near].tolist()


def least_ncv(k: int, block_size: int) -> int:
    """Return the fewest basis vectors with which a restart leaves room for a step."""
    return 2 * k + block_size + 2


def default_ncv(n: int, itemsize: int, k: int, block_size: int, fitting: float) -> int:
    """Return the default number of basis vectors: by n alone, unless only ``fitting`` vectors fit into memory."""
    least, work = least_ncv(k, block_size), num_vectors(0, k, block_size)
    usual = max(least + EXTRA_NCV, min(BASIS_BYTES // (n * itemsize), max(MAX_NCV, 4 * k)))
    modest = min(least + MODEST_NCV, MODEST_SHARE * fitting - work)
    return int(max(least, min(usual, max(fitting - work, modest))))


def num_vectors(ncv: int, k: int, block_size: int) -> int:
    """Return the vectors that a solve takes memory for: its basis, and what it works with, measured."""
    return ncv + block_size + 4 * k + 3 * block_size


@full_precision
def lanczos(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    sigma: float | None = None,
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    ncv: int | None = None,
    offload: bool = False,
    block_size: int = 1,
    check_copies: bool = True,
    confidence: float = 0.99,
    certify: bool = False,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EigenResult:
    r"""Compute a few eigenpairs at the ends of the spectrum, or closest to a point in it, by thick-restart Lanczos.

    For one pair at an end, from one start vector: **with probability** ``confidence`` **over random starts, a converged
    value** :math:`\theta` **is off by at most twice the error allowed** (once with ``certify``),

    .. math:: \text{allowed} = \text{tol} \cdot |\theta|,

    or :math:`\text{atol} \cdot \|A\|` for a value of at most that, with the largest Ritz value or norm of a matvec so
    far for :math:`\|A\|`, and at least 32 eps of that. It stops when for each wanted value ``error_bound <= allowed``,
    and it is that unlikely that an eigenvalue hides further out. The bound is the residual norm, with rounding, or its
    square over the gap, bounded by the other Ritz pairs' residuals, where that is smaller.

    For more pairs at an end the bound is the residual norm, and the probability holds for the outermost value; for the
    others there is none, but the search for copies. For blocks there is none at all: see the intervals.

    Inside of the spectrum, ``which="CLOSEST"``, the bound is the residual norm: an eigenvalue lies within it of each
    value. From one start vector the solve goes on while it is too likely, by the start, that another one is closer to
    sigma by more than ``2 tol |value|``; intervals, of kind ``"residual"``, do not claim that none is.
    :func:`hvpkit.count_eigenvalues` counts those of an interval.

    Args:
        op: symmetric operator.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` the largest in magnitude, ``"BE"`` half
            from each end (the odd one from the high end), all from one Krylov space; ``"CLOSEST"`` those closest to
            ``sigma``.
        sigma: the point for ``"CLOSEST"``.
        v0: start ``[n]`` or ``[n, p]``, or an earlier result. The columns are assigned round-robin to the vectors of
            the block and summed, each sum with a tenth of a random vector, so that no direction is missing.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        ncv: the most basis vectors before a restart. By default as many as 4 GiB hold, at most 300 or 4 k, and at least
            ``2 k + block_size + 55``: the same for an n wherever it is solved, unless memory is short. Where they
            would take more than half of the free memory, as many as that holds; name ``ncv`` for the same bits there.
        offload: keep the basis in host memory, and work there; only matvecs are on the device. For operators on a GPU
            whose basis does not fit there. A step copies a vector there and back, and waits for it.
        block_size: vectors in one matvec. Operators share work among them; the number of matvecs rises.
        check_copies: for two or more pairs at one end, make sure by a further random vector that no copy of
            a multiple eigenvalue is missed; doubles the matvecs.
        confidence: of the outermost values and of intervals, over random starts.
        certify: continue until the interval itself has a width of at most the error allowed, for one pair at an end;
            about a tenth more matvecs.
        max_matvecs: full-data matvecs, at most; by default 1,000, or ten for each pair if that is more.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted. The same call
            continues from it, for one matvec beyond the budget that verifies the operator, to the same bits;
            tolerances and limits may be changed. A save that fails is an :class:`hvpkit.UnsavedWarning`. Deleted on
            convergence. Of several ranks, each keeps its part of the basis in a folder beside the file, named as that
            with ``.parts``, and any number of ranks continues.

    Returns:
        Values ascending, with orthonormal vectors (DTensors over a mesh), true residuals, intervals and status. At a
        limit, or if a matvec is not finite, the status says so, and the result holds the best pairs so far: fewer than
        ``k`` if that was early.

    Raises:
        ValueError: an argument out of its range, named; a checkpoint that is damaged, of another version or solve, or
            whose path cannot be written.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.
        MemoryError: before the first matvec, if the basis does not fit into the memory that is free.

    Cost:
        Matvecs as ``num_matvecs`` says, the last of them to verify the residuals; ``ncv + 4 block_size + 4 k`` vectors
        of memory.

    Source:
        Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> lanczos(op, 2, which="BE", tol=1e-6).values
        tensor([-1.0000,  2.0000], dtype=torch.float64)
    """
    block_size = check_count("block_size", block_size, 1, op.n)
    request = check_arguments(
        op,
        k,
        which,
        v0=v0,
        tol=tol,
        atol=atol,
        max_matvecs=max_matvecs,
        time_limit=time_limit,
        seed=seed,
        offered=(*WHICH, "CLOSEST"),
        block_size=block_size,
        num_checks=1 if op.exact is None else k,
    )
    request = replace(request, sigma=check_sigma(which, sigma))
    check_certainty(confidence, certify)
    check_flag("check_copies", check_copies)
    check_flag("offload", offload)
    asked, least = op, least_ncv(k, block_size)
    if offload:
        op, request = on_host(op), request.on_host()
    op = sharded(op)
    if ncv is None and checkpoint is not None:
        saved = argument_of(checkpoint, "ncv", op.space.ranks) or 0
        ncv = saved if saved >= least else None
    if ncv is None:
        ncv = default_ncv(op.n, op.dtype.itemsize, k, block_size, vectors_that_fit(op))
    elif check_count("ncv", ncv, 1) < min(least, op.n):
        raise ValueError(f"ncv must be at least 2 k + block_size + 2 = {least} or n, got {ncv}")
    remedy = f"take a smaller ncv (at least {least}), " if ncv > least else "take "
    remedy += "" if op.device == HOST else "offload=True for a basis in host memory, "
    remedy += "fewer parameters (wrt=), or a machine with more memory"
    check_room(op, num_vectors(min(ncv, op.n), k, block_size), remedy)
    solver = Lanczos(op, request, ncv, block_size, check_copies, confidence, certify)
    file = None
    if checkpoint is not None:
        file = Checkpoint[LanczosState](
            checkpoint, solver.identity(), op, krylov.trim, lambda state: krylov.verify(op, state)
        )
    found = run(solver, monitor=monitor, checkpoint=file)
    return with_vectors_of(found, op, asked)
