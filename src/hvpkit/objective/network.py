"""A module as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvpkit._utils.typing import Batch, Tree
from hvpkit.autodiff.captured import listed
from hvpkit.autodiff.fixed_random import fixed_random_numbers
from hvpkit.autodiff.pytree import batch_size, snapshot
from hvpkit.objective.first_call import run_original
from hvpkit.objective.fully_sharded import gathered
from hvpkit.objective.module_copy import ModuleCopy, attributes_restored
from hvpkit.objective.objective import check_statistics
from hvpkit.objective.parameter_access import NamedTensors, ParameterAccess

BESIDE_COPY = (
    "model: its forward pass reads {name!r} of the original module, and not of the copy that is differentiated, "
    "through a global variable or a helper object; let it use self, or a submodule registered on it"
)


@dataclass(frozen=True)
class Network:
    """A copy of a module, and the tensors that are not variables.

    Attributes:
        module: the copy, with tensors on the meta device.
        tensors: those tensors, by name.
        constants: the values of frozen parameters, by name.
        buffers: the values of buffers, by name.
        originals: the tensors of the original module.
        batchnorm: as in :func:`hvpkit.from_module`.
        dropout: as in :func:`hvpkit.from_module`.
        variables: the names of the parameters that it is a function of.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]
    buffers: dict[str, Tensor]
    originals: NamedTensors
    batchnorm: str
    dropout: int | None
    variables: frozenset[str]

    @classmethod
    def of(
        cls, copied: ModuleCopy, include_frozen: bool, batchnorm: str, dropout: int | None, shard_params: bool
    ) -> tuple[Network, dict[str, Tensor]]:
        """Return the network and its variables' values, in shards or whole; raise ValueError if there are none."""
        values: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for name, parameter in copied.module.named_parameters():
            is_variable = parameter.requires_grad or include_frozen
            original = copied.originals[parameter]
            kept = original if is_variable and shard_params else gathered(original)
            values[is_variable][name] = snapshot(kept)
        constants, variables = values
        if not variables:
            state = "all its parameters are frozen (pass include_frozen=True)" if constants else "it has none"
            raise ValueError(f"model has no parameters to differentiate by: {state}")
        module = copied.module
        buffers = {
            name: snapshot(gathered(copied.originals[buffer])) for name, buffer in module.named_buffers()
        }
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        originals = NamedTensors({name: copied.originals[tensor] for name, tensor in tensors.items()})
        names = frozenset(variables)
        return cls(module, tensors, constants, buffers, originals, batchnorm, dropout, names), variables

    def __call__(self, params: Tree, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs for the inputs ``args`` and ``kwargs`` of a batch."""
        if self.batchnorm == "batch":
            check_statistics(batch_size(batch))
        values = self.values(params)
        if torch.compiler.is_compiling():  # after a first call without, which has checked the module
            with self.dropouts(batch):
                return torch.func.functional_call(self.module, values, args, kwargs)
        replaced = {id(t): values[name] for name, t in self.tensors.items() if name in values}
        access = ParameterAccess(replaced, self.originals, BESIDE_COPY)
        with attributes_restored(self.module), access, self.dropouts(batch):
            return torch.func.functional_call(self.module, values, args, kwargs)

    def values(self, params: Tree) -> dict[str, Tensor]:
        """Return the values of all tensors; buffers are copies, as modules may write to them.

        Raises:
            TypeError: ``params`` is no dict.
            ValueError: it lacks a parameter, or has another name or shape.
        """
        if not torch.compiler.is_compiling():
            self._check(params)
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return {**self.constants, **buffers, **params}

    def _check(self, params: Tree) -> None:
        """Raise TypeError or ValueError unless ``params`` has every variable, and perhaps frozen parameters."""
        if not isinstance(params, Mapping):
            raise TypeError(
                "params must be a dict of the network's parameters by name, as hvpkit.from_module returns it, got "
                f"{type(params).__name__}"
            )
        missing = sorted(self.variables - params.keys())
        if missing:
            raise ValueError(
                f"params lacks {listed(missing)} of the network; pass all that hvpkit.from_module returned, and wrt= "
                "for the block of some"
            )
        unknown = [name for name in params if name not in self.variables and name not in self.constants]
        if unknown:
            raise ValueError(
                f"params has {listed(unknown)}, no parameter of the network; pass what hvpkit.from_module returned: a "
                "state_dict() holds buffers, and shared parameters twice"
            )
        for name, value in params.items():
            if value.shape != (shape := self.tensors[name].shape):
                raise ValueError(f"params[{name!r}] has shape {list(value.shape)}, expected {list(shape)}")

    def dropouts(self, batch: Batch) -> Any:
        """Return the context that fixes dropout masks."""
        return nullcontext() if self.dropout is None else fixed_random_numbers(self.dropout, batch)


def original_call(model: nn.Module, network: Network, copied: ModuleCopy) -> Callable[..., Any]:
    """Return a function like ``network``, by the original ``model``, which then calls a function of the outputs."""
    names = {id(copied.originals[tensor]): name for name, tensor in network.tensors.items()}
    training = {name: module.training for name, module in network.module.named_modules()}

    def call(
        params: Tree,
        batch: Batch,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        losses: Callable[[Any], Tensor],
    ) -> Tensor:
        values = network.values(params)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = {
            name: values[names[id(tensor)]] if id(tensor) in names else tensor.detach().clone()
            for name, tensor in own.items()
        }
        with network.dropouts(batch):
            return run_original(model, training, tensors, lambda: losses(model(*args, **kwargs)))

    return call
