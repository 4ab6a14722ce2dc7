r"""A randomized range basis, and quadratic forms of the probes outside of it.

With Q an orthonormal basis of the range of :math:`A S`, for random S, and a probe :math:`\omega` independent of S,

.. math:: \operatorname{tr} A = \operatorname{tr} Q'AQ + E\,\omega'(I - QQ')\, A\, (I - QQ')\,\omega,

and the second term varies little where the spectrum decays. Hutch++ draws S beside its probes; XTrace takes the probes
themselves for S, and for each of them the basis of the others. Both need only small matrices of inner products, so
that every probe is used with the last basis, and none is multiplied again.

Source: Meyer, Musco, Musco, Woodruff, SOSA 2021, arXiv:2010.09649; Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl.
45 (2024) 1-23, arXiv:2301.07825.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit.estimators.probe import draw
from hvpkit.estimators.sampling import Plan
from hvpkit.operators.base import LinearOperator
from hvpkit.results.plain_data import LONG
from hvpkit.solvers.checkpoint import Witness
from hvpkit.solvers.common.orthogonalize import orthonormalise_, power_of_two
from hvpkit.solvers.common.vector_memory import check_room

COSTS = {"hutchinson": 1, "hutch++": 3, "xtrace": 2}
"""Matvecs per probe: its own; that of a column of S (Hutch++); that of the basis row made of it."""

SKETCH = 2**32
"""Number of the first column of S in Hutch++, beyond the numbers of all probes."""


@dataclass(frozen=True)
class SketchState:
    """Probes, a basis, and their inner products over ``scale``. ``step`` donates (reuses) the state's buffers.

    Attributes:
        basis: orthonormal rows, zero where a vector was dependent ``[r, n]``; no rows for Hutchinson's method.
        probes: the same number of rows.
        images: A times the basis, or no rows where they are not kept.
        alive: 1, or 0 for a row of the basis that is zero ``[r]``.
        projected: ``Q'AQ`` ``[r, r]``.
        dots: ``Q'W`` for probes W ``[r, k]``.
        crossed: ``Q'AW`` ``[r, k]``.
        forms: quadratic forms of the probes ``[k]``.
        squares: squared norms of A times the probes ``[k]``.
        scale: divisor of matvecs, 0-d.
        num_good: probes before the first whose matvec is not finite, 0-d.
        witness: a random combination of the probes, and of their images over scale.
        num_probes: so far.
        num_matvecs: full-data matvecs so far.
    """

    basis: Tensor = field(metadata=LONG)
    probes: Tensor = field(metadata=LONG)
    images: Tensor = field(metadata=LONG)
    alive: Tensor
    projected: Tensor
    dots: Tensor
    crossed: Tensor
    forms: Tensor
    squares: Tensor
    scale: Tensor
    num_good: Tensor
    witness: Witness
    num_probes: int = 0
    num_matvecs: float = 0.0


def num_vectors(plan: Plan, *, keep_images: bool = False) -> int:
    """Return the vectors that an estimate takes memory for: those kept, and what a step works with, measured.

    Two of them are the witness for a checkpoint.
    """
    kept = 0 if plan.cost == 1 else plan.num_probes
    return (2 + keep_images) * kept + (4 if plan.cost == 1 else 10) * plan.block_size + 2


def init(op: LinearOperator, plan: Plan, *, keep_images: bool = False) -> SketchState:
    """Return a state without a probe, with buffers for all.

    Raises:
        MemoryError: they do not fit into the memory that is free.
    """
    remedy = "take fewer num_matvecs, a smaller block_size" + (
        ', or method="hutchinson"' if plan.cost > 1 else ""
    )
    check_room(op, num_vectors(plan, keep_images=keep_images), remedy)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=op.dtype, device=op.device)

    k, n = plan.num_probes, op.space.size(op.n)
    r = 0 if plan.cost == 1 else k
    matrices = empty(r, r), empty(r, k), empty(r, k)
    vectors = empty(r, n), empty(r, n), empty(r if keep_images else 0, n)
    none = torch.zeros((), dtype=torch.int64, device=op.device)
    one, witness = empty().fill_(1.0), Witness.empty(op)
    return SketchState(*vectors, empty(r), *matrices, empty(k), empty(k), one, none, witness)


def step(op: LinearOperator, plan: Plan, state: SketchState) -> SketchState:
    """Multiply the next block of probes, and the rows that they add to the basis."""
    numbers = plan.next_block(state.num_probes)
    new = slice(numbers.start, numbers.stop)
    probes = draw(op, plan.probe, plan.seed, numbers)
    if plan.method == "hutch++":
        others = range(SKETCH + numbers.start, SKETCH + numbers.stop)
        sketch, state = _multiply(op, state, draw(op, plan.probe, plan.seed, others))
        _extend_(op, state, numbers, sketch)
        both, state = _multiply(op, state, torch.cat([state.basis[new], probes]))
        basis_images, images = both.tensor_split(2)
    else:
        images, state = _multiply(op, state, probes)
        basis_images = images[:0]
        if plan.method == "xtrace":
            _extend_(op, state, numbers, images)
            basis_images, state = _multiply(op, state, state.basis[new])
    _store_(op, state, numbers, probes, images, basis_images)
    if plan.method == "xtrace":  # a row of the basis is orthogonal to the matvecs before it
        state.crossed[new, : numbers.start] = 0
    witness = state.witness.including(op.space, probes, images)
    return replace(state, num_probes=numbers.stop, num_good=_num_good(state, numbers), witness=witness)


def trim(state: SketchState) -> SketchState:
    """Drop the room for further probes."""
    k = state.num_probes
    small = {name: getattr(state, name)[:k, :k] for name in ("projected", "dots", "crossed")}
    rows = ("basis", "probes", "images", "alive", "forms", "squares")
    return replace(state, **small, **{name: getattr(state, name)[:k] for name in rows})


def _multiply(op: LinearOperator, state: SketchState, rows: Tensor) -> tuple[Tensor, SketchState]:
    images = op.product(rows.mT).mT
    scale = state.scale if state.num_matvecs else power_of_two(op.space.peak(images))
    return images / scale, replace(state, scale=scale, num_matvecs=state.num_matvecs + len(rows) * op.cost)


def _extend_(op: LinearOperator, state: SketchState, numbers: range, vectors: Tensor) -> None:
    """Orthonormalise ``vectors`` against the basis, into its rows of these numbers."""
    for row, vector in zip(numbers, vectors, strict=True):
        _, _, state.alive[row] = orthonormalise_(op.space, state.basis, row, vector, op.space.norm(vector))


def _store_(
    op: LinearOperator,
    state: SketchState,
    numbers: range,
    probes: Tensor,
    images: Tensor,
    basis_images: Tensor,
) -> None:
    """Store the probes of these numbers and their inner products; by symmetry where an image is not kept."""
    new, old, upto = slice(numbers.start, numbers.stop), slice(numbers.start), slice(numbers.stop)
    state.forms[new] = op.space.reduce((probes * images).sum(dim=1))
    state.squares[new] = op.space.reduce((images * images).sum(dim=1))
    if len(state.images):
        state.images[new] = basis_images
    if len(state.basis):
        state.projected[upto, new] = op.space.dots(state.basis[upto], basis_images.mT)
        state.projected[new, old] = state.projected[old, new].mT
        state.dots[upto, new] = op.space.dots(state.basis[upto], probes.mT)
        state.dots[new, old] = op.space.dots(state.basis[new], state.probes[old].mT)
        state.crossed[upto, new] = op.space.dots(state.basis[upto], images.mT)
        state.crossed[new, old] = op.space.dots(basis_images, state.probes[old].mT)
        state.probes[new] = probes


def _num_good(state: SketchState, numbers: range) -> Tensor:
    """Return the number of probes before the first that is not finite, including those of these numbers."""
    new, upto = slice(numbers.start, numbers.stop), slice(numbers.stop)
    fresh = [state.forms[new], *(m[upto, new] for m in (state.projected, state.dots, state.crossed))]
    good = torch.stack([torch.isfinite(tensor).all() for tensor in fresh]).all()
    return torch.where(good & (state.num_good == numbers.start), numbers.stop, state.num_good)


@dataclass(frozen=True)
class Small:
    """The inner products of k probes and their basis, on the CPU in float64.

    Attributes:
        n: dimension of the operator.
        rank: number of nonzero rows of the basis.
        projected, dots, crossed, forms: as in :class:`SketchState`, of the operator or of its square.
    """

    n: int
    rank: float
    projected: Tensor
    dots: Tensor
    crossed: Tensor
    forms: Tensor


def small(op: LinearOperator, state: SketchState, k: int) -> Small:
    """Return the small matrices of a state's first k probes."""
    r = min(k, len(state.basis))

    def take(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float64)

    matrices = take(state.projected[:r, :r]), take(state.dots[:r, :k]), take(state.crossed[:r, :k])
    return Small(op.n, float(state.alive[:r].sum()), *matrices, take(state.forms[:k]))
