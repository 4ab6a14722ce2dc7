r"""Krylov spaces: the Lanczos process with restarts, and a few steps of it for a function of an operator.

With V the multiplied rows of the basis and F its frontier, the rows still to be multiplied, the functions of
:class:`KrylovState` keep :math:`A V = V T + F B` at any time.

:func:`krylov_space` is for :math:`f(A)\, b`: with Ritz values :math:`\theta_i` and coefficients :math:`s_i` of their
vectors on a basis V that starts with b, :math:`f(A)\, b \approx \|b\| \sum_i f(\theta_i)\, s_{1i}\, V^\top s_i` and
:math:`b' f(A)\, b \approx \|b\|^2 \sum_i f(\theta_i)\, s_{1i}^2`, of which the latter is Gauss quadrature.

Cost: a matvec a step, and full reorthogonalisation. Memory: a vector a step.
Source: Golub and Meurant, Matrices, Moments and Quadrature with Applications, 2010, doi:10.1515/9781400833887.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.checkpoint import Witness, coefficients
from hvpkit.solvers.common.bounds import StartPolynomial
from hvpkit.solvers.common.convergence import check_symmetric
from hvpkit.solvers.common.orthogonalize import (
    RANDOM_SHARE,
    mixed_start,
    orthonormalise_,
    power_of_two,
    rotate_,
)
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, ritz

SETTLING_INTERVAL = 3
"""Steps of :func:`krylov_space` between two tests of its accuracy, by default. Chosen by feel."""


@dataclass(frozen=True)
class KrylovState:
    """A basis and the operator on it. ``step`` donates (reuses) the input buffers.

    Attributes:
        basis: orthonormal rows ``[capacity, n]``: the multiplied ones, the frontier, and unused ones.
        projected: ``basis @ A @ basis.T / scale`` ``[capacity, capacity]``, columns of multiplied rows.
        alive: 1, or 0 for a row that is zero because its vector depended on the rows above ``[capacity]``.
        norm: largest norm of a matvec so far, over scale, 0-d.
        scale: what matvecs are divided by, 0-d.
        dropped: norm of all remainders that counted as zero, over scale, 0-d.
        polynomial: the one that the restarts applied to the start.
        num_multiplied, num_frontier: rows in use.
        num_kept: of the multiplied ones, those that a restart kept.
        num_products: matvecs so far.
        num_matvecs: the same in full-data matvecs, with those that verified the operator.
        num_verified: number of these.
        num_random: random vectors drawn so far.
    """

    basis: Tensor = field(metadata=LONG)
    projected: Tensor
    alive: Tensor
    norm: Tensor
    scale: Tensor
    dropped: Tensor
    polynomial: StartPolynomial
    num_multiplied: int = 0
    num_frontier: int = 0
    num_kept: int = 0
    num_products: int = 0
    num_matvecs: float = 0.0
    num_verified: int = 0
    num_random: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the basis in use."""
        return self.num_multiplied + self.num_frontier


S = TypeVar("S", bound=KrylovState)


def start(
    op: LinearOperator,
    capacity: int,
    width: int,
    seed: int,
    v0: Tensor | None = None,
    *,
    buffer: Tensor | None = None,
) -> KrylovState:
    """Return a state with ``width`` vectors at its frontier: from ``v0`` ``[n, p]``, else random ones.

    Of v0 as :func:`hvpkit.solvers.common.orthogonalize.mixed_start` mixes it. ``buffer`` is a basis ``[rows, n]`` of
    another state that is not needed any more: its memory is reused if it is large enough.
    """
    capacity = min(capacity, op.n)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=op.dtype, device=op.device)

    if buffer is not None and len(buffer) >= capacity:
        basis = buffer[:capacity]
    else:
        basis = torch.empty(capacity, op.space.size(op.n), dtype=op.dtype, device=op.device)
    polynomial = StartPolynomial.of_start(op.n, 1.0 if width == 1 else 0.0)
    state = KrylovState(
        basis, zeros(capacity, capacity), zeros(capacity), zeros(), zeros() + 1, zeros(), polynomial
    )
    if v0 is not None:
        mixed = mixed_start(v0, width, seed)
        if width == 1:
            share = RANDOM_SHARE / float(
                torch.linalg.vector_norm(mixed)
            )  # of whole vectors, as the caller's are
            state = replace(state, polynomial=replace(polynomial, share=min(share, 1.0)))
        for vector in mixed:
            state = _append(op, state, op.space.local(vector))
    while state.num_frontier < width:
        state = append_random(op, state, seed)
    return state


def append_random(op: LinearOperator, state: S, seed: int) -> S:
    """Append a random vector, orthogonal to the basis, to the frontier.

    Beside others it starts a Krylov space of its own, and no single polynomial describes the basis.
    """
    stream = 1 + state.num_random
    vector = op.space.random(op.n, like=state.basis, seed=seed, stream=stream)
    if state.num_rows:
        state = replace(state, polynomial=replace(state.polynomial, share=0.0))
    return _append(op, replace(state, num_random=stream), vector)


def _append(op: LinearOperator, state: S, vector: Tensor) -> S:
    row, unit = state.num_rows, vector / op.space.norm(vector)
    _, _, state.alive[row] = orthonormalise_(op.space, state.basis, row, unit, state.norm * 0 + 1)
    return replace(state, num_frontier=state.num_frontier + 1)


def step(op: LinearOperator, state: S, block_size: int = 1) -> S:
    """Multiply the first vectors of the frontier and append the new directions of the matvecs.

    No host synchronisation: on a GPU, scalars stay there.
    """
    first, width = state.num_multiplied, min(block_size, state.num_frontier)
    block = op.product(state.basis[first : first + width].mT.contiguous())
    if state.num_products == 0:
        state = replace(state, scale=power_of_two(op.space.peak(block)))
    alive = state.alive[first : first + width] > 0  # a matvec with zero is zero, whatever came out
    block = torch.where(alive, block, 0.0).div_(state.scale)
    for column, vector in zip(range(first, first + width), block.unbind(1), strict=True):
        state = _append_matvec(op, state, column, vector)
    return state


def _append_matvec(op: LinearOperator, state: S, column: int, vector: Tensor) -> S:
    """Orthogonalise the matvec with basis row ``column``: store its coefficients, append the remainder."""
    row, norm, dropped = state.num_rows, torch.maximum(state.norm, op.space.norm(vector)), state.dropped
    if row < op.n:
        # From one start, a matvec has parts along the last two vectors only, but for the first after a restart.
        near = column - 2 if state.num_frontier == 1 and state.num_random <= 1 else 0
        first = near if near >= state.num_kept else 0
        coefficients, rest, alive = orthonormalise_(op.space, state.basis, row, vector, norm, first)
        state.projected[row, column], state.alive[row] = rest * alive, alive
        dropped = torch.hypot(dropped, rest * (1 - alive))
    else:  # the basis spans the space
        coefficients = op.space.dots(state.basis, vector)
    state.projected[: min(row, op.n), column] = coefficients
    return replace(
        state,
        norm=norm,
        dropped=dropped,
        num_multiplied=state.num_multiplied + 1,
        num_frontier=min(row + 1, op.n) - state.num_multiplied - 1,
        num_products=state.num_products + 1,
        num_matvecs=(state.num_products + state.num_verified + 1) * op.cost,
    )


def project(op: LinearOperator, state: KrylovState) -> tuple[RitzPairs, Tensor]:
    """Return Ritz pairs on the multiplied rows, and norms of new vectors since a restart; over ``state.scale``.

    Raises:
        NotSymmetricError: the operator is not symmetric beyond rounding.
    """
    m = state.num_multiplied
    projected = state.projected[: state.num_rows, :m].to("cpu", torch.float64, copy=True)
    pairs = ritz(projected[:m], projected[m:])
    check_symmetric(op, pairs.asymmetry, max(pairs.norm, float(state.norm)))
    return pairs, projected.diagonal(-1)[state.num_kept :]


def trim(state: S) -> S:
    """Drop the unused rows of the basis."""
    return replace(state, basis=state.basis[: state.num_rows])


def witness(state: KrylovState) -> Witness:
    """Return a random combination, of unit norm, of the multiplied rows whose matvecs are finite, and its matvec."""
    rows = state.num_rows
    finite = torch.isfinite(state.projected[:rows, : state.num_multiplied]).all(dim=0).tolist()
    m = finite.index(False) if False in finite else len(finite)
    if not m:
        return Witness(state.basis[0], state.basis[0])
    weights = coefficients(m)
    weights = (weights / torch.linalg.vector_norm(weights)).to(state.projected)
    image = state.projected[:rows, :m] @ weights
    used = int(image.nonzero().max()) + 1 if bool(image.any()) else 0  # further rows need not be finite
    return Witness(state.basis[:m].mT @ weights, state.basis[:used].mT @ image[:used], m)


def verify(op: LinearOperator, state: S) -> S:
    """Verify by one matvec, counted, that a loaded state belongs to the operator.

    Raises:
        ValueError: it belongs to another operator.
    """
    cost = witness(state).check(op, state.scale, float(state.norm.nan_to_num(0.0, posinf=0.0)))
    if not cost:
        return state
    return replace(state, num_verified=state.num_verified + 1, num_matvecs=state.num_matvecs + cost)


def compact(state: S) -> tuple[S, bool]:
    """Drop zero rows, and cut before a matvec that was not finite; also return whether there was one."""
    state = _drop_zero_rows(state)
    rows = state.num_rows
    finite = torch.isfinite(state.projected[:rows, : state.num_multiplied]).all(dim=0).tolist()
    if all(finite):
        return state, False
    m = finite.index(False)
    return replace(state, num_multiplied=m, num_frontier=rows - m), True


def _drop_zero_rows(state: S) -> S:
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


def restart(state: S, pairs: RitzPairs, norms: Tensor, chosen: list[int]) -> S:
    """Reduce the basis to the chosen Ritz vectors and the frontier; pairs and norms are those of :func:`project`."""
    m, f, kept = state.num_multiplied, state.num_frontier, len(chosen)
    discarded = torch.ones(m, dtype=torch.bool, device="cpu")
    discarded[chosen] = False
    basis, projected = state.basis, state.projected
    rotation = pairs.vectors[:, chosen]
    coupling = projected[m : m + f, :m] @ rotation.to(projected)
    rotate_(basis, rotation)
    basis[kept : kept + f] = basis[m : m + f].clone()
    projected.zero_()[:kept, :kept] = torch.diag(pairs.values[chosen]).to(projected)
    projected[kept : kept + f, :kept] = coupling
    state.alive.zero_()[: kept + f] = 1
    polynomial = state.polynomial.restarted(pairs.values[discarded], norms)
    return replace(state, num_multiplied=kept, num_kept=kept, polynomial=polynomial)


@dataclass(frozen=True)
class KrylovSpace:
    """The Krylov space of an operator and a vector b.

    Attributes:
        rows: its orthonormal basis ``[m, n]``.
        pairs: Ritz pairs over scale, with coefficients on the rows; NaN if a matvec was not finite.
        scale: what matvecs are divided by, 0-d.
    """

    rows: Tensor
    pairs: RitzPairs
    scale: Tensor


def krylov_space(
    op: LinearOperator,
    vector: Tensor,
    num_steps: int,
    scale: Tensor | None,
    enough: Callable[[RitzPairs], bool],
    *,
    interval: int = SETTLING_INTERVAL,
) -> KrylovSpace:
    """Return the space after ``num_steps`` Lanczos steps from ``vector`` ``[n]``, or as soon as it is ``enough``.

    That is tested each ``interval`` steps. ``scale`` is what matvecs are divided by; None: a power of two near the
    first one.
    """
    rows = torch.empty(num_steps, op.space.size(op.n), dtype=op.dtype, device=op.device)
    projected = rows.new_zeros(num_steps + 1, num_steps)
    alive, norm = rows.new_zeros(num_steps), rows.new_zeros(())
    alive[0] = orthonormalise_(op.space, rows, 0, vector / op.space.peak(vector), norm)[2]
    for row in range(num_steps):
        image = op.product(rows[row].unsqueeze(1))[:, 0]
        if scale is None:
            scale = power_of_two(op.space.peak(image))
        image, norm = image / scale, torch.maximum(norm, op.space.norm(image / scale))
        count = row + 1
        if count == num_steps:
            projected[:count, row] = op.space.dots(rows, image)
        else:
            projected[:count, row], projected[count, row], alive[count] = orthonormalise_(
                op.space, rows, count, image, norm
            )
        if count % interval == 0 or count == num_steps:
            found = _ritz_space(rows[:count], projected[: count + 1, :count], alive[:count], scale)
            finite = bool(torch.isfinite(projected[count, row]))
            if count < num_steps and (not finite or enough(found.pairs)):
                break
    return found


def _ritz_space(rows: Tensor, projected: Tensor, alive: Tensor, scale: Tensor) -> KrylovSpace:
    """Return the space of those rows that are not zero."""
    kept = alive.cpu().nonzero().flatten()
    small = projected.to("cpu", torch.float64)
    coupling, small = small[-1:, kept], small[kept][:, kept]
    if bool(torch.isfinite(small).all()):
        return KrylovSpace(rows[kept], ritz(small, coupling), scale)
    nothing = torch.full_like(small, math.nan)
    return KrylovSpace(rows[kept], RitzPairs(nothing.diagonal(), nothing, nothing.diagonal()), scale)
