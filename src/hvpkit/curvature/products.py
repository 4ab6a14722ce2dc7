"""Losses, gradients and Hessian-vector products: pure functions on trees.

The mean over examples is written as a sum of one function for each batch, ``f_b(leaves)``, which holds
what the batch adds to the mean. Everything here is a sum over those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_choice, check_like
from hvpkit.autodiff.captured import checked_references
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.overrides import padding_held
from hvpkit.autodiff.pytree import Layout, batch_size, check_params, unflatten
from hvpkit.autodiff.randomness import check_repeatable
from hvpkit.data import Data, as_data, whole_batch
from hvpkit.errors import NonFiniteError
from hvpkit.objective import check_loss_fn

Leaves: TypeAlias = list[Tensor]
Part: TypeAlias = Callable[[Leaves], Tensor]
"""What one batch adds to the mean, as a function of the parameters' leaves."""


class Linear(Protocol):
    """What one batch adds to products with several vectors; ``again``: more will be asked for, of the same graph."""

    def __call__(self, vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]: ...


Term: TypeAlias = Callable[[str], Linear]
"""One batch, to be linearised at the point in a mode; this is the work that products can share."""

F = TypeVar("F", contravariant=True)
R = TypeVar("R")


class Terms(Protocol[F]):
    """A kind of curvature: what each batch adds to products, for a function of params and a batch."""

    def __call__(self, function: F, layout: Layout, leaves: Leaves, data: Data, /) -> Iterator[Term]: ...


MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def hvp(loss_fn: LossFn, params: Tree, batch: Batch, v: Tree, *, mode: str = "forward-over-reverse") -> Tree:
    r"""Hessian-vector product of the mean loss over one batch, :math:`\nabla^2 L(p)\, v`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors, the point.
        batch: tree of tensors with a common first dimension.
        v: tree shaped like ``params``, of its dtype and device. Its values are not looked at.
        mode: ``"forward-over-reverse"``: the directional derivative of the gradient;
            ``"reverse-over-reverse"``: the gradient of the gradient's inner product with ``v``, least
            memory; ``"finite-difference"``: central differences of the gradient with step
            :math:`\epsilon^{1/3} \max(1, \|p\|) / \|v\|`, about two thirds of the dtype's digits, where
            the others lack a derivative. Values that the loss detaches are constants in the others, and move
            with the parameters in differences.

    Returns:
        A tree shaped like ``params``. Nothing of the caller's is written to.

    Raises:
        TypeError: a leaf that is no floating tensor, a loss of integer dtype.
        ValueError: shapes, dtypes or devices that disagree; an unknown mode; a loss that is neither
            ``[B]`` nor 0-d, does not depend on ``params``, or draws other random numbers in each call.

    Cost:
        About 9 forward passes; 6 gradients' worth of them with finite differences.

    Source:
        Pearlmutter, Neural Computation 6 (1994) 147-160, doi:10.1162/neco.1994.6.1.147.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (batch * p["w"]).sum(-1) ** 2
        >>> params, batch = {"w": torch.ones(2)}, torch.tensor([[1.0, 2.0]])
        >>> hvp(loss_fn, params, batch, {"w": torch.tensor([1.0, 0.0])})
        {'w': tensor([2., 4.])}
    """
    return batch_product(hessian_terms, dependent(loss_fn), params, batch, v, mode)


def batch_product(terms: Terms[F], function: F, params: Tree, batch: Batch, v: Tree, mode: str) -> Tree:
    """The product of one batch's curvature with a tree, arguments checked: what :func:`hvp` is of the Hessian."""
    check_choice("mode", mode, MODES)
    layout, leaves = check_params(params, finite=False)
    direction = [check_like(leaf, leaves[0]) for leaf in layout.leaves(v)]
    with exact_derivatives(leaves[0].device):
        term = next(terms(function, layout, leaves, whole_batch(batch)))
        return unflatten(term(mode)([direction])[0], layout.spec)


def grad(loss_fn: LossFn, params: Tree, data: object) -> Tree:
    """Gradient of the mean loss over all examples, a tree shaped like ``params``.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.

    Raises:
        TypeError, ValueError: as :func:`hvp` and :func:`hvpkit.as_data`.
        NonFiniteError: the gradient is not finite; names the first batch at fault.

    Cost:
        One pass of 3 forward passes' work.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (p * batch).sum(-1)
        >>> grad(loss_fn, torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([2., 4.])
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    examples = as_data(data, device=leaves[0].device)

    def gradient(part: Part) -> Leaves:
        return part_gradient(part, leaves)

    with exact_derivatives(leaves[0].device):
        batches = parts(loss_fn, layout, examples)
        first = next(batches)

        def checked(points: Leaves) -> Tensor:
            value = check_repeatable(lambda: first(points), points[0].device)
            if not value.requires_grad:
                raise ValueError(INDEPENDENT)
            return value

        total = sum_parts(itertools.chain([checked], batches), gradient)
        if not all_finite(total):
            raise NonFiniteError(blame("gradient", parts(loss_fn, layout, examples), gradient))
        return unflatten(total, layout.spec)


def loss(loss_fn: LossFn, params: Tree, data: object) -> Tensor:
    """Mean loss over all examples, 0-d.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: tree of floating tensors.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.

    Raises:
        TypeError, ValueError: as :func:`hvp` and :func:`hvpkit.as_data`.
        NonFiniteError: the loss is not finite; names the first batch at fault.

    Cost:
        One forward pass over the data.

    Example:
        >>> import torch
        >>> loss(lambda p, batch: (p - batch) ** 2, torch.tensor(1.0), torch.tensor([0.0, 3.0]))
        tensor(2.5000)
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    examples = as_data(data, device=leaves[0].device)

    def value(part: Part) -> Leaves:
        return [part(leaves).detach()]

    with exact_derivatives(leaves[0].device):
        total = sum_parts(parts(loss_fn, layout, examples), value)
        if not all_finite(total):
            raise NonFiniteError(blame("loss", parts(loss_fn, layout, examples), value))
        return total[0]


def parts(loss_fn: LossFn, layout: Layout, data: Data) -> Iterator[Part]:
    """What each batch adds to the (weighted) mean over the data's examples."""
    for batch, weights in data.weighted():
        yield _part(loss_fn, layout, batch, weights, data.num_examples)


def _part(loss_fn: LossFn, layout: Layout, batch: Batch, weights: Tensor | None, num_examples: int) -> Part:
    size = batch_size(batch)

    def part(leaves: Leaves) -> Tensor:
        return share(loss_fn(unflatten(leaves, layout.spec), batch), size, weights, num_examples)

    return part


def share(losses: Tensor, size: int, weights: Tensor | None, num_examples: int) -> Tensor:
    """What the losses of a batch of ``size`` examples add to the mean."""
    check_losses(losses, size)
    if weights is None:
        return losses.mean() * (size / num_examples)  # a sum might overflow in half precision
    check_per_example(losses, size)
    return torch.dot(losses, weights.to(losses.dtype))


def check_per_example(losses: Tensor, size: int) -> None:
    """A ValueError if these are not the losses of examples but their mean."""
    if losses.ndim == 0:
        raise ValueError(
            "loss_fn returned a 0-d mean, which cannot be weighted by example; return one loss "
            f"for each example, shape [{size}]"
        )


def check_losses(losses: object, size: int) -> None:
    """A TypeError or ValueError if these are not the losses of ``size`` examples, or their mean."""
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


def check_loss(part: Part, leaves: Leaves) -> Tensor:
    """The part's value; a ValueError if no derivative by the leaves flows back from it."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = checked_references(
            part, points, lambda: check_repeatable(lambda: part(points), points[0].device)
        )
    # A loss that closes over a module has a graph too, but not one of the leaves.
    if not value.requires_grad or not any(
        slope is not None for slope in torch.autograd.grad(value, points, allow_unused=True)
    ):
        raise ValueError(INDEPENDENT)
    return value.detach()


def dependent(function: Callable[[Tree, Batch], R]) -> Callable[[Tree, Batch], R]:
    """The function of params and a batch, which raises a ValueError if its result is random or has no derivative."""

    def checked(params: Tree, batch: Batch) -> R:
        device = _pytree.tree_leaves(params)[0].device
        result = check_repeatable(lambda: function(params, batch), device)
        floating = [
            leaf
            for leaf in _pytree.tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if floating and torch.is_grad_enabled() and not any(leaf.requires_grad for leaf in floating):
            raise ValueError(INDEPENDENT)
        return result

    return checked


INDEPENDENT = (
    "loss_fn does not depend on params: no derivative flows back (does it close over the model's own parameters, "
    "detach, or run under no_grad?); compute the loss from its params argument, for a module with "
    "torch.func.functional_call or hvpkit.from_module"
)


# The derivatives of one part; each vector a list of leaves.


def part_gradient(part: Part, leaves: Leaves) -> Leaves:
    """Gradient of a part; zeros for leaves that it does not use."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = part(points)
        if not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        slopes = torch.autograd.grad(value, points, allow_unused=True)
    _check_dependent(slopes)
    return [torch.zeros_like(p) if s is None else s for p, s in zip(leaves, slopes, strict=True)]


def _check_dependent(slopes: Sequence[Tensor | None]) -> None:
    """A ValueError if a value with a derivative has none by any of the leaves: it is of other parameters."""
    if all(slope is None for slope in slopes):
        raise ValueError(INDEPENDENT)


def hessian_terms(loss_fn: LossFn, layout: Layout, leaves: Leaves, data: Data) -> Iterator[Term]:
    """What each batch adds to products with the Hessian at ``leaves``."""
    return (partial(linearise, part, leaves) for part in parts(loss_fn, layout, data))


def linearise(part: Part, leaves: Leaves, mode: str) -> Linear:
    """The Hessian of a part, to be multiplied with vectors."""
    return named("Hessian", mode, lambda: _HESSIANS[mode](part, leaves))


def named(what: str, mode: str, make: Callable[[], Linear]) -> Linear:
    """What ``make`` makes; torch's own errors, then and in products, say which other modes may do without."""
    with naming_modes(what, mode):
        linear = make()

    def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:
        with naming_modes(what, mode):
            return linear(vectors, again=again)

    return products


@contextmanager
def naming_modes(what: str, mode: str) -> Iterator[None]:
    """Adds to torch's own errors which other modes may do without what they are about."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        others = " or ".join(repr(other) for other in MODES if other != mode)
        error.add_note(f"hvpkit: in a {what} product with mode={mode!r}; mode={others} may do without")
        raise


def _forward_over_reverse(part: Part, leaves: Leaves) -> Linear:
    # The order matters: jvp(grad) is exact where jvp(jacrev) and grad(jvp) are wrong through LayerNorm.
    gradient = torch.func.grad(part)

    def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:  # noqa: ARG001
        with torch.no_grad():  # nothing is recorded for what loss_fn closes over
            return [list(torch.func.jvp(gradient, (leaves,), (vector,))[1]) for vector in vectors]

    return products


def _reverse_over_reverse(part: Part, leaves: Leaves) -> Linear:
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in leaves]
        value = part(points)
        slopes: Sequence[Tensor | None] = ()
        if value.requires_grad:
            slopes = torch.autograd.grad(value, points, create_graph=True, allow_unused=True)
            _check_dependent(slopes)
    # The ends of the graph, and not the slopes: a graph that is kept would hold a gradient for each batch.
    ends = {
        i: torch.autograd.graph.get_gradient_edge(slope)
        for i, slope in enumerate(slopes)
        if slope is not None and slope.requires_grad
    }
    del value, slopes

    def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:
        if not ends:  # the loss is linear in the parameters
            return [[torch.zeros_like(leaf) for leaf in leaves] for _ in vectors]
        return [
            list(
                torch.autograd.grad(
                    list(ends.values()),
                    points,
                    [vector[i] for i in ends],
                    retain_graph=again or column + 1 < len(vectors),
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for column, vector in enumerate(vectors)
        ]

    return products


def _finite_difference(part: Part, leaves: Leaves) -> Linear:
    gradient = partial(part_gradient, part)

    def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:  # noqa: ARG001
        return [central_difference(gradient, leaves, vector) for vector in vectors]

    return products


def central_difference(function: Callable[[Leaves], Leaves], leaves: Leaves, vector: Leaves) -> Leaves:
    """Derivative of ``function`` along ``vector``, to about two thirds of the dtype's digits."""
    length = _tree_norm(vector)
    size = _tree_norm(leaves).clamp(min=1.0)
    step = torch.finfo(leaves[0].dtype).eps ** (1 / 3) * size
    # A zero vector has no direction: divide by one instead, and the difference is zero.
    step = step / torch.where(length > 0, length, torch.ones_like(length))
    moved = [[p + h * d for p, d in zip(leaves, vector, strict=True)] for h in (step, -step)]
    with padding_held([*moved[0], *moved[1]], [*leaves, *leaves]):
        ahead, behind = map(function, moved)
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def _tree_norm(leaves: Leaves) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


_HESSIANS: dict[str, Callable[[Part, Leaves], Linear]] = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
    "finite-difference": _finite_difference,
}


# Sums over parts.


def sum_parts(terms: Iterator[R], term: Callable[[R], Leaves]) -> Leaves:
    """Sum of ``term(part)`` over the parts, leaf by leaf."""
    total: Leaves = []
    for part in terms:
        leaves = term(part)
        if not total:
            total = [leaf.detach().clone() for leaf in leaves]
        else:
            for accumulated, leaf in zip(total, leaves, strict=True):
                accumulated += leaf.detach()
    return total


def all_finite(leaves: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite; waits for the device."""
    return bool(torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all())


def blame(what: str, terms: Iterator[R], term: Callable[[R], Leaves]) -> str:
    """Which batch first gives a value that is not finite, found by another pass."""
    for index, part in enumerate(terms):
        if not all_finite(term(part)):
            return (
                f"the {what} is not finite (NaN or infinity), first from batch {index} of the data (counted "
                "from 0); look there for such inputs, a logarithm or square root at 0, or an overflow"
            )
    return (
        f"the {what} is not finite (NaN or infinity), though no batch alone is, as an overflow of their sum"
    )
