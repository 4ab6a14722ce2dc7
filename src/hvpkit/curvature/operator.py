"""How a loss over data becomes an operator: looked at, tried, and its products added up over batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.memory import free_memory
from hvpkit._utils.random import generator, normal_vector, resolve_seed
from hvpkit._utils.typing import LossFn, Tree
from hvpkit._utils.validation import check_choice, check_count
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import check_params, snapshot
from hvpkit.curvature.batch_size import best_size
from hvpkit.curvature.compiled import MODE, compiled_terms
from hvpkit.curvature.graph_cache import Budget
from hvpkit.curvature.mode_selection import Recipe, check_arithmetic, lower_precision, settle
from hvpkit.curvature.param_selection import Selection, restrict
from hvpkit.curvature.products import MODES, Leaves, Term, Terms, all_finite, blame, check_loss, parts
from hvpkit.data import Data, as_data, whole_batch
from hvpkit.errors import NonFiniteError
from hvpkit.objective import check_batches, check_loss_fn, goes_by_batches
from hvpkit.operators.base import LinearOperator, Origin

FREE_SHARE = 0.25
"""Of the memory that is free, what an operator may hold between products by default."""

TRIAL_EXAMPLES = 32
"""Examples of the first batch, at most, on which modes are tried and errors measured."""

R = TypeVar("R")

NAMES = {"hessian": "Hessian", "ggn": "GGN", "empirical-fisher": "empirical Fisher", "fisher": "Fisher"}


def origin_of(
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
    check_loss_fn(loss_fn, params)
    function, params = restrict(loss_fn, params, wrt)
    layout, leaves = check_params(params)
    leaves = [snapshot(leaf) for leaf in leaves]  # the point stays, whatever training does to params
    device = leaves[0].device
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size must be a number of examples or 'auto', got {batch_size!r}")
        if goes_by_batches(loss_fn):
            raise ValueError(
                "batch_size='auto': batchnorm=\"batch\" makes the Hessian depend on the batches; name their size"
            )
        batch_size = None  # for now
    examples = as_data(data, batch_size=batch_size, device=device)
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


def operator(
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
    elif isinstance(memory_limit, bool | str) or not memory_limit >= 0:
        raise ValueError(f"memory_limit must be a number of bytes, at least 0, got {memory_limit!r}")

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
