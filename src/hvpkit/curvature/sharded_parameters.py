"""Parameters of which each rank holds a part, whole on a rank only inside of the functions that use them.

A rank holds the same consecutive entries of the parameters as of all vectors (:class:`hvpkit.operators.space.Space`),
so that matvecs take and give parts as they are. A loss gets :class:`ShardedParameter` objects. Each function of torch
that one enters runs as a :class:`Unit`: parameters are sent to all ranks, the function runs, and they are freed. Its
derivative is a unit again, which computes the function anew, takes parameters and the vector in parts, and sums each
gradient over the ranks as soon as it is known. So no graph holds more than a layer's worth of whole parameters,
vectors or images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import Tree
from hvpkit.autodiff.overrides import OVERRIDES
from hvpkit.autodiff.pytree import Layout, ParamSpec, flatten, unflatten
from hvpkit.operators.space import Space

Leaves = list[Tensor]


@dataclass(frozen=True, eq=False)
class Shards:
    """How the ranks hold parameters, and vectors, of a layout.

    Attributes:
        ranks: that hold them.
        layout: of the whole parameters.
    """

    ranks: Ranks
    layout: Layout

    @property
    def space(self) -> Space:
        """The vectors in parts."""
        return Space(self.ranks, sharded=True)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.layout.numels)]

    def own(self, index: int, rank: int | None = None) -> slice:
        """Return the entries of a parameter that a rank holds, this one by default."""
        return self._held(self._starts[index], self._starts[index + 1], rank)

    def _held(self, begin: int, end: int, rank: int | None) -> slice:
        """Return which of the entries from ``begin`` to ``end`` of a vector a rank holds, counted from ``begin``."""
        held = self.space.part(self.layout.n, rank)
        return slice(*(min(max(bound, begin), end) - begin for bound in (held.start, held.stop)))

    @property
    def parts(self) -> Layout:
        """The layout of this rank's parts: a flat tensor for each parameter, which may be empty."""
        spec, names = self.layout.spec, self.layout.names
        sizes = [range(numel)[self.own(index)] for index, numel in enumerate(self.layout.numels)]
        real = ParamSpec(spec.tree, (False,) * len(names))
        return Layout(real, names, tuple(torch.Size([len(size)]) for size in sizes))

    def tree(self, parts: Tree) -> Tree:
        """Return the tree of parameters of which a tree holds this rank's parts."""
        given = enumerate(flatten(parts)[0])
        parameters = [_Present.apply(self, index, part) for index, part in given]  # type: ignore[no-untyped-call]
        return unflatten(parameters, self.layout.spec)

    def gather(self, tensors: Sequence[Tensor], indices: Sequence[int | None]) -> Leaves:
        """Return the tensors, whole where they are this rank's part of the parameter of an index."""
        self._meet("gathered", indices)
        found = list(tensors)
        for run in _runs(indices):
            (first, start), (_, last) = run[0], run[-1]
            begin, end = self._starts[start], self._starts[last + 1]
            flat = tensors[first].new_empty(end - begin)
            whole = flat.split(self.layout.numels[start : last + 1])
            for (place, index), one in zip(run, whole, strict=True):
                one[self.own(index)] = tensors[place]
                found[place] = one.view(self.layout.shapes[index])
            for rank in range(self.ranks.size):
                if len(piece := flat[self._held(begin, end, rank)]):
                    self.ranks.send(piece, rank)
        return found

    def scatter(self, tensors: Sequence[Tensor], indices: Sequence[int | None]) -> Leaves:
        """Return the tensors; of a gradient by a parameter, this rank's part of the sum of all ranks'."""
        self._meet("summed", indices)
        found, gradients = list(tensors), list(_given(indices))
        for rank in range(self.ranks.size):
            pieces = [tensors[place].reshape(-1)[self.own(index, rank)] for place, index in gradients]
            total = torch.cat(pieces) if pieces else torch.empty(0, device="cpu")
            if len(total):
                self.ranks.sum_on(total, rank)
            if rank == self.ranks.rank:
                parts = total.split([len(piece) for piece in pieces])
                for (place, _), part in zip(gradients, parts, strict=True):
                    found[place] = part
        return found

    def _meet(self, what: str, indices: Sequence[int | None]) -> None:
        names = [self.layout.names[index] for _, index in _given(indices)]
        if names:
            self.ranks.meet(f"the parameters {', '.join(names)}, which are {what} in its loss")


def _same(tensors: Leaves) -> Leaves:
    return tensors


def _given(indices: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    return ((place, index) for place, index in enumerate(indices) if index is not None)


def _runs(indices: Sequence[int | None]) -> list[list[tuple[int, int]]]:
    """Return places and parameters, those together that follow each other in the vector, as weight and bias do."""
    runs: list[list[tuple[int, int]]] = []
    for place, index in sorted(_given(indices), key=lambda pair: pair[1]):
        if runs and runs[-1][-1][1] + 1 == index:
            runs[-1].append((place, index))
        else:
            runs.append([(place, index)])
    return runs


@dataclass(frozen=True, eq=False)
class Unit:
    """A function of tensors, some of which are parameters that come in parts, and results that go in parts.

    Attributes:
        shards: how parameters are held.
        function: of whole tensors, to tensors.
        arguments: for each argument the index of its parameter; None: it is no parameter.
        results: likewise, for gradients by parameters; empty: there are none.
        unread: only edges of the graph are wanted of the gradients, and not their values.
    """

    shards: Shards
    function: Callable[[Leaves], Sequence[Tensor]]
    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...] = ()
    unread: bool = False

    def __call__(self, tensors: Sequence[Tensor]) -> Leaves:
        """Run the function, without a graph."""
        whole = self.shards.gather([tensor.detach() for tensor in tensors], self.arguments)
        found = list(self.function(whole))
        del whole
        if not self.unread:
            return self.shards.scatter(found, self.results)
        for place, index in _given(self.results):
            part = self.shards.own(index)
            found[place] = found[place].new_full((part.stop - part.start,), torch.nan)
        return found

    def derivative(self, needed: Sequence[bool], num_results: int) -> Unit:
        """Return the unit of the arguments and of gradients by the results, to gradients by the arguments needed."""
        size = len(self.arguments)

        def function(tensors: Leaves) -> Sequence[Tensor]:
            has_graph = any(tensor.requires_grad for tensor in tensors)
            with torch.enable_grad():
                points = [
                    tensor if not need or tensor.requires_grad else tensor.requires_grad_()
                    for tensor, need in zip(tensors[:size], needed, strict=True)
                ]
                results = zip(self.function(points), tensors[size:], strict=True)
                outputs = [pair for pair in results if pair[0].requires_grad]
                wanted = [point for point, need in zip(points, needed, strict=True) if need]
                if not outputs:
                    return [torch.zeros_like(point) for point in wanted]
                return torch.autograd.grad(
                    [output for output, _ in outputs],
                    wanted,
                    [gradient for _, gradient in outputs],
                    create_graph=has_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )

        gradients = tuple(index for index, need in zip(self.arguments, needed, strict=True) if need)
        given = self.results or (None,) * num_results
        return Unit(self.shards, function, self.arguments + given, gradients)


class _Run(torch.autograd.Function):
    """A unit in a graph, which holds its arguments, parameters in parts."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *tensors: Tensor) -> Any:
        ctx.unit = unit
        ctx.save_for_backward(*tensors)
        results = unit(tensors)
        ctx.mark_non_differentiable(
            *(one for one in results if not (one.is_floating_point() or one.is_complex()))
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        unit = replace(ctx.unit.derivative(needed, len(gradients)), unread=torch.is_grad_enabled())
        found = iter(_run_unit(unit, *ctx.saved_tensors, *gradients))
        return None, *(next(found) if need else None for need in needed)


def _run_unit(unit: Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = _Run.apply(unit, *tensors)  # type: ignore[no-untyped-call]
    return results


class _Present(torch.autograd.Function):
    """A parameter for a loss. A function of autograd that takes it past torch's overrides gives its whole gradient."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, index: int, part: Tensor) -> Tensor:
        ctx.shards, ctx.index = shards, index
        return ShardedParameter(shards, index, part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        unit = Unit(ctx.shards, _same, (None,), (ctx.index,))
        return None, None, _run_unit(unit, gradient)[0]


class ShardedParameter(Tensor):
    """A parameter of which this rank holds a part; functions of torch take it whole."""

    shards: Shards
    place: int
    part: Tensor

    @staticmethod
    def __new__(cls, shards: Shards, index: int, part: Tensor) -> ShardedParameter:
        made: ShardedParameter = torch.Tensor._make_wrapper_subclass(
            cls,
            shards.layout.shapes[index],
            dtype=part.dtype,
            device=part.device,
        )
        made.shards, made.place, made.part = shards, index, part
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _asks_for_values(func):
            return _run(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(
            f"shard_params=True: {func} takes a parameter past torch's overrides of functions, so that it cannot be "
            "gathered; leave shard_params out"
        )


METHODS = {
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "get_device",
    ),
    *(
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_signed",
        "__len__",
        "__hash__",
        "requires_grad_",
    ),
}
"""Methods of a tensor that do not ask for its values."""

IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
}
"""Operators that write to their first argument, as functions do whose names end with an underscore."""

VALUES = {"T", "mT", "H", "mH", "real", "imag", "data"}
"""Attributes that do."""


def _asks_for_values(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in VALUES  # type: ignore[attr-defined]
    return name not in METHODS and name != "__set__"


RESULT = object()
"""Stands for a tensor among the results of a function."""


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of torch with whole parameters, as a unit."""
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if _varies(leaf)]
    given = [leaves[place] for place in places]
    shards = next(leaf.shards for leaf in given if isinstance(leaf, ShardedParameter))
    indices = tuple(leaf.place if isinstance(leaf, ShardedParameter) else None for leaf in given)
    tensors = [leaf.part if isinstance(leaf, ShardedParameter) else leaf for leaf in given]
    constants = [None if place in places else leaf for place, leaf in enumerate(leaves)]
    rest: list[Any] = []
    defined = OVERRIDES.get(func, func)  # a mode sees no call inside of an overridden function

    def call(tensors: Sequence[Tensor]) -> Any:
        filled = list(constants)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = _pytree.tree_unflatten(filled, spec)
        return defined(*args, **kwargs)

    if _writes(func):
        if isinstance(args[0], ShardedParameter):
            name = shards.layout.names[args[0].place]
            written = f"loss_fn writes to the parameter {name!r} by {func.__name__}"
            raise ValueError(f"{written}; let it compute a new tensor")
        return call([_whole(leaf) if isinstance(leaf, ShardedParameter) else leaf for leaf in given])

    def function(tensors: Leaves) -> list[Tensor]:
        found, found_spec = _pytree.tree_flatten(call(tensors))
        rest[:] = [[RESULT if isinstance(one, Tensor) else one for one in found], found_spec]
        return [one for one in found if isinstance(one, Tensor)]

    results = iter(_run_unit(Unit(shards, function, indices), *tensors))
    others, found_spec = rest
    return _pytree.tree_unflatten([next(results) if one is RESULT else one for one in others], found_spec)


def _whole(parameter: ShardedParameter) -> Tensor:
    """Return a parameter as a whole tensor, for functions that have to see the tensors of the graph."""
    unit = Unit(parameter.shards, _same, (parameter.place,))
    return _run_unit(unit, parameter.part)[0]


def _varies(leaf: object) -> bool:
    return isinstance(leaf, ShardedParameter) or (isinstance(leaf, Tensor) and leaf.requires_grad)


def _writes(func: Callable[..., Any]) -> bool:
    """Return True for functions that write to their first argument."""
    name = func.__name__
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
