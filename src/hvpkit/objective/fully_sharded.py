"""Modules of ``torch.distributed.fsdp.fully_shard`` (FSDP2): their whole parameters, and copies without its hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hvpkit._utils.memory import free_memory, in_words
from hvpkit._utils.ranks import answering

WHOLE_VECTORS = 6
"""Times the parameters that an objective, its operator and a matvec hold: the parameters that :func:`from_module`
returns, the operator's copy, a vector, and less than three times as much in a matvec. Counted."""

OF_FSDP = "torch.distributed.fsdp._fully_shard"
"""The package of torch in which the hooks of ``fully_shard`` are defined."""

MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""Attributes that ``fully_shard`` gives to modules, for torch's compiler."""

PLACEMENTS = (["Shard"], ["Replicate", "Shard"], ["Replicate"], ["Replicate", "Replicate"])
"""Of the parameters of ``fully_shard``, on meshes of one and two dimensions."""


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor; torch.distributed.tensor, which defines it, takes seconds to import."""
    return type(tensor.data).__name__ == "DTensor"


def is_fully_sharded(module: nn.Module) -> bool:
    """Return True if ``fully_shard`` was called with the module, or with one that it is in."""
    return MARKS[0] in vars(module)


def reshard(model: nn.Module) -> None:
    """Put the shards of parameters in their places, as ``model.state_dict()`` does.

    After a forward pass the modules hold whole parameters, in the dtype of its arithmetic, until a backward pass.
    """
    for module in model.modules():
        if plain_class(module) is not type(module):
            module.reshard()  # type: ignore[operator]


def check_shards(model: nn.Module, *, fit: bool) -> None:
    """Raise TypeError for DTensors not of ``fully_shard``; MemoryError if all are to fit, whole, and do not."""
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    of_fsdp = {
        id(p) for module in model.modules() if is_fully_sharded(module) for p in module.parameters(False)
    }
    for name, parameter in sharded.items():
        _check_placements(name, parameter, of_fsdp, next(iter(sharded.values())))
    if sharded and fit:
        _check_room(sharded.values())


def _check_placements(name: str, parameter: Any, of_fsdp: set[int], first: Any) -> None:
    placements = [type(placement).__name__ for placement in parameter.placements]
    if id(parameter) in of_fsdp and placements in PLACEMENTS and parameter.device_mesh == first.device_mesh:
        return
    raise TypeError(
        f"model: parameter {name!r} is a DTensor with {parameter.placements} on {parameter.device_mesh}, as of tensor "
        "parallelism, and only parameters of torch.distributed.fsdp.fully_shard are gathered; load the full tensors, "
        "parameter.full_tensor(), into a plain module, and pass the data with mesh="
    )


def _check_room(parameters: Iterable[Any]) -> None:
    """Raise MemoryError, on all ranks, if whole parameters and what a matvec needs do not fit on one of them."""
    from torch.distributed.tensor import DTensor, Partial

    distinct = {id(p): p for p in parameters}.values()
    num_bytes = sum(p.numel() * p.itemsize for p in distinct)
    mesh = next(iter(distinct)).device_mesh
    device = torch.device(mesh.device_type)
    here = torch.tensor([free_memory(device)], dtype=torch.float64, device=device)
    with answering():
        least = DTensor.from_local(here, mesh, [Partial("min")] * mesh.ndim).full_tensor()
    if WHOLE_VECTORS * num_bytes > (free := float(least)):
        raise MemoryError(
            f"model: its parameters take {in_words(num_bytes)} where they are whole, an operator with its matvecs "
            f"{WHOLE_VECTORS} times as much, {in_words(WHOLE_VECTORS * num_bytes)}, and {in_words(free)} are free on a "
            "rank: pass shard_params=True to from_module and to the operator, which then holds shards"
        )


def gathered(tensor: Tensor) -> Tensor:
    """Return the tensor, or all of a DTensor, gathered from all ranks."""
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor.detach()
    with answering(), torch.inference_mode(False), torch.no_grad():
        whole: Tensor = shard.to(shard.device_mesh.device_type).full_tensor()
        return whole


def plain_class(module: nn.Module) -> type:
    """Return the class that a module had before ``fully_shard``."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if all(base.__name__ != "FSDPModule" for base in kind.__mro__))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, without the state and the hooks of ``fully_shard``."""
    return {
        name: _without_fsdp(value) if isinstance(value, dict) else value
        for name, value in vars(module).items()
        if name not in MARKS
    }


def _without_fsdp(entries: dict[Any, Any]) -> dict[Any, Any]:
    kept = [(key, entry) for key, entry in entries.items() if not _is_of_fsdp(entry)]
    return entries if len(kept) == len(entries) else type(entries)(kept)


def _is_of_fsdp(thing: Any) -> bool:
    """Return True for the state of ``fully_shard``, and for its functions and methods."""
    if isinstance(thing, nn.Module):  # whose class may be made there
        return False
    function = getattr(thing, "hook", thing)  # load_state_dict wraps its hooks
    kinds = (function, type(function), type(getattr(function, "__self__", None)))
    return any(str(getattr(kind, "__module__", "")).startswith(OF_FSDP) for kind in kinds)
