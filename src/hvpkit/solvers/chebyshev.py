r"""Subspace iteration with Chebyshev filters.

Method: a few steps of block Lanczos show where the spectrum ends. Then vectors are filtered: multiplied by a
Chebyshev polynomial in A that is small on the unwanted interval [a, b] and large outside of it,

.. math:: p_m(\lambda) = T_m\!\left(\frac{\lambda - c}{e}\right), \qquad c = \frac{a + b}{2}, \quad e = \frac{b - a}{2}.

Rayleigh-Ritz follows, and the next filter, until the residuals are small. Where both ends are wanted, the unwanted
interval is the bulk between them.

Cost: 32 Lanczos matvecs, or four for each vector of the block if that is more, unless fewer are enough; in each
cycle as many as the degrees add up to, and one more for each vector filtered; at the end one for each pair. Filters
need no orthogonalisation.
Memory: 64 vectors, or eight for each of the block if that is more, and some eight for each of the block.
Source: Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006) 172-184, doi:10.1016/j.jcp.2006.03.017; bounds of
the spectrum: Zhou, Li, Linear Algebra Appl. 435 (2011) 480-493, doi:10.1016/j.laa.2010.06.034; degrees: Winkelmann,
Springer, Di Napoli, ACM Trans. Math. Softw. 45 (2019) 21, doi:10.1145/3313828.

Departures from the papers:
1. The Lanczos steps start from the block, so that its Ritz vectors are the first to be filtered, copies of a multiple
   eigenvalue among them.
2. Rayleigh-Ritz is on the filtered vectors and on those before the filter, whose matvecs are known: values never
   get worse, also if a filter did not help.
3. Accurate Ritz vectors are kept out of the filter by projection, wanted or not: also outliers that would widen the
   unwanted interval.
4. With :math:`x = (A - c) / e`, after each term of :math:`T_{j+1} = 2 x T_j - T_{j-1}` the last two vectors are divided
   by the norm of the last, and not by an estimate of the spectrum's end: nothing overflows for any spectrum.
5. Once n matvecs are spent, for n up to a thousand, the subspace becomes the whole space: hard small problems end
   exactly.
6. The operator is divided by a power of two near its first matvec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.solvers.common import block_subspace
from hvpkit.solvers.common.block_subspace import BlockSubspace
from hvpkit.solvers.common.bounds import TINY
from hvpkit.solvers.common.convergence import (
    MIN_STEPS,
    attainable_accuracy,
    is_converged,
    progress_of,
    rounding,
)
from hvpkit.solvers.common.orthogonalize import residuals_of, row_norms
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, num_at_low_end, select
from hvpkit.solvers.common.request import Request, Start, check_arguments
from hvpkit.solvers.driver import Assessment, Limits, Monitor, full_precision, run, with_vectors_of

WHICH = ("LA", "SA", "BE")

NUM_GUARDS = 1
"""Vectors in the block beside the wanted ones, at each end where several are wanted. Chosen by feel."""

MAX_ROWS, ROWS_PER_VECTOR = 32, 4
"""Vectors that are kept during a filter: the first, or the second for each of the block if that is more. Chosen by
feel."""

TERMS_PER_ASSESSMENT = 5
"""Terms of a filter between two assessments, which see matvecs that are not finite. Chosen by feel."""

MAX_DEGREE = 20
"""Degree of a filter, at most: the unwanted interval is known better after so many matvecs. Chosen by feel."""

LOCKING_SHARE = 0.1
"""Share of the error asked for that a vector may cause which is kept out of the filter. Chosen by feel."""


@dataclass(frozen=True)
class FilterPlan:
    """A filter for Ritz pairs.

    Attributes:
        locked: indices of the pairs to keep out of it.
        filtered: indices of those to filter.
        degrees: for each of these.
        center, half_width: of the unwanted interval, where it is small, over scale.
    """

    locked: list[int]
    filtered: list[int]
    degrees: list[int]
    center: float
    half_width: float


def make_plan(
    op: LinearOperator, request: Request, width: int, room: int, norm: float, values: Tensor, norms: Tensor
) -> FilterPlan:
    r"""Choose the locked and the filtered Ritz pairs, the degrees and the unwanted interval.

    Out of the filter, a pair with residual r moves a value at distance g by at most :math:`r \min(1, r/g)`. Where
    that is little for all values still needed, it is locked: converged pairs, and outliers on the other side. The
    interval holds the Ritz values that are neither locked nor among the outermost ``width``; and, at an end that is
    not wanted, their residuals too, as a bound of the spectrum. A value that by its residual may be a copy of one
    still needed does not count. Outside of the interval a degree m divides a residual by :math:`e^{m \rho}`, with
    :math:`\cosh \rho = |\theta - c| / e`.

    Args:
        op: the operator.
        request: what is asked for.
        width: vectors to filter, at most.
        room: pairs to lock, at most.
        norm: of the operator, over scale.
        values: ascending ``[m]``, over scale.
        norms: of residuals ``[m]``, over scale.
    """
    places, num_low = torch.arange(len(values), device="cpu"), num_at_low_end(request.k, request.which)
    wanted = torch.isin(places, torch.tensor(select(values, request.k, request.which), device="cpu"))
    block = torch.isin(places, torch.tensor(select(values, width, request.which), device="cpu"))
    needed = wanted & ~is_converged(op, request.allowed(values, norm), norm, norms)
    gaps = (values[:, None] - values[needed]).abs().amin(dim=1)
    aims = request.allowed(values, norm).clamp(min=attainable_accuracy(op, norm)) - rounding(op, norm)
    allowed = LOCKING_SHARE * aims[needed].min()
    aims = torch.where(needed, aims, torch.maximum(allowed, (allowed * gaps).sqrt()))
    accurate = places[~needed & (norms <= aims)]
    accurate = accurate[select(accurate, room, "BE")]
    locked = torch.isin(places, accurate)
    inside = ~(block | locked)
    inside = next(some for some in (inside & (gaps > norms), inside, ~locked) if bool(some.any()))
    low = float((values - norms if num_low == 0 else values)[inside].min())
    high = float((values + norms if num_low == request.k else values)[inside].max())
    center, half_width = (low + high) / 2, max((high - low) / 2, attainable_accuracy(op, norm))
    rates = torch.acosh(((values - center).abs() / half_width).clamp(min=1.0)).clamp(min=TINY)
    degrees = ((norms / aims).clamp(min=1.0).log() / rates).ceil().clamp(1, MAX_DEGREE)
    filtered = places[block & ~locked]
    order = degrees[filtered].argsort(descending=True, stable=True)
    filtered = filtered[order]
    return FilterPlan(
        accurate.tolist(), filtered.tolist(), degrees[filtered].int().tolist(), center, half_width
    )


@dataclass(frozen=True)
class Filter:
    """A filter in progress. ``next_term`` donates (reuses) the buffers.

    Attributes:
        current, previous: the last two polynomials' vectors ``[w, n]``, up to a factor for each; where a vector
            has reached its degree, ``current`` is the result.
        plan: of the filter, with descending degrees.
        num_terms: terms so far.
    """

    current: Tensor
    previous: Tensor
    plan: FilterPlan
    num_terms: int = 0

    @property
    def num_active(self) -> int:
        """Vectors that the next term multiplies."""
        return sum(degree > self.num_terms for degree in self.plan.degrees)

    @property
    def num_left(self) -> int:
        """Terms to come."""
        return self.plan.degrees[0] - self.num_terms


def next_term(op: LinearOperator, state: Filter, scale: Tensor, locked: Tensor) -> Filter:
    """Advance the recurrence by one matvec with each vector below its degree. No host synchronisation.

    Rows ``locked`` ``[l, n]`` are projected out, so that the filter is one of the operator on the rest of the space.
    """
    w, plan = state.num_active, state.plan
    factor = (1 if state.num_terms == 0 else 2) / plan.half_width
    vectors = state.current[:w]
    images = op.product(vectors.mT).mT / scale
    new = torch.add(images, vectors, alpha=-plan.center) * factor - state.previous[:w]
    new = torch.addmm(new, op.space.dots(locked, new.mT).mT, locked, alpha=-1.0)
    norms = row_norms(op.space, new)[:, None]
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    torch.div(vectors, norms, out=state.previous[:w])
    torch.div(new, norms, out=state.current[:w])
    return replace(state, num_terms=state.num_terms + 1)


@dataclass(frozen=True)
class ChebyshevState(BlockSubspace):
    """Rows that are Ritz vectors once they are assessed, and a filter in progress.

    Attributes:
        filter: or None. The first rows are those kept out of it.
        progress: of the last assessment with new Ritz pairs.
    """

    filter: Filter | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Chebyshev:
    """The solver of :func:`chebyshev`: see :class:`hvpkit.solvers.driver.Solver`.

    Attributes:
        op: the operator.
        request: what is asked for.
        width: vectors to filter.
        max_rows: vectors to keep during a filter.
    """

    op: LinearOperator
    request: Request
    width: int
    max_rows: int

    @property
    def limits(self) -> Limits:
        """Of the request."""
        return self.request.limits

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of a step, at most."""
        return self.width * self.op.cost

    def init(self) -> ChebyshevState:
        """Return a state with the start vectors as new rows."""
        start = block_subspace.start(self.op, self.request, self.width, self.max_rows + self.width)
        return ChebyshevState(**vars(start))

    def step(self, state: ChebyshevState) -> ChebyshevState:
        """Multiply the vectors in the filter, or else new rows."""
        if state.filter is None:
            return block_subspace.multiply(self.op, state, self.width)
        locked = state.rows[: len(state.filter.plan.locked)]
        num_matvecs = state.num_matvecs + state.filter.num_active * self.op.cost
        moved = next_term(self.op, state.filter, state.scale, locked)
        return replace(state, filter=moved, num_matvecs=num_matvecs)

    def assess(self, state: ChebyshevState) -> Assessment[ChebyshevState]:
        """Take over filtered vectors as new rows; Rayleigh-Ritz where these are multiplied; plan what comes next."""
        status = None
        if state.filter is not None:
            state, status = self._end_filter(state, state.filter)
        elif state.num_fresh:
            state, status = self._test(block_subspace.drop_non_finite(self.op, state))
        num_steps = math.ceil(state.num_new / self.width)
        if state.filter is not None:
            num_steps = min(state.filter.num_left, TERMS_PER_ASSESSMENT)
        return Assessment(state, state.progress, num_steps, status, state.suspect)

    def _end_filter(self, state: ChebyshevState, moved: Filter) -> tuple[ChebyshevState, Status | None]:
        """Take over the filtered vectors as new rows after the filter completes."""
        if not bool(torch.isfinite(self.op.space.peak(moved.current))):
            suspect = state.rows[len(moved.plan.locked)].unsqueeze(1).clone()
            return replace(state, filter=None, suspect=suspect), Status.NON_FINITE
        if moved.num_left:
            return state, None
        without = replace(state, filter=None)
        return block_subspace.extend(self.op, self.request, without, moved.current), None

    def _test(self, state: ChebyshevState) -> tuple[ChebyshevState, Status | None]:
        """Rotate the rows to Ritz vectors, test convergence, and choose the next vectors to multiply."""
        op, asked, m = self.op, self.request, state.num_rows
        if not m:
            return state, Status.NON_FINITE
        projection = block_subspace.rayleigh_ritz(op, state.rows[:m], state.images[:m])
        state = block_subspace.rotate(state, projection, projection.vectors)
        values, wanted = projection.values, select(projection.values, asked.k, asked.which)
        residuals = residuals_of(state.rows[:m], state.images[:m], values)
        norms = row_norms(op.space, residuals).to("cpu", torch.float64)
        found = RitzPairs(values[wanted], state.rows[wanted].mT, norms[wanted])
        state = replace(state, progress=progress_of(values, norms, state.scale), best=found)
        early = m < op.n and state.num_matvecs < MIN_STEPS * op.cost
        allowed = 0.0 if early else asked.allowed(found.values, state.norm)
        done = is_converged(op, allowed, state.norm, found.residual_norms)
        status = block_subspace.status_of(op, asked, state, found, done, whole=m == op.n)
        if status is not None:
            return state, status
        if m < self.max_rows:
            largest = torch.argsort(norms, descending=True)[: self.width]
            return block_subspace.extend(op, asked, state, residuals[largest.to(op.device)]), None
        return self._start_filter(state, values, norms)

    def _start_filter(
        self, state: ChebyshevState, values: Tensor, norms: Tensor
    ) -> tuple[ChebyshevState, Status | None]:
        """Start a filter; rows are then the locked ones, those to filter, and others from both ends."""
        op, width = self.op, self.width
        plan = make_plan(op, self.request, width, self.max_rows - width, state.norm, values, norms)
        most = int((self.limits.remaining(state.num_matvecs) / op.cost - width) / len(plan.filtered))
        if most < 1:
            return state, Status.MAX_MATVECS
        plan = replace(plan, degrees=[min(degree, most) for degree in plan.degrees])
        kept = plan.locked + plan.filtered
        others = [place for place in range(state.num_rows) if place not in set(kept)]
        spare = select(values[others], self.max_rows - len(kept), "BE")
        kept += [others[place] for place in spare]
        for matrix in (state.rows, state.images):
            matrix[: len(kept)] = matrix[kept]
        inputs = state.rows[len(plan.locked) : len(plan.locked + plan.filtered)].clone()
        moving = Filter(inputs, torch.zeros_like(inputs), plan)
        return replace(state, filter=moving, num_rows=len(kept)), None

    def finalize(self, state: ChebyshevState, status: Status) -> EigenResult:
        """Return the best pairs with true residuals, for one more matvec each."""
        return block_subspace.finalize(self.op, self.request, state, status)


@full_precision
def chebyshev(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Start | None = None,
    tol: float = 1e-3,
    atol: float | None = None,
    block_size: int | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""Compute a few eigenpairs at the ends of the spectrum, by Chebyshev-filtered subspace iteration.

    Stops when for each wanted Ritz value :math:`\theta` with residual r,

    .. math:: \|r\| + \text{rounding} \le \text{tol} \cdot |\theta|,

    or :math:`\text{atol} \cdot \|A\|` for a value of at most that, with the largest norm of a matvec so far for
    :math:`\|A\|`, or when the left side is at most 32 eps times that. A ``tol`` below rounding is taken as rounding.

    Use it where matvecs with many vectors at once are cheap, where many pairs are wanted, or where
    orthogonalisation is the largest cost: a filter needs none, and a fixed number of vectors. Otherwise
    :func:`hvpkit.lanczos` mostly takes fewer matvecs.

    Args:
        op: symmetric operator.
        k: number of pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end (the odd one from the
            high end), by a filter that damps the interval between.
        v0: start vectors, used as by :func:`hvpkit.lanczos`.
        tol: relative error of the eigenvalues.
        atol: size, in units of the operator's norm, up to which a value cannot be told from zero, and may be off by as
            much; 0 for none. By default ``min(1e-5, tol / 1000)``.
        block_size: vectors to filter, at least ``k``; by default one more for each end where several are wanted,
            without which one of them may be missed where many lie close together.
        max_matvecs: full-data matvecs, at most; the default is that of :func:`hvpkit.lanczos`.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each assessment.

    Returns:
        As :func:`hvpkit.lanczos`.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Matvecs as ``num_matvecs`` says, ``k`` of them for the true residuals; memory for 64 vectors and 8 for each
        of the block, for 16 of each where it is larger than 8.

    Source:
        Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006) 172-184, doi:10.1016/j.jcp.2006.03.017.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> chebyshev(op, 2, which="BE", tol=1e-6).values.round(decimals=4).tolist()
        [-1.0, 2.0]
    """
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
        offered=WHICH,
    )
    num_low = num_at_low_end(k, request.which)
    guards = sum(NUM_GUARDS for wanted in (num_low, k - num_low) if wanted > 1)
    width = k + guards if block_size is None else check_count("block_size", block_size, k, op.n)
    width = min(width, op.n, int(request.limits.remaining(0.0) / op.cost))
    split = sharded(op)
    solver = Chebyshev(split, request, width, max_rows=max(MAX_ROWS, ROWS_PER_VECTOR * width))
    return with_vectors_of(run(solver, monitor=monitor), split, op)
