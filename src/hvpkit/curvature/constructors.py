"""Constructors of curvature operators: the Hessian, the Gauss-Newton matrix and both Fisher matrices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.random import normal_vector, resolve_seed
from hvpkit._utils.ranks import Ranks, agreed, watching
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import check_choice, check_count, check_flag
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import check_params, snapshot
from hvpkit.curvature.batch_means import check_batch_mean
from hvpkit.curvature.batch_size import best_size
from hvpkit.curvature.batch_sums import all_finite
from hvpkit.curvature.batches import (
    MODES,
    BatchCurvature,
    Kind,
    Leaves,
    Problem,
    batch_curvatures,
    check_loss,
    hessian_of_batch,
    loss_shares,
)
from hvpkit.curvature.compiled import MODE, compiled_kind
from hvpkit.curvature.fisher import LIKELIHOODS, empirical_fisher_of_batch, find_likelihood, fisher_of_batch
from hvpkit.curvature.float64 import in_float64
from hvpkit.curvature.ggn import check_objective, ggn_of_batch
from hvpkit.curvature.graph_cache import MemoryBudget
from hvpkit.curvature.mode_selection import Recipe, check_arithmetic, choose_recipe, lower_precision
from hvpkit.curvature.operator import Curvature, CurvatureOperator
from hvpkit.curvature.param_selection import Selection, restrict
from hvpkit.curvature.sharded_problem import MODE as SHARDED_MODE
from hvpkit.curvature.sharded_problem import check_options, device_of, sharded_problem, verify
from hvpkit.data import Data, as_data
from hvpkit.errors import CompileWarning, NonFiniteError
from hvpkit.objective import Objective, check_batches, check_loss_fn, goes_by_batches, normalized

TRIAL_EXAMPLES = 32
"""The most examples of the first batch on which modes are tried and errors measured. By feel."""


def hessian(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    compile: bool = False,
    shard_params: bool = False,
    progress: bool = False,
) -> CurvatureOperator:
    r"""Return the Hessian of the mean loss over all examples, :math:`H = \frac1N \sum_i \nabla^2 \ell_i(p)`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors of one dtype and device, the point; a complex entry is two real coordinates.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        wrt: glob or globs over dotted parameter names, or a predicate of a name: the block of the matrix
            that belongs to those parameters, the others held constant.
        batch_size: the most examples in a batch; memory grows with it, matvecs change by no more than
            rounding. By default the loader's own, else 256. ``"auto"``: the fastest within
            ``memory_limit``, by trials with 16, 32, 64 ... examples.
        mode: of automatic differentiation: one of :func:`hvpkit.hvp`, or ``"auto"``: the exact one that is the
            faster on the first examples, if both agree; else the one that finite differences confirm, or these
            themselves. ``H.mode`` and ``H.mode_reason`` say which and why.
        arithmetic: ``"native"``, the parameters' dtype; ``"bf16"`` or ``"tf32"`` (CUDA only): matrix products and
            convolutions of float32 networks in fewer digits. The last matvecs of a solve, and the values and
            residuals that it reports, are in native arithmetic in any case.
        memory_limit: bytes to hold between matvecs, by the operator and its samples: the graphs of the gradients of as
            many batches as fit, recorded in the second matvec and used in all later ones, which take two thirds of
            the work; in the mode ``"reverse-over-reverse"``. Freed with the operator. By default a quarter of the
            memory that is free; 0: nothing is held.
        compile: compile matvecs by ``torch.compile``, forward over reverse, once for a ``loss_fn`` and a batch size;
            that takes from seconds to a minute, and pays in long runs. The result is compared with the matvec without
            it, which stays in use, with a :class:`hvpkit.CompileWarning`, where torch cannot compile or is wrong.
        shard_params: keep 1 / p of the parameters on each of the p ranks that share ``data``; each is whole only
            while a function of the loss uses it. For models that fit no other way: a batch sends all parameters
            about seven times, and computes functions of parameters anew, so that batches should be large. ``params``
            may be DTensors, as of ``from_module(..., shard_params=True)``. Reverse over reverse; no graphs are held,
            and the operator has no samples. docs/distributed.md.
        progress: show a bar over the batches of each matvec.

    Returns:
        A symmetric :class:`hvpkit.CurvatureOperator`; trees for ``@`` are shaped like ``params``, a dict of the
        chosen ones by dotted name where ``wrt`` is given. ``H.precision`` is the relative error of its matvecs,
        measured on the first examples for finite differences and for less than native arithmetic.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.hvp` and :func:`hvpkit.as_data`; ``wrt`` matches nothing; a
            last batch of one example under ``batchnorm="batch"``; arithmetic that the dtype, device or mode lacks;
            ``shard_params`` with data of one process, or with an option that it excludes.
        NonFiniteError: the loss of the first batch is not finite.
        ArithmeticError: ``mode="auto"``: the exact modes disagree or differ from finite differences, and these are not
            symmetric, the gradient being that of no loss, or too rough. ``shard_params``: products are not symmetric,
            or not the derivative of the gradient, as of a loss that does other things when it is run again.

    Warns:
        DerivativeWarning: ``mode="auto"``: no exact mode is right, by finite differences, which are used instead; or
            the only one that works differs from them, and they are too rough to tell.

    Cost:
        A gradient of the first batch now, and four matvecs with 32 of its examples, twelve at most. A matvec is a
        pass over the data at about 9 forward passes' work. With ``[n, k]`` it reads the data once, and columns share
        the forward and the first backward pass in the mode ``"reverse-over-reverse"``.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p["w"]) ** 2 + p["b"] ** 2
        >>> params, data = {"w": torch.zeros(2), "b": torch.tensor(0.0)}, torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> hessian(loss_fn, params, data) @ torch.ones(3)
        tensor([2., 8., 2.])

        Both ends of the spectrum of each layer:

        >>> ends = {name: hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data, wrt=name)) for name in params}
        >>> {name: round(ex.largest.value, 3) for name, ex in ends.items()}
        {'w': 8.0, 'b': 2.0}
    """
    options = _Options(wrt, batch_size, mode, arithmetic, memory_limit, progress, shard_params, compile)
    problem, first = _specify(loss_fn, params, data, options)
    return _build("hessian", hessian_of_batch, problem, first, options)


def ggn(  # noqa: D417
    objective: Objective,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    shard_params: bool = False,
    progress: bool = False,
) -> CurvatureOperator:
    r"""Return the generalised Gauss-Newton matrix of the mean loss, :math:`G = \frac1N \sum_i J_i^\top H_i J_i`.

    :math:`J_i` is the Jacobian of the outputs of example i, :math:`H_i` the Hessian of its loss in the outputs. G is
    positive semi-definite where the loss is convex in the outputs.

    Args:
        objective: a :class:`hvpkit.Objective`, as :func:`hvpkit.from_module` gives one.
        mode: how J is multiplied: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    The other arguments are those of :func:`hessian`.

    Returns:
        A symmetric :class:`hvpkit.CurvatureOperator`.

    Raises:
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hvpkit.ggnvp` and :func:`hessian`.

    Cost:
        As :func:`hessian` now. A matvec is a pass over the data at about 6 forward passes' work and twice the
        loss of the outputs; for its memory see :func:`hvpkit.ggnvp`. Columns of ``[n, k]`` share one forward pass.

    Source:
        Schraudolph, Neural Computation 14 (2002) 1723-1738, doi:10.1162/08997660260028683.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: (batch @ p).exp(), lambda z, batch: z**2)
        >>> G = ggn(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]))
        >>> G @ torch.tensor([1.0, 0.0])
        tensor([2., 4.])
    """
    options = _Options(wrt, batch_size, mode, arithmetic, memory_limit, progress, shard_params)
    problem, first = _specify(check_objective(objective), params, data, options)
    return _build("ggn", ggn_of_batch, problem, first, options)


def empirical_fisher(  # noqa: D417
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    shard_params: bool = False,
    progress: bool = False,
) -> CurvatureOperator:
    r"""Return the empirical Fisher matrix: the second moment of single gradients, :math:`\frac1N \sum_i g_i g_i^\top`.

    :math:`g_i` is the gradient of the loss of an **example**: for a sequence whose loss is a mean over its tokens, the
    mean of their gradients. For a Fisher matrix of tokens let each token be an example. The mean of all :math:`g_i` is
    the gradient of the loss: where an objective has weights w of its examples, as by their classes or where targets are
    ignored, :math:`g_i = N w_i \nabla \ell_i / \sum_j w_j`, and weights are squared, unlike in :func:`fisher`. Leave
    examples out of the data whose targets are ignored: N / (number kept) is a factor of the matrix.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``. Pure.
        mode: how inner products with gradients are computed: see :func:`hvpkit.ggnvp`; or ``"auto"``.

    The other arguments are those of :func:`hessian`.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.CurvatureOperator`.

    Raises:
        ValueError: a 0-d loss, whose examples are not known apart.
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hessian`.

    Cost:
        As :func:`hessian` now. A matvec is a pass over the data at about 6 forward passes' work.

    Example:
        >>> import torch
        >>> F = empirical_fisher(lambda p, batch: batch @ p, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> F @ torch.ones(2)
        tensor([2., 3.])
    """
    options = _Options(wrt, batch_size, mode, arithmetic, memory_limit, progress, shard_params)
    problem, first = _specify(loss_fn, params, data, options)
    return _build("empirical-fisher", empirical_fisher_of_batch, problem, first, options)


def fisher(  # noqa: D417
    objective: Objective,
    params: Tree,
    data: object,
    *,
    likelihood: str | None = None,
    num_samples: int | None = None,
    seed: Seed = 0,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    shard_params: bool = False,
    progress: bool = False,
) -> CurvatureOperator:
    r"""Return the Fisher matrix of predictions, :math:`\frac1N \sum_i \mathbf E_{y \sim p(y|x_i)}\, g g^\top`.

    g is the gradient of the loss at a target y drawn from the model's own prediction. The expectation, which is the
    generalised Gauss-Newton matrix here, is exact by default, or an unbiased mean over samples. Where an example has
    several predictions (tokens, pixels, labels), each is drawn, with the weight that the loss gives it.

    Args:
        objective: a :class:`hvpkit.Objective`, whose outputs are one tensor.
        likelihood: of targets given the outputs: ``"categorical"`` (cross entropy of logits, their classes along the
            dimension 1 or the last), ``"bernoulli"`` (binary cross entropy of logits), ``"gaussian"`` (squared error);
            by default the one of the loss.
        num_samples: targets drawn for each prediction, the same in every matvec; None: the exact form.
        seed: of the samples.
        mode: how J is multiplied: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    The other arguments are those of :func:`hessian`.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.CurvatureOperator`.

    Raises:
        ValueError: the loss is of another likelihood, or of none of these.
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hvpkit.ggnvp` and :func:`hessian`.

    Cost:
        As :func:`ggn`; samples take the memory of the outputs, each.

    Source:
        Kunstner, Balles and Hennig, NeurIPS 2019, arXiv:1905.12558.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: batch @ p, lambda z, batch: 0.5 * z**2)
        >>> F = fisher(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]), likelihood="gaussian")
        >>> F @ torch.tensor([1.0, 0.0])
        tensor([1., 2.])
    """
    check_objective(objective)
    if likelihood is not None:
        check_choice("likelihood", likelihood, LIKELIHOODS)
    if num_samples is not None:
        num_samples = check_count("num_samples", num_samples, 1)
    seed = resolve_seed(seed)
    options = _Options(wrt, batch_size, mode, arithmetic, memory_limit, progress, shard_params)
    problem, first = _specify(objective, params, data, options)
    with exact_derivatives(problem.device):
        found = find_likelihood(check_objective(problem.loss_fn), problem.over(first), likelihood)
    of_batch: Kind = ggn_of_batch
    if num_samples is not None:
        of_batch = partial(fisher_of_batch, likelihood=found, num_samples=num_samples, seed=seed)
    return _build("fisher", of_batch, problem, first, options)


@dataclass(frozen=True)
class _Options:
    """Arguments that all constructors share: see :func:`hessian`."""

    wrt: Selection
    batch_size: int | str | None
    mode: str
    arithmetic: str
    memory_limit: float | None
    progress: bool
    shard_params: bool
    compile: bool = False


def _plain(options: _Options) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("batch_size", "mode", "arithmetic", "compile", "shard_params")
    }


def _specify(loss_fn: LossFn, params: Tree, data: object, options: _Options) -> tuple[Problem, Data]:
    """Validate the arguments; return the problem, and the first few examples for trials."""
    batch_size = options.batch_size
    check_choice("mode", options.mode, ("auto", *MODES))
    check_flag("compile", options.compile)
    check_flag("progress", options.progress)
    check_flag("shard_params", options.shard_params)
    if options.shard_params:
        check_options(**vars(options))
    check_loss_fn(loss_fn, params)
    function, params = restrict(loss_fn, params, options.wrt)
    if options.shard_params:
        device = device_of(params)
    else:
        layout, leaves = check_params(params)
        leaves = [snapshot(leaf) for leaf in leaves]  # later training does not change the operator
        device = leaves[0].device
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size must be a number of examples or 'auto', got {batch_size!r}")
        if goes_by_batches(loss_fn):
            raise ValueError(
                "batch_size='auto': batchnorm=\"batch\" makes the Hessian depend on the batches; name their size"
            )
        batch_size = None  # until trials have chosen it
    examples = as_data(data, batch_size=batch_size, device=device)
    check_batches(loss_fn, examples)
    function = normalized(function, examples)
    first, ranks = examples.first(), examples.ranks
    with watching(ranks), exact_derivatives(device):
        if options.shard_params:
            problem = sharded_problem(function, params, examples)
        else:
            problem = Problem(function, layout, leaves, examples)
        value = check_loss(next(loss_shares(problem.loss_fn, problem.layout, first)), problem.leaves)
        if problem.shards is None or not problem.shards.ranks.any(first.num_examples < 2):
            resized = options.batch_size == "auto"
            can_cut = check_batch_mean(problem.loss_fn, problem.params, examples, first, resized=resized)
            if problem.shards is None:  # else ranks take as many batches, whatever their sizes
                problem = problem.over(replace(examples, can_cut=agreed(ranks, can_cut)))
        if not all_finite([value]):
            raise NonFiniteError("loss_fn gave NaN or infinity on batch 0 of data (counted from 0)")
        if ranks is not None:
            if problem.shards is None:
                ranks.check_same(params=digest(problem.leaves))
            ranks.check_same(**_plain(options))
            if examples.units_of_ranks is None:
                _check_same_loss(ranks, float(value), torch.finfo(value.dtype).eps ** 0.5)
    return problem, first.first(TRIAL_EXAMPLES)


def _check_same_loss(ranks: Ranks, value: float, tol: float) -> None:
    """Raise ValueError on all ranks if the loss of the first batch is not the same: what it closes over differs."""
    values = ranks.gather(value)
    if max(values) - min(values) > tol * max(map(abs, values)):
        raise ValueError(
            "loss_fn must be the same function on all ranks: for the first batch it gives "
            f"{', '.join(map(str, values))}. Buffers, as running statistics of BatchNorm, are each rank's own in "
            "data-parallel training: broadcast the first rank's (torch.distributed.broadcast) before the objective is "
            "made"
        )


def _build(kind: str, of_batch: Kind, problem: Problem, first: Data, options: _Options) -> CurvatureOperator:
    """Choose mode, batch size and code by trials on the first examples; return the operator."""
    if problem.shards is not None:
        return _build_sharded(kind, of_batch, problem, first, options)
    arithmetic = options.arithmetic
    device, dtype = problem.device, problem.leaves[0].dtype
    check_arithmetic(arithmetic, problem.leaves[0])
    budget = MemoryBudget.of(options.memory_limit, device)

    def random_vector(stream: int) -> Leaves:
        return problem.layout.split(
            normal_vector(problem.layout.n, dtype=dtype, device=device, seed=0, stream=stream)
        )

    def first_batch(size: int) -> BatchCurvature:
        return next(batch_curvatures(of_batch, problem, as_data(problem.data.alone, batch_size=size)))

    def trial(problem: Problem) -> BatchCurvature:
        return next(batch_curvatures(of_batch, problem, first))

    def trial_in_float64() -> BatchCurvature:
        if dtype == torch.float64:
            return trial(problem)
        leaves = [leaf.double() for leaf in problem.leaves]
        return trial(replace(problem, loss_fn=in_float64(problem.loss_fn), leaves=leaves))

    ranks = problem.data.ranks
    with watching(ranks), exact_derivatives(device):
        recipe = choose_recipe(trial(problem), random_vector, options.mode, arithmetic, trial_in_float64)
        recipe = agreed(ranks, recipe)
        if options.batch_size == "auto":
            with lower_precision(arithmetic, device):
                longest = problem.data.longest_batch
                size = best_size(first_batch, random_vector(0), recipe.mode, longest, budget.num_bytes)
            problem = problem.over(as_data(problem.data, batch_size=agreed(ranks, size)))
        if options.compile:
            if options.mode not in ("auto", MODE):
                raise ValueError(f"compile=True makes products {MODE}; leave mode={options.mode!r} out")
            faster = None
            if MODE in recipe.refuted:
                warnings.warn(
                    f"compile=True is ignored: {MODE}, which it would compile, is wrong here ({recipe.reason})",
                    CompileWarning,
                    stacklevel=3,
                )
            else:
                with lower_precision(arithmetic, device):
                    faster = compiled_kind(of_batch, problem)
            if faster is not None:
                of_batch, recipe = faster, replace(recipe, mode=MODE, reason=f"{MODE}: compiled")
    curvature = Curvature(kind, of_batch, problem, recipe, budget.new_cache(), progress=options.progress)
    return CurvatureOperator.of([(1.0, curvature)])


def _build_sharded(
    kind: str, of_batch: Kind, problem: Problem, first: Data, options: _Options
) -> CurvatureOperator:
    """Verify products of parameters in parts on the first examples; return the operator."""
    with watching(problem.data.ranks), exact_derivatives(problem.device):
        verify(of_batch, problem, first)
    reason = f"{SHARDED_MODE}: shard_params=True, by which parameters come in parts"
    recipe = Recipe(SHARDED_MODE, None if options.mode != "auto" else reason, "native")
    cache = MemoryBudget(0.0).new_cache()
    return CurvatureOperator.of(
        [(1.0, Curvature(kind, of_batch, problem, recipe, cache, progress=options.progress))]
    )
