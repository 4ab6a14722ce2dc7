"""The objective of a torch module and a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss, _WeightedLoss

from hvpkit._utils.typing import Batch, Tree
from hvpkit._utils.validation import check_choice, check_count, check_dense, check_flag, check_function
from hvpkit.autodiff.references import references
from hvpkit.objective.batches import Targets, check_targets, split_batch
from hvpkit.objective.criterion import Criterion, as_criterion
from hvpkit.objective.first_call import changed_parameters, check_reduction, check_stored_state
from hvpkit.objective.fully_sharded import is_sharded
from hvpkit.objective.module_copy import copy_structure, unwrap
from hvpkit.objective.network import Network, original_call
from hvpkit.objective.objective import Objective
from hvpkit.objective.outputs import OwnLoss, as_tree, from_tree, main_tensor, own_loss
from hvpkit.objective.parameter_access import NamedTensors, ParameterAccess

IN_CRITERION = (
    "criterion reads the parameter {name!r} of model, which it would take for a constant: its derivative would be "
    "missing. A penalty on parameters belongs in a loss function of params, as\n"
    "    def loss_fn(params, batch):\n"
    "        return objective(params, batch) + 0.05 * sum(p.square().sum() for p in params.values())\n"
    "and whatever else the criterion needs of the model in the model's outputs"
)


def from_module(
    model: nn.Module,
    criterion: Callable[..., Tensor] | None,
    *,
    batchnorm: str = "eval",
    dropout: int | None = None,
    include_frozen: bool = False,
    targets: Targets = None,
    shard_params: bool = False,
) -> tuple[Objective, dict[str, Tensor]]:
    """Return the objective and the parameters of a module, as they are now.

    Parameters and buffers are copied, and the module is not kept: neither later training nor the caller's
    ``train()`` or ``eval()`` changes the objective, and nothing of the module is written to. A parameter that
    modules share is one parameter. Functions that close over the module (lambdas, hooks) call the copy.

    Batches and what is called with them:

    ============================================  ==========================================================
    batch                                         calls
    ============================================  ==========================================================
    ``(*inputs, targets)``                        ``criterion(model(*inputs), targets)``
    a dict with its targets under ``"targets"``,  ``criterion(model(**rest), targets)``
    ``"target"``, ``"labels"`` or ``"label"``
    either, with ``targets=2``, or                ``criterion(model(...), first, second)``
    ``targets=("mask", "labels")``
    one tensor x, as for autoencoders             ``criterion(model(x), x)``, or ``criterion(model(x))`` where it
                                                  takes one argument
    any, with ``criterion=None``                  ``model(*batch)`` or ``model(**batch)``, which computes its loss
    ============================================  ==========================================================

    A criterion that needs more arguments than that gets a tuple of outputs, or else of targets, taken apart. torch's
    losses take one tensor: of models that return several values it is the field ``logits``, ``out``, ``output`` or
    ``prediction``, else the first tensor. Other criteria get what the model returns: a tuple, dict, dataclass.

    Args:
        model: the module; it and modules in it are taken out of ``DistributedDataParallel``, ``torch.compile`` and
            the wrappers of Accelerate, Fabric and DeepSpeed. Of a model of ``fully_shard`` (FSDP2) the parameters
            are gathered, by all of its ranks, in the dtype of the shards; it is resharded first, as by its
            ``state_dict()``, and goes on training as before.
        criterion: ``criterion(outputs, targets)``, as those of :mod:`hvpkit.hf` for models of transformers. Losses
            ``[B]`` are taken as they are. A criterion with an attribute or argument ``reduction``, as torch's
            ``nn.CrossEntropyLoss()`` or ``F.cross_entropy``, is switched to its per-example form; what is left beyond
            the first dimension is averaged. With ``reduction="sum"`` it is summed, and **the objective is the mean over
            examples, 1/N of the sum** that was asked for: multiply by the number of examples for the Hessian of a sum.
            An ignored target counts as an example of loss zero. A criterion with an attribute
            ``example_weight(targets)``, weights ``[B]``, returns weighted sums ``[B]``: the objective is their sum over
            the sum of the weights **of the data**. Any other criterion that returns a 0-d tensor is taken for the mean
            over its batch: single examples are not known then, which excludes Fisher matrices and importance sampling,
            and a loss that is no mean over its examples has a Hessian only for a fixed batch
            (``batch_size=len(data)``). None: the loss that the model returns: the tensor, its field ``loss``, or the
            first of a tuple. A GGN needs a criterion.
        batchnorm: ``"eval"``: by running statistics, so that the loss is a mean over examples;
            ``"batch"``: by the statistics of each batch, so that it depends on the batches.
        dropout: off by default. A seed: on, with masks that are functions of the seed and of each example's
            content, and so the same in every product and batch. The modules are then as in training, but for
            those that keep statistics. Other random numbers of the model are fixed in the same way (noise, samples
            of a variational encoder), if their first dimension is the examples. Dropout inside recurrent layers has
            to be 0.
        include_frozen: make parameters with ``requires_grad=False`` variables too; by default they are
            constants.
        targets: of a dict, the key or keys of the targets; of a tuple, how many there are at its end. By default
            one, as above.
        shard_params: leave the parameters of a model of ``fully_shard`` in shards, as DTensors, for operators with
            ``shard_params=True``. Frozen parameters and buffers are gathered in any case.

    Returns:
        ``(objective, params)``, ``params`` a dict by dotted name in the order of ``named_parameters()``.

    Raises:
        TypeError: ``model`` is no module, or a ScriptModule, or its parameters are sharded by anything but
            ``fully_shard`` (FSDP1, tensor parallelism); ``criterion`` cannot be called, or refers to a sharded model;
            the arguments are in the other order.
        MemoryError: the whole parameters of a sharded model, with what a matvec needs, do not fit on one of its ranks.
        RemoteError: not all ranks of a sharded model call it.
        ValueError: no parameters, or all frozen; a criterion with parameters of its own; uninitialised lazy
            parameters; an unknown ``batchnorm``, ``"eval"`` without running statistics, or ``"batch"`` with a
            ``SyncBatchNorm``; an embedding with ``max_norm``; a ``FractionalMaxPool`` without ``_random_samples``; a
            ``CrossMapLRN2d``. On call: a criterion that reads parameters of the model or values that its forward
            pass stored; one whose reduction is no mean or sum over examples; outputs ``[B, 1]`` and targets ``[B]``,
            which torch's losses would pair, each with all; one example only, under batch statistics; dropout of a
            tensor whose first dimension is not the examples, or inside a recurrent layer.

    Warns:
        UserWarning: a hook or an attribute of the model cannot be copied.

    Cost:
        A copy of the parameters and buffers. The first call makes one or two more forward passes where the criterion
        is not torch's own and reduces its losses, or refers to the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)
        >>> objective, params = from_module(model, torch.nn.CrossEntropyLoss())
        >>> objective(params, (x, y)).shape
        torch.Size([5])

        A criterion of three arguments, and an autoencoder:

        >>> weighted = lambda z, y, w: w * torch.nn.functional.cross_entropy(z, y, reduction="none")
        >>> objective, params = from_module(model, weighted, targets=2)
        >>> objective(params, (x, y, torch.ones(5))).shape
        torch.Size([5])
        >>> objective, params = from_module(torch.nn.Linear(3, 3), torch.nn.MSELoss())
        >>> objective(params, x).shape
        torch.Size([5])
    """
    check_choice("batchnorm", batchnorm, ("eval", "batch"))
    if dropout is not None:
        dropout = check_count("dropout", dropout, 0)
    check_flag("include_frozen", include_frozen)
    check_flag("shard_params", shard_params)
    _check_order(model, criterion)
    where = check_targets(targets)
    copied = copy_structure(unwrap(model), batchnorm, dropout is not None, shard_params)
    network, params = Network.of(copied, include_frozen, batchnorm, dropout, shard_params)
    if criterion is None:
        return _with_own_loss(network, where or 0), params
    own = as_criterion(criterion)
    trained = NamedTensors({name: copied.originals[network.tensors[name]] for name in params})
    refers = any(id(thing) in copied.copied for _, thing in references(criterion))
    if refers and any(map(is_sharded, copied.originals.values())):
        raise TypeError(
            "criterion refers to model, whose parameters are sharded, so that the two cannot be compared; let model "
            "return what criterion needs, or load the full tensors into a plain module"
        )
    original = original_call(unwrap(model), network, copied) if refers else None
    return _with_criterion(network, own, where, params, trained, original), params


def _with_own_loss(network: Network, where: int | tuple[str, ...]) -> Objective:
    def forward(params: Tree, batch: Batch) -> OwnLoss:
        args, kwargs, _ = split_batch(batch, where)
        return OwnLoss(own_loss(network(params, batch, args, kwargs)))

    def output_loss(outputs: OwnLoss, batch: Batch) -> Tensor:  # noqa: ARG001
        return outputs.loss

    return Objective(forward, output_loss, batchnorm=network.batchnorm, network=network.module)


def _with_criterion(
    network: Network,
    criterion: Criterion,
    where: int | tuple[str, ...] | None,
    params: dict[str, Tensor],
    trained: NamedTensors,
    original: Callable[..., Any] | None,
) -> Objective:
    def split(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        args, kwargs, targets = split_batch(batch, where, inputs_as_targets=not criterion.takes_classes)
        if criterion.keeps_targets and isinstance(batch, Mapping):
            kwargs = dict(batch)
        return args, kwargs, targets

    def outputs_of(outputs: Any, targets: list[Any]) -> Any:
        single = criterion.is_torch and not criterion.takes_more_than(targets)
        return main_tensor(outputs) if single else as_tree(outputs)

    def losses(outputs: Any, targets: list[Any]) -> Tensor:
        return criterion.losses(from_tree(outputs_of(outputs, targets)), targets)

    def check_first(batch: Batch, given: Tree, like: Tensor) -> None:
        """Compare the objective with the model and the criterion as they were given."""
        args, kwargs, targets = split(batch)
        moved = given if any(map(is_sharded, params.values())) else changed_parameters(params, like)
        with torch.enable_grad(), access():  # a module may differentiate by its inputs
            outputs = network(moved, batch, args, kwargs)
            if original is not None:
                check_stored_state(
                    lambda: losses(outputs, targets),
                    lambda scale: original(
                        changed_parameters(params, like, scale),
                        *(batch, args, kwargs),
                        lambda outputs: losses(outputs, targets),
                    ),
                )
            if criterion.is_custom:
                tree = from_tree(outputs_of(outputs, targets))
                reduced = criterion.reduced(tree, targets)
                check_reduction(reduced, criterion.losses(tree, targets), str(criterion.reduction))

    def access() -> Any:
        """Return the context in which the criterion must not read the parameters of the original module."""
        return nullcontext() if torch.compiler.is_compiling() else ParameterAccess({}, trained, IN_CRITERION)

    checks = [check_first] if original is not None or criterion.is_custom else []

    def forward(params: Tree, batch: Batch) -> Any:
        if checks:
            checks[0](batch, params, next(iter(params.values())))
            checks.clear()
        args, kwargs, targets = split(batch)
        return outputs_of(network(params, batch, args, kwargs), targets)

    def output_loss(outputs: Any, batch: Batch) -> Tensor:
        with access():
            return criterion.losses(from_tree(outputs), split(batch)[2])

    def example_weight(batch: Batch) -> Tensor:
        return criterion.weights(split(batch)[2])

    weight = example_weight if criterion.is_weighted else None
    return Objective(forward, output_loss, weight, network.batchnorm, network.module)


def _check_order(model: object, criterion: object) -> None:
    """Raise TypeError unless ``model`` is a module and no loss, and ``criterion`` is no class."""
    if criterion is not None:
        check_function("criterion", criterion, "criterion(outputs, targets)")
    if isinstance(model, type):
        raise TypeError(
            f"model must be a torch.nn.Module, got the class {model.__name__}: pass an instance, {model.__name__}(...)"
        )
    losses = _Loss | _WeightedLoss
    trained = isinstance(criterion, nn.Module) and not isinstance(criterion, losses)
    if isinstance(model, losses) or (trained and callable(model) and not isinstance(model, nn.Module | type)):
        raise TypeError(
            "from_module takes the model first: from_module(model, criterion), and not from_module(criterion, model)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            check_dense(f"model: {name}", tensor)
