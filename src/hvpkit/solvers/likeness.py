r"""Is a sample of the data likely to save passes to both ends? Another sample tells, for a pass or less.

The lowest Ritz vector v of a sample's Hessian :math:`H_S` is fitted to it. If it is the sample's alone, as with few
examples that differ much, :math:`v' H_T v` is far from :math:`v' H_S v` for an independent sample T, of which v knows
nothing, and has :math:`v' H v` as its mean. And where the low end is no small part of the spectrum, as early in
training, Lanczos on all data takes few steps.

Cost: Lanczos steps on the first sample and a matvec of the second. Evidence: docs/multifidelity.md.
"""

from __future__ import annotations

import torch

from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.krylov import krylov_space

NUM_STEPS = 15
"""Lanczos steps on the sample, at most."""

AGREEMENT = 0.75
"""Smaller over larger quotient of both samples, at least."""

LARGE_END = 0.05
"""Low end of a sample over its high one, from which Lanczos takes few steps, and the sample is likely to be unlike all
data."""


def may_save_passes(sample: LinearOperator, other: LinearOperator, seed: int) -> tuple[bool, float]:
    """Return whether the low end is small, negative and the same in two samples, and the full-data matvecs it took."""
    op, second = sharded(sample), sharded(other)
    like = torch.empty(0, dtype=op.dtype, device=op.device)
    # of a stream that no other solve has: what follows does not depend on this start
    start = op.space.random(op.n, like=like, seed=seed, stream=2**16)

    def has_large_end(pairs: RitzPairs) -> bool:
        return not float(pairs.values[0]) >= -LARGE_END * float(pairs.values[-1])

    found = krylov_space(op, start, min(NUM_STEPS, op.n), None, has_large_end, interval=1)
    first, cost = float(found.pairs.values[0] * found.scale), len(found.rows) * sample.cost
    if has_large_end(found.pairs) or first >= 0:
        return False, cost
    vector = found.pairs.vectors[:, 0].to(found.rows) @ found.rows
    image = second.product(vector.unsqueeze(1))[:, 0]
    ratio = float(op.space.dots(vector[None], image)[0]) / first
    return AGREEMENT <= ratio <= 1 / AGREEMENT, cost + other.cost
