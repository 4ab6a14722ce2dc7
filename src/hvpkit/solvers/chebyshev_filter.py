r"""A Chebyshev filter: where it is small, which vectors go through it with which degrees, and one term of it.

With :math:`x = (A - c) / e`, :math:`T_{j+1} = 2 x T_j - T_{j-1}`. After each term the last two vectors are divided by
the length of the last, so that nothing overflows, whatever the spectrum turns out to be.

Source: Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006) 172-184, doi:10.1016/j.jcp.2006.03.017; degrees:
Winkelmann, Springer, Di Napoli, ACM Trans. Math. Softw. 45 (2019) 21, doi:10.1145/3313828.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit.operators.base import LinearOperator
from hvpkit.solvers.common.block import row_norms
from hvpkit.solvers.common.convergence import floor, is_converged, rounding
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end, select
from hvpkit.solvers.common.request import Request

MAX_DEGREE = 20
"""The interval is known better after so many products with a vector."""

SAFETY = 0.1
"""What of the error asked for a vector may cause that is kept out of the filter."""


@dataclass(frozen=True)
class Plan:
    """A filter to be, on Ritz pairs.

    Attributes:
        locked: places of the pairs to keep out of it.
        filtered: places of those to put through it.
        degrees: for each of these.
        center, half_width: of the interval where it is small, over scale.
    """

    locked: list[int]
    filtered: list[int]
    degrees: list[int]
    center: float
    half_width: float


def make_plan(
    op: LinearOperator, asked: Request, width: int, room: int, norm: float, values: Tensor, norms: Tensor
) -> Plan:
    r"""What to do about Ritz pairs of which wanted ones are not good enough yet.

    Out of the filter, a pair with residual r moves a value at distance g by at most :math:`r \min(1, r/g)`. Where
    that is little for all values looked for, it is locked: pairs that are done, and outliers on the other side. The
    interval holds the Ritz values that are neither locked nor among the outermost ``width``; and, at an end that is
    not wanted, their residuals too, as a bound of the spectrum. A value that by its residual may be a copy of one
    looked for does not count. Outside of the interval a degree m divides a residual by :math:`e^{m \rho}`, with
    :math:`\cosh \rho = |\theta - c| / e`.

    Args:
        op: the operator.
        asked: what is wanted.
        width: vectors to filter, at most.
        room: pairs to lock, at most.
        norm: of the operator, over scale.
        values: ascending ``[m]``, over scale.
        norms: of residuals ``[m]``, over scale.
    """
    places, num_low = torch.arange(len(values)), num_at_low_end(asked.k, asked.which)
    wanted = torch.isin(places, torch.tensor(select(values, asked.k, asked.which)))
    block = torch.isin(places, torch.tensor(select(values, width, asked.which)))
    needed = wanted & ~is_converged(op, asked.tol, norm, values, norms)
    gaps = (values[:, None] - values[needed]).abs().amin(dim=1)
    aims = (asked.tol * values.abs()).clamp(min=floor(op, norm)) - rounding(op, norm)
    allowed = SAFETY * aims[needed].min()
    aims = torch.where(needed, aims, torch.maximum(allowed, (allowed * gaps).sqrt()))
    accurate = places[~needed & (norms <= aims)]
    accurate = accurate[select(accurate, room, "BE")]
    locked = torch.isin(places, accurate)
    inside = ~(block | locked)
    inside = next(some for some in (inside & (gaps > norms), inside, ~locked) if bool(some.any()))
    low = float((values - norms if num_low == 0 else values)[inside].min())
    high = float((values + norms if num_low == asked.k else values)[inside].max())
    center, half_width = (low + high) / 2, max((high - low) / 2, floor(op, norm))
    rates = torch.acosh(((values - center).abs() / half_width).clamp(min=1.0)).clamp(min=1e-300)
    degrees = ((norms / aims).clamp(min=1.0).log() / rates).ceil().clamp(1, MAX_DEGREE)
    filtered = places[block & ~locked]
    order = degrees[filtered].argsort(descending=True, stable=True)
    filtered = filtered[order]
    return Plan(accurate.tolist(), filtered.tolist(), degrees[filtered].int().tolist(), center, half_width)


@dataclass(frozen=True)
class Filter:
    """A filter under way. ``next_term`` takes over the buffers.

    Attributes:
        current, previous: the last two polynomials' vectors ``[w, n]``, to a factor for each; where a vector
            has reached its degree, ``current`` is the result.
        plan: of the filter, with descending degrees.
        num_terms: terms so far.
    """

    current: Tensor
    previous: Tensor
    plan: Plan
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
    """The filter after one more product with each vector below its degree. Waits for nothing.

    Rows ``locked`` ``[l, n]`` are projected out, so that the filter is one of the operator on the rest of the space.
    """
    w, plan = state.num_active, state.plan
    factor = (1 if state.num_terms == 0 else 2) / plan.half_width
    vectors = state.current[:w]
    images = op.product(vectors.mT.contiguous()).mT / scale
    new = torch.add(images, vectors, alpha=-plan.center) * factor - state.previous[:w]
    new = torch.addmm(new, op.space.dots(locked, new.mT).mT, locked, alpha=-1.0)
    lengths = row_norms(op.space, new)[:, None]
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    torch.div(vectors, lengths, out=state.previous[:w])
    torch.div(new, lengths, out=state.current[:w])
    return replace(state, num_terms=state.num_terms + 1)
