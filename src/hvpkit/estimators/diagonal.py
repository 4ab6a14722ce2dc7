r"""The diagonal, from matvecs with random signs.

Method: :math:`a_{jj} = E\,\omega_j (A\omega)_j` for signs :math:`\omega` (Bekas, Kokiopoulou, Saad), with variance
:math:`\sum_{i \ne j} a_{ij}^2`; or (XDiag), for the part :math:`QQ'A` exactly, with Q a basis of the range that the
probes themselves make, and for each probe the basis of the others.

Cost: one matvec per probe, or two. Memory: two vectors per probe of a step and four more; with XDiag, one and a half
vectors per matvec.
Source: Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57 (2007) 1214-1229, doi:10.1016/j.apnum.2007.01.003; Epperly,
Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23, doi:10.1137/23M1548323.

Departures: signs only, as their variance has no term of the diagonal itself and no division by a small number is
needed; low rank as in :mod:`hvpkit.estimators.leave_one_out`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.typing import Seed
from hvpkit.estimators import sketch
from hvpkit.estimators.leave_one_out import angles, left_out
from hvpkit.estimators.probe import draw, unit_order
from hvpkit.estimators.sampling import Monitor, Plan, estimate, make_plan
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.results.estimate import Estimate, Mean
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.checkpoint import Witness
from hvpkit.solvers.common.orthogonalize import CHUNK, power_of_two
from hvpkit.solvers.common.vector_memory import check_room
from hvpkit.solvers.driver import full_precision

COSTS = {"hutchinson": 1, "xdiag": 2}
"""Matvecs per probe."""


@dataclass(frozen=True)
class DiagonalState:
    """Mean and spread of the samples so far, over ``scale`` (Welford's update).

    Attributes:
        mean: ``[n]``.
        spread: sum of squared distances from it ``[n]``.
        scale: divisor of matvecs, 0-d.
        num_good: probes before the first whose matvec is not finite, 0-d.
        witness: a random combination of the probes, and of their images over scale.
        num_probes: so far.
        num_matvecs: full-data matvecs so far.
    """

    mean: Tensor = field(metadata=LONG)
    spread: Tensor = field(metadata=LONG)
    scale: Tensor
    num_good: Tensor
    witness: Witness
    num_probes: int = 0
    num_matvecs: float = 0.0


def init(op: LinearOperator) -> DiagonalState:
    """Return a state without a probe."""
    zero = torch.zeros(op.space.size(op.n), dtype=op.dtype, device=op.device)
    none = torch.zeros((), dtype=torch.int64, device=op.device)
    return DiagonalState(zero, zero, zero.new_ones(()), none, Witness.empty(op))


def step(op: LinearOperator, plan: Plan, state: DiagonalState) -> DiagonalState:
    """Multiply the next block of probes and add its samples to mean and spread."""
    numbers = plan.next_block(state.num_probes)
    k, w = numbers.start, len(numbers)
    probes = draw(op, plan.probe, plan.seed, numbers)
    images = op.product(probes.mT).mT
    scale = state.scale if k else power_of_two(op.space.peak(images))
    images = images / scale
    found = probes * images
    mean = found.mean(dim=0)
    change = mean - state.mean
    spread = state.spread + (found - mean).square().sum(dim=0) + change.square() * (k * w / (k + w))
    good = op.space.finite(images).all() & (state.num_good == k)
    return DiagonalState(
        torch.where(good, state.mean + change * (w / (k + w)), state.mean),
        torch.where(good, spread, state.spread),
        scale,
        torch.where(good, numbers.stop, state.num_good),
        state.witness.including(op.space, probes, images),
        numbers.stop,
        state.num_matvecs + w * op.cost,
    )


def evaluate(op: LinearOperator, plan: Plan, state: DiagonalState, k: int) -> Mean:
    """Return the diagonal, over scale, from a state's k probes."""
    if plan.exact:
        seen = torch.zeros(op.n, dtype=torch.bool, device=op.device)
        seen[unit_order(op.n, plan.seed)[:k].to(op.device)] = True
        value = torch.where(op.space.local(seen), k * state.mean, torch.nan)
        return Mean(value, torch.where(value.isnan(), torch.inf, 0.0).to(value), value[None][:0])
    if k < 2:
        value = state.mean if k else torch.full_like(state.mean, torch.nan)
        return Mean(value, torch.full_like(value, torch.inf), value[None][:0])
    return Mean(state.mean, (state.spread / (k * (k - 1))).sqrt(), state.mean[None][:0])


def evaluate_xdiag(op: LinearOperator, _: Plan, state: sketch.SketchState, k: int) -> Mean:
    r"""Return the diagonal, over scale, from the first k probes of a state that keeps images.

    Sample i is :math:`\operatorname{diag}(QQ'A) - u_i v_i + c_i\, \omega_i u_i`, entry by entry, with
    :math:`u_i = Q s_i`, :math:`v_i = A u_i` and :math:`c_i = s_i'r_i`, the component of :math:`A\omega_i` outside
    of the basis of the others.
    """
    size = op.space.size(op.n)
    value = torch.full((size,), torch.nan, dtype=op.dtype, device=op.device)
    stderr = torch.full_like(value, torch.inf)
    if not k:
        return Mean(value, stderr, value[None][:0])
    found = sketch.small(op, state, k)
    lost = left_out(found.crossed, op.precision)
    left = (lost * found.crossed).sum(dim=0)
    for first in range(0, size, width := max(1, CHUNK // k)):
        at = slice(first, first + width)
        changes = _changes(state, lost, left, at)
        value[at] = (state.basis[:k, at] * state.images[:k, at]).sum(dim=0) + changes.mean(dim=0)
        if k > 1:
            stderr[at] = changes.std(dim=0) / k**0.5
    return Mean(value, stderr * (1 + _shared(op, state, lost, left)) ** 0.5, value[None][:0])


def _changes(state: sketch.SketchState, lost: Tensor, left: Tensor, at: slice) -> Tensor:
    """Return the difference of each sample from the diagonal of QQ'A at some entries, ``[k, ...]``."""
    k, s = len(left), lost.to(state.basis)
    u, v = s.mT @ state.basis[:k, at], s.mT @ state.images[:k, at]
    return u * (left.to(s)[:, None] * state.probes[:k, at] - v)


def _shared(op: LinearOperator, state: sketch.SketchState, lost: Tensor, left: Tensor) -> float:
    r"""Return the samples' mean covariance over their variance / k, summed over part of the entries; in [0, 1].

    As :func:`hvpkit.estimators.leave_one_out.shared_variance`: with the further direction :math:`b = Q u_{ij}` that
    the basis without j lacks, :math:`\Delta_{ij} = b\, Ab - \omega_i b\, u_{ij}'r_i`, and :math:`u_{ij}'r_i = -c\,c_i /
    \sqrt{1 - c^2}`.
    """
    k = len(left)
    if k < 2:
        return 0.0
    stride = -(-k * k * op.n // CHUNK)
    at = slice(-op.space.part(op.n).start % stride, None, stride)
    basis, images, probes = (
        rows[:k, at].to("cpu", torch.float64) for rows in (state.basis, state.images, state.probes)
    )
    own = _changes(state, lost, left, at).double().var(dim=0).sum() / k
    cosines, sines, pairs = angles(lost)
    u, v = lost.mT @ basis, lost.mT @ images
    b, image = ((x - cosines[:, :, None] * x[:, None]) / sines[:, :, None] for x in (u, v))
    change = b * (image + probes[:, None] * (cosines / sines * left[:, None])[:, :, None])
    change = torch.where(pairs[:, :, None], change, 0.0)
    shared = (change * change.transpose(0, 1)).sum().to(own) / (k * (k - 1))
    shared, own = op.space.reduce(torch.stack([shared, own])).cpu()
    return float((shared / own).clamp(0, 1)) if own > 0 else 0.0


@full_precision
def diagonal(
    op: LinearOperator,
    *,
    method: str = "hutchinson",
    num_matvecs: float = 100,
    tol: float | None = None,
    block_size: int = 8,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Monitor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate[Tensor]:
    r"""Estimate the diagonal ``[n]``, with the standard error of each entry.

    With XDiag and a spectrum that decays fast, standard errors are right in norm, but those of single entries may be
    several times too small. If ``num_matvecs`` suffices for all n columns, the value is exact to rounding; entries
    that a limit then leaves out are NaN.

    Args:
        op: symmetric operator.
        method: ``"hutchinson"``, or ``"xdiag"``, which is more accurate where the spectrum decays, and keeps vectors.
        num_matvecs: budget, as for :func:`hvpkit.trace`.
        tol: stop where ``norm(stderr) <= tol * norm(value)``, at 20 samples or more.
        block_size: probes that are multiplied together.
        time_limit: seconds; a matvec that runs past it ends after its batch, and does not count.
        seed: of random vectors.
        monitor: called with a :class:`hvpkit.EstimateProgress` after each assessment.
        checkpoint: a file to continue from, as for :func:`hvpkit.trace`.

    Returns:
        The estimate, as of :func:`hvpkit.trace`; ``op.unflatten`` converts its value to a tree. Over a mesh value and
        standard error are DTensors, ``Shard(0)``.

    Raises:
        ValueError: an argument is out of its range; a checkpoint as for :func:`hvpkit.trace`.

    Cost:
        As ``num_matvecs`` says. Memory: :mod:`hvpkit.estimators.diagonal`.

    Source:
        Bekas et al., doi:10.1016/j.apnum.2007.01.003; Epperly, Tropp, Webber, doi:10.1137/23M1548323.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.arange(500.0)))
        >>> diagonal(op, num_matvecs=10).value[:3]
        tensor([0., 1., 2.])
    """
    plan = make_plan(op, method, COSTS, num_matvecs=num_matvecs, tol=tol, block_size=block_size, seed=seed)
    options: Any = {"time_limit": time_limit, "monitor": monitor, "checkpoint": checkpoint}
    split = sharded(op)
    if plan.method == "hutchinson":
        check_room(split, 6 * plan.block_size + 8, "take a smaller block_size, or fewer parameters (wrt=)")
        return _of_whole(op, estimate(split, plan, init(split), step, evaluate, **options))
    plan = replace(plan, method="xtrace")
    start = sketch.init(split, plan, keep_images=True)
    return _of_whole(
        op, estimate(split, plan, start, sketch.step, evaluate_xdiag, trim=sketch.trim, **options)
    )


def _of_whole(op: LinearOperator, found: Estimate[Tensor]) -> Estimate[Tensor]:
    """Return the estimate with DTensors, if ranks hold parts of its entries."""
    ranks = op.space.ranks
    if ranks is None or op.space.sharded:
        return found
    value, stderr = (ranks.shards(part, op.n) for part in (found.value, found.stderr))
    return replace(found, value=value, stderr=stderr, samples=found.samples.new_empty(0, op.n))
