"""Matvecs by compiled code: ``compile=True``.

The compiled function is the whole matvec of one batch with one vector, forward over reverse, as a function of
parameters, vector, batch and weights. It is compiled once for a batch size, for all operators of a loss function. A
ragged last batch is multiplied without it.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvpkit._utils.typing import Batch
from hvpkit.autodiff.exact import without_fused_encoder
from hvpkit.autodiff.pytree import Layout, batch_size
from hvpkit.curvature.batches import (
    BatchCurvature,
    Kind,
    Leaves,
    LinearMap,
    Problem,
    WeightedBatch,
    weighted_batches,
)
from hvpkit.errors import CompileWarning

MODE = "forward-over-reverse"
"""The mode that torch can compile."""

CompiledMatvec: TypeAlias = Callable[[Leaves, Leaves, Batch, "Tensor | None"], Leaves]
"""From leaves, a vector, a batch and its weights to the matvec with the batch's own mean, or weighted sum."""

_COMPILED: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
"""Compiled matvecs that an operator still uses. They hold their function, so that its id is its own."""


def compiled_kind(kind: Kind, problem: Problem) -> Kind | None:
    """Compile the matvecs of this kind for the size of the first batch; None, with a warning, if that fails.

    Matvecs with that batch, compiled and not, must agree to half of the dtype's digits.
    """
    function, layout, leaves = problem.loss_fn, problem.layout, problem.leaves
    if problem.data.whole:
        _warn("the batches of data are read whole, each of a form of its own")
        return None
    first = next(weighted_batches(problem.data.alone))
    matvec = _compiled_matvec(kind, function, layout)
    with torch.no_grad():
        by_example = function(problem.params, first.batch).ndim > 0
    # Uniform weights are given where they can be, so that those of samples do not make it compile again.
    uniform = leaves[0].new_full((first.size,), 1 / first.size) if by_example else None
    weights = uniform if first.weights is None else first.weights
    vector = [
        torch.sin(torch.arange(leaf.numel(), device="cpu").to(leaf) + 1).view(leaf.shape) for leaf in leaves
    ]
    try:
        found = matvec(leaves, vector, first.batch, weights)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch's own compilers, in many kinds
        _warn(
            f"torch could not compile the product ({type(error).__name__}: {str(error).splitlines()[0]:.200})"
        )
        return None
    expected = _matvec(kind, function, layout, leaves, vector, first.batch, weights)
    difference, norm = (
        torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree]).norm()
        for tree in ([a - b for a, b in zip(found, expected, strict=True)], expected)
    )
    if not float(difference) <= torch.finfo(vector[0].dtype).eps ** 0.5 * float(norm):
        _warn(f"the compiled product is off by {float(difference / norm):.0e}")
        return None
    return partial(_batch_curvature, kind, matvec, first.size, uniform)


def _warn(why: str) -> None:
    warnings.warn(f"compile=True: {why}; products are made without it", CompileWarning, stacklevel=5)


def _compiled_matvec(kind: Kind, function: Any, layout: Layout) -> CompiledMatvec:
    """Return the compiled matvec, the same one for all operators of a function: parameters are arguments."""
    key = (id(function), kind, layout.names, layout.shapes)
    found: CompiledMatvec | None = _COMPILED.get(key)
    if found is None:

        def matvec(leaves: Leaves, vector: Leaves, batch: Batch, weights: Tensor | None) -> Leaves:
            return _matvec(kind, function, layout, leaves, vector, batch, weights)

        # torch counts recompilations by code object, and gives up after eight: each function has its own.
        code = matvec.__code__.replace()
        own = types.FunctionType(code, matvec.__globals__, "matvec", None, matvec.__closure__)
        found = _COMPILED[key] = without_fused_encoder()(torch.compile(own, fullgraph=True, dynamic=False))
    return found


def _matvec(
    kind: Kind,
    function: Any,
    layout: Layout,
    leaves: Leaves,
    vector: Leaves,
    batch: Batch,
    weights: Tensor | None,
) -> Leaves:
    size = batch_size(batch)
    whole = WeightedBatch(batch, size, weights, num_examples=size)
    return kind(function, layout, leaves, whole).linearize(MODE)([vector])[0]


def _batch_curvature(
    kind: Kind,
    matvec: CompiledMatvec,
    size: int,
    uniform: Tensor | None,
    function: Any,
    layout: Layout,
    leaves: Leaves,
    batch: WeightedBatch,
    /,
) -> BatchCurvature:
    if batch.size != size:
        return kind(function, layout, leaves, batch)
    return CompiledBatch(matvec, leaves, batch, uniform)


@dataclass(frozen=True, eq=False)
class CompiledBatch:
    """The curvature of one batch by its compiled matvec.

    Attributes:
        matvec: compiled.
        leaves: the parameters.
        batch: of the size that it was compiled for.
        uniform: weights ``1 / B`` where the batch has none; None if the loss is a mean.
    """

    matvec: CompiledMatvec
    leaves: Leaves
    batch: WeightedBatch
    uniform: Tensor | None

    def linearize(self, mode: str) -> LinearMap:  # noqa: ARG002
        """Return the compiled matvec, whose mode is :data:`MODE`."""
        batch = self.batch
        weights, share = batch.weights, 1.0
        if weights is None:
            weights, share = self.uniform, batch.size / batch.num_examples

        def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:  # noqa: ARG001
            found = [self.matvec(self.leaves, list(vector), batch.batch, weights) for vector in vectors]
            return [[leaf * share for leaf in leaves] for leaves in found]

        return matvecs
