"""Results of linear systems: solutions with true residuals, and directions of negative curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit.results.eigen import Status
from hvpkit.results.plain_data import LONG
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns


@dataclass(frozen=True)
class SolveProgress:
    """Progress of a linear solve: the argument of ``monitor``, and an entry of ``history``.

    Attributes:
        num_matvecs: full-data matvecs so far.
        seconds: since the start.
        residual: the largest residual norm of a right-hand side, over the norm of that side, by the recurrence.
        num_converged: right-hand sides whose true residual is small enough.
        seconds_left: an estimate, at most up to the limits; infinite if it is not known.
    """

    num_matvecs: float = 0.0
    seconds: float = 0.0
    residual: float = 1.0
    num_converged: int = 0
    seconds_left: float = math.inf

    def __str__(self) -> str:
        return f"residual {self.residual:.2g}, {self.num_converged} converged"


@dataclass(frozen=True)
class NegativeCurvature:
    """A direction in which a matrix A is not positive definite.

    Attributes:
        direction: v, of unit norm, shaped like one right-hand side.
        curvature: :math:`v'Av`, negative.
        column: the right-hand side whose solve met it.
    """

    direction: Tree = field(metadata=LONG)
    curvature: float
    column: int


@dataclass(frozen=True, repr=False)
class SolveResult(Result):
    r"""The solution of linear systems A x = b.

    Attributes:
        x: shaped like b.
        residual_norm: :math:`\|b - A x\|` by a matvec with the x returned: a float, or for b ``[n, k]`` a tensor
            ``[k]``, float64 on the CPU. Infinite where that matvec was not finite.
        relative_residual: the same over :math:`\|b\|`; zero for b = 0.
        num_matvecs: full-data matvecs spent, of all right-hand sides, with those of the preconditioner by their share
            of the data.
        num_passes: passes over the data: the columns of a block share one.
        status: why it stopped: of several right-hand sides, that of the worst.
        statuses: of each right-hand side.
        message: the status in words, with the remedy.
        seconds: wall time.
        history: one entry for each assessment.
        method: ``"cg"`` or ``"minres"``.
        negative_curvature: the first direction of negative curvature met, by conjugate gradients; else None.
    """

    x: Tree = field(metadata=LONG)
    residual_norm: float | Tensor
    relative_residual: float | Tensor
    num_matvecs: float
    num_passes: float
    status: Status
    statuses: tuple[Status, ...]
    message: str
    seconds: float
    history: tuple[SolveProgress, ...]
    method: str
    negative_curvature: NegativeCurvature | None = None

    @property
    def converged(self) -> bool:
        """True if each true residual is at most ``tol`` times the norm of its right-hand side."""
        return self.status.converged

    def _columns(self) -> Columns:
        norms = {name: getattr(self, name) for name in ("residual_norm", "relative_residual")}
        return {
            "status": [str(status) for status in self.statuses],
            **{
                name: torch.as_tensor(norm, device="cpu").double().flatten().tolist()
                for name, norm in norms.items()
            },
        }

    def __repr__(self) -> str:
        worst = float(torch.as_tensor(self.relative_residual, device="cpu").max())
        return (
            f"<SolveResult: {len(self.statuses)} right-hand side{'s' * (len(self.statuses) > 1)}, {self.status}, "
            f"relative residual {worst:.2g}, {self.num_matvecs:g} matvecs>"
        )
