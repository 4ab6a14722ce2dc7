"""What estimates of many seeds must be: unbiased, with standard errors that are the spread."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

import hvpkit as hk

SPREAD = (0.8, 1.25)


def z_score(values: Tensor, truth: float) -> float:
    """Of the mean of values ``[seeds]``; normal if they are unbiased."""
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


def calibration(values: Tensor, stderrs: Tensor) -> float:
    """Reported standard errors over the observed spread, of ``[seeds]`` or in norm of ``[seeds, n]``."""
    return float((stderrs.square().mean(dim=0).sum() / values.var(dim=0).sum()).sqrt())


@dataclass
class Counting:
    """A matrix whose products are counted and written down, and are not finite once ``good`` columns are through."""

    A: Tensor
    good: float = float("inf")
    bad: float = float("nan")
    widths: list[int] = field(default_factory=list)

    def product(self, v: Tensor) -> Tensor:
        through = sum(self.widths)
        self.widths.append(v.shape[1])
        image = self.A @ v
        image[:, [column for column in range(v.shape[1]) if through + column >= self.good]] = self.bad
        return image

    def operator(self, cost: float = 1.0) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product, cost=cost)


def diagonal_operator(entries: Tensor) -> hk.LinearOperator:
    return hk.LinearOperator(lambda v: entries[:, None] * v, len(entries), entries.dtype, entries.device)
