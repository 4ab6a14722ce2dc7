"""Operators that differ from a given one in behaviour, and not in what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import hvpkit as hk


def variant(op: hk.LinearOperator, **attributes: Any) -> hk.LinearOperator:
    """The operator with other attributes of its class, such as ``precision``; functions do not get the operator."""
    functions = {name: staticmethod(value) for name, value in attributes.items() if callable(value)}
    subclass = type(type(op).__name__, (type(op),), attributes | functions)
    return subclass(**{field.name: getattr(op, field.name) for field in fields(op)})


def explained(op: hk.LinearOperator, explain: Callable[[Tensor], str]) -> hk.LinearOperator:
    """The operator, whose message about NaN is ``explain`` of the first vector ``[n]`` with such a product."""

    def blame(vectors: Tensor) -> str:
        finite = torch.isfinite(op.product(vectors)).all(dim=0).tolist()
        return explain(vectors[:, finite.index(False) if False in finite else 0])

    return variant(op, blame=blame)
