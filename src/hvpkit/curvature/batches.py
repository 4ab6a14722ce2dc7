"""One batch's share of the mean over the data: its loss, its gradient and its linearized Hessian.

The mean over examples is the sum of one function for each batch, ``f_b(leaves)``: the batch's share of the mean.
Every curvature matrix of the package is a sum over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit.autodiff.captured import evaluate_unchanged, warn_captured
from hvpkit.autodiff.forward_mode import jvp
from hvpkit.autodiff.overrides import fixed_padding
from hvpkit.autodiff.pytree import Layout, unflatten, versions
from hvpkit.autodiff.randomness import check_repeatable
from hvpkit.curvature.sharded_parameters import Shards
from hvpkit.data import Data, describe

Leaves: TypeAlias = list[Tensor]
"""Parameters, or a vector, as a list of tensors."""

LossShare: TypeAlias = Callable[[Leaves], Tensor]
"""One batch's share of the mean loss, as a function of the parameters."""

T = TypeVar("T")

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")

LOSS_FAILED = "hvpkit: loss_fn failed on batch"
"""The beginning of the note on an error of the loss itself."""

INDEPENDENT = (
    "loss_fn does not depend on params: no derivative flows back (does it close over the model's own parameters, "
    "detach, or run under no_grad?); compute the loss from its params argument, for a module with "
    "torch.func.functional_call or hvpkit.from_module"
)


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """A loss over data at fixed parameters.

    Attributes:
        loss_fn: function of the chosen parameters and a batch; other parameters are constants in it.
        layout: of the chosen parameters.
        leaves: their values, a copy.
        data: the examples.
        shards: how the ranks hold parameters and vectors, of which ``layout`` and ``leaves`` are this rank's parts;
            None: each has all of them.
    """

    loss_fn: LossFn
    layout: Layout
    leaves: Leaves
    data: Data
    shards: Shards | None = None

    @property
    def params(self) -> Tree:
        """The parameters as a tree."""
        return unflatten(self.leaves, self.layout.spec)

    @property
    def n(self) -> int:
        """How many parameters there are, on all ranks."""
        return (self.layout if self.shards is None else self.shards.layout).n

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.leaves[0].device

    def over(self, data: Data) -> Problem:
        """Return the same loss at the same parameters over other data."""
        return replace(self, data=data)


@dataclass(frozen=True, eq=False, repr=False)
class WeightedBatch:
    """One batch, and how it enters the mean over all examples.

    Attributes:
        batch: tree of tensors with a common first dimension, or anything that is read whole.
        size: number of examples in the batch.
        weights: one for each example ``[size]``; 0-d: of the batch's mean loss; None: ``1 / num_examples`` each.
        num_examples: examples of all the data.
        number: batches before this one.
        start: examples of all batches before this one.
    """

    batch: Batch
    size: int
    weights: Tensor | None
    num_examples: int
    number: int = 0
    start: int = 0

    def share_of_mean(self, losses: Tensor) -> Tensor:
        """Return the contribution of this batch's losses to the mean, 0-d."""
        size = self.size
        check_losses(losses, size)
        if self.weights is None:
            return losses.mean() * (size / self.num_examples)  # a sum might overflow in half precision
        weights = self.weights.to(losses.dtype)
        if weights.ndim == 0:
            return losses.mean() * weights
        if losses.ndim == 0 and bool((weights == weights[0]).all()):
            return losses * (size * weights[0])
        check_per_example(losses, size)
        return torch.dot(losses, weights)

    def loss_share(self, loss_fn: LossFn, layout: Layout) -> LossShare:
        """Return this batch's share of the mean loss as a function of the parameters' leaves."""

        def share(leaves: Leaves) -> Tensor:
            with self.noting(leaves):
                losses = loss_fn(unflatten(leaves, layout.spec), self.batch)
            return self.share_of_mean(losses)

        return share

    @contextmanager
    def noting(self, leaves: Leaves) -> Iterator[None]:
        """Add a note to errors of the loss: which batch it is of, and what that holds.

        Raises:
            ValueError: the loss wrote to the batch: another call would see other data.
        """
        before = versions(self.batch)
        try:
            yield
        except Exception as error:
            last = self.start + self.size - 1
            error.add_note(
                f"{LOSS_FAILED} {self.number} of data (counted from 0), examples {self.start} to "
                f"{last}: {describe(self.batch, leaves[0].dtype, self.start)}"
            )
            raise
        if versions(self.batch) != before:
            raise ValueError(
                f"loss_fn writes to its batch in place ({describe(self.batch, leaves[0].dtype, self.start)}), as "
                "x.sub_(mean) does, or a first layer with inplace=True, so that the next call sees other data: let it "
                "work on a copy, as x.clone()"
            )


def weighted_batches(data: Data) -> Generator[WeightedBatch, None, None]:
    """Iterate over the batches of the data, or this rank's share of them, with their place in the mean."""
    for batch, size, weights, number, start in data.even_share():
        yield WeightedBatch(batch, size, weights, data.num_examples, number, start)


def batches_in_step(data: Data, ranks: Ranks) -> Iterator[WeightedBatch]:
    """Iterate over this rank's batches, as many as of any rank: a rank without one more takes one with weight zero."""
    batches, spare = weighted_batches(data), None
    while True:
        batch = next(batches, None)
        if not ranks.any(batch is not None):
            return
        spare = batch or spare or next(weighted_batches(data.first()))
        yield batch or replace(spare, weights=torch.zeros((), device=data.device))


def batch_curvatures(kind: Kind, problem: Problem, data: Data | None = None) -> Iterator[BatchCurvature]:
    """Iterate over the batches' curvature matrices of this kind; their sum is the matrix over all examples."""
    if problem.shards is not None and data is None:
        batches: Iterator[WeightedBatch] = batches_in_step(problem.data, problem.shards.ranks)
    else:
        batches = weighted_batches(problem.data if data is None else data)
    return (kind(problem.loss_fn, problem.layout, problem.leaves, batch) for batch in batches)


def loss_shares(loss_fn: LossFn, layout: Layout, data: Data) -> Iterator[LossShare]:
    """Iterate over the batches' shares of the mean loss; their sum is the mean over all examples."""
    return (batch.loss_share(loss_fn, layout) for batch in weighted_batches(data))


# Validation of losses.


def check_per_example(losses: Tensor, size: int) -> None:
    """Raise ValueError if ``losses`` is a mean and not one loss for each example."""
    if losses.ndim == 0:
        raise ValueError(
            "loss_fn returned a 0-d mean, which cannot be weighted by example; return one loss "
            f"for each example, shape [{size}]"
        )


def check_losses(losses: object, size: int) -> None:
    """Raise TypeError or ValueError unless ``losses`` holds the losses of ``size`` examples, or their mean."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(losses).__name__}")
    if not losses.dtype.is_floating_point:
        raise TypeError(
            f"loss_fn returned dtype {losses.dtype}; a loss must be real floating point to have a derivative"
        )
    if losses.ndim and losses.shape != (size,):
        hint = "squeeze it" if losses.shape == (size, 1) else "reduce it over all but the first dimension"
        raise ValueError(
            f"loss_fn returned shape {list(losses.shape)} for a batch of {size} examples; expected one loss "
            f"for each, [{size}], or their mean as a 0-d tensor: {hint}"
        )


def check_loss(share: LossShare, leaves: Leaves) -> Tensor:
    """Return the share's value. Raise ValueError if the loss is random or does not depend on the leaves."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = evaluate_unchanged(share, lambda: check_repeatable(lambda: share(points), points[0].device))
    # A loss that closes over a module has a graph too, but not one of the leaves.
    if not value.requires_grad:
        raise ValueError(INDEPENDENT)
    _check_dependent(torch.autograd.grad(value, points, allow_unused=True))
    warn_captured(share, value, points)
    return value.detach()


def _check_dependent(gradients: Sequence[Tensor | None]) -> None:
    """Raise ValueError if the loss does not depend on ``params``."""
    if all(gradient is None for gradient in gradients):
        raise ValueError(INDEPENDENT)


# Linearization.


class LinearMap(Protocol):
    """The matrix of one batch, times several vectors. ``retain_graph``: it will be called again."""

    def __call__(self, vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]: ...


class BatchCurvature(Protocol):
    """The curvature matrix of one batch's share of the mean at fixed parameters."""

    def linearize(self, mode: str) -> LinearMap:
        """Return the matrix as a linear map; matvecs share this work."""
        ...


class Kind(Protocol):
    """A kind of curvature: the matrix of one batch, of a function at the parameters ``leaves``."""

    def __call__(
        self, function: Any, layout: Layout, leaves: Leaves, batch: WeightedBatch, /
    ) -> BatchCurvature: ...


@dataclass(frozen=True, eq=False)
class BatchHessian:
    """The Hessian of a function of leaves, such as a batch's share of the mean loss.

    Attributes:
        function: the function.
        leaves: the point.
        step: of finite differences: see :func:`central_difference`.
    """

    function: LossShare
    leaves: Leaves
    step: float | None = None

    def linearize(self, mode: str) -> LinearMap:
        """Return the Hessian as a linear map, by one of :data:`MODES`."""
        linearization = _EXACT.get(mode) or partial(_finite_difference, step=self.step)
        return annotated("Hessian", mode, lambda: linearization(self.function, self.leaves))


def hessian_of_batch(
    loss_fn: LossFn, layout: Layout, leaves: Leaves, batch: WeightedBatch, /
) -> BatchHessian:
    """Return the Hessian of one batch's share of the mean loss."""
    return BatchHessian(batch.loss_share(loss_fn, layout), leaves)


def annotated(matrix: str, mode: str, linearize: Callable[[], LinearMap]) -> LinearMap:
    """Linearize; torch's own errors, now and in matvecs, get a note that names the other modes."""
    with _naming_modes(matrix, mode):
        linear = linearize()

    def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
        with _naming_modes(matrix, mode):
            return linear(vectors, retain_graph=retain_graph)

    return matvecs


@contextmanager
def _naming_modes(matrix: str, mode: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "modified by an inplace operation" in str(error):
            error.add_note(
                "hvpkit: data, or what the loss closes over, has been written to since a graph of it was kept: make "
                "another operator of what it is now"
            )
            raise
        failed = any(note.startswith(LOSS_FAILED) for note in getattr(error, "__notes__", ()))
        if failed and mode != "forward-over-reverse":
            raise  # in a plain forward pass, as of all modes
        others = " or ".join(repr(other) for other in MODES if other != mode)
        error.add_note(f"hvpkit: in a {matrix} product with mode={mode!r}; mode={others} may do without")
        raise


def gradient_of(function: LossShare, leaves: Leaves) -> Leaves:
    """Return the gradient of a function of leaves; zeros for leaves that it does not use."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = function(points)
        if not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        gradients = torch.autograd.grad(value, points, allow_unused=True)
    _check_dependent(gradients)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]


def _forward_over_reverse(function: LossShare, leaves: Leaves) -> LinearMap:
    # The order matters: jvp(grad) is exact where jvp(jacrev) and grad(jvp) are wrong through LayerNorm.
    gradient = torch.func.grad(function)

    def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:  # noqa: ARG001
        with torch.no_grad():  # nothing is recorded for what loss_fn closes over
            return [list(jvp(gradient, (leaves,), (vector,))[1]) for vector in vectors]

    return matvecs


def gradient_graph(
    function: LossShare, leaves: Leaves
) -> tuple[Leaves, dict[int, torch.autograd.graph.GradientEdge]]:
    """Return the points of a function's gradient, and the edges of its graph by leaf; of leaves with a derivative."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = function(points)
        gradients: Sequence[Tensor | None] = ()
        if value.requires_grad:
            gradients = torch.autograd.grad(value, points, create_graph=True, allow_unused=True)
            _check_dependent(gradients)
    # Edges of the graph, and not the gradients: a graph that is kept would hold one gradient for each batch.
    return points, {
        i: torch.autograd.graph.get_gradient_edge(gradient)
        for i, gradient in enumerate(gradients)
        if gradient is not None and gradient.requires_grad
    }


def _reverse_over_reverse(function: LossShare, leaves: Leaves) -> LinearMap:
    points, edges = gradient_graph(function, leaves)

    def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
        if not edges:  # the loss is linear in the parameters
            return [[torch.zeros_like(leaf) for leaf in leaves] for _ in vectors]
        return [
            list(
                torch.autograd.grad(
                    list(edges.values()),
                    points,
                    [vector[i] for i in edges],
                    retain_graph=retain_graph or column + 1 < len(vectors),
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for column, vector in enumerate(vectors)
        ]

    return matvecs


def _finite_difference(function: LossShare, leaves: Leaves, step: float | None) -> LinearMap:
    gradient = partial(gradient_of, function)

    def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:  # noqa: ARG001
        return [central_difference(gradient, leaves, vector, step) for vector in vectors]

    return matvecs


_EXACT: dict[str, Callable[[LossShare, Leaves], LinearMap]] = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
}


def central_difference(
    function: Callable[[Leaves], Leaves], leaves: Leaves, vector: Leaves, step: float | None = None
) -> Leaves:
    """Return the derivative of ``function`` along ``vector``, to about two thirds of the dtype's digits.

    ``step`` is the distance moved to each side, in units of the larger of one and the norm of ``leaves``; by default
    eps^(1/3), of fewest errors for a smooth function.
    """
    norm = _norm(vector)
    size = _norm(leaves).clamp(min=1.0)
    relative = torch.finfo(leaves[0].dtype).eps ** (1 / 3) if step is None else step
    # A zero vector has no direction: divide by one instead, and the difference is zero.
    h = relative * size / torch.where(norm > 0, norm, torch.ones_like(norm))
    moved = [[p + s * d for p, d in zip(leaves, vector, strict=True)] for s in (h, -h)]
    with fixed_padding([*moved[0], *moved[1]], [*leaves, *leaves]):
        ahead, behind = map(function, moved)
    return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]


def _norm(leaves: Leaves) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total
