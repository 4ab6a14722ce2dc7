"""A loss in two parts, outputs and the loss of outputs, and how a module gives one."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils import _pytree

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_choice, check_count
from hvpkit.autodiff.overrides import check_max_norm
from hvpkit.autodiff.pytree import batch_size, snapshot
from hvpkit.autodiff.randomness import fixed_dropout
from hvpkit.data import Data

TARGET_KEYS = ("targets", "target", "labels", "label")
"""Under which key a batch that is a dict holds its targets."""


@dataclass(frozen=True)
class Objective:
    """A loss function made of two pure functions; callable as ``loss_fn(params, batch)``.

    Attributes:
        forward: ``forward(params, batch)``: the outputs.
        output_loss: ``output_loss(outputs, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        batchnorm: ``"eval"``, or ``"batch"`` where losses depend on the batch that an example is in.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: batch[0] @ p, lambda z, batch: (z - batch[1]) ** 2)
        >>> objective(torch.ones(2), (torch.ones(3, 2), torch.zeros(3)))
        tensor([4., 4., 4.])
    """

    forward: Callable[[Tree, Batch], Any]
    output_loss: Callable[[Any, Batch], Tensor]
    batchnorm: str = "eval"

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """Losses of the batch."""
        return self.output_loss(self.forward(params, batch), batch)


def from_module(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    *,
    batchnorm: str = "eval",
    dropout: int | None = None,
    include_frozen: bool = False,
) -> tuple[Objective, dict[str, Tensor]]:
    """The objective and the parameters of a module, as they are now.

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
            those that keep statistics. Dropout inside attention and recurrent layers has to be 0.
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
            under batch statistics; dropout of a tensor whose first dimension is not the examples.

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
    skeleton, originals = _skeleton(_unwrap(model), batchnorm, dropout is not None)
    variables: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, parameter in skeleton.named_parameters():
        chosen = variables if parameter.requires_grad or include_frozen else constants
        chosen[name] = snapshot(originals[parameter])
    if not variables:
        state = "all its parameters are frozen (pass include_frozen=True)" if constants else "it has none"
        raise ValueError(f"model has no parameters to differentiate by: {state}")
    buffers = {name: snapshot(originals[buffer]) for name, buffer in skeleton.named_buffers()}
    per_example = _per_example(criterion)

    def forward(params: Tree, batch: Batch) -> Any:
        if batchnorm == "batch":
            _check_statistics(batch_size(batch))
        args, kwargs, _ = _split(batch)
        own_buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # modules may write to them
        with nullcontext() if dropout is None else fixed_dropout(dropout, batch):
            return torch.func.functional_call(skeleton, {**constants, **own_buffers, **params}, args, kwargs)

    def output_loss(outputs: Any, batch: Batch) -> Tensor:
        return per_example(outputs, _split(batch)[2])

    return Objective(forward, output_loss, batchnorm), variables


def goes_by_batches(loss_fn: LossFn) -> bool:
    """Whether the loss of an example depends on the batch that it is in: then batches have to stay as they are."""
    return isinstance(loss_fn, Objective) and loss_fn.batchnorm == "batch"


def check_batches(loss_fn: LossFn, data: Data) -> None:
    """A ValueError if ``data`` does not fit a ``loss_fn`` that goes by the statistics of batches."""
    if goes_by_batches(loss_fn):
        _check_statistics(data.smallest_batch)
        if data.weights is not None:
            raise ValueError(
                'batchnorm="batch" makes the loss of an example depend on its batch, so that examples cannot be '
                'weighted; leave weights out, or take batchnorm="eval"'
            )


def _check_statistics(smallest_batch: int | None) -> None:
    if smallest_batch == 1:
        raise ValueError(
            'batchnorm="batch" needs at least two examples in each batch, and data has a batch of one; '
            'choose another batch_size, leave the example out, or take batchnorm="eval"'
        )


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers that transforms cannot pass through."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # what torch.compile wraps
        else:
            return model


def _skeleton(model: nn.Module, batchnorm: str, training: bool) -> tuple[nn.Module, dict[Tensor, Tensor]]:
    """The modules as an objective calls them, with tensors that hold nothing, and the original of each of those.

    They are in evaluation mode, or in training mode but for those that would keep statistics of it, and batch
    norms are as asked for.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: lazy parameter {name!r} has no shape yet; run one forward pass first")
    originals = {_hollow(t): t for t in {*model.parameters(), *model.buffers()}}
    copies: dict[int, Any] = {id(original): hollow for hollow, original in originals.items()}
    kept = _pytree.tree_leaves([vars(module) for module in model.modules()])
    copies |= {id(t): snapshot(t) for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    for module in reversed([*model.modules()]):  # wrappers inside wrappers first
        if (inner := _unwrap(module)) is not module:
            copies[id(module)] = copy.deepcopy(inner, copies)
    skeleton = copy.deepcopy(model, copies).train(training)
    for module in skeleton.modules():
        _check_supported(module, batchnorm)
        if _keeps_statistics(module):
            module.eval()
        if batchnorm == "batch" and isinstance(module, _BatchNorm):
            module.train()
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, nn.RNNBase):
            vars(module)["flatten_parameters"] = _nothing  # it moves the weights that it is called with
    return skeleton, originals


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor like this one without its values."""
    hollow = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _nothing() -> None:
    pass


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether calls in training mode write to buffers."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _NormBase | _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in hooks
    )


def _check_supported(module: nn.Module, batchnorm: str) -> None:
    """A ValueError for what is no function of an example, or has no derivative to trust."""
    name = type(module).__name__
    if isinstance(module, _BatchNorm) and batchnorm == "eval" and module.running_mean is None:
        raise ValueError(
            'batchnorm="eval" needs running statistics, and model has a batch norm that keeps none '
            '(track_running_stats=False); take batchnorm="batch"'
        )
    if isinstance(module, nn.SyncBatchNorm) and batchnorm == "batch":
        raise ValueError(
            'batchnorm="batch" goes by the batches of one process, and model has a SyncBatchNorm, which goes by '
            'those of all; make it a BatchNorm, or take batchnorm="eval"'
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        check_max_norm(module.max_norm)
    if isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d) and module._random_samples is None:
        raise ValueError(
            f"model: {name} draws other regions in each call, in evaluation mode too; pass it _random_samples"
        )
    if isinstance(module, nn.CrossMapLRN2d):
        raise ValueError(f"model: torch's gradient of {name} is wrong; use LocalResponseNorm")


def _split(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and targets of a batch."""
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


def _per_example(criterion: Callable[..., Tensor]) -> Callable[[Any, Any], Tensor]:
    """``criterion`` in its per-example form: losses ``[B]``."""
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if isinstance(criterion, type):
        raise TypeError(
            f"criterion must be an instance, got the class {criterion.__name__}: pass {criterion.__name__}()"
        )
    if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
        raise ValueError(
            "criterion has parameters of its own, which would be constants; make them part of model, or say so "
            "by criterion.requires_grad_(False)"
        )
    unreduced, summed = _without_reduction(criterion)

    def losses(outputs: Any, targets: Any) -> Tensor:
        values = unreduced(outputs, targets)
        if isinstance(values, Tensor) and values.ndim == 0:
            raise ValueError(
                "criterion has no per-example form: it returned a 0-d tensor; pass one that returns one loss "
                'for each example, as functools.partial(F.cross_entropy, reduction="none")'
            )
        if summed is None or values.ndim < 2:
            return values
        flat = values.flatten(1)
        return flat.sum(1) if summed else flat.mean(1)

    return losses


def _without_reduction(
    criterion: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], bool | None]:
    """The criterion without its reduction, and whether that was a sum; None: there was none to undo."""
    if isinstance(criterion, nn.Module) and isinstance(vars(criterion).get("reduction"), str):
        reduction: str = vars(criterion)["reduction"]
        _check_class_weights(reduction, getattr(criterion, "weight", None), criterion)
        unreduced = copy.copy(criterion)
        vars(unreduced)["reduction"] = "none"
        return unreduced, _is_sum(reduction)
    function = criterion.func if isinstance(criterion, functools.partial) else criterion
    if getattr(function, "__module__", None) == F.__name__ and _has_reduction(function):
        keywords = criterion.keywords if isinstance(criterion, functools.partial) else {}
        reduction = keywords.get("reduction", "mean")
        _check_class_weights(reduction, keywords.get("weight"), function)
        return functools.partial(criterion, reduction="none"), _is_sum(reduction)
    return criterion, None


def _is_sum(reduction: str) -> bool | None:
    return None if reduction == "none" else reduction in ("sum", "batchmean")


def _has_reduction(function: Callable[..., Any]) -> bool:
    return "reduction" in inspect.signature(function).parameters


def _check_class_weights(reduction: str, weight: object, criterion: object) -> None:
    weighted = (nn.CrossEntropyLoss, nn.NLLLoss)
    by_class = isinstance(criterion, weighted) or criterion in (F.cross_entropy, F.nll_loss)
    if reduction == "mean" and weight is not None and by_class:
        raise ValueError(
            "criterion has no per-example form: with class weights, torch's mean divides by the weights that "
            "happen to be in a batch; pass reduction='none' for the mean over examples of the weighted losses"
        )
