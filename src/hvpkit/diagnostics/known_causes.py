"""Which modules are known to make which check of an operator fail, and what to do about it."""

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
        checks: which.
        fits: whether a module is of that kind.
        mend: what to do about it.
    """

    checks: tuple[str, ...]
    fits: Callable[[nn.Module], bool]
    mend: str


def _drops(module: nn.Module) -> bool:
    """Whether calls draw random numbers."""
    if isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return True
    rate = getattr(module, "p", 0.0) if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(rate, float) and rate > 0))


def _goes_by_the_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _normalises_weights(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return type(module) is _WeightNorm or any(isinstance(hook, WeightNorm) for hook in hooks)


SUSPECTS = (
    Suspect(
        ("repeatable",),
        _drops,
        "call model.eval() before products are made, or take the loss from hvpkit.from_module, where dropout is off",
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
        "to torch's forward mode its row of padding is no constant: make products by hvpkit.hessian, or set that "
        "row of each vector to zero",
    ),
    Suspect(
        ("symmetric", "differences"),
        _normalises_weights,
        "torch's second derivative of weight_norm is wrong: make products by hvpkit.hessian, which writes it out, "
        "of a model with torch.nn.utils.parametrizations.weight_norm",
    ),
    Suspect(
        ("symmetric", "differences"),
        lambda module: isinstance(module, nn.LayerNorm | _InstanceNorm) or _goes_by_the_batch(module),
        "torch's jvp of jacrev, torch.func.hessian and grad of jvp are wrong through it: make products by "
        "hvpkit.hessian, or as torch.func.jvp of torch.func.grad",
    ),
    Suspect(
        ("batching",),
        _goes_by_the_batch,
        'take running statistics, batchnorm="eval", or say that the batches are fixed, batchnorm="batch"',
    ),
)


MENDS = {
    "data order": "give the same examples in the same order in each pass: a sampler or augmentation with random "
    "numbers of its own has to seed them when a pass begins",
    "finite": "look there for such inputs, a logarithm or square root at 0, or an overflow",
    "repeatable": "make the loss a pure function of its arguments: no random numbers, no state that calls change",
    "linear": 'products have few digits: make them in float64, with arithmetic="native", and not by finite '
    "differences, which are wrong across kinks as those of ReLU",
    "symmetric": "make a Hessian by hvpkit.hessian, try another mode, look at custom autograd functions; of a matrix "
    "take (A + A.T) / 2",
    "differences": "try another mode; look at custom autograd functions and at what the loss detaches; if this check "
    "passes in float64, the products of this dtype have few digits",
    "batching": "where differences fails too, look at that first; return one loss for each example, [B], whatever "
    "other examples are in its batch; in a mean over batches, weigh each by the examples that it holds",
    "constants": "compute the loss from its params argument (torch.func.functional_call, hvpkit.from_module); where "
    "these parameters are meant to be fixed, say so by requires_grad_(False) or detach()",
}
"""What to do about a check that failed, where no module is suspected."""


def find_suspects(check: str, loss_fn: object) -> tuple[tuple[str, ...], str]:
    """Of the modules that ``loss_fn`` holds, the names of those that may make ``check`` fail; and what to do."""
    found = {}
    for model in held(loss_fn, nn.Module):
        for name, module in model.named_modules():
            for suspect in SUSPECTS:
                if check in suspect.checks and suspect.fits(module):
                    found[f"{name} ({type(module).__name__})".lstrip()] = suspect.mend
    return tuple(found), "; ".join(dict.fromkeys(found.values())) or MENDS[check]


def held(function: object, kind: type[T]) -> Iterator[T]:
    """The objects of a kind among a function and what it holds: in closures, partials, methods, attributes."""
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
