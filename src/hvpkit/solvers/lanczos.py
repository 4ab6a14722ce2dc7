r"""Lanczos with thick restart and full reorthogonalisation.

Method: an orthonormal basis V of a Krylov space grows by products with the vectors at its frontier F, so
that :math:`A V = V T + F B` always holds; Ritz pairs of T approximate eigenpairs from the ends of the
spectrum inwards. When the basis is full it is replaced by some of its Ritz vectors, the frontier stays, and
the relation holds as before. One start vector gives the classical method; several, a block method; a random
vector added to the frontier later finds further copies of a multiple eigenvalue.

Cost: one product a step for each vector of a block; beside it, orthogonalisation reads the basis four
times (two passes of classical Gram-Schmidt, two matrix-vector products each).
Memory: ``ncv + block_size`` vectors and two to work with.
Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

Departures from the paper:
1. T is kept whole and not as an arrowhead: full reorthogonalisation gives all its entries, and what should
   be zero or symmetric among them shows an operator that is not.
2. The frontier may hold several vectors: each product's residual joins it, so that blocks of any size
   (also changing) are one algorithm, and a vector that vanishes simply does not join.
3. The operator is divided by a power of two near its first product, so that no inner product overflows or
   underflows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._typing import Seed
from hvpkit.errors import NotSymmetricError, check_choice, check_count, check_positive
from hvpkit.iterate import Limits, Look, Monitor, iterate
from hvpkit.operators import LinearOperator
from hvpkit.probes import normal_vector, resolve_seed
from hvpkit.products import check_like
from hvpkit.results import EigenResult, Interval, Status
from hvpkit.solvers.basis import orthonormalise_
from hvpkit.solvers.rayleigh_ritz import WHICH, Ritz, most_at_one_end, num_at_low_end, ritz, select

BASIS_BYTES = 4 * 2**30
"""What the default ``ncv`` lets the basis take."""

DEFAULT_MAX_MATVECS = 1000.0

NOISE, FLOOR = 4.0, 16.0
"""In units of eps * norm: the rounding in an error bound, and an error bound that counts as none."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: the arguments of :func:`lanczos` that the steps need."""

    k: int
    which: str
    tol: float
    block_size: int
    seed: int
    check_copies: bool


@dataclass(frozen=True)
class State:
    """A basis and the operator on it. ``step`` takes over the buffers of the state that it is given.

    Attributes:
        basis: orthonormal rows ``[capacity, n]``: the multiplied ones, the frontier, and unused ones.
        projected: ``basis @ A @ basis.T / scale`` ``[capacity, capacity]``, columns of multiplied rows.
        alive: 1, or 0 for a row that is zero because nothing new was left ``[capacity]``.
        norm: largest norm of a product so far, over scale, 0-d.
        scale: what products are divided by, 0-d.
        num_multiplied, num_frontier: rows in use.
        num_products: products so far.
        num_matvecs: the same in full-data products.
        num_random: random vectors drawn so far.
        search_length, search_until: of the search for further copies of the values, in products; 0 before
            it begins.
        search_from: the values that it began with.
    """

    basis: Tensor
    projected: Tensor
    alive: Tensor
    norm: Tensor
    scale: Tensor
    num_multiplied: int = 0
    num_frontier: int = 0
    num_products: int = 0
    num_matvecs: float = 0.0
    num_random: int = 0
    search_length: int = 0
    search_until: int = 0
    search_from: tuple[float, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the basis in use."""
        return self.num_multiplied + self.num_frontier


def init(op: LinearOperator, goal: Goal, ncv: int, v0: Tensor | None = None) -> State:
    """A state whose frontier is the start: from ``v0`` ``[n, p]``, else random vectors."""
    capacity = min(ncv + goal.block_size, op.n)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=op.dtype, device=op.device)

    basis = torch.empty(capacity, op.n, dtype=op.dtype, device=op.device)
    alive, norm, scale = zeros(capacity), zeros(), zeros() + 1
    state = State(basis, zeros(capacity, capacity), alive, norm, scale)
    width = min(goal.block_size, op.n)
    for vector in [] if v0 is None else _start_vectors(v0, goal)[:width]:
        state = _append(op, state, vector)
    while state.num_frontier < width:
        state = _append_random(op, state, goal)
    return state


def _start_vectors(v0: Tensor, goal: Goal) -> list[Tensor]:
    """Unit columns of v0; for a single start vector, their sum with a tenth of a random vector.

    A start that lacks the wanted vectors altogether would converge to others without a sign of it.
    """
    columns = v0 / v0.abs().amax(dim=0)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    if goal.block_size > 1:
        return list(columns.unbind(1))
    total = columns.sum(dim=1)
    noise = normal_vector(len(v0), dtype=v0.dtype, device=v0.device, seed=goal.seed)
    return [total + 0.1 * torch.linalg.vector_norm(total) / torch.linalg.vector_norm(noise) * noise]


def _append_random(op: LinearOperator, state: State, goal: Goal) -> State:
    """The state with a random vector, orthogonal to its basis, at its frontier."""
    stream = 1 + state.num_random
    vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=goal.seed, stream=stream)
    return _append(op, replace(state, num_random=state.num_random + 1), vector)


def _append(op: LinearOperator, state: State, vector: Tensor) -> State:
    row, unit = state.num_rows, vector / torch.linalg.vector_norm(vector)
    _, _, state.alive[row] = orthonormalise_(op.space, state.basis, row, unit, state.norm * 0 + 1)
    return replace(state, num_frontier=state.num_frontier + 1)


def step(op: LinearOperator, state: State, block_size: int = 1) -> State:
    """Multiplies the first vectors of the frontier and appends what is new in their products.

    Waits for nothing: on a GPU, scalars stay there.
    """
    first, width = state.num_multiplied, min(block_size, state.num_frontier)
    _newest_first_(state, width)
    block = op.product(state.basis[first : first + width].mT.contiguous())
    if state.num_products == 0:
        state = replace(state, scale=_power_of_two(block.abs().max()))
    for column, vector in zip(range(first, first + width), (block / state.scale).unbind(1), strict=True):
        state = _absorb(op, state, column, vector)
    return state


def _newest_first_(state: State, width: int) -> None:
    """Moves the newest vectors of the frontier to its head, if there are older ones.

    So a random vector that came later has its Krylov space to itself, and what there was before waits.
    """
    m, rows = state.num_multiplied, state.num_rows
    waiting = state.num_frontier - width
    if waiting:
        order = torch.arange(m, rows, device=state.basis.device).roll(width)
        for matrix in (state.basis, state.projected, state.alive):
            matrix[m:rows] = matrix[order]


def _absorb(op: LinearOperator, state: State, column: int, vector: Tensor) -> State:
    """Files the product with basis row ``column``: its coefficients, and what is new in it."""
    row, norm = state.num_rows, torch.maximum(state.norm, op.space.norm(vector))
    if row < op.n:
        coefficients, length, alive = orthonormalise_(op.space, state.basis, row, vector, norm)
        state.projected[row, column], state.alive[row] = length, alive
    else:  # the basis spans the space
        coefficients = op.space.dots(state.basis, vector)
    state.projected[: min(row, op.n), column] = coefficients
    return replace(
        state,
        norm=norm,
        num_multiplied=state.num_multiplied + 1,
        num_frontier=min(row + 1, op.n) - state.num_multiplied - 1,
        num_products=state.num_products + 1,
        num_matvecs=(state.num_products + 1) * op.cost,
    )


def _power_of_two(peak: Tensor) -> Tensor:
    """A power of two near ``peak``; 1 where it is zero or not finite."""
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.exp2(torch.log2(torch.where(usable, peak, torch.ones_like(peak))).round())


def look(op: LinearOperator, goal: Goal, state: State) -> Look[State]:
    """The ends so far, whether they are good enough, and the state to go on from."""
    state, poisoned = _in_order(state)
    pairs, m = project(op, state), state.num_multiplied
    status, wants_random = (Status.NON_FINITE, False) if poisoned else (None, False)
    if m and not poisoned:
        status, wants_random, state = _judge(op, goal, state, pairs)
    if status is None:
        whole = len(state.basis) == op.n
        if not whole and state.num_rows + wants_random + goal.block_size > len(state.basis):
            state = _restart(goal, state, pairs)
        if wants_random:
            state = _append_random(op, state, goal)
    room = (len(state.basis) - state.num_rows) // goal.block_size
    pace = m // (32 if op.device.type == "cpu" else 8)  # steps past the end cost at most so much
    scale = float(state.scale)
    return Look(
        state,
        smallest=float(pairs.values[0]) * scale if m else float("nan"),
        largest=float(pairs.values[-1]) * scale if m else float("nan"),
        smallest_bound=float(pairs.residual_norms[0]) * scale if m else float("inf"),
        largest_bound=float(pairs.residual_norms[-1]) * scale if m else float("inf"),
        status=status,
        num_steps=max(1, min(room, pace)),
    )


def project(op: LinearOperator, state: State) -> Ritz:
    """Ritz pairs on the multiplied rows, over ``state.scale``.

    Raises:
        NotSymmetricError: the operator is not symmetric beyond rounding.
    """
    m = state.num_multiplied
    projected = state.projected[: state.num_rows, :m].to("cpu", torch.float64)
    pairs = ritz(projected[:m], projected[m:])
    allowed = torch.finfo(op.dtype).eps ** 0.5
    if pairs.asymmetry > allowed * max(pairs.norm, float(state.norm)):
        raise NotSymmetricError(
            f"{op!r} is not symmetric: v'(Aw) and w'(Av) differ by {pairs.asymmetry / float(state.norm):.1e} "
            f"of its norm, where {op.dtype} allows {allowed:.1e}; for a Hessian try another mode, for a "
            "matrix take (A + A.T) / 2"
        )
    return pairs


def _in_order(state: State) -> tuple[State, bool]:
    """The state without rows that vanished, and cut before a product that was not finite (True then)."""
    rows, m = state.num_rows, state.num_multiplied
    finite = torch.isfinite(state.projected[:rows, :m]).all(dim=0).tolist()
    if not all(finite):
        m = finite.index(False)
        return replace(state, num_multiplied=m, num_frontier=rows - m), True
    alive = state.alive[:rows].nonzero().flatten()
    if len(alive) == rows:
        return state, False
    kept_columns = int((alive < m).sum())
    basis, projected = state.basis, state.projected
    basis[: len(alive)] = basis[alive]
    corner = projected[alive][:, alive]
    projected.zero_()[: len(alive), : len(alive)] = corner
    state.alive.zero_()[: len(alive)] = 1
    return replace(
        state, num_multiplied=kept_columns, num_frontier=len(alive) - kept_columns
    ), False


def _judge(
    op: LinearOperator, goal: Goal, state: State, pairs: Ritz
) -> tuple[Status | None, bool, State]:
    """Whether it is over, and if not whether a random vector is wanted."""
    m, exhausted = state.num_multiplied, state.num_frontier == 0
    if m < goal.k:
        return None, exhausted, state
    wanted = select(pairs.values, goal.k, goal.which)
    values, bounds = pairs.values[wanted], pairs.residual_norms[wanted] + _noise(op, pairs)
    digits = (bounds <= goal.tol * values.abs()) & (values != 0)
    rounded = bounds <= max(FLOOR * torch.finfo(op.dtype).eps * pairs.norm, 2 * _noise(op, pairs))
    if not exhausted and not bool((digits | rounded).all()):
        return None, False, state
    if m < op.n and goal.check_copies and most_at_one_end(goal.k, goal.which) > 1:
        searching, state = _search_copies(goal, state, values, bounds)
        if searching:
            return None, state.search_until == state.num_products + state.search_length, state
    if not bool(digits.all()):
        return Status.ZERO_TO_ROUNDING, False, state
    return Status.INVARIANT_SUBSPACE if exhausted else Status.CONVERGED, False, state


def _search_copies(goal: Goal, state: State, values: Tensor, bounds: Tensor) -> tuple[bool, State]:
    """Whether to go on looking for further copies of the wanted values, and the state that says so.

    A Krylov space holds one vector of a multiple eigenvalue. A copy appears when a new random vector has had
    as many products as the first one took; where one does, another may follow.
    """
    if state.num_products < state.search_until and state.num_frontier:
        return True, state
    before = torch.tensor(state.search_from, dtype=torch.float64)
    if len(before) and not bool(((values - before).abs() > bounds + goal.tol * values.abs()).any()):
        return False, state
    length = state.search_length or max(state.num_products, goal.k)
    return True, replace(
        state,
        search_length=length,
        search_until=state.num_products + length,
        search_from=tuple(values.tolist()),
    )


def _noise(op: LinearOperator, pairs: Ritz) -> float:
    """What rounding in products may add to an error bound: by the dtype, or as far as seen by asymmetry."""
    return max(NOISE * torch.finfo(op.dtype).eps * pairs.norm, pairs.asymmetry)


def _restart(goal: Goal, state: State, pairs: Ritz) -> State:
    """The state with its basis reduced to the best Ritz vectors and the frontier."""
    m, f = state.num_multiplied, state.num_frontier
    num_kept = min(goal.k + (m - goal.k) // 2, len(state.basis) - f - goal.block_size - 1)
    chosen = select(pairs.values, num_kept, goal.which)
    basis, projected = state.basis, state.projected
    rotation = pairs.coefficients[:, chosen]
    coupling = projected[m : m + f, :m] @ rotation.to(projected)
    for columns in basis.split(max(1, 2**22 // m), dim=1):  # in place, with little to work with
        columns[:num_kept] = rotation.mT.to(basis) @ columns[:m]
    basis[num_kept : num_kept + f] = basis[m : m + f].clone()
    projected.zero_()[:num_kept, :num_kept] = torch.diag(pairs.values[chosen]).to(projected)
    projected[num_kept : num_kept + f, :num_kept] = coupling
    state.alive.zero_()[: num_kept + f] = 1
    return replace(state, num_multiplied=num_kept)


def finalize(op: LinearOperator, goal: Goal, state: State, status: Status) -> EigenResult:
    """The wanted pairs with true residuals, for one more product each."""
    pairs, m = project(op, state), state.num_multiplied
    wanted = select(pairs.values, goal.k, goal.which)
    scale, noise = float(state.scale), _noise(op, pairs)
    rotation = pairs.coefficients[:, wanted].to(state.basis)
    vectors = state.basis[:m].mT @ rotation
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    values, residual_norms = pairs.values[wanted], pairs.residual_norms[wanted]
    if wanted and status is not Status.NON_FINITE:
        images = op.product(vectors) / state.scale
        quotients = (vectors * images).sum(dim=0)
        norms = torch.linalg.vector_norm(images - vectors * quotients, dim=0)
        values, residual_norms = quotients.to("cpu", torch.float64), norms.to("cpu", torch.float64)
        if not bool(torch.isfinite(residual_norms).all()):
            status = Status.NON_FINITE
            values, residual_norms = pairs.values[wanted], pairs.residual_norms[wanted]
    floor = FLOOR * torch.finfo(op.dtype).eps * pairs.norm
    status = _confirm(goal, floor, values, residual_norms, status)
    order = torch.argsort(values, stable=True)
    values, residual_norms = values[order], residual_norms[order]
    num_low = num_at_low_end(len(wanted), goal.which)
    if goal.which == "LM":
        num_low = sum(index == place for place, index in enumerate(wanted))
    kind = "exact" if status is Status.INVARIANT_SUBSPACE else "residual"
    radii = zip(values.tolist(), residual_norms.tolist(), strict=True)
    intervals = tuple(
        Interval(
            scale * (value - noise - (radius if place < num_low else 0.0)),
            scale * (value + noise + (radius if place >= num_low else 0.0)),
            kind,
        )
        for place, (value, radius) in enumerate(radii)
    )
    return EigenResult(
        values * scale,
        vectors[:, order.to(vectors.device)],
        residual_norms * scale,
        intervals,
        state.num_matvecs + len(wanted) * op.cost,
        0.0,
        status,
        status.advice,
        (),
    )


def _confirm(goal: Goal, floor: float, values: Tensor, norms: Tensor, status: Status) -> Status:
    """The status, less if true residuals are larger than those that it rests on."""
    missed = (norms > goal.tol * values.abs()) & (norms > floor)
    if not status.converged or not bool(missed.any()):
        return status
    zero = bool((values.abs() <= norms)[missed].all())
    return Status.ZERO_TO_ROUNDING if zero else Status.ROUNDING_LIMITED


def lanczos(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    v0: Tensor | None = None,
    tol: float = 1e-3,
    ncv: int | None = None,
    block_size: int = 1,
    check_copies: bool = True,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
) -> EigenResult:
    r"""A few eigenpairs at the ends of the spectrum, by thick-restart Lanczos.

    Stops when for each wanted Ritz value :math:`	heta` with residual r,

    .. math:: \|r\| + 	ext{rounding} \le 	ext{tol} \cdot |	heta|,

    or, where a value is zero to rounding, when :math:`\|r\|` is at most 16 eps times the operator's norm. A
    ``tol`` below rounding is taken as rounding.

    Args:
        op: symmetric operator.
        k: how many pairs.
        which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` the largest in magnitude, ``"BE"`` half
            from each end (the odd one from the high end), all from one Krylov space.
        v0: start ``[n]`` or ``[n, p]``. A block takes the columns as they are; a single start vector is
            their sum with a tenth of a random vector, so that nothing is missed.
        tol: relative error of the eigenvalues.
        ncv: the most basis vectors before a restart, by default what fits into 4 GiB, at most 300 or 4 k.
        block_size: vectors in one product. Operators share work among them; the count of products grows.
        check_copies: for two or more pairs at one end, make sure by a further random vector that no copy of
            a multiple eigenvalue is missed; doubles the products.
        max_matvecs: full-data products, at most; 1,000 by default.
        time_limit: seconds.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.Progress` after each look.

    Returns:
        Values ascending, with orthonormal vectors, true residuals, intervals and status. Running into a
        limit or a product that is not finite is a status too, with what was found until then: fewer than
        ``k`` pairs if that was so early.

    Raises:
        ValueError: an argument out of its range, named.
        NotSymmetricError: ``op`` is not symmetric beyond rounding.

    Cost:
        Products as the message says, ``k`` of them for the true residuals; ``ncv + block_size + 2`` vectors
        of memory.

    Source:
        Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, doi:10.1137/S0895479898334605.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 100, dtype=torch.float64)))
        >>> lanczos(op, 2, which="BE", tol=1e-6).values
        tensor([-1.0000,  2.0000], dtype=torch.float64)
    """
    begin = time.perf_counter()
    check_count("k", k, 1, op.n)
    check_choice("which", which, WHICH)
    check_count("block_size", block_size, 1, op.n)
    tol = max(check_positive("tol", tol), torch.finfo(op.dtype).eps)
    goal = Goal(k, which, tol, block_size, resolve_seed(seed), check_copies)
    least = 2 * k + block_size + 2
    if ncv is None:
        fitting = BASIS_BYTES // (op.n * op.dtype.itemsize)
        ncv = max(least + 18, min(fitting, max(300, 4 * k)))
    elif check_count("ncv", ncv, 1) < min(least, op.n):
        raise ValueError(f"ncv must be at least 2 k + block_size + 2 = {least} or n, got {ncv}")
    limits = Limits(max_matvecs or DEFAULT_MAX_MATVECS, time_limit, k * op.cost, k * op.cost)
    state = init(op, goal, ncv, None if v0 is None else _check_start(op, v0))
    run = iterate(
        state,
        lambda state: step(op, state, block_size),
        lambda state: look(op, goal, state),
        step_cost=block_size * op.cost,
        limits=limits,
        monitor=monitor,
    )
    found = finalize(op, goal, run.state, run.status)
    message = found.status.advice
    if run.status is Status.NON_FINITE:
        message += "; " + op.blame(run.state.basis[run.state.num_multiplied].unsqueeze(1))
    return replace(found, history=run.history, message=message, seconds=time.perf_counter() - begin)


def _check_start(op: LinearOperator, v0: Tensor) -> Tensor:
    if not isinstance(v0, Tensor) or v0.ndim not in (1, 2) or v0.shape[0] != op.n:
        found = list(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(f"v0 must be a tensor of shape [{op.n}] or [{op.n}, p], got {found}")
    check_like(v0, torch.empty(0, dtype=op.dtype, device=op.device), name="v0")
    columns = v0.detach().reshape(op.n, -1)
    if not bool(torch.isfinite(columns).all()) or bool((columns == 0).all(dim=0).any()):
        raise ValueError("v0 has a column that is zero or contains NaN or infinity")
    return columns
