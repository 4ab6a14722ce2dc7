"""Instrumented operator for external solvers: it counts matvecs, enforces limits and records a basis.

External solvers do not expose their basis. Rayleigh-Ritz on the vectors multiplied last, with thick restarts as in
:mod:`hvpkit.solvers.lanczos`, gives the history, an answer when a limit or NaN ends the solve by an exception, and a
check of the pairs that the solver returns.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit._utils.deadline import DeadlineReached, deadline
from hvpkit._utils.ranks import agreed, call_on_first
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Progress, Status
from hvpkit.solvers.common.convergence import attainable_accuracy, check_symmetric, is_converged, rounding
from hvpkit.solvers.common.orthogonalize import orthonormalise_, power_of_two
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs, num_at_low_end, select
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.common.vector_memory import FEWER, check_room
from hvpkit.solvers.driver import Monitor

MAX_GROWTH = 30.0
"""Largest rounding error of a kept image, in that of a matvec. Nearly dependent vectors, with more, are left out.
Chosen by feel."""


class Stop(Exception):
    """Exception out of a matvec that ends the external solver."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Recorder:
    """An operator over a scale, with a basis of the vectors multiplied. Mutable, as external solvers keep no state.

    Attributes:
        op: the operator.
        goal: the checked arguments.
        begin: start of the solve, as ``time.perf_counter``.
        monitor: called after each matvec.
        capacity: vectors that are kept; n if that is at most twice as many.
        depth: minimum matvecs before recorded pairs end the solve.
        tol: relative error of recorded pairs that ends it; 0: only ``atol`` of the goal, or rounding, does.
        num_rows: vectors in use.
        num_products: matvecs so far.
        norm: lower bound of the operator's norm, over scale.
        suspect: a vector ``[n]`` whose matvec was not finite.
        remark: a note on the external solver for the result's message.
        history: one entry for each matvec.
        rows, images: an orthonormal basis of the vectors multiplied, and its image over scale ``[capacity, n]``.
        projected: ``rows @ images.T`` ``[capacity, capacity]``, float64, on the CPU.
        growth: rounding error of each image, in that of a matvec ``[capacity]``.
        scale: divisor of matvecs, 0-d.
    """

    op: LinearOperator
    goal: Request
    begin: float
    monitor: Monitor | None
    capacity: int
    depth: float
    tol: float
    num_rows: int = 0
    num_products: int = 0
    norm: float = 0.0
    suspect: Tensor | None = None
    remark: str = ""
    history: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.op.n <= 2 * self.capacity:
            self.capacity, self.depth = self.op.n, math.inf
        check_room(
            self.op, 2 * self.capacity + 4 * self.goal.k + 15, FEWER
        )  # rows, images, SciPy's own, measured
        self.rows = torch.empty(self.capacity, self.op.n, dtype=self.op.dtype, device=self.op.device)
        self.images = torch.empty_like(self.rows)
        self.projected = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device="cpu")
        self.growth = torch.ones(self.capacity, dtype=torch.float64, device="cpu")
        self.scale = self.rows.new_ones(())

    @property
    def num_matvecs(self) -> float:
        """Full-data matvecs so far."""
        return self.num_products * self.op.cost

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply ``[n, p]``, over scale, one column at a time, so that limits hold to the matvec.

        Raises:
            Stop: a limit, a matvec that is not finite, or recorded pairs that satisfy the stop.
            NotSymmetricError: the operator is not symmetric beyond rounding.
        """
        return torch.cat([self._multiply(vector) for vector in vectors.split(1, dim=1)], dim=1)

    def _multiply(self, vector: Tensor) -> Tensor:
        seconds = time.perf_counter() - self.begin
        if self.goal.limits.time_limit is not None:
            seconds = agreed(self.op.space.ranks, seconds)
        limit = self.goal.limits.exceeded_by(self.op.cost, self.num_matvecs, seconds)
        if limit is not None:
            raise Stop(limit)
        image = self._in_time(vector)
        if self.num_products == 0:
            self.scale = power_of_two(image.abs().max())
        self.num_products += 1
        image = image / self.scale
        if not bool(torch.isfinite(image).all()):
            self.suspect = vector[:, 0]
            raise Stop(Status.NON_FINITE)
        norm = self.op.space.norm(vector[:, 0])
        self._keep(vector[:, 0] / norm, image[:, 0] / norm)
        self._assess()
        return image

    def _in_time(self, vector: Tensor) -> Tensor:
        """Multiply; raise Stop if the time limit ends the matvec before its last batch."""
        limit = self.goal.limits.time_limit
        try:
            with deadline(math.inf if limit is None else self.begin + limit):
                return self.op.product(vector)
        except DeadlineReached:
            raise Stop(Status.TIME_LIMIT) from None

    def _keep(self, vector: Tensor, image: Tensor) -> None:
        """Extend the basis by the new component of a unit vector, after a restart if it is full."""
        space = self.op.space
        if self.num_rows == self.capacity:
            self._restart()
        m, self.norm = self.num_rows, max(self.norm, float(space.norm(image)))
        coefficients, norm, _ = orthonormalise_(space, self.rows, m, vector, torch.ones_like(self.scale))
        inherited = torch.linalg.vector_norm(coefficients.to(self.growth) * self.growth[:m])
        self.growth[m] = (1 + inherited**2).sqrt() / float(norm)
        if not float(self.growth[m]) <= MAX_GROWTH:
            return
        self.images[m] = torch.addmv(image, self.images[:m].mT, coefficients, alpha=-1.0) / norm
        dots = space.dots(self.rows[: m + 1], self.images[m]), space.dots(self.images[: m + 1], self.rows[m])
        ahead, back = torch.stack(dots).to(self.projected)
        check_symmetric(self.op, float((ahead - back).abs().max()), self.norm)
        self.projected[m, : m + 1] = self.projected[: m + 1, m] = (ahead + back) / 2
        self.num_rows = m + 1

    def _restart(self) -> None:
        """Keep the wanted half of the Ritz vectors."""
        values, coefficients = torch.linalg.eigh(self.projected)
        kept = select(values, max(self.goal.k, self.capacity // 2), self.goal.which)
        coefficients, j = coefficients[:, kept], len(kept)
        self.rows[:j], self.images[:j] = self._rotated(coefficients)
        self.growth[:j] = (coefficients.square().mT @ self.growth.square()).sqrt()
        self.projected.zero_()[:j, :j] = torch.diag(values[kept])
        self.num_rows = j

    def _rotated(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Return combinations ``[m, j]`` of the basis and of its image, as rows ``[j, n]``."""
        rotation = coefficients.mT.to(self.rows)
        return rotation @ self.rows[: self.num_rows], rotation @ self.images[: self.num_rows]

    def pairs(self, *first: int) -> RitzPairs:
        """Return the Ritz pairs of these indices, then the wanted ones, over scale; fewer than k of a smaller basis."""
        values, coefficients = torch.linalg.eigh(self.projected[: self.num_rows, : self.num_rows])
        chosen = [*first, *select(values, self.goal.k, self.goal.which)]
        rows, images = self._rotated(coefficients[:, chosen])
        residuals = images - rows * values[chosen].to(rows)[:, None]
        norms = self.op.space.reduce(residuals.square().sum(dim=1)).sqrt()
        return RitzPairs(values[chosen], rows.mT, norms.to("cpu", torch.float64))

    def _assess(self) -> None:
        """Record both ends, and end the solve if the wanted pairs satisfy the stop."""
        found, noise, unit = self.pairs(0, -1), rounding(self.op, self.norm), float(self.scale)
        ends = torch.cat([found.values[:2], found.residual_norms[:2] + noise]) * unit
        seconds = time.perf_counter() - self.begin
        self.history.append(Progress(self.num_matvecs, seconds, *ends.tolist()))
        if self.monitor is not None:
            call_on_first(self.op.space.ranks, self.monitor, self.history[-1])
        allowed = replace(self.goal, tol=self.tol).allowed(found.values[2:], self.norm)
        done = is_converged(self.op, allowed, self.norm, found.residual_norms[2:])
        if self.num_products >= self.depth and len(done) == self.goal.k and bool(done.all()):
            raise Stop(Status.CONVERGED)

    def shows_beyond(self, found: RitzPairs) -> bool:
        """Return True if ``k`` pairs over scale, exact to their residuals, miss a recorded eigenvalue.

        By Cauchy interlacing, the j-th eigenvalue from an end lies no further in than the j-th Ritz value on any space.
        """
        recorded, num_low = self.pairs().values, num_at_low_end(self.goal.k, self.goal.which)
        rounding_error = MAX_GROWTH * attainable_accuracy(self.op, self.norm)
        values, errors = found.values, found.residual_norms + rounding_error
        if self.goal.which == "LM":
            order, num_low = values.abs().argsort(), 0
            recorded, values, errors = recorded.abs().sort().values, values.abs()[order], errors[order]
        outward = torch.cat([values[:num_low] - recorded[:num_low], recorded[num_low:] - values[num_low:]])
        return bool((outward > errors).any())
