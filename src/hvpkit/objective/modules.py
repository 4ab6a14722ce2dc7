"""The objective of a torch module and a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hvpkit._utils.typing import Batch, Tree
from hvpkit._utils.validation import check_choice, check_count
from hvpkit.autodiff.fixed_random import fixed_random_numbers
from hvpkit.autodiff.pytree import batch_size, snapshot
from hvpkit.objective.criterion import per_example
from hvpkit.objective.module_copy import copy_structure, unwrap
from hvpkit.objective.objective import Objective, check_statistics

TARGET_KEYS = ("targets", "target", "labels", "label")
"""Keys under which a batch that is a dict may hold its targets."""


def from_module(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    *,
    batchnorm: str = "eval",
    dropout: int | None = None,
    include_frozen: bool = False,
) -> tuple[Objective, dict[str, Tensor]]:
    """Return the objective and the parameters of a module, as they are now.

    Parameters and buffers are copied, and the module is not kept: neither later training nor the caller's
    ``train()`` or ``eval()`` changes the objective, and nothing of the module is written to. A parameter that
    modules share is one parameter.

    Args:
        model: the module; it and modules in it are taken out of ``DistributedDataParallel`` and
            ``torch.compile``.
        criterion: ``criterion(outputs, targets)``: losses ``[B]``. torch's losses, as
            ``nn.CrossEntropyLoss()`` or ``F.cross_entropy``, are switched to their per-example form; what
            is left beyond the first dimension is averaged (summed, for ``reduction="sum"``). An ignored
            target counts as an example of loss zero.
        batchnorm: ``"eval"``: by running statistics, so that the loss is a mean over examples;
            ``"batch"``: by the statistics of each batch, so that it depends on the batches.
        dropout: off by default. A seed: on, with masks that are functions of the seed and of each example's
            content, and so the same in every product and batch. The modules are then as in training, but for
            those that keep statistics. Other random numbers of the model are fixed in the same way (noise, samples
            of a variational encoder), if their first dimension is the examples. Dropout inside recurrent layers has
            to be 0.
        include_frozen: make parameters with ``requires_grad=False`` variables too; by default they are
            constants.

    Returns:
        ``(objective, params)``, ``params`` a dict by dotted name in the order of ``named_parameters()``.
        A batch is ``(*inputs, targets)``, called as ``model(*inputs)``, or a dict with its targets under
        ``"targets"``, ``"target"``, ``"labels"`` or ``"label"`` and the rest keyword arguments.

    Raises:
        TypeError: ``model`` is no module, ``criterion`` cannot be called.
        ValueError: no parameters, or all frozen; a criterion without a per-example form, or with parameters of
            its own; uninitialised lazy parameters; an unknown ``batchnorm``, ``"eval"`` without running
            statistics, or ``"batch"`` with a ``SyncBatchNorm``; an embedding with ``max_norm``; a
            ``FractionalMaxPool`` without ``_random_samples``; a ``CrossMapLRN2d``. On call: one example only,
            under batch statistics; dropout of a tensor whose first dimension is not the examples, or inside a
            recurrent layer.

    Cost:
        A copy of the parameters and buffers.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> objective, params = from_module(model, torch.nn.CrossEntropyLoss())
        >>> objective(params, (torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))).shape
        torch.Size([5])
    """
    check_choice("batchnorm", batchnorm, ("eval", "batch"))
    if dropout is not None:
        check_count("dropout", dropout, 0)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    skeleton, originals = copy_structure(unwrap(model), batchnorm, dropout is not None)
    variables: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, parameter in skeleton.named_parameters():
        chosen = variables if parameter.requires_grad or include_frozen else constants
        chosen[name] = snapshot(originals[parameter])
    if not variables:
        state = "all its parameters are frozen (pass include_frozen=True)" if constants else "it has none"
        raise ValueError(f"model has no parameters to differentiate by: {state}")
    buffers = {name: snapshot(originals[buffer]) for name, buffer in skeleton.named_buffers()}
    losses = per_example(criterion)

    def forward(params: Tree, batch: Batch) -> Any:
        if batchnorm == "batch":
            check_statistics(batch_size(batch))
        args, kwargs, _ = _split(batch)
        own_buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # modules may write to them
        with nullcontext() if dropout is None else fixed_random_numbers(dropout, batch):
            return torch.func.functional_call(skeleton, {**constants, **own_buffers, **params}, args, kwargs)

    def output_loss(outputs: Any, batch: Batch) -> Tensor:
        return losses(outputs, _split(batch)[2])

    return Objective(forward, output_loss, batchnorm), variables


def _split(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the positional inputs, keyword inputs and targets of a batch."""
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) == 1:
            return (), {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
    elif isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise ValueError(
        "data: a batch for from_module must be (*inputs, targets), or a dict with one of the keys "
        f"{', '.join(TARGET_KEYS)}; for any other write hvpkit.Objective(forward, output_loss)"
    )
