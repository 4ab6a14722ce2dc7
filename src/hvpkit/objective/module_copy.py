"""A copy of a module that objectives call, without the values of its tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils import _pytree

from hvpkit.autodiff.overrides import check_max_norm
from hvpkit.autodiff.pytree import snapshot


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that function transforms do not support."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # torch.compile
        else:
            return model


def copy_structure(
    model: nn.Module, batchnorm: str, training: bool
) -> tuple[nn.Module, dict[Tensor, Tensor]]:
    """Return a copy of ``model`` with tensors on the meta device, and the map from those to the originals.

    The copy is in evaluation mode; with ``training``, in training mode except for modules that would update
    statistics. Batch norms use the statistics that ``batchnorm`` names.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: lazy parameter {name!r} has no shape yet; run one forward pass first")
    originals = {_hollow(t): t for t in {*model.parameters(), *model.buffers()}}
    copies: dict[int, Any] = {id(original): hollow for hollow, original in originals.items()}
    kept = _pytree.tree_leaves([vars(module) for module in model.modules()])
    copies |= {id(t): snapshot(t) for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    for module in reversed([*model.modules()]):  # wrappers inside wrappers first
        if (inner := unwrap(module)) is not module:
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
    """Return a tensor of the same kind and shape on the meta device, without values."""
    hollow = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _nothing() -> None:
    pass


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
