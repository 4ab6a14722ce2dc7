"""Curvature of a loss over data: constructors of one operator class."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hvpkit._typing import LossFn, Tree
from hvpkit.data import Data, as_data
from hvpkit.errors import NonFiniteError, check_choice, check_count
from hvpkit.objective import check_batches
from hvpkit.operators import LinearOperator
from hvpkit.probes import generator, resolve_seed
from hvpkit.products import (
    MODES,
    Leaves,
    Part,
    all_finite,
    blame,
    check_loss,
    exact_derivatives,
    part_products,
    parts,
    sum_parts,
)
from hvpkit.trees import Layout, check_params, flatten, join, snapshot, unflatten

Selection = str | Sequence[str] | Callable[[str], bool] | None
"""Globs over dotted parameter names, or a predicate of a name; None: all."""


def hessian(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | None = None,
    mode: str = "auto",
    progress: bool = False,
) -> LinearOperator:
    r"""The Hessian of the mean loss over all examples, :math:`H = \frac1N \sum_i \nabla^2 \ell_i(p)`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors of one dtype and device, the point.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        wrt: glob or globs over dotted parameter names, or a predicate of a name: the block of the Hessian
            that belongs to those parameters, the others held constant.
        batch_size: the most examples put through at once; memory grows with it, the product does not
            change beyond rounding. By default the loader's own, else 256.
        mode: how a product is made: one of :func:`hvpkit.hvp`, or ``"auto"``: reverse over reverse on a
            CPU, where it is the faster one, forward over reverse elsewhere. ``H.mode`` says which.
        progress: show a bar over the batches of each product.

    Returns:
        A symmetric :class:`hvpkit.LinearOperator`; trees for ``@`` are shaped like ``params``, a dict of the
        chosen ones by dotted name where ``wrt`` is given.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.hvp` and :func:`hvpkit.as_data`; ``wrt`` matches nothing; a
            last batch of one example under ``batchnorm="batch"``.
        NonFiniteError: the loss of the first batch is not finite.

    Cost:
        One forward pass of the first batch now; a product is a pass over the data at about 9 forward
        passes' work. ``[n, k]`` products read the data once, and share the forward and the first backward
        pass in the mode ``"reverse-over-reverse"``.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
        >>> H = hessian(loss_fn, torch.zeros(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> H @ torch.ones(2)
        tensor([2., 8.])
    """
    check_choice("mode", mode, ("auto", *MODES))
    function, params = _restrict(loss_fn, params, wrt)
    layout, leaves = check_params(params)
    leaves = [snapshot(leaf) for leaf in leaves]  # the point stays, whatever training does to params
    device = leaves[0].device
    examples = as_data(data, batch_size=batch_size, device=device)
    check_batches(loss_fn, examples)
    if mode == "auto":
        mode = "reverse-over-reverse" if device.type == "cpu" else "forward-over-reverse"
    with exact_derivatives(device):
        first = check_loss(next(parts(function, layout, examples)), leaves)
        if not all_finite([first]):
            raise NonFiniteError("loss_fn gave NaN or infinity on batch 0 of data (counted from 0)")

    return _hessian_over(examples, function, layout, leaves, mode, progress)


def _hessian_over(
    examples: Data,
    loss_fn: LossFn,
    layout: Layout,
    leaves: Leaves,
    mode: str,
    progress: bool,
    cost: float = 1.0,
) -> LinearOperator:
    """The Hessian of the mean over ``examples``, whose products cost ``cost`` full-data products."""
    device = leaves[0].device

    def terms() -> Iterator[Part]:
        batches = parts(loss_fn, layout, examples)
        return _with_bar(batches) if progress else batches

    def product(vectors: Tensor) -> Tensor:
        columns = [layout.split(vector) for vector in vectors.mT.contiguous()]

        def term(part: Part) -> Leaves:
            return [join(column) for column in part_products(part, leaves, columns, mode)]

        with exact_derivatives(device):
            return torch.stack(sum_parts(terms(), term), dim=1)

    def explain(vector: Tensor) -> str:
        def term(part: Part) -> Leaves:
            return part_products(part, leaves, [layout.split(vector)], mode)[0]

        with exact_derivatives(device):
            return blame("Hessian product", parts(loss_fn, layout, examples), term)

    def sample(num_examples: int, seed: int) -> LinearOperator:
        chosen = _subset(examples, num_examples, seed)
        share = cost * num_examples / examples.num_examples
        return _hessian_over(chosen, loss_fn, layout, leaves, mode, progress, share)

    return LinearOperator(
        product,
        layout.n,
        leaves[0].dtype,
        device,
        name="Hessian",
        layout=layout,
        num_examples=examples.num_examples,
        cost=cost,
        mode=mode,
        explain=explain,
        sample=sample,
    )


def _subset(examples: Data, num_examples: int, seed: int) -> Data:
    """A uniform random subset without replacement, whose mean is unbiased for that of all examples."""
    total = examples.num_examples
    check_count("num_examples", num_examples, 1, total)
    chosen = torch.randperm(total, generator=generator(resolve_seed(seed)))[:num_examples]
    weights = examples.weights
    if weights is not None:
        weights = weights[chosen.to(weights.device)] * (total / num_examples)
    return examples.subset(chosen, weights)


def _restrict(loss_fn: LossFn, params: Tree, wrt: Selection) -> tuple[LossFn, Tree]:
    """The loss as a function of the chosen parameters, a dict by name; the others are constants."""
    if wrt is None:
        return loss_fn, params
    leaves, spec = flatten(params)
    names = Layout.of(params).names
    chosen = _matcher(wrt)
    selected = {name: leaf for name, leaf in zip(names, leaves, strict=True) if chosen(name)}
    if not selected:
        raise ValueError(f"wrt={wrt!r} matches no parameter; their names: {', '.join(names)}")
    constants = [snapshot(leaf) for leaf in leaves]

    def restricted(variables: dict[str, Tensor], batch: object) -> Tensor:
        whole = [variables.get(name, leaf) for name, leaf in zip(names, constants, strict=True)]
        return loss_fn(unflatten(whole, spec), batch)

    return restricted, selected


def _matcher(wrt: Selection) -> Callable[[str], bool]:
    if callable(wrt):
        return wrt
    globs = [wrt] if isinstance(wrt, str) else list(wrt or ())
    return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _with_bar(batches: Iterator[Part]) -> Iterator[Part]:
    from tqdm.auto import tqdm

    yield from tqdm(batches, desc="product", unit="batch", leave=False)
