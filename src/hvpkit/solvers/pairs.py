r"""The Lanczos process on a congruence of which the root is never made.

For :math:`B = P^{1/2} A P^{1/2}`, with A symmetric and P symmetric positive definite, a vector y is kept as the pair
:math:`u = P^{1/2} y,\ w = P^{-1/2} y`. Then :math:`y_1^\top y_2 = u_1^\top w_2`, and B y is the pair :math:`P v, v`
with :math:`v = A u`. P is applied after v is orthogonalised: pairs that are combined as whole ones drift apart, by
factors of :math:`\alpha / \beta` a step.

Cost of a step: a matvec of A, an application of P, and full reorthogonalisation. Memory: two vectors a step.
Source: as in preconditioned conjugate gradients: Golub and Van Loan, Matrix Computations, 4th edition (2013), section
11.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hvpkit.operators.space import Space
from hvpkit.solvers.common.bounds import StartPolynomial
from hvpkit.solvers.common.orthogonalize import BREAKDOWN
from hvpkit.solvers.krylov import KrylovState


def halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the u and the w of pairs in rows ``[..., 2 n]``."""
    half = pairs.shape[-1] // 2
    return pairs[..., :half], pairs[..., half:]


def start(space: Space, capacity: int, pair: Tensor, polynomial: StartPolynomial) -> KrylovState:
    """Return a state whose first row is this pair ``[2 n]``, with unit norm."""
    zeros = pair.new_zeros
    basis = pair.new_empty(capacity, len(pair))
    basis[0] = pair / length(space, pair)
    alive = zeros(capacity)
    alive[0] = 1
    one = zeros(()) + 1
    projected = zeros(capacity, capacity)
    return KrylovState(basis, projected, alive, zeros(()), one, zeros(()), polynomial, num_frontier=1)


def step(
    space: Space, state: KrylovState, image: Callable[[Tensor], Tensor], metric: Callable[[Tensor], Tensor]
) -> KrylovState:
    """Multiply the last pair by A, ``image``, and append the remainder, by P, ``metric``. No host synchronisation.

    A basis that spans the space has no remainder.
    """
    column, row = state.num_multiplied, state.num_rows
    if not state.num_frontier:
        return state
    us, ws = halves(state.basis[:row])
    # a matvec with zero is zero, whatever came out
    v = torch.where(state.alive[column] > 0, image(us[column].unsqueeze(1))[:, 0], 0.0)
    first = space.dots(us, v)
    v = v - ws.mT @ first
    second = space.dots(us, v)
    v = v - ws.mT @ second
    coefficients, pair = first + second, torch.cat([metric(v.unsqueeze(1))[:, 0], v])
    rest = length(space, pair)
    norm = torch.maximum(state.norm, torch.hypot(torch.linalg.vector_norm(coefficients), rest))
    left = (rest > BREAKDOWN * torch.finfo(v.dtype).eps * norm) & (row < state.polynomial.n)
    alive = left.to(v.dtype)
    state.basis[row] = pair * (alive / torch.where(left, rest, torch.ones_like(rest)))
    state.projected[:row, column], state.projected[row, column] = coefficients, rest * alive
    state.alive[row] = alive
    return replace(
        state,
        norm=norm,
        dropped=torch.hypot(state.dropped, rest * (1 - alive)),
        num_multiplied=column + 1,
        num_products=state.num_products + 1,
    )


def length(space: Space, pair: Tensor) -> Tensor:
    """Return the norm of y, 0-d, for its pair ``[2 n]``."""
    u, w = halves(pair)
    return space.dots(u[None], w)[0].clamp(min=0).sqrt()
