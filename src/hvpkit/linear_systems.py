"""Linear systems with curvature: solutions, and the inverse as an operator."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import Seed, Tree
from hvpkit._utils.validation import check_choice, check_non_negative, check_positive, check_tolerance
from hvpkit.errors import NotConvergedError
from hvpkit.extreme import SCORE_COST
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.operators.vectors import as_columns, is_one
from hvpkit.results.linear import SolveProgress, SolveResult
from hvpkit.solvers.checkpoint import Checkpoint
from hvpkit.solvers.common.orthogonalize import unit_of
from hvpkit.solvers.common.request import DEFAULT_MAX_MATVECS
from hvpkit.solvers.common.vector_memory import check_room
from hvpkit.solvers.driver import Limits, full_precision, run
from hvpkit.solvers.linear.arithmetic import arithmetic_of
from hvpkit.solvers.linear.preconditioner import SamplePreconditioner, krylov_preconditioner
from hvpkit.solvers.linear.system import LinearSystem

METHODS = ("auto", "cg", "minres")

SAMPLE_RATIO, MIN_SAMPLE = 20, 200
"""All examples over those of the sample for a preconditioner, and the fewest of one."""

SAMPLE_STEPS = 60
"""Lanczos steps on a sample for a preconditioner, and vectors that it holds."""

VECTORS_PER_COLUMN = {"cg": 13, "minres": 21}
"""Vectors that a solve takes memory for, for each right-hand side, at its peak."""


@full_precision
def solve(
    H: LinearOperator,
    b: Tree,
    *,
    damping: float = 0.0,
    method: str = "auto",
    tol: float = 1e-6,
    preconditioner: str | None = None,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    seed: Seed = 0,
    monitor: Callable[[SolveProgress], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SolveResult:
    r"""Solve :math:`(H + \delta I)\, x = b` with damping :math:`\delta`, to a residual of ``tol``, relative to b.

    The residual of a solution that counts as converged is true: it is computed by a matvec with the x returned. The
    columns of ``b [n, k]`` converge one by one, each by a recurrence of its own; they share passes over the data.

    Args:
        H: symmetric operator.
        b: right-hand side: a tensor or NumPy array ``[n]`` or ``[n, k]``, or a tree like the parameters; over a mesh
            also a DTensor, ``Shard(0)``.
        damping: multiple of the identity that is added, at least 0. (For a shift to the left solve with
            ``H.shift(-s)``.)
        method: ``"minres"``: any symmetric matrix, definite or not; the least residual in each step. ``"cg"``:
            conjugate gradients, for positive definite matrices; two thirds of the memory for each right-hand side,
            and a direction of negative curvature where there is one. ``"auto"``: ``"minres"``, which reaches a residual
            in no more steps than conjugate gradients do.
        tol: norm of the residual over that of b.
        preconditioner: ``"sample"``: the Krylov space of a weighted sample of the data, see
            :mod:`hvpkit.solvers.linear.preconditioner`. Worth it with many examples and little damping.
        max_matvecs: full-data matvecs, at most, of all columns; by default 1,000 for each.
        time_limit: seconds.
        seed: of the sample and its start vector; nothing else is random.
        monitor: called with a :class:`hvpkit.SolveProgress` after each assessment, as :func:`hvpkit.progress_bar` is:
            each eighth step at first, and each 64th of a matrix of at most 8,192 unknowns on a CPU.
        checkpoint: a file. The solve is saved there every minute, at a limit and when it is interrupted, and the same
            call continues from it; deleted on convergence.

    Returns:
        The solution, in the form of b. Status, for the worst column (``statuses`` for each): ``"converged"``;
        ``"negative-curvature"``, from conjugate gradients, with a direction v of :math:`v'(H + \delta I)v < 0`, and the
        last iterate as x. In all other cases x is the best one that was verified: ``"singular"``: b is not in the range
        of a singular matrix, and x by MINRES has the least residual; ``"rounding-limited"``: the dtype does not allow
        ``tol``; a limit; ``"non-finite"``.

    Raises:
        TypeError: ``preconditioner="sample"`` for an operator that is not over examples.
        ValueError: an argument out of its range, named; b of another shape, dtype or device, or not finite; a
            checkpoint that is damaged, of another version or solve, or whose path cannot be written.
        MemoryError: before the first matvec, if the vectors do not fit into the memory that is free.

    Cost:
        A matvec a step and column, and one for the true residual; with a sample, its scores and Lanczos steps. Memory:
        13 vectors a column with ``"cg"``, 21 with ``"minres"``; with a sample a vector for each of its steps.

    Source:
        Hestenes and Stiefel, doi:10.6028/jres.049.044; Paige and Saunders, doi:10.1137/0712047.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([-1.0, 2.0, 4.0], dtype=torch.float64)))
        >>> found = hk.solve(A, torch.ones(3, dtype=torch.float64))
        >>> found.x, found.converged
        (tensor([-1.0000,  0.5000,  0.2500], dtype=torch.float64), True)
        >>> hk.solve(A, torch.ones(3, dtype=torch.float64), method="cg").status
        <Status.NEGATIVE_CURVATURE: 'negative-curvature'>
    """
    check_choice("method", method, METHODS)
    check_preconditioner(preconditioner)
    number = resolve_seed(seed)
    columns, back = as_columns(sharded(H), b, "b")
    made = sample_preconditioner(H, damping, number) if preconditioner else None
    system = make_system(H, columns, damping, method, tol, made, max_matvecs, time_limit)
    saved = None
    if checkpoint is not None:
        identity = system.identity(damping=damping, preconditioner=preconditioner, seed=number)
        saved = Checkpoint(
            checkpoint, identity, system.op, verify=system.resumed, entry=SolveProgress, unpack=system.unpack
        )
    return _like_b(H, run(system, monitor=monitor, checkpoint=saved), back, b)


@dataclass(frozen=True, eq=False, repr=False)
class InverseOperator(LinearOperator):
    r"""The operator :math:`(H + \text{damping}\, I)^{-1}`: each matvec is a solve.

    Attributes:
        tol: relative residual norm of its solves.
    """

    tol: float = 0.0

    @property
    def precision(self) -> float:
        """Relative error of matvecs: that of the residual."""
        return max(self.tol, super().precision)


@full_precision
def inverse(
    H: LinearOperator,
    *,
    damping: float = 0.0,
    method: str = "auto",
    tol: float = 1e-6,
    preconditioner: str | None = None,
    max_matvecs: float | None = None,
    seed: Seed = 0,
) -> LinearOperator:
    r"""Return the operator :math:`(H + \text{damping}\, I)^{-1}`.

    ``hk.inverse(H) @ b`` is ``hk.solve(H, b).x``, for vectors, blocks and trees; estimators and eigensolvers take it as
    any other operator, and count one matvec for each of its solves. A sample for the preconditioner is drawn once.

    Args:
        H: symmetric operator.
        damping: multiple of the identity that is added, at least 0.
        method: as of :func:`solve`.
        tol: norm of each residual over that of its right-hand side.
        preconditioner: as of :func:`solve`.
        max_matvecs: full-data matvecs of each solve, at most, by default 1,000 for each column.
        seed: of the sample.

    Returns:
        The operator. Its matvecs raise :class:`hvpkit.NotConvergedError` where a solve does not reach ``tol``.

    Raises:
        TypeError, ValueError: as of :func:`solve`.

    Cost:
        That of :func:`solve` for each matvec.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
        >>> hk.inverse(A, damping=1.0) @ torch.ones(2, dtype=torch.float64)
        tensor([0.5000, 0.2000], dtype=torch.float64)
    """
    check_choice("method", method, METHODS)
    check_preconditioner(preconditioner)
    check_non_negative("damping", damping)
    check_tolerance("tol", tol)
    if max_matvecs is not None:
        check_positive("max_matvecs", max_matvecs)
    made = sample_preconditioner(H, damping, resolve_seed(seed)) if preconditioner else None

    def product(vectors: Tensor) -> Tensor:
        space = sharded(H).space
        found = run(make_system(H, space.local(vectors), damping, method, tol, made, max_matvecs, None))
        if not found.converged:
            worst = float(torch.as_tensor(found.relative_residual, device="cpu").max())
            raise NotConvergedError(
                f"a solve with {H!r} ended {found.status} at a relative residual of {worst:.1e}, where tol is "
                f"{tol:.1e}: {found.message}"
            )
        return space.whole(torch.as_tensor(found.x, device=H.device), H.n)

    shifted = f"({H.name} + {damping:g} I)" if damping else H.name
    return InverseOperator(
        product, H.n, H.dtype, H.device, name=f"inverse of {shifted}", layout=H.layout, space=H.space, tol=tol
    )


def check_preconditioner(preconditioner: str | None) -> None:
    """Raise ValueError unless it is None or "sample"."""
    if preconditioner is not None:
        check_choice("preconditioner", preconditioner, ("sample",))


def make_system(
    H: LinearOperator,
    columns: Tensor,
    damping: float,
    method: str,
    tol: float,
    preconditioner: SamplePreconditioner | None,
    max_matvecs: float | None,
    time_limit: float | None,
) -> LinearSystem:
    """Return the system for columns ``[n, k]``, as split vectors are, after a check of the other arguments."""
    op = sharded(H.shift(damping) if check_non_negative("damping", damping) else H)
    check_tolerance("tol", tol)
    k, spent = columns.shape[1], preconditioner.spent if preconditioner else 0.0
    cost = k * op.cost
    budget = DEFAULT_MAX_MATVECS * cost if max_matvecs is None else max_matvecs
    num_vectors = k * VECTORS_PER_COLUMN["cg" if method == "cg" else "minres"]
    check_room(op, num_vectors, "take fewer columns at a time, or fewer parameters (wrt=)")
    units = tuple(unit_of(peak) for peak in op.space.peaks(columns.mT).tolist())
    limits = Limits(budget, time_limit, reserve=cost, minimum=cost + spent)
    rows = tuple(vector / unit for vector, unit in zip(columns.unbind(1), units, strict=True))
    arithmetic, method = arithmetic_of(op), "minres" if method == "auto" else method
    lengths = tuple(arithmetic.norms(rows))
    return LinearSystem(
        op, arithmetic, op.precision, rows, lengths, units, method, tol, limits, preconditioner
    )


def sample_preconditioner(H: LinearOperator, damping: float, seed: int) -> SamplePreconditioner:
    """Return the preconditioner by a weighted sample of the examples.

    Raises:
        TypeError: ``H`` is not over examples that can be left out.
        ValueError: there is no damping.
        MemoryError: its vectors do not fit into the memory that is free.
    """
    if not check_non_negative("damping", damping):
        raise ValueError(
            'preconditioner="sample" needs damping > 0, the level of what the sample does not show; got 0'
        )
    whole = int(getattr(H, "num_examples", 1))
    size, num_steps = min(whole, max(whole // SAMPLE_RATIO, MIN_SAMPLE)), min(SAMPLE_STEPS, H.n)
    check_room(sharded(H), num_steps + 5, "leave the preconditioner out, or take fewer parameters (wrt=)")
    importance = "residual" if getattr(H, "has_outputs", False) else "loss"
    sample = sharded(H.coarsen(size, importance=importance, seed=seed).shift(damping))
    return krylov_preconditioner(sample, damping, num_steps, seed, SCORE_COST * H.cost)


def _like_b(op: LinearOperator, found: SolveResult, back: Callable[[Tensor], Any], b: Tree) -> SolveResult:
    """Return the result with vectors in the form of b, and floats where b is one vector."""
    x, negative = back(found.x), found.negative_curvature
    if negative is not None:
        _, back_one = as_columns(sharded(op), b if is_one(op, b) else b[:, 0])
        negative = replace(negative, direction=back_one(negative.direction))
    norms: tuple[float | Tensor, ...] = found.residual_norm, found.relative_residual
    if is_one(op, b):
        norms = tuple(float(torch.as_tensor(norm, device="cpu")) for norm in norms)
    return replace(
        found, x=x, residual_norm=norms[0], relative_residual=norms[1], negative_curvature=negative
    )
