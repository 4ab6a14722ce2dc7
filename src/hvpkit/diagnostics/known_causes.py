"""Known causes of failed checks: kinds of modules, and the remedy for each."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

T = TypeVar("T")


@dataclass(frozen=True)
class Suspect:
    """A kind of module that is known to make checks fail.

    Attributes:
        checks: names of the checks.
        fits: the test of a module for that kind.
        mend: the remedy.
    """

    checks: tuple[str, ...]
    fits: Callable[[nn.Module], bool]
    mend: str


def _is_random(module: nn.Module) -> bool:
    """Return True if calls draw random numbers."""
    if isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return True
    rate = getattr(module, "p", 0.0) if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(rate, float) and rate > 0))


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return type(module) is _WeightNorm or any(isinstance(hook, WeightNorm) for hook in hooks)


SUSPECTS = (
    Suspect(
        ("repeatable",),
        _is_random,
        "call model.eval() before the operator is made, or take the loss from hvpkit.from_module, where dropout is off",
    ),
    Suspect(
        ("repeatable", "differences"),
        lambda module: module.training and isinstance(module, _SpectralNorm),
        "in training its power iteration goes on with every call: call model.eval()",
    ),
    Suspect(
        ("repeatable", "differences"),
        lambda module: getattr(module, "max_norm", None) is not None,
        "max_norm rescales the weight with every call: rescale it once and set max_norm to None",
    ),
    Suspect(
        ("symmetric", "differences"),
        lambda module: type(module) is nn.Embedding and module.padding_idx is not None,
        "in torch's forward mode its row of padding is no constant: use hvpkit.hessian, or set that "
        "row of each vector to zero",
    ),
    Suspect(
        ("symmetric", "differences"),
        _has_weight_norm,
        "torch's second derivative of weight_norm is wrong: use hvpkit.hessian, which replaces it, "
        "of a model with torch.nn.utils.parametrizations.weight_norm",
    ),
    Suspect(
        ("symmetric", "differences"),
        lambda module: isinstance(module, nn.LayerNorm | _InstanceNorm) or _uses_batch_statistics(module),
        "torch's jvp of jacrev, torch.func.hessian and grad of jvp are wrong through it: use "
        "hvpkit.hessian, or torch.func.jvp of torch.func.grad",
    ),
    Suspect(
        ("batching",),
        _uses_batch_statistics,
        'take running statistics, batchnorm="eval", or say that the batches are fixed, batchnorm="batch"',
    ),
)


REMEDIES = {
    "data order": "give the same examples in the same order in each pass: a sampler or augmentation with random "
    "numbers of its own has to seed them when a pass begins",
    "finite": "look there for such inputs, a logarithm or square root at 0, or an overflow",
    "repeatable": "make the loss a pure function of its arguments: no random numbers, no state that calls change",
    "linear": 'products have few digits: make them in float64, with arithmetic="native", and not by finite '
    "differences, which are wrong across kinks as those of ReLU",
    "symmetric": "make a Hessian by hvpkit.hessian, try another mode, inspect custom autograd functions; of a matrix "
    "take (A + A.T) / 2",
    "differences": "try another mode; inspect custom autograd functions and values that the loss detaches; if this "
    "check passes in float64, matvecs in this dtype have few digits",
    "batching": "where data are suspected, make each example the same in every batch: collate_fn may pad or mix; where "
    "differences fails too, fix that first; return one loss for each example, [B], whatever "
    "other examples are in its batch; in a mean over batches, weigh each by the examples that it holds",
    "constants": "compute the loss from its params argument (torch.func.functional_call, hvpkit.from_module); where "
    "these parameters are meant to be fixed, say so by requires_grad_(False) or detach()",
}
"""Remedy for a check that failed, where no module is suspected."""


def find_suspects(check: str, *loss_fns: object) -> tuple[tuple[str, ...], str]:
    """Return the names of the modules in the loss functions that can make ``check`` fail, and the remedy."""
    found = {}
    for model in (model for loss_fn in loss_fns for model in held(loss_fn, nn.Module)):
        for name, module in model.named_modules():
            for suspect in SUSPECTS:
                if check in suspect.checks and suspect.fits(module):
                    found[f"{name} ({type(module).__name__})".lstrip()] = suspect.mend
    return tuple(found), "; ".join(dict.fromkeys(found.values())) or REMEDIES[check]


def held(function: object, kind: type[T]) -> Iterator[T]:
    """Iterate over the objects of a type in a function: itself, its closures, partials, methods and attributes."""
    seen: dict[int, object] = {}
    waiting = [function]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, kind):
            yield thing
        if not isinstance(thing, nn.Module | type):
            waiting += _contents(thing)


def _contents(thing: Any) -> list[object]:
    if isinstance(thing, types.FunctionType):
        variables = inspect.getclosurevars(thing)
        modules = [value for value in variables.globals.values() if isinstance(value, nn.Module)]
        return [*variables.nonlocals.values(), *modules]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__, *getattr(thing.__self__, "__dict__", {}).values()]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    return list(vars(thing).values()) if callable(thing) and hasattr(thing, "__dict__") else []
