"""The result of a function of an operator, applied to vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit.results.eigen import Status
from hvpkit.results.plain_data import LONG
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns


@dataclass(frozen=True, repr=False)
class FunctionResult(Result):
    """A function of an operator, applied to vectors: f(H) b.

    Attributes:
        x: shaped like b.
        error_estimate: of the Euclidean norm of the error: a float, or for b ``[n, k]`` a tensor ``[k]``, float64 on
            the CPU. It is the change over the last steps, and what rounding may change; no bound.
        num_matvecs: full-data matvecs spent.
        status: why it stopped: of several vectors, that of the worst.
        message: the status in words, with the remedy.
        seconds: wall time.
    """

    x: Tree = field(metadata=LONG)
    error_estimate: float | Tensor
    num_matvecs: float
    status: Status
    message: str
    seconds: float

    @property
    def converged(self) -> bool:
        """True if each error estimate is at most ``tol`` times the norm of the result."""
        return self.status.converged

    def _columns(self) -> Columns:
        return {
            "error_estimate": torch.as_tensor(self.error_estimate, device="cpu").double().flatten().tolist()
        }

    def __repr__(self) -> str:
        worst = float(torch.as_tensor(self.error_estimate, device="cpu").max())
        return f"<FunctionResult: {self.status}, error about {worst:.2g}, {self.num_matvecs:g} matvecs>"
