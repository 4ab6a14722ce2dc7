r"""Both ends, trace and density of each diagonal block of a Hessian, in passes that all blocks share.

Method: one Krylov space for each block, from one random vector, in lockstep: a pass over the data multiplies a vector
of every block that is not done. From the space V of a block B come

- both ends, as :func:`hvpkit.lanczos` finds them, by the same test and with the same intervals;
- the rule of its start vector, which is a density by stochastic Lanczos quadrature with one probe;
- the trace, :math:`\operatorname{tr} B = \operatorname{tr} V'BV + E\,\omega'(I - VV')\,B\,(I - VV')\,\omega`, with
  random probes that are independent of V: Hutch++ with the Krylov space in place of its sketch.

A block of few rows is multiplied with as many random orthonormal vectors at once: all three are exact to rounding.

Source: Chen and Hallman, SIAM J. Matrix Anal. Appl. 44 (2023) 1218-1244, doi:10.1137/22M1494257 (the trace).
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from hvpkit._utils.deadline import DeadlineReached, deadline
from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.ranks import call_on_first
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import check_count, check_flag, check_monitor, check_positive
from hvpkit.autodiff.pytree import check_params
from hvpkit.curvature.block_diagonal import BlockDiagonal, BlockOperator
from hvpkit.curvature.constructors import hessian
from hvpkit.estimators import quadrature
from hvpkit.estimators.probe import draw
from hvpkit.estimators.quadrature import Measured
from hvpkit.estimators.spectral_density import check_precision, density_of
from hvpkit.extreme import extreme_result
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.vectors import as_shards
from hvpkit.results.blocks import BlockSpectra, BlockSpectrum, BlocksProgress
from hvpkit.results.eigen import EigenResult, Progress, Status
from hvpkit.results.estimate import Estimate, mean_of
from hvpkit.solvers import krylov
from hvpkit.solvers.common.request import check_arguments, check_certainty
from hvpkit.solvers.common.vector_memory import check_room, vectors_that_fit
from hvpkit.solvers.driver import completed, full_precision
from hvpkit.solvers.lanczos import Lanczos, LanczosState, default_ncv, num_vectors
from hvpkit.solvers.lockstep import Asker, Asking, in_lockstep

GROUPINGS = ("module", "parameter")

LEAST_STEPS = 20
"""Matvecs that both ends of a block take at least: blocks of no more rows than these, or the steps of a density, and
the probes are multiplied whole. Chosen by feel."""

TRACE_MESSAGES = {
    Status.COMPLETED: "all probes are taken; stderr says how well the trace is known, raise num_probes for more",
    Status.INVARIANT_SUBSPACE: "every column was multiplied: the trace is as exact as the matvecs",
    Status.TIME_LIMIT: "the time limit was reached before the probes of the trace were multiplied; raise time_limit",
    Status.NON_FINITE: "a matvec gave NaN or infinity; see the block's extremes.message",
}


@dataclass(frozen=True)
class Question:
    """The checked arguments of :func:`blocks`, beside the blocks themselves."""

    density: bool
    tol: float
    atol: float | None
    confidence: float
    num_steps: int
    num_probes: int
    max_matvecs: float | None
    seed: int

    def width(self, n: int) -> int:
        """Return the start vectors of a block of n rows: all or one."""
        usual = self.num_probes + (max(self.num_steps, LEAST_STEPS) if self.density else LEAST_STEPS)
        affordable = self.max_matvecs is None or n + 1 <= self.max_matvecs
        return n if n <= usual and affordable else 1

    def solver(self, op: LinearOperator, number: int, ncv: int) -> Lanczos:
        """Return the solver of both ends of a block."""
        width = self.width(op.n)
        request = check_arguments(
            op,
            min(2, op.n),
            "BE",
            v0=None,
            tol=self.tol,
            atol=self.atol,
            max_matvecs=self.max_matvecs,
            time_limit=None,
            seed=self.seed_of(number, 0),
            block_size=width,
            num_checks=1,
        )
        return Lanczos(op, request, max(ncv, width), width, confidence=self.confidence)

    def seed_of(self, number: int, stream: int) -> int:
        """Return the seed of a block's start (stream 0) or of its probes (1), which are independent."""
        return generator(self.seed, 2 * number + stream).initial_seed()


def blocks(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    by: str | Sequence[str] = "module",
    *,
    trace: bool = True,
    density: bool = False,
    tol: float = 1e-2,
    atol: float | None = None,
    confidence: float = 0.99,
    num_steps: int = 100,
    num_probes: int = 10,
    max_matvecs: float | None = None,
    time_limit: float | None = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    memory_limit: float | None = None,
    seed: Seed = 0,
    monitor: Callable[[BlocksProgress], object] | None = None,
) -> BlockSpectra:
    r"""Compute both ends, the trace and the density of each diagonal block of the Hessian, in shared passes.

    Block b is :math:`H_{bb} = \nabla_{p_b}^2 L(p)`, that of ``hessian(..., wrt=...)``. All blocks advance together: a
    pass reads the data once, and in the mode ``"reverse-over-reverse"`` it computes the loss and its gradient once,
    and for each block follows only the paths between its part of the gradient and its parameters. Both ends have the
    promise of :func:`hvpkit.extreme_eigenvalues`, each with the probability ``confidence``. Trace and density use the
    Krylov space of the ends: see :mod:`hvpkit.block_spectra`.

    Args:
        loss_fn: as of :func:`hvpkit.hessian`; with ``params, data, batch_size, mode, memory_limit``.
        params: tree of floating tensors, the point.
        data: the examples.
        by: ``"module"``: a block for each module that has parameters, all of these together, by their dotted names up
            to the last dot; a name without a dot is a block. ``"parameter"``: a block for each. Or a list of globs
            over dotted names: a block for each; parameters that none matches are in no block. Blocks of empty
            parameters are left out.
        trace: estimate the trace of each block.
        density: estimate the density of each block.
        tol: relative error of the ends.
        atol: as for :func:`hvpkit.extreme_eigenvalues`.
        confidence: of each end's value and interval, over random starts; k ends hold together with a probability of
            at least ``1 - k (1 - confidence)``.
        num_steps: matvecs with each block's start vector, for its density: it resolves the spectrum, of span L, to
            about ``L / num_steps``.
        num_probes: random probes of each trace, beyond the Krylov space: at least 2, for a standard error.
        max_matvecs: matvecs with each block, at most, without those of the probes; 1,000 by default.
        time_limit: seconds from the first pass. A pass that runs past it ends after its batch, and does not count.
        batch_size: the most examples in a batch.
        mode: of automatic differentiation. On a GPU ``"auto"`` prefers forward over reverse, in which a block takes
            as long as the whole Hessian: name ``"reverse-over-reverse"`` there.
        memory_limit: bytes of gradient graphs to hold between passes.
        seed: of random vectors; the same seed gives the same bits.
        monitor: called with a :class:`hvpkit.BlocksProgress` after each pass.

    Returns:
        A spectrum for each block, by name. A block that is not done at a limit says so in its status, with the
        intervals known by then; one whose matvec is not finite does not stop the others.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.hessian` and :func:`hvpkit.extreme_eigenvalues`; another ``by``, a glob
            that matches no parameter, two globs that match the same one; a density of less precision than float32.
        NotSymmetricError: a block is not symmetric beyond rounding.
        MemoryError: before the first pass, if the Krylov spaces do not fit into the memory that is free.

    Cost:
        As many passes as the slowest block takes: 20 to 60 for the ends, at least ``num_steps`` with a density, and
        one for all the probes. A pass costs the loss and its gradient, unless these graphs are held, and for each
        vector of a block a part of a whole matvec: 0.4 for the first of 20 layers, 0.1 for the last.
        Memory as for :func:`hvpkit.lanczos` of the whole Hessian: the blocks' vectors add up to its own. For a
        comparison with a loop over ``wrt=`` see docs/performance.md: up to 4.5 times fewer seconds for ends and traces,
        with densities 1.7 times where graphs are held and 3.3 times where they are not.

    Source:
        Zhang et al., NeurIPS 2024, arXiv:2402.16788 (densities by block, of networks where Adam helps); Ghorbani,
        Krishnan and Xiao, ICML 2019, arXiv:1901.10159; for the trace Chen and Hallman, doi:10.1137/22M1494257.

    Example:
        >>> import torch, hvpkit as hk
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
        >>> objective, params = hk.from_module(net, torch.nn.MSELoss())
        >>> x, y = torch.linspace(-1, 1, 60).double().view(20, 3), torch.ones(20, 2).double()
        >>> found = hk.blocks(objective, params, (x, y), density=True)
        >>> found.names, found.converged, len(found["2"].density.nodes)
        (('0', '2'), True, 18)
    """
    for name, flag in (("trace", trace), ("density", density)):
        check_flag(name, flag)
    num_steps = check_count("num_steps", num_steps, 1)
    num_probes = check_count("num_probes", num_probes, 2)
    check_certainty(confidence, False)
    check_monitor(monitor)
    if max_matvecs is not None:
        check_positive("max_matvecs", max_matvecs)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    globs = check_by(by)
    question = Question(
        density, tol, atol, confidence, num_steps, num_probes if trace else 0, max_matvecs, resolve_seed(seed)
    )
    if globs is not None:
        grouped(check_params(params)[0].names, globs)  # names ``by`` where a glob is wrong
    H = hessian(loss_fn, params, data, wrt=globs, batch_size=batch_size, mode=mode, memory_limit=memory_limit)
    layout = H.terms[0][1].problem.layout
    groups = {
        name: places
        for name, places in grouped(layout.names, by).items()
        if any(layout.numels[place] for place in places)  # a block without a row has no spectrum
    }
    return solve(
        H, BlockDiagonal(H, tuple(groups), tuple(groups.values())), question, time_limit, monitor=monitor
    )


def check_by(by: str | Sequence[str]) -> list[str] | None:
    """Return the globs of ``by``, or None for a grouping.

    Raises:
        TypeError, ValueError: it is neither.
    """
    remedy = "'module', 'parameter', or a list of globs over dotted names, as ['encoder.*', 'head.*']"
    if isinstance(by, str):
        if by not in GROUPINGS:
            raise ValueError(f"by must be {remedy}; got {by!r}")
        return None
    if not isinstance(by, Sequence) or not all(isinstance(glob, str) for glob in by):
        raise TypeError(f"by must be {remedy}; got {by!r:.80}")
    if not by:
        raise ValueError(f"by holds no glob; it must be {remedy}")
    return list(by)


def grouped(names: Sequence[str], by: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the places of the names in each block, by the block's name.

    Raises:
        ValueError: a glob matches nothing, or two match the same name.
    """
    if isinstance(by, str):
        groups: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            owner = name.rpartition(".")[0] if by == "module" else ""
            groups.setdefault(owner or name or "params", []).append(place)
        return {name: tuple(places) for name, places in groups.items()}
    owners: dict[int, str] = {}
    for glob in by:
        places = [
            place
            for place, name in enumerate(names)
            if (name == glob if glob in names else fnmatch.fnmatchcase(name, glob))
        ]
        if not places:
            raise ValueError(f"by: {glob!r} matches no parameter; their names: {', '.join(names)}")
        for place in places:
            if place in owners:
                raise ValueError(
                    f"by: {owners[place]!r} and {glob!r} both match {names[place]!r}; blocks may not overlap"
                )
            owners[place] = glob
    return {glob: tuple(place for place in sorted(owners) if owners[place] == glob) for glob in by}


@full_precision
def solve(
    H: LinearOperator,
    diagonal: BlockDiagonal,
    question: Question,
    time_limit: float | None,
    *,
    monitor: Callable[[BlocksProgress], object] | None,
) -> BlockSpectra:
    """Answer the question for all blocks in lockstep."""
    began = time.perf_counter()
    end = math.inf if time_limit is None else began + time_limit
    if question.density:
        check_precision(H)
    ncv = default_ncv(H.n, H.dtype.itemsize, 2, 1, vectors_that_fit(H))
    ncv = (
        max(ncv, question.num_steps + 2) if question.density else ncv
    )  # no restart before the density's last step
    check_room(
        H,
        num_vectors(min(ncv, max(layout.n for layout in diagonal.layouts)), 2, 1) + 3 * question.num_probes,
        "take fewer num_steps and num_probes, fewer blocks (by=[...]), or a machine with more memory",
    )
    operators, passes = diagonal.operators(), 0
    ends = {op.block_name: Progress() for op in operators}

    def report(num_working: int) -> None:
        if monitor is not None and passes:
            seconds = time.perf_counter() - began
            entry = BlocksProgress(passes, seconds, len(operators) - num_working, dict(ends))
            call_on_first(H.space.ranks, monitor, entry)

    def products(asked: dict[int, Tensor]) -> dict[int, Tensor]:
        nonlocal passes
        report(len(asked))
        nothing = [torch.zeros(layout.n, 0, dtype=H.dtype, device=H.device) for layout in diagonal.layouts]
        with deadline(end):
            images = diagonal.products([asked.get(i, none) for i, none in enumerate(nothing)])
        passes += 1
        return {number: images[number] for number in asked}

    studies = [study(op, number, ncv, question, ends) for number, op in enumerate(operators)]
    found = in_lockstep(studies, products)
    report(0)
    return BlockSpectra(tuple(found), passes, time.perf_counter() - began, repr(H)[1:-1])


def study(
    op: BlockOperator, number: int, ncv: int, question: Question, ends: dict[str, Progress]
) -> Asking[BlockSpectrum]:
    """Expand the Krylov space of a block until both ends have converged and the density has its steps.

    The ends so far are noted in ``ends``, by the block's name.
    """
    began, asker = time.perf_counter(), Asker(op)
    solver = question.solver(asker.op, number, ncv)
    steps = math.ceil(question.num_steps / solver.block_size) if question.density else 0
    state, history, limit, measured = solver.init(), list[Progress](), None, None
    while True:
        found = solver.assess(state)
        state, status = found.state, found.status or limit
        if state.num_matvecs:
            progress, seconds = cast(Progress, found.progress), time.perf_counter() - began
            ends[op.block_name] = replace(progress, num_matvecs=state.num_matvecs, seconds=seconds)
            history.append(ends[op.block_name])
        over = status is Status.NON_FINITE or limit is not None or not state.num_frontier
        done = state.num_products // solver.block_size
        if steps and measured is None and (over or done >= steps):
            measured = _measured(solver, state, status)
        if status is not None and (over or done >= steps):
            break
        num_steps = found.num_steps if status is None else steps - done
        for _ in range(min(num_steps, steps - done) if done < steps else num_steps):
            limit = solver.limits.exceeded_by(solver.step_cost, state.num_matvecs, 0.0)
            if limit is not None:
                break
            try:
                state = yield from asker.asking(partial(solver.step, state))
            except DeadlineReached:
                limit = Status.TIME_LIMIT
                break
    final: EigenResult = yield from asker.asking(partial(solver.finalize, state, status))
    final = completed(final, op, tuple(history), began, found.suspect)
    trace = None
    if question.num_probes:
        trace = yield from _trace(op, state, final.status, question.seed_of(number, 1), question.num_probes)
    density = None
    if measured is not None:
        seconds = time.perf_counter() - began
        density = density_of(op, "lanczos", replace(measured, seconds=seconds, history=tuple(history)))
    names = op.layout.names if op.layout is not None else ()
    final = replace(final, vectors=as_shards(op, final.vectors))
    extremes = extreme_result(op, final, question.tol)
    return BlockSpectrum(op.block_name, names, op.n, extremes, trace, density)


def _measured(solver: Lanczos, state: LanczosState, status: Status | None) -> Measured:
    """Return the rules of the start vectors, which are the first rows of the basis, so far."""
    width = solver.block_size
    found = []
    if state.num_multiplied:
        found = [quadrature.measure(solver.op, state, krylov.project(solver.op, state)[0], width)]
    if status not in (Status.NON_FINITE, Status.MAX_MATVECS, Status.TIME_LIMIT):
        status = Status.INVARIANT_SUBSPACE if width == solver.op.n else Status.COMPLETED
    return Measured(found, state.num_matvecs, status, quadrature.MESSAGES[status])


def _trace(
    op: BlockOperator, state: LanczosState, status: Status, seed: int, num_probes: int
) -> Asking[Estimate[float]]:
    """Estimate the trace: that on the basis exactly, and the rest by probes that are independent of it."""
    began, m, scale = time.perf_counter(), state.num_multiplied, float(state.scale)
    captured = float(state.projected[:m, :m].diagonal().double().sum()) * scale
    forms, reason, spent = torch.zeros(0, dtype=torch.float64, device="cpu"), status, 0
    if m == op.n:
        forms, reason = torch.zeros(m, dtype=torch.float64, device="cpu"), Status.INVARIANT_SUBSPACE
    elif status not in (Status.NON_FINITE, Status.TIME_LIMIT):
        basis, probes = state.basis[:m], draw(op, "rademacher", seed, range(num_probes))
        for _ in range(2):  # as orthogonal as rounding allows
            probes = probes - (probes @ basis.mT) @ basis
        try:
            images = yield probes.mT.contiguous()
            forms, spent = (probes.double() * images.mT.double()).sum(dim=1).cpu(), num_probes
            reason = Status.COMPLETED if bool(torch.isfinite(forms).all()) else Status.NON_FINITE
        except DeadlineReached:
            reason = Status.TIME_LIMIT
    mean = mean_of(captured + forms, 1.0 if m == op.n else 0.0)
    found = float(mean.value), float(mean.stderr), mean.samples, len(forms), spent * op.cost
    return Estimate(*found, time.perf_counter() - began, reason, TRACE_MESSAGES[reason], ())
