"""Products by compiled code: ``compile=True``.

What is compiled is the whole product of one batch with one vector, forward over reverse, as a function of parameters,
vector, batch and weights: once for a batch size, for all operators of a loss function. A ragged last batch is
multiplied without.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.pytree import Layout, batch_size, unflatten
from hvpkit.curvature.products import Leaves, Linear, Term, Terms
from hvpkit.data import Data
from hvpkit.errors import CompileWarning

MODE = "forward-over-reverse"
"""The mode that torch can compile."""

Step: TypeAlias = Callable[[Leaves, Leaves, Batch, "Tensor | None"], Leaves]
"""From leaves, a vector, a batch and its weights to the product."""

_STEPS: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
"""Compiled products that an operator still uses. They hold their function, so that its id is its own."""


@dataclass(frozen=True)
class _OneBatch:
    """Of :class:`hvpkit.data.Data`, what terms read."""

    batch: Batch
    weights: Tensor | None
    num_examples: int

    def weighted(self) -> Iterator[tuple[Batch, Tensor | None]]:
        yield self.batch, self.weights


def compiled_terms(
    terms: Terms[Any], function: Any, layout: Layout, leaves: Leaves, data: Data
) -> Terms[Any] | None:
    """Terms whose products are compiled for the size of the first batch; None, with a warning, if they cannot be.

    Products of that batch, compiled and not, must agree to half of the dtype's digits.
    """
    batch, weights = next(data.weighted())
    step, size = _step(terms, function, layout), batch_size(batch)
    with torch.no_grad():
        by_example = function(unflatten(leaves, layout.spec), batch).ndim > 0
    # Uniform weights are given where they can be, so that those of samples do not make it compile again.
    uniform = leaves[0].new_full((size,), 1 / size) if by_example else None
    weights = uniform if weights is None else weights
    vector = [torch.sin(torch.arange(leaf.numel()).to(leaf) + 1).view(leaf.shape) for leaf in leaves]
    try:
        found = step(leaves, vector, batch, weights)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch's own compilers, in many kinds
        _warn(
            f"torch could not compile the product ({type(error).__name__}: {str(error).splitlines()[0]:.200})"
        )
        return None
    expected = _product(terms, function, layout, leaves, vector, batch, weights)
    difference, length = (
        torch.stack([torch.linalg.vector_norm(leaf) for leaf in norms]).norm()
        for norms in ([a - b for a, b in zip(found, expected, strict=True)], expected)
    )
    if not float(difference) <= torch.finfo(vector[0].dtype).eps ** 0.5 * float(length):
        _warn(f"the compiled product is off by {float(difference / length):.0e}")
        return None
    return partial(_terms, terms, step, size, uniform)


def _warn(why: str) -> None:
    warnings.warn(f"compile=True: {why}; products are made without it", CompileWarning, stacklevel=5)


def _step(terms: Terms[Any], function: Any, layout: Layout) -> Step:
    """The compiled product, the same one for all operators of a function: parameters are arguments."""
    key = (id(function), terms, layout.names, layout.shapes)
    found: Step | None = _STEPS.get(key)
    if found is None:

        def step(leaves: Leaves, vector: Leaves, batch: Batch, weights: Tensor | None) -> Leaves:
            return _product(terms, function, layout, leaves, vector, batch, weights)

        # torch counts recompilations by code object, and gives up after eight: each function has its own.
        code = step.__code__.replace()
        own = types.FunctionType(code, step.__globals__, "step", None, step.__closure__)
        found = _STEPS[key] = torch.compile(own, fullgraph=True, dynamic=False)
    return found


def _product(
    terms: Terms[Any],
    function: Any,
    layout: Layout,
    leaves: Leaves,
    vector: Leaves,
    batch: Batch,
    weights: Tensor | None,
) -> Leaves:
    """The product of the batch's own mean, or weighted sum."""
    data: Any = _OneBatch(batch, weights, batch_size(batch))
    return next(iter(terms(function, layout, leaves, data)))(MODE)([vector])[0]


def _terms(
    terms: Terms[Any],
    step: Step,
    size: int,
    uniform: Tensor | None,
    function: Any,
    layout: Layout,
    leaves: Leaves,
    data: Data,
) -> Iterator[Term]:
    for batch, weights in data.weighted():
        if batch_size(batch) != size:
            one: Any = _OneBatch(batch, weights, data.num_examples)
            yield next(iter(terms(function, layout, leaves, one)))
        else:
            share = 1.0 if weights is not None else size / data.num_examples
            yield partial(_compiled_term, step, leaves, batch, uniform if weights is None else weights, share)


def _compiled_term(
    step: Step, leaves: Leaves, batch: Batch, weights: Tensor | None, share: float, _mode: str
) -> Linear:
    def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:  # noqa: ARG001
        return [[leaf * share for leaf in step(leaves, list(vector), batch, weights)] for vector in vectors]

    return products
