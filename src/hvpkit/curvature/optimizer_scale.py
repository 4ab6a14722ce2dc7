r"""The diagonal that an adaptive optimizer divides its momentum by, from its state.

With :math:`\theta_{t+1} = \theta_t - \eta D_t^{-1} \hat m_t` for a bias-corrected mean :math:`\hat m` of gradients, as
``torch.optim`` computes it: v is ``exp_avg_sq`` (``square_avg``, ``sum``) and :math:`\hat v = v / (1 - \beta_2^t)`.

==========================  ==================================================================================
Adam, AdamW, NAdam          :math:`\sqrt{\hat v} + \epsilon`; with ``amsgrad`` of the largest v so far
Adamax                      :math:`u`, ``exp_inf``, which has :math:`\epsilon` in it
RAdam                       :math:`(\sqrt v + \epsilon) / (\sqrt{1 - \beta_2^t}\, r_t)` with the rectification r;
                            1 while its :math:`\rho_t \le 5`, where it does not adapt
RMSprop                     :math:`\sqrt v + \epsilon`; ``centered`` of :math:`v - \bar g^2`
Adagrad                     :math:`\sqrt v + \epsilon`
SGD                         1, with or without momentum
==========================  ==================================================================================

Source: the update rules of torch.optim, of arXiv:1412.6980, arXiv:1711.05101, arXiv:1908.03265 and
doi:10.5555/1953048.2021068.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.objective.fully_sharded import gathered
from hvpkit.operators.base import LinearOperator

State = dict[str, Any]


def _corrected(group: State, state: State, v: Tensor) -> Tensor:
    """Return v without the bias of its start at zero."""
    correction: Tensor = v.double() / (1 - group["betas"][1] ** float(state["step"]))
    return correction


def _adam(group: State, state: State) -> Tensor:
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return _corrected(group, state, v).sqrt() + float(group["eps"])


def _adamax(_: State, state: State) -> Tensor:
    largest: Tensor = state["exp_inf"].double()
    return largest


def _radam(group: State, state: State) -> Tensor:
    beta, t, v = group["betas"][1], float(state["step"]), state["exp_avg_sq"].double()
    limit = 2 / (1 - beta) - 1
    rho = limit - 2 * t * beta**t / (1 - beta**t)
    if rho <= 5:
        return torch.ones_like(v)
    rectified = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    found: Tensor = (v.sqrt() + group["eps"]) / (math.sqrt(1 - beta**t) * rectified)
    return found


def _rmsprop(group: State, state: State) -> Tensor:
    v = state["square_avg"].double()
    if group["centered"]:
        v = (v - state["grad_avg"].double().square()).clamp(min=0)
    found: Tensor = v.sqrt() + group["eps"]
    return found


def _adagrad(group: State, state: State) -> Tensor:
    found: Tensor = state["sum"].double().sqrt() + group["eps"]
    return found


FORMULAS: dict[type, tuple[str, Callable[[State, State], Tensor]]] = {
    AdamW: ("exp_avg_sq", _adam),
    Adam: ("exp_avg_sq", _adam),
    NAdam: ("exp_avg_sq", _adam),
    Adamax: ("exp_inf", _adamax),
    RAdam: ("exp_avg_sq", _radam),
    RMSprop: ("square_avg", _rmsprop),
    Adagrad: ("sum", _adagrad),
}
"""For each optimizer the entry of its state that the formula needs, and the formula; a subclass is as its class."""


def optimizer_scale(H: LinearOperator, optimizer: Optimizer) -> Tensor:
    """Return the diagonal D of an optimizer in the order of H's parameters, ``[n]``, float64.

    Raises:
        TypeError: H is not over parameters; an optimizer without a formula; complex parameters.
        ValueError: a parameter that the optimizer lacks, or has with other values, or has no state for, named.
    """
    if not isinstance(H, CurvatureOperator):
        raise TypeError(
            f"scale is an optimizer, whose state belongs to parameters, but {H!r} is not over parameters: pass its "
            "diagonal as a vector"
        )
    formula = next((FORMULAS[kind] for kind in FORMULAS if isinstance(optimizer, kind)), None)
    if formula is None and not isinstance(optimizer, SGD):
        known = ", ".join(kind.__name__ for kind in (*FORMULAS, SGD))
        raise TypeError(
            f"scale is a {type(optimizer).__name__}, whose formula is not known ({known} are): pass the diagonal that "
            "it divides by as a tree or a vector"
        )
    problem, places = H.terms[0][1].problem, _places(H, optimizer)
    if formula is None:
        return torch.ones(H.n, dtype=torch.float64, device=H.device)
    _check_order(H, optimizer, places)
    entry, of_state = formula
    theirs = _parameters(optimizer)
    found = [theirs[place] for place in places]
    missing = [
        name
        for name, (_, p) in zip(problem.layout.names, found, strict=True)
        if not _has_stepped(optimizer.state.get(p, {}), entry)
    ]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"scale: {type(optimizer).__name__} has no state for {', '.join(missing[:4])}{more}: it has not taken a "
            "step with a gradient of them; take one, or leave them out by wrt="
        )
    parts = [of_state(group, _whole(optimizer.state[p])).reshape(-1) for group, p in found]
    return torch.cat(parts).to(H.device)


def _whole(state: State) -> State:
    """Return the state of a parameter; of one of ``fully_shard`` all of it, gathered from all ranks."""
    return {key: gathered(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _has_stepped(state: State, entry: str) -> bool:
    """Return True if a parameter has taken a step; Adagrad makes its state before."""
    return entry in state and float(state.get("step", 1)) > 0


def _parameters(optimizer: Optimizer) -> list[tuple[State, Tensor]]:
    """Return the optimizer's parameters, each with its group."""
    return [(group, p) for group in optimizer.param_groups for p in group["params"]]


def _names(optimizer: Optimizer) -> list[str | None]:
    """Return the names of the optimizer's parameters; None where they were given without."""
    return [
        name
        for group in optimizer.param_groups
        for name in group.get("param_names") or [None] * len(group["params"])
    ]


def _places(H: CurvatureOperator, optimizer: Optimizer) -> list[int]:
    """Return the place of each leaf of H among the optimizer's parameters: by equal values, then name, then order.

    Raises:
        ValueError: there is none, or several and nothing to tell them apart.
    """
    problem, names = H.terms[0][1].problem, _names(optimizer)
    if any(problem.layout.spec.is_complex):
        raise TypeError("scale is an optimizer of complex parameters; pass its diagonal as a vector")
    values = [gathered(p.detach()) for _, p in _parameters(optimizer)]
    found: list[int] = []
    for name, leaf in zip(problem.layout.names, problem.leaves, strict=True):
        same = [
            place
            for place, p in enumerate(values)
            if p.shape == leaf.shape and torch.equal(p.to(leaf.device, leaf.dtype), leaf)
        ]
        if not same:
            raise ValueError(
                f"scale: the optimizer has no parameter with the values of {name!r}: make H of the parameters that it "
                "optimizes, after its last step"
            )
        twins = sum(torch.equal(leaf, other) for other in problem.leaves if other.shape == leaf.shape)
        named = [place for place in same if names[place] == name]
        if len(same) > twins and not named:
            raise _ambiguous(name)
        found.append(next(place for place in named or same if place not in found))
    return found


def _check_order(H: CurvatureOperator, optimizer: Optimizer, places: list[int]) -> None:
    """Raise ValueError if places of equal parameters were chosen by an order that is not the optimizer's."""
    if places == sorted(places):
        return
    problem, names = H.terms[0][1].problem, _names(optimizer)
    for name, leaf, place in zip(problem.layout.names, problem.leaves, places, strict=True):
        twins = sum(torch.equal(leaf, other) for other in problem.leaves if other.shape == leaf.shape)
        if twins > 1 and names[place] != name:
            raise _ambiguous(name)


def _ambiguous(name: str) -> ValueError:
    return ValueError(
        f"scale: several parameters of the optimizer have the values of {name!r}; give it names, as "
        "torch.optim.Adam(model.named_parameters())"
    )
