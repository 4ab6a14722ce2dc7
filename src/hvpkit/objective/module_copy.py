"""A copy of a module that objectives call, without the values of its tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from hvpkit.autodiff.overrides import check_max_norm
from hvpkit.autodiff.pytree import snapshot
from hvpkit.autodiff.references import references, twin_functions
from hvpkit.objective.fully_sharded import (
    check_shards,
    is_fully_sharded,
    is_sharded,
    plain_attributes,
    plain_class,
    reshard,
)

LIBRARY_WRAPPERS = ("_FabricModule", "DeepSpeedEngine")
"""Classes of training libraries, by name, that hold the user's module as ``module``."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that function transforms do not support."""
    while True:
        inner = getattr(model, "module", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif type(model).__name__ in LIBRARY_WRAPPERS and isinstance(inner, nn.Module):
            model = inner
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # torch.compile
        else:
            return model


@dataclass(frozen=True)
class ModuleCopy:
    """A module as an objective calls it.

    Attributes:
        module: the copy, with tensors on the meta device.
        originals: the tensor that each of those stands for.
        copied: the ids of the objects that were copied.
    """

    module: nn.Module
    originals: dict[Tensor, Tensor]
    copied: frozenset[int]


def copy_structure(
    model: nn.Module, batchnorm: str, training: bool, shard_params: bool = False
) -> ModuleCopy:
    """Return a copy of ``model`` whose tensors are on the meta device, without values.

    With ``shard_params`` parameters are to stay in shards, and need not fit. The copy is in evaluation mode; with
    ``training``, in training mode except for modules that would update statistics. Batch norms use the statistics that
    ``batchnorm`` names. Functions that close over modules of ``model`` are copied too, and call the copies.
    """
    for name, module in model.named_modules():
        _check_copyable(name, module)
    reshard(model)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    check_shards(model, fit=not shard_params)
    originals = {_hollow(t): t for t in {*model.parameters(), *model.buffers()}}
    copies: dict[int, Any] = {id(original): hollow for hollow, original in originals.items()}
    kept = [t for _, t in references(model) if isinstance(t, Tensor)]
    copies |= {id(t): snapshot(t) for t in kept if not t.is_leaf}
    copies |= _copies_of_state(model, copies)
    skeleton = copies[id(model)].train(training)
    for module in skeleton.modules():
        _check_supported(module, batchnorm)
        if _keeps_statistics(module):
            module.eval()
        if batchnorm == "batch" and isinstance(module, _BatchNorm):
            module.train()
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, nn.RNNBase):
            vars(module)["flatten_parameters"] = _nothing  # it moves the weights that it is called with
        _undo_autocast(module)
    return ModuleCopy(skeleton, originals, frozenset(copies))


def _copies_of_state(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Return the copies of ``model`` and all in it by id, those in ``memo`` given.

    Values that cannot be copied are shared with ``model``; hooks that cannot be copied are left out.
    """
    try:
        return _deep_copies(model, memo)
    except Exception:  # of any class's own __deepcopy__ or __reduce__
        shared = {id(value): (name, value) for name, value in _not_copyable(model, memo)}
        if not shared:
            raise
    for name, value in shared.values():
        what = "left out" if _is_hook(name) else "used as it is"
        warnings.warn(
            f"model: {name} ({type(value).__name__}) cannot be copied, and is {what} in products",
            stacklevel=4,
        )
    stand_ins = {key: _nothing if _is_hook(name) else value for key, (name, value) in shared.items()}
    return _deep_copies(model, memo | stand_ins)


def _deep_copies(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    copies = dict(memo)
    for module in model.modules():
        copies.setdefault(id(module), None)  # functions that refer to one of these need a twin
    modules = [id(module) for module in model.modules()]
    complete = twin_functions(model, copies)
    for key in modules:
        del copies[key]
    sharded = [module for module in model.modules() if is_fully_sharded(module)]
    for module in sharded:  # torch copies no such module
        copies[id(module)] = object.__new__(plain_class(module))
    for module in sharded:
        vars(copies[id(module)]).update(copy.deepcopy(plain_attributes(module), copies))
    for module in reversed([*model.modules()]):  # wrappers inside wrappers first
        if (inner := unwrap(module)) is not module:
            copies[id(module)] = copy.deepcopy(inner, copies)
    copy.deepcopy(model, copies)
    complete()
    return copies


def _not_copyable(model: nn.Module, memo: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of attributes, and of entries in those that are dicts, that cannot be copied."""
    for prefix, module in model.named_modules():
        memo = memo | {id(part): part for part in module.modules()}
        for name, value in vars(module).items():
            label = f"{prefix}.{name}".lstrip(".")
            entries = (
                [(label, entry) for entry in value.values()] if isinstance(value, dict) else [(label, value)]
            )
            for key, entry in entries:
                try:
                    copy.deepcopy(entry, dict(memo))
                except Exception:  # as above
                    yield key, entry


def _is_hook(name: str) -> bool:
    return name.endswith("_hooks")


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore, on exit, the attributes of a module and of those in it, but not what is inside of containers."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            for added in vars(part).keys() - attributes.keys():
                del vars(part)[added]
            vars(part).update(attributes)


def _undo_autocast(module: nn.Module) -> None:
    """Remove the wrapper that Accelerate puts around ``forward`` for mixed precision."""
    forward = vars(module).pop("_original_forward", None)
    if forward is not None:
        vars(module)["forward"] = forward


def _hollow(tensor: Tensor) -> Tensor:
    """Return a tensor of the same kind and shape on the meta device, without values."""
    if is_sharded(tensor):
        hollow = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad
        )
    else:
        hollow = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _nothing(*_: object, **__: object) -> None:
    pass


def _check_copyable(name: str, module: nn.Module) -> None:
    """Raise for modules whose parameters are not at hand, or whose code is not Python."""
    label = f"model.{name}" if name else "model"
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{label} is a ScriptModule, whose compiled code function transforms do not support; pass the "
            "nn.Module that was scripted or traced"
        )
    if type(module).__name__ == "FullyShardedDataParallel":
        raise TypeError(
            f"{label} is a FullyShardedDataParallel, whose parameters are shards; gather them "
            "(FullyShardedDataParallel.summon_full_params, or a full state dict) and load them into a plain module"
        )


def _check_parameter(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"model: lazy parameter {name!r} has no shape yet; run one forward pass first")


def _keeps_statistics(module: nn.Module) -> bool:
    """Return True if calls in training mode write to buffers."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _NormBase | _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in hooks
    )


def _check_supported(module: nn.Module, batchnorm: str) -> None:
    """Raise ValueError for modules that are random, mix examples, or whose derivative in torch is wrong."""
    name = type(module).__name__
    if isinstance(module, _BatchNorm) and batchnorm == "eval" and module.running_mean is None:
        raise ValueError(
            'batchnorm="eval" needs running statistics, and model has a batch norm that keeps none '
            '(track_running_stats=False); take batchnorm="batch"'
        )
    if isinstance(module, nn.SyncBatchNorm) and batchnorm == "batch":
        raise ValueError(
            'batchnorm="batch" goes by the batches of one process, and model has a SyncBatchNorm, which uses '
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
