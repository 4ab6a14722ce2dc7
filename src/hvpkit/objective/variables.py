"""A loss as a function of other variables: coordinates of a subspace, perturbations of inputs or of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_flag, check_function, check_like
from hvpkit.autodiff.pytree import Layout, check_params, flatten, join, leaf_names, snapshot, unflatten
from hvpkit.data import Data, as_data
from hvpkit.data.sources import TensorBatches
from hvpkit.objective.objective import Objective, check_loss_fn

L = TypeVar("L", bound=LossFn)

Map = Tensor | Callable[[Tree], Tree]
"""A matrix ``[n, m]``, or a function from variables to parameters."""


def composed(loss_fn: L, point: Callable[[Tree], Tree]) -> L:
    """Return the loss as a function of the variables from which ``point`` makes the parameters."""

    def of_variables(function: Callable[[Tree, Batch], Any]) -> Any:
        return lambda variables, batch: function(point(variables), batch)

    if isinstance(loss_fn, Objective):
        return replace(loss_fn, forward=of_variables(loss_fn.forward))
    composition: L = of_variables(loss_fn)
    return composition


def reparametrize(loss_fn: L, params: Tree, map: Map, z0: Tree | None = None) -> tuple[L, Tree]:
    r"""Return the loss as a function of other variables z, and their values: what every constructor takes.

    The Hessian of :math:`z \mapsto \ell(p(z))` is :math:`J' H J + \sum_i \partial_i \ell\, \nabla^2 p_i`, with the
    Jacobian J of the map; the second term is that of a map which is not linear. A GGN or a Fisher matrix is
    :math:`J' G J`.

    Args:
        loss_fn: ``loss_fn(params, batch)`` or a :class:`hvpkit.Objective`.
        params: tree of parameters.
        map: a matrix A ``[n, m]``, for :math:`p = p_0 + A z` (it is not copied); or a function of z, by torch, which
            returns the parameters: a tree like ``params``, a dict of some of them by dotted name, the others held
            constant, or all of them as a flat vector ``[n]``.
        z0: the point in the new variables, a tree of tensors; of a matrix zero by default.

    Returns:
        The loss, of the kind of ``loss_fn``, and z0.

    Raises:
        TypeError: ``map`` is neither; a function without ``z0``.
        ValueError: shapes, dtypes or devices that do not fit.

    Cost:
        One evaluation of a function now, and one with its derivatives in each batch of each matvec.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
        >>> p, data = torch.ones(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> hk.hessian(*reparametrize(loss_fn, p, torch.tensor([[1.0], [1.0]])), data) @ torch.ones(1)
        tensor([10.])

        Factors of low rank in place of a weight matrix, as LoRA has them:

        >>> objective, params = hk.from_module(torch.nn.Linear(5, 4), torch.nn.MSELoss())
        >>> z0 = {"B": torch.zeros(4, 1), "A": torch.ones(1, 5)}
        >>> low_rank = lambda z: {"weight": params["weight"] + z["B"] @ z["A"]}
        >>> hk.hessian(*reparametrize(objective, params, low_rank, z0), (torch.ones(3, 5), torch.ones(3, 4))).shape
        (9, 9)
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    if not isinstance(map, Tensor):
        return composed(loss_fn, _by_function(layout, leaves, map, z0)), z0
    check_like(map, leaves[0], name="map")
    if map.ndim != 2 or map.shape[0] != layout.n or not map.shape[1]:
        raise ValueError(
            f"map must be a matrix [n, m] with a row for each of the {layout.n} parameters, got {list(map.shape)}"
        )
    if z0 is None:
        z0 = map.new_zeros(map.shape[1])
    elif not isinstance(z0, Tensor) or z0.shape != map.shape[1:]:
        raise ValueError(f"z0 must be a vector [m] with m = {map.shape[1]}, the columns of map")
    check_like(z0, leaves[0], name="z0")
    origin = join(leaves)
    return composed(loss_fn, lambda z: layout.unflatten(origin + map @ z)), z0


def _by_function(
    layout: Layout, leaves: list[Tensor], map: Callable[[Tree], Tree], z0: Tree | None
) -> Callable[[Tree], Tree]:
    """Return ``map`` with the whole tree of parameters as its value; raise unless it gives one at z0."""
    check_function("map", map, "map(z), which returns parameters, or a matrix [n, m]", 1)
    if z0 is None:
        raise TypeError("z0 must be given where map is a function: the variables at which map gives params")
    constants = unflatten([snapshot(leaf) for leaf in leaves], layout.spec)
    named = dict(zip(layout.names, flatten(constants)[0], strict=True))

    def point(z: Tree) -> Tree:
        found = map(z)
        if isinstance(found, Tensor) and found.shape == (layout.n,):
            return layout.unflatten(found)
        if isinstance(found, Mapping) and set(found) <= set(named):
            found = {**named, **found}
        return unflatten(layout.leaves(found, name="map(z)"), layout.spec)

    check_params(z0)
    with torch.no_grad():
        found = layout.leaves(point(z0), name="map(z0)")
    for leaf, name in zip(found, layout.names, strict=True):
        check_like(leaf, leaves[0], name=f"map(z0)[{name!r}]")
    return point


def perturb_inputs(
    loss_fn: L, params: Tree, data: object, inputs: str | int | None = None, *, shared: bool = False
) -> tuple[L, Tensor, Data]:
    r"""Return the loss as a function of perturbations of the inputs, zero ones, and the data: for every constructor.

    The variables are :math:`\delta_i` of :math:`\ell_i(x_i + \delta_i)`, one for each example: the Hessian of the mean
    loss is :math:`\frac1N \operatorname{diag}(\nabla_x^2 \ell_1, \ldots, \nabla_x^2 \ell_N)`, so that ``N * H`` holds
    the Hessians of the examples as blocks, and the largest eigenvalue of all. With ``shared`` there is one
    :math:`\delta` for all examples, and the Hessian is the mean of theirs.

    Args:
        loss_fn: ``loss_fn(params, batch)`` or a :class:`hvpkit.Objective`.
        params: tree of parameters, constants now.
        data: tensors: a tensor, tuple or dict of all examples; with ``shared`` all that :func:`hvpkit.as_data` takes.
        inputs: key or position in a batch of the tensor to perturb, as ``"x"`` or ``0``, a dotted name where it lies
            deeper; by default a batch that is one tensor, or the first of a tuple. An objective sees the perturbation
            in ``forward`` alone: targets stay, of an autoencoder too.
        shared: one perturbation for all examples.

    Returns:
        The loss, of the kind of ``loss_fn``; the perturbations ``[N, ...]``, or ``[...]`` if shared, zero; the data.

    Raises:
        TypeError: inputs that are no floating tensor; data that is not tensors, unless shared.
        ValueError: ``inputs`` names nothing.

    Note:
        Examples that have variables of their own cannot be left out: there is no ``H.coarsen``, and no solver samples.

    Cost:
        The vectors have N times the entries of an input. With ``batch_size=`` the network's memory is that of a batch.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: (p * batch**2).sum(1) / 2
        >>> loss, delta, data = perturb_inputs(loss_fn, torch.tensor([1.0, 5.0]), torch.ones(3, 2))
        >>> (3 * hk.hessian(loss, delta, data)).to_dense().diagonal()
        tensor([1., 5., 1., 5., 1., 5.])
    """
    check_loss_fn(loss_fn, params)
    point = _constant(params)
    examples, first = _examples(data, params, shared)
    place = _place(first, inputs)
    x = flatten(first, name="data")[0][place]
    if not x.is_floating_point():
        raise TypeError(
            f"inputs must be a floating tensor to be perturbed, got {x.dtype}; of tokens perturb their embedding, by "
            "hvpkit.perturb_activations"
        )

    def call(function: Callable[[Tree, Batch], Any], delta: Tensor, batch: Batch) -> Any:
        leaves, spec = flatten(batch, name="data")
        leaves[place] = leaves[place] + delta
        return function(point, unflatten(leaves, spec))

    return _perturbed(loss_fn, call, examples, x)


def perturb_activations(
    objective: Objective, params: Tree, data: object, module: str, *, shared: bool = False
) -> tuple[Objective, Tensor, Data]:
    r"""Return the loss as a function of perturbations of a module's output, zero ones, and the data.

    As :func:`perturb_inputs`, with the output :math:`a_i` of a module of the network in place of the inputs:
    :math:`\nabla_a^2 \ell_i` of each example, or with ``shared`` their mean, which is the Hessian by a bias.

    Args:
        objective: of :func:`hvpkit.from_module`.
        params: its parameters, constants now.
        data: as of :func:`perturb_inputs`.
        module: dotted name of the module in the network, as in ``model.named_modules()``. It returns one tensor, whose
            first dimension is the examples, and is called once in a forward pass.
        shared: one perturbation for all examples.

    Returns:
        The objective; the perturbations ``[N, ...]``, or ``[...]`` if shared, all zero; the data.

    Raises:
        TypeError: an objective of another origin; a module that returns no floating tensor; data that is not tensors,
            unless shared.
        ValueError: there is no such module; it is not called once; its output has another first dimension.

    Note:
        As of :func:`perturb_inputs`.

    Cost:
        A forward pass of the first batch now. The vectors have N times the entries of an output.

    Example:
        >>> import torch, hvpkit as hk
        >>> model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> objective, params = hk.from_module(model, torch.nn.MSELoss())
        >>> loss, delta, data = perturb_activations(objective, params, (torch.ones(3, 5), torch.ones(3, 1)), "1")
        >>> delta.shape
        torch.Size([3, 4])
        >>> bool((hk.extreme_eigenvalues(hk.ggn(loss, delta, data)).smallest.value < 1e-6))
        True
    """
    network = objective.network if isinstance(objective, Objective) else None
    if network is None:
        raise TypeError(
            "objective must be one of hvpkit.from_module, whose modules have names; for inputs take "
            "hvpkit.perturb_inputs"
        )
    names = [name for name, _ in network.named_modules() if name]
    if module not in names:
        raise ValueError(
            f"module must be the name of a module of the network, got {module!r}; {', '.join(names)}"
        )
    target, point = network.get_submodule(module), _constant(params)
    examples, first = _examples(data, params, shared)

    def call(function: Callable[[Tree, Batch], Any], delta: Tensor, batch: Batch) -> Any:
        with _hooked(target, lambda output: output + delta):
            return function(point, batch)

    return _perturbed(objective, call, examples, _output(objective, point, first, target, module))


def _constant(params: Tree) -> Tree:
    """Return a copy of the parameters."""
    layout, leaves = check_params(params)
    return unflatten([snapshot(leaf) for leaf in leaves], layout.spec)


def _examples(data: object, params: Tree, shared: bool) -> tuple[Data, Batch]:
    """Return the data, with batches ``(numbers, batch)`` unless shared, and the first batch as it was."""
    check_flag("shared", shared)
    examples = as_data(data, device=flatten(params, name="params")[0][0].device)
    first = next(iter(examples))
    if shared:
        return examples, first
    if not isinstance(examples.source, TensorBatches) or examples.weights is not None:
        raise TypeError(
            "data must be tensors, as (x, y), where each example has a perturbation of its own: pass the examples of "
            "a loader as tensors, or shared=True for one perturbation of all examples"
        )
    tensors = examples.source.examples
    numbered = (torch.arange(examples.num_examples, device=flatten(tensors)[0][0].device), tensors)
    source = TensorBatches(numbered, examples.source.batch_size)
    return replace(examples, source=source, has_own_variables=True), first


def _place(batch: Batch, inputs: str | int | None) -> int:
    """Return the position, among the leaves of a batch, of the tensor that ``inputs`` names."""
    names = leaf_names(batch)
    wanted = "0" if inputs is None else str(inputs)
    if inputs is None and names == [""]:
        return 0
    if wanted not in names:
        raise ValueError(
            f"inputs must name a tensor of a batch, got {inputs!r}; the batch has {', '.join(map(repr, names))}"
        )
    return names.index(wanted)


def _perturbed(
    loss_fn: L, call: Callable[[Any, Tensor, Batch], Any], data: Data, perturbed: Tensor
) -> tuple[L, Tensor, Data]:
    """Return the loss of perturbations, which are zero, and the data.

    Args:
        loss_fn: a function of parameters and batch, or an objective.
        call: ``call(function, delta, batch)`` calls such a function with perturbations of the batch.
        data: the examples.
        perturbed: what is perturbed, of the first batch.
    """
    own = data.has_own_variables
    delta = perturbed.new_zeros((data.num_examples, *perturbed.shape[1:]) if own else perturbed.shape[1:])

    def examples(batch: Batch) -> Batch:
        return batch[1] if own else batch

    def of_perturbations(function: Callable[[Tree, Batch], Any]) -> Any:
        return lambda delta, batch: call(
            function, delta.index_select(0, batch[0]) if own else delta, examples(batch)
        )

    if not isinstance(loss_fn, Objective):
        plain: L = of_perturbations(loss_fn)
        return plain, delta, data
    weight = loss_fn.example_weight
    objective = replace(
        loss_fn,
        forward=of_perturbations(loss_fn.forward),
        output_loss=lambda outputs, batch: loss_fn.output_loss(outputs, examples(batch)),
        example_weight=None if weight is None else lambda batch: weight(examples(batch)),
    )
    return objective, delta, data


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Change the outputs of a module of an objective's own network, inside ``with``."""
    handle = module.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _output(objective: Objective, params: Tree, batch: Batch, module: nn.Module, name: str) -> Tensor:
    """Return the output of a module in a forward pass; raise unless it is one tensor over the examples."""
    found: list[Any] = []
    with torch.no_grad(), _hooked(module, found.append):
        objective(params, batch)
    if len(found) != 1:
        raise ValueError(
            f"module {name!r} is called {len(found)} times in a forward pass, and must be called once; name another"
        )
    (output,) = found
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            f"module {name!r} must return one floating tensor, got {type(output).__name__}; name a module inside"
        )
    size = len(flatten(batch, name="data")[0][0])
    if not output.ndim or len(output) != size:
        raise ValueError(
            f"module {name!r} must return a tensor whose first dimension is the {size} examples, got "
            f"{list(output.shape)}"
        )
    return output
