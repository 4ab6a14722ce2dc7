"""A plan before the work: time and memory of the usual questions, from a few timed batches and measured solves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hvpkit._utils.memory import free_memory
from hvpkit._utils.random import normal_vector, resolve_seed
from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_flag, check_positive, check_tolerance
from hvpkit.curvature.batch_trials import BatchTrials, time_batches
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.estimators import sketch, spectral_density
from hvpkit.estimators.sampling import make_plan
from hvpkit.extreme import METHODS, method_for
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.offload import HOST
from hvpkit.results.cost_plan import Plan, PlannedTask, Range
from hvpkit.solvers import lanczos, multifidelity
from hvpkit.solvers.common.expected import expected_passes, slowed_by_restarts
from hvpkit.solvers.common.request import check_atol, default_atol
from hvpkit.solvers.common.vector_memory import BASIS_SHARE
from hvpkit.solvers.driver import full_precision

UNSURE = (0.6, 1.0, 1.7)
"""The time of a pass in units of what the trials say: a few batches are not all of them, and a machine is not always as
busy. Chosen by feel."""

FIRST_PASSES = 2
"""Passes before graphs are kept."""


@dataclass(frozen=True)
class Figures:
    """All that a plan rests on, measured or given: the cost model knows nothing else of the operator and the machine.

    Attributes:
        n: dimension.
        itemsize: bytes of a number of a vector.
        first_pass, later_pass: seconds of a matvec with one vector, before and after graphs are kept.
        row_seconds: to orthogonalise a vector against another one.
        product_bytes: of a matvec, beside its vectors.
        graph_bytes: of the graphs that are kept.
        graphs_kept: share of the batches whose graphs these are.
        free_bytes: on the device, before any of this.
        host_bytes: free in host memory, if that is another one; None: the device is the host.
    """

    n: int
    itemsize: int
    first_pass: float
    later_pass: float
    row_seconds: float
    product_bytes: float
    graph_bytes: float
    graphs_kept: float
    free_bytes: float
    host_bytes: float | None = None

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector."""
        return self.n * self.itemsize

    def on_ranks(self, num_ranks: int, bytes_per_second: float) -> Figures:
        r"""Return the figures of a rank, where so many share the batches and each has all vectors.

        .. math:: t_p = t_1 / p + 2\, \frac{p - 1}{p}\, \frac{\text{bytes of a vector}}{\text{bandwidth}}

        Args:
            num_ranks: p.
            bytes_per_second: that a rank sends and receives in a reduction of all.

        Example:
            >>> resnet18 = Figures(11_200_000, 4, 24.8, 24.8, 0.0, 0.0, 0.0, 0.0, free_bytes=8e10)
            >>> [round(resnet18.on_ranks(p, 3e11).first_pass, 2) for p in (8, 64)]
            [3.1, 0.39]
        """
        sums = reduction_seconds(self.vector_bytes, num_ranks, bytes_per_second)
        return replace(
            self,
            first_pass=self.first_pass / num_ranks + sums,
            later_pass=self.later_pass / num_ranks + sums,
            graph_bytes=self.graph_bytes / num_ranks,
        )

    def fitting(self, *, offload: bool) -> float:
        """Return how many vectors a default may take."""
        free = self.host_bytes if offload and self.host_bytes is not None else self.free_bytes
        return BASIS_SHARE * free / self.vector_bytes

    def seconds(self, passes: Range, capacity: float) -> Range:
        """Return the time of passes, each with orthogonalisation against those before, ``capacity`` at most."""

        def of(count: float) -> float:
            first = min(count, FIRST_PASSES)
            rows = min(count, capacity) ** 2 / 2 + max(count - capacity, 0.0) * capacity
            return first * self.first_pass + (count - first) * self.later_pass + rows * self.row_seconds

        return Range(of(passes.low), of(passes.expected), of(passes.high)).scaled(*UNSURE)

    def remedy(self, num_vectors: float, smaller: Sequence[str], *, offload: bool) -> str | None:
        """Return what to change so that so many vectors fit beside matvecs and graphs; None: they do.

        ``smaller`` are changes that make them fewer.
        """
        vectors, host = num_vectors * self.vector_bytes, self.host_bytes
        beside, free = self.product_bytes + self.graph_bytes, self.free_bytes
        if offload and host is not None:
            beside, free, host = 0.0, host, None
        if vectors + beside <= free:
            return None
        options = [*smaller, "fewer parameters (wrt=)"]
        if host is not None and vectors <= host:
            options.insert(0, "offload=True")
        if self.graph_bytes and vectors + self.product_bytes <= free:
            options.insert(0, "memory_limit=0, which keeps no graphs")
        room = max(0.0, (free - beside) // self.vector_bytes)
        return f"of {num_vectors:.0f} vectors there is room for {room:.0f}: take {', or '.join(options)}"


def reduction_seconds(num_bytes: float, num_ranks: int, bytes_per_second: float) -> float:
    """Return the time to add up so many bytes of each rank, and to give each the sum: twice (p - 1) / p of them."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / bytes_per_second


@full_precision
def plan(
    H: LinearOperator,
    *,
    tol: float = 1e-2,
    atol: float | None = None,
    method: str = "auto",
    ncv: int | None = None,
    offload: bool = False,
    certify: bool = False,
    num_steps: int = 100,
    num_probes: int = 1,
    num_matvecs: float = 100,
    seconds_a_pass: float | None = None,
    free_bytes: float | None = None,
    max_seconds: float = 5.0,
    seed: Seed = 0,
) -> Plan:
    r"""Estimate the time and the memory of both ends, a density and a trace before computing them.

    The time of a pass comes from trials: matvecs of one to five batches, by a fresh graph and by a kept one. Passes of
    :func:`hvpkit.extreme_eigenvalues` are known in advance only roughly: from those of several hundred networks, see
    :mod:`hvpkit.solvers.common.expected`; of :func:`hvpkit.spectral_density` and :func:`hvpkit.trace` exactly. Memory
    is that of the vectors that each method keeps, of kept graphs, and of a matvec at its peak. Of several ranks, time
    and memory are those of the slowest and of the fullest one; the sum of a matvec over the ranks is timed too.

    .. math:: \text{seconds} \approx 2\, t_{\text{fresh}} + (p - 2)\, t_{\text{kept}} + t_{\text{row}}
              \sum_{m \le p} \min(m, \text{ncv})

    Args:
        H: symmetric operator.
        tol: as of :func:`hvpkit.extreme_eigenvalues`.
        atol: the same.
        method: the same.
        ncv: the same.
        offload: the same.
        certify: the same.
        num_steps: as of :func:`hvpkit.spectral_density`.
        num_probes: the same.
        num_matvecs: as of :func:`hvpkit.trace`.
        seconds_a_pass: of another machine, or of several processes, in place of trials here.
        free_bytes: of another machine's device.
        max_seconds: of the trials, about; one batch is multiplied in any case.
        seed: of the vector to multiply with.

    Returns:
        The plan; ``print(plan.summary())`` shows it.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named.

    Cost:
        ``max_seconds``, or three matvecs of a batch if that is more; without batches, two matvecs. One batch's memory.

    Example:
        >>> import torch, hvpkit as hk
        >>> op = hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 5000)))
        >>> found = plan(op)
        >>> found.fits, found.task("trace").passes.expected
        (True, 99.0)
    """
    if isinstance(H, CurvatureOperator):
        H.check_whole("plan")
    check_choice("method", method, METHODS)
    check_tolerance("tol", tol)
    check_positive("max_seconds", max_seconds)
    atol = default_atol(tol) if atol is None else check_atol(atol)
    for name, flag in (("offload", offload), ("certify", certify)):
        check_flag(name, flag)
    for name, count in (("num_steps", num_steps), ("num_probes", num_probes)):
        check_count(name, count, 1)
    if ncv is not None:
        check_count("ncv", ncv, 1)
    found, num_batches = _figures(H, max_seconds, resolve_seed(seed), seconds_a_pass, free_bytes)
    first, later = (Range(t, t, t).scaled(*UNSURE) for t in (found.first_pass, found.later_pass))
    extremes = method_for(H, method, fitting=found.fitting(offload=offload), ncv=ncv)
    passes = expected_passes(
        extremes, tol=tol, atol=atol, certify=certify, n=H.n, zero_end=_is_semidefinite(H)
    )
    tasks = (
        plan_extremes(found, extremes, passes, ncv=ncv, offload=offload),
        _plan_density(H, found, num_steps, num_probes),
        _plan_trace(H, found, num_matvecs),
    )
    remedy = None
    if found.product_bytes > found.free_bytes:
        remedy = "take a smaller batch_size" if num_batches else "take fewer parameters (wrt=)"
        size = H.batch_size if isinstance(H, CurvatureOperator) else None
        if size is not None:
            remedy += f", about {max(1, int(size * found.free_bytes / (2 * found.product_bytes)))}"
    place = HOST if offload else H.device
    return Plan(
        repr(H)[1:-1],
        H.n,
        first,
        later,
        found.product_bytes,
        found.graph_bytes,
        found.graphs_kept,
        found.free_bytes if place == H.device or found.host_bytes is None else found.host_bytes,
        "host memory" if place != H.device else str(place),
        num_batches,
        tasks,
        remedy,
    )


def plan_extremes(
    figures: Figures, method: str, passes: Range, *, ncv: int | None = None, offload: bool = False
) -> PlannedTask:
    """Return the time and the memory of both ends by ``"lanczos"`` or ``"multifidelity"`` from figures alone.

    Example:
        >>> gpt = Figures(124_000_000, 4, 60.0, 60.0, 1e-3, 2e10, 0.0, 0.0, free_bytes=8e10, host_bytes=1.2e11)
        >>> task = plan_extremes(gpt, "lanczos", Range(10, 30, 85))
        >>> task.num_vectors, round(task.seconds.expected / 60), task.remedy
        (72, 30, None)
    """
    fitting, n = figures.fitting(offload=offload), figures.n
    if method == "lanczos":
        size = ncv or lanczos.default_ncv(n, figures.itemsize, 2, 1, fitting)
        num_vectors, least = lanczos.num_vectors(min(size, n), 2, 1), lanczos.least_ncv(2, 1)
    else:
        size = ncv or multifidelity.default_ncv(fitting)
        num_vectors, least = multifidelity.num_vectors(min(size, n)), multifidelity.MIN_NCV
    if ncv is not None:
        check_count("ncv", ncv, min(least, n))
    if method == "lanczos" and size < n:
        slowed = slowed_by_restarts(size)
        passes = passes.scaled(1.0, slowed, slowed)
    smaller = [f"a smaller ncv (at least {least})"] if size > least else []
    smaller += ['method="lanczos"'] if method != "lanczos" else []
    return PlannedTask(
        "extremes",
        method,
        passes,
        figures.seconds(passes, size),
        num_vectors,
        num_vectors * figures.vector_bytes,
        figures.remedy(num_vectors, smaller, offload=offload),
    )


def _plan_density(H: LinearOperator, figures: Figures, num_steps: int, num_probes: int) -> PlannedTask:
    goal = spectral_density.make_goal(H, "lanczos", num_steps, num_probes, None, 0)
    num_vectors = spectral_density.num_vectors(H.n, "lanczos", goal)
    count = sum(goal.sizes) * goal.num_steps * H.cost
    return _exact_task(
        "density",
        f"{num_steps} steps x {num_probes}",
        figures,
        count,
        num_vectors,
        max(goal.sizes) * goal.num_steps,
        ['method="chebyshev"', "fewer num_steps"],
    )


def _plan_trace(H: LinearOperator, figures: Figures, num_matvecs: float) -> PlannedTask:
    asked = make_plan(H, "hutch++", sketch.COSTS, num_matvecs=num_matvecs, tol=None, block_size=8, seed=0)
    return _exact_task(
        "trace",
        "every column" if asked.exact else "hutch++",
        figures,
        asked.num_probes * asked.cost * H.cost,
        sketch.num_vectors(asked),
        asked.num_probes,
        ['method="hutchinson"', "a smaller block_size"],
    )


def _exact_task(
    call: str,
    method: str,
    figures: Figures,
    count: float,
    num_vectors: int,
    capacity: float,
    smaller: Sequence[str],
) -> PlannedTask:
    """Return a task whose passes are known."""
    passes, size = Range(count, count, count), num_vectors * figures.vector_bytes
    remedy = figures.remedy(num_vectors, smaller, offload=False)
    return PlannedTask(call, method, passes, figures.seconds(passes, capacity), num_vectors, size, remedy)


def _figures(
    H: LinearOperator, max_seconds: float, seed: int, seconds_a_pass: float | None, free_bytes: float | None
) -> tuple[Figures, int | None]:
    """Return the figures of an operator, by trials where they are not given, and the number of batches timed."""
    free = free_memory(H.device) if free_bytes is None else check_positive("free_bytes", free_bytes)
    host = None if H.device == HOST else free_memory(HOST)
    row_seconds = _row_seconds(H, seed)
    n, itemsize = H.n, H.dtype.itemsize
    if seconds_a_pass is not None:
        check_positive("seconds_a_pass", seconds_a_pass)
        given = Figures(n, itemsize, seconds_a_pass, seconds_a_pass, row_seconds, 0.0, 0.0, 0.0, free, host)
        return given, None
    if not isinstance(H, CurvatureOperator):
        seconds = _product_seconds(H, max_seconds, seed)
        return Figures(n, itemsize, seconds, seconds, row_seconds, 0.0, 0.0, 0.0, free, host), None
    ranks = H.space.ranks
    first = later = graph_bytes = product_bytes = kept = 0.0
    num_batches = 0
    for _, term in H.terms:
        trials = time_batches(term, max_seconds / len(H.terms), seed)
        count, num_batches = term.problem.data.num_examples, max(num_batches, len(trials.fresh))
        count = count if ranks is None else -(-count // ranks.size)
        share = _share_kept(trials, count, term.cache.budget.left + term.cache.num_bytes - graph_bytes)
        fresh, again = (_median(times) * count for times in (trials.fresh, trials.kept))
        first, later = first + fresh, later + share * again + (1 - share) * fresh
        graph_bytes += share * trials.graph_bytes * count
        product_bytes, kept = max(product_bytes, trials.product_bytes), kept + share / len(H.terms)
    figures = Figures(n, itemsize, first, later, row_seconds, product_bytes, graph_bytes, kept, free, host)
    return figures if ranks is None else _of_slowest(ranks, figures, H), num_batches


def _of_slowest(ranks: Ranks, own: Figures, H: LinearOperator) -> Figures:
    """Return the figures that hold for all ranks, with the time of a sum over them."""
    vector = torch.zeros(H.n, dtype=H.dtype, device=H.device)
    times = []
    for _ in range(3):
        ranks.meet("a sum, timed")
        start = time.perf_counter()
        float(ranks.sum(vector)[0])  # waits for the device
        times.append(time.perf_counter() - start)
    timed = replace(own, first_pass=own.first_pass + min(times), later_pass=own.later_pass + min(times))
    everywhere = ranks.gather(timed)
    worst: dict[str, Any] = {
        field.name: max(getattr(one, field.name) or 0.0 for one in everywhere) for field in fields(own)
    }
    least = min(one.free_bytes for one in everywhere)
    return replace(Figures(**worst), free_bytes=least, host_bytes=own.host_bytes)


def _share_kept(trials: BatchTrials, num_examples: int, budget: float) -> float:
    """Return the share of the batches whose graphs a budget of bytes holds."""
    if not trials.keeps:
        return 0.0
    whole = trials.graph_bytes * num_examples
    return min(1.0, max(0.0, budget / whole)) if whole else 1.0


def _product_seconds(op: LinearOperator, max_seconds: float, seed: int) -> float:
    """Return the time of a whole matvec with one vector, after another one if there is time for two."""
    vector = normal_vector(op.n, dtype=op.dtype, device=op.device, seed=seed)[:, None]
    times: list[float] = []
    most = 10 if op.space.ranks is None else 2  # which ranks agree on without their clocks
    while len(times) < 2 or (sum(times) < max_seconds and len(times) < most):
        start = time.perf_counter()
        float(op.product(vector)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
        if sum(times) > max_seconds and op.space.ranks is None:
            break
    return _median(times[1:] or times)


def _row_seconds(op: LinearOperator, seed: int, num_rows: int = 4) -> float:
    """Return the time to orthogonalise a vector against another one: once along all, twice read."""
    size = min(op.n, 2**22)  # the rest takes as long in proportion
    row = normal_vector(size, dtype=op.dtype, device=op.device, seed=seed)
    rows = row.repeat(num_rows, 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.addmv(row, rows.mT, op.space.dots(rows, row), alpha=-1.0)[0].item()
        times.append(time.perf_counter() - start)
    return min(times) / num_rows * op.n / size


def _is_semidefinite(H: LinearOperator) -> bool:
    """Return True for sums of Gauss-Newton and Fisher matrices: one end is nearly zero."""
    if not isinstance(H, CurvatureOperator) or H.is_shifted:
        return False
    return all(c > 0 and term.kind != "hessian" for c, term in H.terms)


def _median(times: Sequence[float]) -> float:
    ordered = sorted(times)
    return ordered[len(ordered) // 2]
