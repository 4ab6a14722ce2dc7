r"""Random probes: vectors :math:`\omega` with :math:`E\,\omega\omega' = I`, each a function of a seed and its number.

``"rademacher"``: signs. Quadratic forms have the variance :math:`2 \sum_{i \ne j} a_{ij}^2`, the smallest of
independent entries. ``"gaussian"``: normal entries, :math:`2 \|A\|_F^2`. ``"sphere"``: uniform on the sphere of radius
:math:`\sqrt n`, :math:`2 (\|A\|_F^2 - (\operatorname{tr} A)^2 / n)\, n / (n + 2)`: the spread of the spectrum,
whatever its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit._utils.random import generator
from hvpkit.operators.base import LinearOperator

KINDS = ("rademacher", "gaussian", "sphere")

UNIT = "unit"
"""The kind of probes that are the columns of the identity, in random order without repetition."""


def draw(op: LinearOperator, kind: str, seed: int, numbers: range) -> Tensor:
    """Return the probes of these numbers as rows ``[len(numbers), n]``, independent of which others are drawn."""
    if kind == UNIT:
        rows = torch.zeros(len(numbers), op.n, dtype=op.dtype, device=op.device)
        rows[range(len(numbers)), unit_order(op.n, seed)[numbers.start : numbers.stop]] = 1
        return op.space.local(rows.mT).mT
    return torch.stack([_one(op, kind, seed, number) for number in numbers])


def unit_order(n: int, seed: int) -> Tensor:
    """Return the index of the one in each unit probe, ``[n]``."""
    return torch.randperm(n, generator=generator(seed), device="cpu")


def _one(op: LinearOperator, kind: str, seed: int, number: int) -> Tensor:
    like = torch.empty(0, dtype=op.dtype, device=op.device)
    vector = op.space.random(op.n, like=like, seed=seed, stream=number)
    if kind == "rademacher":
        return torch.ones_like(vector).copysign_(vector)
    if kind == "sphere":
        vector = vector * (op.n**0.5 / op.space.norm(vector))
    return vector
