"""Generalised Gauss-Newton matrices: the curvature of a loss of outputs through the linearized network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.autodiff.cross_entropy import cross_entropy
from hvpkit.autodiff.forward_mode import jvp
from hvpkit.autodiff.overrides import FunctionOverrides
from hvpkit.autodiff.pytree import Layout, unflatten
from hvpkit.curvature.batches import (
    BatchHessian,
    Leaves,
    LinearMap,
    LossShare,
    WeightedBatch,
    annotated,
    central_difference,
)
from hvpkit.curvature.functional import batch_matvec, checked
from hvpkit.objective import Objective, normalized_in_batch


def ggnvp(
    objective: Objective, params: Tree, batch: Batch, v: Tree, *, mode: str = "forward-over-reverse"
) -> Tree:
    r"""Multiply the generalised Gauss-Newton matrix of the mean loss over one batch by a vector, :math:`J^\top H J v`.

    J is the Jacobian of the outputs ``objective.forward(p, batch)``, H the Hessian of their mean loss by
    ``objective.output_loss``. Neither is formed.

    Args:
        objective: a :class:`hvpkit.Objective`, as :func:`hvpkit.from_module` gives one.
        params: as in :func:`hvpkit.hvp`.
        batch: as in :func:`hvpkit.hvp`.
        v: as in :func:`hvpkit.hvp`.
        mode: how J v is made: ``"forward-over-reverse"``: forward; ``"reverse-over-reverse"``: as the
            derivative of :math:`J^\top u` by u; ``"finite-difference"``: by central differences of the
            outputs, and H by those of the loss's gradient. H is exact in the other two: by double backward.

    Returns:
        A tree shaped like ``params``. Nothing of the caller's is written to.

    Raises:
        TypeError: ``objective`` is no Objective, outputs that are no tree of real tensors; and as :func:`hvpkit.hvp`.
        ValueError: as :func:`hvpkit.hvp`.

    Cost:
        About 6 forward passes, and the loss of the outputs twice. In memory the activations of one backward pass and
        nine times the outputs: four, for cross entropy with class indices, where a training step takes three.

    Source:
        Schraudolph, Neural Computation 14 (2002) 1723-1738, doi:10.1162/08997660260028683.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: (batch @ p).exp(), lambda z, batch: z**2)
        >>> ggnvp(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.0]))
        tensor([2., 4.])
    """
    objective = check_objective(normalized_in_batch(check_objective(objective), batch))
    safe = replace(objective, forward=checked(objective.forward))
    return batch_matvec(ggn_of_batch, safe, params, batch, v, mode)


def check_objective(objective: object) -> Objective:
    """Return the objective; raise TypeError if it is no :class:`hvpkit.Objective`."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be a hvpkit.Objective, whose outputs and loss are known apart, got "
            f"{type(objective).__name__}; use hvpkit.from_module or hvpkit.Objective(forward, output_loss)"
        )
    return objective


LossAt: TypeAlias = Callable[[Tree, Batch], LossFn]
"""From the outputs of a batch to the loss of outputs whose Hessian is taken there."""


def ggn_of_batch(objective: Objective, layout: Layout, leaves: Leaves, batch: WeightedBatch, /) -> BatchGGN:
    """Return the generalised Gauss-Newton matrix of one batch's share of the mean loss."""
    return BatchGGN(objective.forward, lambda *_: objective.output_loss, layout, leaves, batch)


@dataclass(frozen=True, eq=False)
class BatchGGN:
    """The matrix J' H J of one batch: J of ``forward`` at ``leaves``, H of the loss at the outputs.

    Attributes:
        forward: ``forward(params, batch)``: the outputs.
        loss_at: from the outputs and the batch to the loss of outputs whose Hessian is H.
        layout: of the parameters.
        leaves: the parameters.
        batch: the examples.
        step: of finite differences: see :func:`hvpkit.curvature.batches.central_difference`.
    """

    forward: Callable[[Tree, Batch], Tree]
    loss_at: LossAt
    layout: Layout
    leaves: Leaves
    batch: WeightedBatch
    step: float | None = None

    def linearize(self, mode: str) -> LinearMap:
        """Return the matrix as a linear map; ``mode`` says how J is multiplied: see :func:`hvpkit.ggnvp`."""

        def outputs(leaves: Leaves) -> Tree:
            with self.batch.noting(leaves):
                return self.forward(unflatten(leaves, self.layout.spec), self.batch.batch)

        def share_at(outputs: Tree) -> Callable[[Tree], Tensor]:
            output_loss = self.loss_at(outputs, self.batch.batch)

            def share(tree: Tree) -> Tensor:
                with self.batch.noting(self.leaves):
                    losses = output_loss(tree, self.batch.batch)
                return self.batch.share_of_mean(losses)

            return share

        return annotated(
            "Gauss-Newton", mode, lambda: _linearize(outputs, share_at, self.leaves, mode, self.step)
        )


def _linearize(
    forward: Callable[[Leaves], Tree],
    loss_at: Callable[[Tree], Callable[[Tree], Tensor]],
    leaves: Leaves,
    mode: str,
    step: float | None,
) -> LinearMap:
    """Linearize ``forward`` at ``leaves`` once; the loss is differentiated in each matvec."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        tree, spec = _pytree.tree_flatten(forward(points))
    variable = _variable(tree)
    if not variable:
        return lambda vectors, *, retain_graph=False: [[torch.zeros_like(p) for p in leaves] for _ in vectors]  # noqa: ARG005
    constants: list[Any] = [None if i in variable else leaf for i, leaf in enumerate(tree)]
    outputs = [tree[i] for i in variable]
    edges = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]
    narrow = [output.dtype for output in outputs]  # narrower than the parameters under autocast
    wide = [torch.promote_types(dtype, leaves[0].dtype) for dtype in narrow]

    def outputs_at(leaves: Leaves) -> Leaves:
        found = _pytree.tree_leaves(forward(leaves))
        return [found[i] for i in variable]

    def rebuilt(outputs: Leaves) -> Tree:
        given = dict(zip(variable, outputs, strict=True))
        return unflatten([given.get(i, leaf) for i, leaf in enumerate(constants)], spec)

    def loss_near(outputs: Leaves) -> LossShare:
        loss = loss_at(rebuilt(outputs))
        return lambda outputs: loss(rebuilt(outputs))

    push_forward = _linearized_forward(outputs_at, leaves, points, outputs, mode, step)
    del tree, outputs  # forward mode computes them again, and two copies would be much
    loss: LossShare | None = None

    def matvec(vector: Leaves, retain_graph: bool) -> Leaves:
        nonlocal loss
        values, tangents = (_cast(found, wide) for found in push_forward(vector))
        loss = loss or loss_near(values)
        cotangents = loss_matvec(loss, values, tangents, mode, step)
        del values, tangents
        pulled = torch.autograd.grad(
            edges,
            points,
            _cast(cotangents, narrow),
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(pulled)

    def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
        return [
            matvec(vector, retain_graph or column + 1 < len(vectors)) for column, vector in enumerate(vectors)
        ]

    return matvecs


def _cast(leaves: Leaves, dtypes: list[torch.dtype]) -> Leaves:
    return [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]


def _variable(tree: list[object]) -> list[int]:
    """Return the indices of the leaves of the outputs that depend on the parameters."""
    for leaf in tree:
        if isinstance(leaf, Tensor) and leaf.is_complex() and leaf.requires_grad:
            raise TypeError(f"objective.forward gave outputs of dtype {leaf.dtype}; they must be real")
        if not isinstance(leaf, Tensor | int | float | str | None):
            raise TypeError(
                f"objective.forward must return a tree of tensors, got a {type(leaf).__name__} in it; "
                "return the tensors that output_loss needs"
            )
    return [i for i, leaf in enumerate(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _linearized_forward(
    outputs_at: Callable[[Leaves], Leaves],
    leaves: Leaves,
    points: Leaves,
    outputs: Leaves,
    mode: str,
    step: float | None,
) -> Callable[[Leaves], tuple[Leaves, Leaves]]:
    """Return the function from a vector v to the outputs and J v."""
    if mode == "forward-over-reverse":
        return partial(_push_forward, outputs_at, leaves)
    values = [output.detach() for output in outputs]
    if mode == "reverse-over-reverse":
        return _transposed_twice(points, outputs, values)

    def constant_outputs(leaves: Leaves) -> Leaves:
        with torch.enable_grad():  # by which constants are known, as padding
            return [o.detach() for o in outputs_at([leaf.detach().requires_grad_() for leaf in leaves])]

    return lambda vector: (values, central_difference(constant_outputs, leaves, vector, step))


def _push_forward(
    outputs_at: Callable[[Leaves], Leaves], leaves: Leaves, vector: Leaves
) -> tuple[Leaves, Leaves]:
    with torch.no_grad():
        values, tangents, *_ = jvp(outputs_at, (leaves,), (vector,))
    return values, tangents


def _transposed_twice(
    points: Leaves, outputs: Leaves, values: Leaves
) -> Callable[[Leaves], tuple[Leaves, Leaves]]:
    """Return J v as the derivative of J'u with respect to u, where J'u is linear in u: u may be zero."""
    dual = [value.new_zeros(()).expand_as(value).requires_grad_() for value in values]
    with torch.enable_grad():
        pulled = torch.autograd.grad(outputs, points, dual, create_graph=True, allow_unused=True)

    def push(vector: Leaves) -> tuple[Leaves, Leaves]:
        used = [(p, v) for p, v in zip(pulled, vector, strict=True) if p is not None]
        tangents = torch.autograd.grad(
            [p for p, _ in used],
            dual,
            [v for _, v in used],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return values, list(tangents)

    return push


def loss_matvec(
    loss: LossShare,
    values: Leaves,
    tangents: Leaves,
    mode: str = "reverse-over-reverse",
    step: float | None = None,
) -> Leaves:
    """Multiply the Hessian of a loss of outputs by tangents, in the full precision of the outputs' dtype."""
    if mode != "finite-difference":
        mode = "reverse-over-reverse"  # a loss of outputs is shallow: this needs the least memory
    lean = FunctionOverrides({F.cross_entropy: cross_entropy})
    with lean, torch.autocast(values[0].device.type, enabled=False):
        return BatchHessian(loss, values, step).linearize(mode)([tangents])[0]
