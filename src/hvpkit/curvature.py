"""Curvature of a loss over data: constructors of one operator class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvpkit._typing import LossFn, Seed, Tree
from hvpkit.batch_sizes import best_size
from hvpkit.compiled import MODE, compiled_terms
from hvpkit.data import Data, as_data, whole_batch
from hvpkit.errors import NonFiniteError, check_choice, check_count
from hvpkit.fisher import LIKELIHOODS, empirical_terms, find_likelihood, fisher_terms
from hvpkit.gauss_newton import check_objective, ggn_terms
from hvpkit.kept import Budget
from hvpkit.memory import free_memory
from hvpkit.modes import Recipe, check_arithmetic, lower_precision, settle
from hvpkit.objective import Objective, check_batches, goes_by_batches
from hvpkit.operators import LinearOperator, Origin
from hvpkit.probes import generator, normal_vector, resolve_seed
from hvpkit.products import (
    MODES,
    Leaves,
    Term,
    Terms,
    all_finite,
    blame,
    check_loss,
    exact_derivatives,
    hessian_terms,
    parts,
)
from hvpkit.selection import Selection, restrict
from hvpkit.trees import check_params, snapshot

FREE_SHARE = 0.25
"""Of the memory that is free, what an operator may hold between products by default."""

TRIAL_EXAMPLES = 32
"""Examples of the first batch, at most, on which modes are tried and errors measured."""


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
    progress: bool = False,
) -> LinearOperator:
    r"""The Hessian of the mean loss over all examples, :math:`H = \frac1N \sum_i \nabla^2 \ell_i(p)`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors of one dtype and device, the point.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        wrt: glob or globs over dotted parameter names, or a predicate of a name: the block of the matrix
            that belongs to those parameters, the others held constant.
        batch_size: the most examples put through at once; memory grows with it, the product does not
            change beyond rounding. By default the loader's own, else 256. ``"auto"``: the fastest within
            ``memory_limit``, by trials with 16, 32, 64 ... examples.
        mode: how a product is made: one of :func:`hvpkit.hvp`, or ``"auto"``: the exact one that is the faster
            on the first examples, if both agree; ``H.mode`` is which, ``H.mode_reason`` why.
        arithmetic: ``"native"``, the parameters' dtype; ``"bf16"`` or ``"tf32"`` (CUDA only): matrix products and
            convolutions of float32 networks in fewer digits. The last products of a solve, and the values and
            residuals that it reports, are in native arithmetic all the same.
        memory_limit: bytes to hold between products, by the operator and its samples: the graph of the gradient of as
            many batches as fit, made in the second product and passed through again in those after, which takes two
            thirds of the work; in the mode ``"reverse-over-reverse"``. Given back when the operator is no longer
            used. By default a quarter of the memory that is free; 0: nothing is held.
        compile: make products by code that torch compiles, forward over reverse, once for a ``loss_fn`` and a
            batch size; that takes from seconds to a minute, and pays in long runs. Compared with the product as it is
            without, which stays in use, with a :class:`hvpkit.CompileWarning`, where torch cannot compile it.
        progress: show a bar over the batches of each product.

    Returns:
        A symmetric :class:`hvpkit.LinearOperator`; trees for ``@`` are shaped like ``params``, a dict of the
        chosen ones by dotted name where ``wrt`` is given. ``H.precision`` is the relative error of its products,
        measured on the first examples for finite differences and for less than native arithmetic.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.hvp` and :func:`hvpkit.as_data`; ``wrt`` matches nothing; a
            last batch of one example under ``batchnorm="batch"``; arithmetic that the dtype, device or mode lacks.
        NonFiniteError: the loss of the first batch is not finite.
        ArithmeticError: ``mode="auto"``: the modes disagree, and finite differences agree with neither.

    Cost:
        A gradient of the first batch now, and four products with 32 of its examples, twelve at most. A product is a
        pass over the data at about 9 forward passes' work. ``[n, k]`` products read the data once, and share the
        forward and the first backward pass in the mode ``"reverse-over-reverse"``.

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
    origin, first = _origin("hessian", loss_fn, params, data, wrt, batch_size, mode)
    return _operator(origin, first, hessian_terms, batch_size, arithmetic, memory_limit, progress, compile)


def ggn(
    objective: Objective,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    progress: bool = False,
) -> LinearOperator:
    r"""The generalised Gauss-Newton matrix of the mean loss, :math:`G = \frac1N \sum_i J_i^\top H_i J_i`.

    :math:`J_i` is the Jacobian of the outputs of example i, :math:`H_i` the Hessian of its loss by the outputs. G is
    positive semi-definite where the loss is convex in the outputs.

    Args:
        objective: a :class:`hvpkit.Objective`, as :func:`hvpkit.from_module` gives one.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        mode: how J is multiplied with: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    Returns:
        A symmetric :class:`hvpkit.LinearOperator`.

    Raises:
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hvpkit.ggnvp` and :func:`hessian`.

    Cost:
        As :func:`hessian` now. A product is a pass over the data at about 6 forward passes' work and twice the
        loss of the outputs; for its memory see :func:`hvpkit.ggnvp`. ``[n, k]`` products share one forward pass.

    Source:
        Schraudolph, Neural Computation 14 (2002) 1723-1738, doi:10.1162/08997660260028683.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: (batch @ p).exp(), lambda z, batch: z**2)
        >>> G = ggn(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]))
        >>> G @ torch.tensor([1.0, 0.0])
        tensor([2., 4.])
    """
    origin, first = _origin("ggn", check_objective(objective), params, data, wrt, batch_size, mode)
    return _operator(origin, first, ggn_terms, batch_size, arithmetic, memory_limit, progress)


def empirical_fisher(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    progress: bool = False,
) -> LinearOperator:
    r"""The second moment of the gradients of single examples, :math:`\frac1N \sum_i g_i g_i^\top`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``. Pure.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        mode: how inner products with gradients are made: see :func:`hvpkit.ggnvp`; or ``"auto"``.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.LinearOperator`.

    Raises:
        ValueError: a 0-d loss, whose examples are not known apart.
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hessian`.

    Cost:
        As :func:`hessian` now. A product is a pass over the data at about 6 forward passes' work.

    Example:
        >>> import torch
        >>> F = empirical_fisher(lambda p, batch: batch @ p, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> F @ torch.ones(2)
        tensor([2., 3.])
    """
    origin, first = _origin("empirical-fisher", loss_fn, params, data, wrt, batch_size, mode)
    return _operator(origin, first, empirical_terms, batch_size, arithmetic, memory_limit, progress)


def fisher(
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
    progress: bool = False,
) -> LinearOperator:
    r"""The Fisher matrix of the model's own predictions, :math:`\frac1N \sum_i \mathbf E_{y \sim p(y|x_i)}\, g g^\top`.

    g is the gradient of the loss at a target y that the model itself predicts. The expectation, which is the
    generalised Gauss-Newton matrix here, is exact by default, or an unbiased mean over samples. Where an example has
    several predictions (tokens, pixels, labels), each is drawn, and counts as much as the loss weighs it.

    Args:
        objective: a :class:`hvpkit.Objective`, whose outputs are one tensor.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        likelihood: of targets given the outputs: ``"categorical"`` (cross entropy of logits, their classes along the
            dimension 1 or the last), ``"bernoulli"`` (binary cross entropy of logits), ``"gaussian"`` (squared error);
            by default whichever the loss is of.
        num_samples: how many targets to draw for each prediction, the same in every product; None: the exact form.
        seed: of the samples.
        mode: how J is multiplied with: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.LinearOperator`.

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
        check_count("num_samples", num_samples, 1)
    seed = resolve_seed(seed)
    origin, first = _origin("fisher", objective, params, data, wrt, batch_size, mode)
    with exact_derivatives(origin.leaves[0].device):
        whole = check_objective(origin.loss_fn)
        found = find_likelihood(whole, origin.layout, origin.leaves, first, likelihood)
    terms: Terms[Any] = ggn_terms
    if num_samples is not None:
        terms = partial(fisher_terms, likelihood=found, num_samples=num_samples, seed=seed)
    return _operator(origin, first, terms, batch_size, arithmetic, memory_limit, progress)


R = TypeVar("R")

NAMES = {"hessian": "Hessian", "ggn": "GGN", "empirical-fisher": "empirical Fisher", "fisher": "Fisher"}


def _origin(
    kind: str,
    loss_fn: LossFn,
    params: Tree,
    data: object,
    wrt: Selection,
    batch_size: int | str | None,
    mode: str,
) -> tuple[Origin, Data]:
    """What an operator is made of, looked at, and the first few examples to try it on."""
    check_choice("mode", mode, ("auto", *MODES))
    function, params = restrict(loss_fn, params, wrt)
    layout, leaves = check_params(params)
    leaves = [snapshot(leaf) for leaf in leaves]  # the point stays, whatever training does to params
    device = leaves[0].device
    given = None
    if isinstance(batch_size, str):
        check_choice("batch_size", batch_size, ("auto",))
        if goes_by_batches(loss_fn):
            raise ValueError(
                "batch_size='auto': batchnorm=\"batch\" makes the Hessian depend on the batches; name their size"
            )
    else:
        given = batch_size
    examples = as_data(data, batch_size=given, device=device)
    check_batches(loss_fn, examples)
    batch, weights = next(examples.weighted())
    first = whole_batch(batch, weights)
    with exact_derivatives(device):
        value = check_loss(next(parts(function, layout, first)), leaves)
    if not all_finite([value]):
        raise NonFiniteError("loss_fn gave NaN or infinity on batch 0 of data (counted from 0)")
    few = torch.arange(min(first.num_examples, TRIAL_EXAMPLES))
    first = first.subset(few, None if weights is None else weights[: len(few)])
    return Origin(kind, function, layout, leaves, examples, mode), first


def _operator(
    origin: Origin,
    first: Data,
    terms: Terms[Any],
    batch_size: int | str | None,
    arithmetic: str,
    memory_limit: float | None,
    progress: bool,
    compile: bool = False,
) -> LinearOperator:
    """The operator, after trials on its first examples of how to make products."""
    layout, leaves = origin.layout, origin.leaves
    device = leaves[0].device
    check_arithmetic(arithmetic, leaves[0])
    if memory_limit is None:
        memory_limit = FREE_SHARE * free_memory(device)
    elif not memory_limit >= 0:
        raise ValueError(f"memory_limit must be a number of bytes, at least 0, got {memory_limit}")

    def draw(stream: int) -> Leaves:
        return layout.split(
            normal_vector(layout.n, dtype=leaves[0].dtype, device=device, seed=0, stream=stream)
        )

    def first_term(data: Data) -> Term:
        return next(terms(origin.loss_fn, layout, leaves, data))

    with exact_derivatives(device):
        recipe = settle(first_term(first), draw, origin.mode, arithmetic)
        if batch_size == "auto":
            with lower_precision(arithmetic, device):
                size = best_size(
                    lambda size: first_term(as_data(origin.data, batch_size=size)),
                    draw(0),
                    recipe.mode,
                    origin.data.longest_batch,
                    memory_limit,
                )
            origin = replace(origin, data=as_data(origin.data, batch_size=size))
        if compile:
            if origin.mode not in ("auto", MODE):
                raise ValueError(f"compile=True makes products {MODE}; leave mode={origin.mode!r} out")
            with lower_precision(arithmetic, device):
                faster = compiled_terms(terms, origin.loss_fn, layout, leaves, origin.data)
            if faster is not None:
                terms, recipe = faster, replace(recipe, mode=MODE, reason=f"{MODE}: compiled")
    origin = replace(origin, mode=recipe.mode)
    return _over(origin, terms, recipe, progress, Budget(memory_limit))


def _over(
    origin: Origin, terms: Terms[Any], recipe: Recipe, progress: bool, budget: Budget, cost: float = 1.0
) -> LinearOperator:
    """The operator over the examples of ``origin``, whose products cost ``cost`` full-data products."""
    layout, leaves, data, mode = origin.layout, origin.leaves, origin.data, recipe.mode
    device, name, kept = leaves[0].device, NAMES[origin.kind], budget.holder()
    batch_statistics = goes_by_batches(origin.loss_fn)
    if batch_statistics:
        name = f"{name} of fixed batches"

    @contextmanager
    def settings() -> Iterator[None]:
        with exact_derivatives(device), lower_precision(recipe.arithmetic, device):
            yield

    def batches() -> Iterator[Term]:
        return terms(origin.loss_fn, layout, leaves, data)

    def product(vectors: Tensor) -> Tensor:
        columns = [layout.split(vector) for vector in vectors.mT.contiguous()]
        with settings():
            rows = vectors.new_zeros(len(columns), layout.n)
            sums = [layout.split(row) for row in rows]
            linears = kept.linears(batches, mode)
            for linear, again in _with_bar(linears) if progress else linears:
                _add_(sums, linear(columns, again=again))
        return rows.mT

    def explain(vector: Tensor) -> str:
        def once(term: Term) -> Leaves:
            return term(mode)([layout.split(vector)])[0]

        with settings():
            return blame(f"{name} product", batches(), once)

    def sample(num_examples: int, seed: int) -> LinearOperator:
        chosen = replace(origin, data=_subset(data, num_examples, seed))
        return _over(chosen, terms, recipe, progress, budget, cost * num_examples / data.num_examples)

    def subset(indices: Tensor, weights: Tensor) -> LinearOperator:
        chosen = replace(origin, data=data.subset(indices, weights.to(device, leaves[0].dtype)))
        return _over(chosen, terms, recipe, progress, budget, cost * len(indices) / data.num_examples)

    exact = None
    if recipe.arithmetic != "native":
        native = replace(recipe, arithmetic="native", precision=0.0)
        exact = _over(origin, terms, native, progress, budget, cost)

    return LinearOperator(
        product,
        layout.n,
        leaves[0].dtype,
        device,
        name=name if recipe.arithmetic == "native" else f"{name} in {recipe.arithmetic}",
        layout=layout,
        num_examples=data.num_examples,
        batch_size=data.batch_size,
        cost=cost,
        mode=mode,
        mode_reason=recipe.reason,
        precision=recipe.precision,
        exact=exact,
        explain=explain,
        sample=None if batch_statistics else sample,  # another batch has other statistics
        subset=None if batch_statistics else subset,
        origin=origin,
    )


def _add_(sums: list[Leaves], shares: list[Leaves]) -> None:
    for total, share in zip(sums, shares, strict=True):
        torch._foreach_add_(total, share)


def _subset(examples: Data, num_examples: int, seed: int) -> Data:
    """A uniform random subset without replacement, whose mean is unbiased for that of all examples."""
    total = examples.num_examples
    check_count("num_examples", num_examples, 1, total)
    chosen = torch.randperm(total, generator=generator(resolve_seed(seed)))[:num_examples]
    weights = examples.weights
    if weights is not None:
        weights = weights[chosen.to(weights.device)] * (total / num_examples)
    return examples.subset(chosen, weights)


def _with_bar(batches: Iterator[R]) -> Iterator[R]:
    from tqdm.auto import tqdm

    yield from tqdm(batches, desc="product", unit="batch", leave=False)
