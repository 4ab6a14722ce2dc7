"""A Krylov space that grows: its basis, the operator on it, and what is kept at a restart.

With V the multiplied rows of the basis and F its frontier, the rows still to be multiplied,
:math:`A V = V T + F B` holds at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.random import normal_vector
from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.common.block import RANDOM_SHARE, mixed_start, power_of_two
from hvpkit.solvers.common.bounds import Filter
from hvpkit.solvers.common.convergence import check_symmetric
from hvpkit.solvers.common.orthogonalize import orthonormalise_
from hvpkit.solvers.common.rayleigh_ritz import Ritz, ritz


@dataclass(frozen=True)
class State:
    """A basis and the operator on it. ``step`` takes over the buffers of the state that it is given.

    Attributes:
        basis: orthonormal rows ``[capacity, n]``: the multiplied ones, the frontier, and unused ones.
        projected: ``basis @ A @ basis.T / scale`` ``[capacity, capacity]``, columns of multiplied rows.
        alive: 1, or 0 for a row that is zero because nothing new was left ``[capacity]``.
        norm: largest norm of a product so far, over scale, 0-d.
        scale: what products are divided by, 0-d.
        dropped: length of all that counted as nothing, over scale, 0-d.
        num_multiplied, num_frontier: rows in use.
        num_kept: of the multiplied ones, those that a restart kept.
        filter: the polynomial that the restarts applied to the start.
        num_products: products so far.
        num_matvecs: the same in full-data products, with those that verified the operator.
        num_verified: how many of these.
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
    dropped: Tensor
    filter: Filter
    num_multiplied: int = 0
    num_frontier: int = 0
    num_kept: int = 0
    num_products: int = 0
    num_matvecs: float = 0.0
    num_verified: int = 0
    num_random: int = 0
    search_length: int = 0
    search_until: int = 0
    search_from: tuple[float, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the basis in use."""
        return self.num_multiplied + self.num_frontier


def start(op: LinearOperator, capacity: int, width: int, seed: int, v0: Tensor | None = None) -> State:
    """A state with ``width`` vectors at its frontier: from ``v0`` ``[n, p]``, else random ones.

    Of v0 as :func:`hvpkit.solvers.common.block.mixed_start` mixes it.
    """
    capacity = min(capacity, op.n)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=op.dtype, device=op.device)

    basis = torch.empty(capacity, op.n, dtype=op.dtype, device=op.device)
    polynomial = Filter.of_start(op.n, 1.0 if width == 1 else 0.0)
    state = State(
        basis, zeros(capacity, capacity), zeros(capacity), zeros(), zeros() + 1, zeros(), polynomial
    )
    if v0 is not None:
        mixed = mixed_start(v0, width, seed)
        if width == 1:
            share = RANDOM_SHARE / float(torch.linalg.vector_norm(mixed))
            state = replace(state, filter=replace(polynomial, share=min(share, 1.0)))
        for vector in mixed:
            state = _append(op, state, vector)
    while state.num_frontier < width:
        state = append_random(op, state, seed)
    return state


def append_random(op: LinearOperator, state: State, seed: int) -> State:
    """The state with a random vector, orthogonal to its basis, at its frontier.

    Beside others it starts a Krylov space of its own, and no single polynomial tells what was done.
    """
    stream = 1 + state.num_random
    vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=seed, stream=stream)
    if state.num_rows:
        state = replace(state, filter=replace(state.filter, share=0.0))
    return _append(op, replace(state, num_random=stream), vector)


def _append(op: LinearOperator, state: State, vector: Tensor) -> State:
    row, unit = state.num_rows, vector / torch.linalg.vector_norm(vector)
    _, _, state.alive[row] = orthonormalise_(op.space, state.basis, row, unit, state.norm * 0 + 1)
    return replace(state, num_frontier=state.num_frontier + 1)


def step(op: LinearOperator, state: State, block_size: int = 1) -> State:
    """Multiplies the first vectors of the frontier and appends what is new in their products.

    Waits for nothing: on a GPU, scalars stay there.
    """
    first, width = state.num_multiplied, min(block_size, state.num_frontier)
    block = op.product(state.basis[first : first + width].mT.contiguous())
    if state.num_products == 0:
        state = replace(state, scale=power_of_two(block.abs().max()))
    alive = state.alive[first : first + width] > 0  # a product with nothing is nothing, whatever came out
    block = torch.where(alive, block, 0.0).div_(state.scale)
    for column, vector in zip(range(first, first + width), block.unbind(1), strict=True):
        state = _absorb(op, state, column, vector)
    return state


def _absorb(op: LinearOperator, state: State, column: int, vector: Tensor) -> State:
    """Files the product with basis row ``column``: its coefficients, and what is new in it."""
    row, norm = state.num_rows, torch.maximum(state.norm, op.space.norm(vector))
    if row < op.n:
        # From one start, a product has parts along the last two vectors only, but for the first after a restart.
        near = column - 2 if state.num_frontier == 1 and state.num_random <= 1 else 0
        first = near if near >= state.num_kept else 0
        coefficients, length, alive = orthonormalise_(op.space, state.basis, row, vector, norm, first)
        state.projected[row, column], state.alive[row] = length * alive, alive
        state = replace(state, dropped=torch.hypot(state.dropped, length * (1 - alive)))
    else:  # the basis spans the space
        coefficients = op.space.dots(state.basis, vector)
    state.projected[: min(row, op.n), column] = coefficients
    return replace(
        state,
        norm=norm,
        num_multiplied=state.num_multiplied + 1,
        num_frontier=min(row + 1, op.n) - state.num_multiplied - 1,
        num_products=state.num_products + 1,
        num_matvecs=(state.num_products + state.num_verified + 1) * op.cost,
    )


def project(op: LinearOperator, state: State) -> tuple[Ritz, Tensor]:
    """Ritz pairs on the multiplied rows, and lengths of new vectors since a restart; over ``state.scale``.

    Raises:
        NotSymmetricError: the operator is not symmetric beyond rounding.
    """
    m = state.num_multiplied
    projected = state.projected[: state.num_rows, :m].to("cpu", torch.float64, copy=True)
    pairs = ritz(projected[:m], projected[m:])
    check_symmetric(op, pairs.asymmetry, max(pairs.norm, float(state.norm)))
    return pairs, projected.diagonal(-1)[state.num_kept :]


def trimmed(state: State) -> State:
    """The state without unused rows of its basis."""
    return replace(state, basis=state.basis[: state.num_rows])


def verified(op: LinearOperator, state: State) -> State:
    """A state that comes from elsewhere, once it is known to be of this operator: by one product, counted.

    Raises:
        ValueError: it is of another operator.
    """
    if not state.num_multiplied:
        return state
    image = op.product(state.basis[0].unsqueeze(1))[:, 0] / state.scale
    rows = state.num_rows
    difference = op.space.norm(image - state.basis[:rows].mT @ state.projected[:rows, 0])
    if not float(difference) <= torch.finfo(op.dtype).eps ** 0.5 * float(state.norm):
        raise ValueError(
            f"checkpoint: it holds a solve of another operator, or of {op!r} at other parameters or data; delete it, "
            "or pass the operator that it began with"
        )
    return replace(state, num_verified=state.num_verified + 1, num_matvecs=state.num_matvecs + op.cost)


def compact(state: State) -> tuple[State, bool]:
    """The state without rows that vanished, and cut before a product that was not finite (True then)."""
    state = _compacted(state)
    rows = state.num_rows
    finite = torch.isfinite(state.projected[:rows, : state.num_multiplied]).all(dim=0).tolist()
    if all(finite):
        return state, False
    m = finite.index(False)
    return replace(state, num_multiplied=m, num_frontier=rows - m), True


def _compacted(state: State) -> State:
    """The state without rows that vanished."""
    rows = state.num_rows
    alive = state.alive[:rows].nonzero().flatten()
    if len(alive) == rows:
        return state
    m = int((alive < state.num_multiplied).sum())
    basis, projected = state.basis, state.projected
    basis[: len(alive)] = basis[alive]
    corner = projected[alive][:, alive]
    projected.zero_()[: len(alive), : len(alive)] = corner
    state.alive.zero_()[: len(alive)] = 1
    return replace(state, num_multiplied=m, num_frontier=len(alive) - m)


def restart(state: State, pairs: Ritz, lengths: Tensor, chosen: list[int]) -> State:
    """The state with its basis reduced to the chosen Ritz vectors and the frontier."""
    m, f, kept = state.num_multiplied, state.num_frontier, len(chosen)
    discarded = torch.ones(m, dtype=torch.bool)
    discarded[chosen] = False
    basis, projected = state.basis, state.projected
    rotation = pairs.coefficients[:, chosen]
    coupling = projected[m : m + f, :m] @ rotation.to(projected)
    for columns in basis.split(max(1, 2**22 // m), dim=1):  # in place, with little to work with
        columns[:kept] = rotation.mT.to(basis) @ columns[:m]
    basis[kept : kept + f] = basis[m : m + f].clone()
    projected.zero_()[:kept, :kept] = torch.diag(pairs.values[chosen]).to(projected)
    projected[kept : kept + f, :kept] = coupling
    state.alive.zero_()[: kept + f] = 1
    polynomial = state.filter.restarted(pairs.values[discarded], lengths)
    return replace(state, num_multiplied=kept, num_kept=kept, filter=polynomial)
