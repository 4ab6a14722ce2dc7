r"""Functions of an operator, applied to vectors: f(H) b.

Method: :math:`f(H)\, b \approx \|b\| \sum_i f(\theta_i)\, s_{1i} V^\top s_i` with the Ritz pairs of the Krylov space of
b, exact for polynomials of a degree below its dimension. As the bases of two dimensions are nested, the distance of
their results is that of their coefficients; the error is estimated by the change over the last steps, and by what
the rounding of matvecs does to the result, to first order: much where f is steep, as an inverse near zero.

Cost: a matvec a step, and full reorthogonalisation. Memory: a vector a step.
Source: Higham, Functions of Matrices, SIAM (2008), doi:10.1137/1.9780898717778, ch. 13.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_function, check_positive, check_tolerance
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.sharded import sharded
from hvpkit.operators.vectors import as_columns, is_one
from hvpkit.results.eigen import Status
from hvpkit.results.function import FunctionResult
from hvpkit.solvers.common.convergence import check_symmetric
from hvpkit.solvers.common.orthogonalize import power_of_two
from hvpkit.solvers.common.rayleigh_ritz import RitzPairs
from hvpkit.solvers.common.request import DEFAULT_MAX_MATVECS
from hvpkit.solvers.common.vector_memory import vector_bytes, vectors_that_fit
from hvpkit.solvers.driver import full_precision
from hvpkit.solvers.krylov import krylov_space
from hvpkit.solvers.lanczos import BASIS_BYTES

MESSAGES = {
    Status.CONVERGED: "the error estimate is at most tol * |f(H) b|",
    Status.ROUNDING_LIMITED: (
        "rounding of matvecs may change the result by more than tol; error_estimate says by how much; take float64, or "
        "a smoother function, as with more damping"
    ),
    Status.MAX_MATVECS: (
        "the matvecs or the memory of the basis are used up; error_estimate says how good x is; raise max_matvecs or "
        "tol, or take a smoother function"
    ),
    Status.NON_FINITE: "a matvec gave NaN or infinity; x is from the matvecs before it",
}

LAG, LAG_SHARE = 2, 0.25
"""The change over this many tests, each after three steps, or over this share of them if that is more, is the estimate
of the error. Chosen by feel."""


@full_precision
def matrix_function(
    H: LinearOperator,
    f: Callable[[Tensor], Tensor],
    b: Tree,
    *,
    tol: float = 1e-6,
    max_matvecs: float | None = None,
) -> FunctionResult:
    r"""Compute f(H) b by Lanczos, with an error estimate.

    With the eigenvalues :math:`\lambda_i` and vectors :math:`u_i` of H, it is :math:`\sum_i f(\lambda_i)\, u_i u_i' b`:
    ``torch.exp`` for the flow of a gradient, ``lambda x: x.clamp(min=0).sqrt()`` for samples of a Gaussian,
    ``lambda x: 1 / (x + d)`` for an inverse (for which :func:`solve` needs less memory).

    Args:
        H: symmetric operator.
        f: from eigenvalues ``[m]``, float64, to real values ``[m]``; defined on the whole spectrum.
        b: a tensor or NumPy array ``[n]`` or ``[n, k]``, or a tree like the parameters; over a mesh also a DTensor,
            ``Shard(0)``. One Krylov space a column.
        tol: error estimate over the norm of the result.
        max_matvecs: full-data matvecs, at most, for each column; by default 1,000; but no more than the vectors that
            4 GiB, or half of the free memory, hold.

    Returns:
        The result with its error estimate, the change over the last quarter of the steps: much larger than the error
        where convergence is fast; and what rounding may change, which is all that is left where the Krylov space is
        invariant. If that alone is more than ``tol``, the status is ``"rounding-limited"``, as for a function that is
        steep at an eigenvalue: the inverse or the root near zero, or a step. A function that is not smooth converges
        slowly, and its error may be a few times the estimate; one that changes where no eigenvalue was found yet can
        deceive it.

    Raises:
        TypeError: f gave complex numbers.
        ValueError: an argument out of its range; b of another shape, dtype or device, or not finite; f gave NaN or
            infinity on a Ritz value, named, or beside one by its rounding; or another shape.
        NotSymmetricError: ``H`` is not symmetric beyond rounding.

    Cost:
        One matvec a step. Memory: a vector a step.

    Source:
        Higham, doi:10.1137/1.9780898717778, ch. 13.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)))
        >>> hk.matrix_function(op, torch.exp, torch.ones(3, dtype=torch.float64)).x
        tensor([1.0000, 2.7183, 7.3891], dtype=torch.float64)
    """
    check_function("f", f, "f(eigenvalues)", 1)
    check_tolerance("tol", tol)
    budget = (
        DEFAULT_MAX_MATVECS * H.cost if max_matvecs is None else check_positive("max_matvecs", max_matvecs)
    )
    op = sharded(H)
    columns, back = as_columns(op, b, "b")
    fitting = max(1, int(min(BASIS_BYTES // vector_bytes(op), vectors_that_fit(op))))
    num_steps = min(H.n, math.floor(budget / H.cost * (1 + 1e-12)), fitting)
    if num_steps < 1:
        raise ValueError(f"max_matvecs must be at least {H.cost:g}, one matvec; got {budget:g}")
    begin = time.perf_counter()
    found = [_applied(op, f, column, tol, num_steps) for column in columns.unbind(1)]
    statuses = [one.status for one in found]
    worst = max(statuses, key=[*MESSAGES].index)
    bad = next((one.suspect for one in found if one.suspect is not None), None)
    message = MESSAGES[worst] if bad is None else f"{MESSAGES[worst]}; {op.blame(bad[:, None])}"
    errors = torch.tensor([one.error for one in found], dtype=torch.float64, device="cpu")
    return FunctionResult(
        back(torch.stack([one.x for one in found], dim=1)),
        float(errors) if is_one(H, b) else errors,
        sum(one.num_matvecs for one in found),
        worst,
        message,
        time.perf_counter() - begin,
    )


@dataclass(frozen=True)
class _Applied:
    """The result of one column."""

    x: Tensor
    error: float
    status: Status
    num_matvecs: float
    suspect: Tensor | None = None


@dataclass
class _Settling:
    """The test of a Krylov space by the change of the coefficients of f(H) b, over the norm of b.

    Attributes:
        f: the function.
        tol: relative change that is enough.
        op: the operator.
        scale: what matvecs are divided by; set by the first.
        num_products: matvecs so far.
        suspect: the first vector ``[n]`` whose matvec was not finite.
        coefficients: at each test ``[m]``.
        exact: True if the space is invariant.
        rounding: the error by the rounding of matvecs.
    """

    f: Callable[[Tensor], Tensor]
    tol: float
    op: LinearOperator
    scale: float = 1.0
    num_products: int = 0
    suspect: Tensor | None = None
    coefficients: list[Tensor] = field(default_factory=list)
    exact: bool = False
    rounding: float = 0.0

    @property
    def error(self) -> float:
        """The estimate of the error: the change of the coefficients, and rounding."""
        return math.hypot(self.change, self.rounding)

    @property
    def change(self) -> float:
        """The change over the last tests; infinite before there are enough."""
        if self.exact:
            return 0.0
        lag = max(LAG, math.ceil(LAG_SHARE * len(self.coefficients)))
        if len(self.coefficients) <= lag:
            return math.inf
        now, before = self.coefficients[-1].clone(), self.coefficients[-1 - lag]
        now[: len(before)] -= before
        return float(now.norm())

    @property
    def small(self) -> bool:
        """True if the error is small enough, or rounding hides the change."""
        return self.exact or self.change <= self.rounding or self.has_converged

    @property
    def has_converged(self) -> bool:
        """True if the error is at most ``tol`` times the norm of the result."""
        return self.error <= self.tol * float(self.coefficients[-1].norm())

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply by the operator; note the scale, and what is not finite."""
        images = self.op.product(vectors)
        if not self.num_products:
            self.scale = float(power_of_two(self.op.space.peak(images)))
        self.num_products += 1
        if self.suspect is None and not bool(self.op.space.finite(images.mT).all()):
            self.suspect = vectors[:, 0].clone()
        return images

    def __call__(self, pairs: RitzPairs, *, cut: bool = False) -> bool:
        check_symmetric(self.op, pairs.asymmetry, pairs.norm)
        nodes = pairs.values * self.scale
        values = self._values(nodes)
        self.rounding = self._rounding(nodes, values, pairs.vectors[0])
        self.coefficients.append(pairs.vectors @ (values * pairs.vectors[0]))
        rounding = 32 * self.op.precision * max(pairs.norm, torch.finfo(torch.float64).tiny)
        self.exact = not cut and bool((pairs.residual_norms <= rounding).all())
        return self.small

    def _values(self, nodes: Tensor) -> Tensor:
        """Return f at nodes ``[m]``, which it may write to.

        Raises:
            TypeError, ValueError: f does not return real, finite numbers, one for each.
        """
        values = torch.as_tensor(self.f(nodes.clone()), device="cpu")
        if values.is_complex():
            raise TypeError(
                "f must return real numbers, got complex ones; take its real and imaginary part apart"
            )
        if values.shape != nodes.shape:
            raise ValueError(f"f must return a tensor of shape {list(nodes.shape)}, got {list(values.shape)}")
        values = values.to("cpu", torch.float64)
        if not bool(torch.isfinite(values).all()):
            where = float(nodes[~torch.isfinite(values)][0])
            raise ValueError(
                f"f gave NaN or infinity at a Ritz value of {where:.6g}; shift it, or define it there"
            )
        return values

    def _rounding(self, nodes: Tensor, values: Tensor, weights: Tensor) -> float:
        r"""Return the error by the rounding of matvecs: a perturbation E of the operator, of norm :math:`\delta`.

        To first order it changes coefficient i by :math:`\sum_j f[\theta_i, \theta_j] E_{ij} w_j` (Daleckii and Krein),
        with divided differences over :math:`\delta` at least, which stay in the range of the nodes.
        """
        width = self.op.precision * float(nodes.abs().max())
        if not width:
            return 0.0
        inward = torch.where(nodes * 2 <= nodes[0] + nodes[-1], width, -width)
        own = (self._values(nodes + inward) - values).abs() / width
        distance = (nodes[:, None] - nodes).abs()
        differences = (values[:, None] - values).abs() / distance.clamp(min=width)
        mean = differences.square().mean(dim=0).sqrt()
        steepest, own_rounding = torch.maximum(own, mean) * width, values * self.op.precision
        return float((torch.hypot(steepest, own_rounding) * weights).norm())


def _applied(
    op: LinearOperator, f: Callable[[Tensor], Tensor], b: Tensor, tol: float, num_steps: int
) -> _Applied:
    """Return f(H) b for one vector ``[n]``."""
    size = float(op.space.norm(b.double()))
    if size == 0:
        return _Applied(torch.zeros_like(b), 0.0, Status.CONVERGED, 0.0)
    test = _Settling(f, tol, op)
    space = krylov_space(replace(op, product=test.product), b, num_steps, None, test)
    tested = len(test.coefficients[-1]) if test.coefficients else 0
    finite = bool(torch.isfinite(space.pairs.values).all())
    if finite and tested < len(space.rows):
        test(space.pairs, cut=num_steps < op.n)
    if not test.coefficients:
        return _Applied(
            torch.zeros_like(b), math.inf, Status.NON_FINITE, test.num_products * op.cost, test.suspect
        )
    coefficients = test.coefficients[-1]
    x = size * (space.rows[: len(coefficients)].mT @ coefficients.to(space.rows))
    status = Status.MAX_MATVECS
    if test.small:
        status = Status.CONVERGED if test.has_converged else Status.ROUNDING_LIMITED
    if not finite:
        status = Status.NON_FINITE
    return _Applied(
        x, size * test.error, status, test.num_products * op.cost, None if finite else test.suspect
    )
