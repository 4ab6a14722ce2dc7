"""Test operators for stochastic solvers: means of small matrices that can draw minibatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import hvpkit as hk
from problems import matrix


@dataclass(frozen=True, eq=False, repr=False)
class SampledMatrix(hk.LinearOperator):
    """An operator with minibatches, as stochastic solvers need it."""

    num_examples: int = 1
    sample: Callable[[int, int], hk.LinearOperator] | None = None


def mean_of(matrices: Tensor, share: float = 1.0) -> SampledMatrix:
    """The mean of ``[N, n, n]``, whose samples are means of random subsets."""
    total = len(matrices)

    def sample(num_examples: int, seed: int) -> hk.LinearOperator:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed % 2**62))
        return mean_of(matrices[order[:num_examples]], share * num_examples / total)

    mean = matrices.mean(0)
    return SampledMatrix(
        lambda v: mean @ v, len(mean), mean.dtype, mean.device, num_examples=total, sample=sample, cost=share
    )


def scattered(
    values: Sequence[float],
    *,
    num_examples: int = 64,
    noise: float = 0.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensor:
    """Draw symmetric ``[N, n, n]`` whose mean has these eigenvalues, each at distance ``noise`` from it in norm."""
    center = matrix(list(values), seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    scatter = torch.randn(num_examples, *center.shape, generator=g, dtype=torch.float64)
    scatter = (scatter + scatter.mT) / (8 * len(center)) ** 0.5 * noise
    return (center + scatter - scatter.mean(0)).to(dtype)


@dataclass
class Tally:
    """Recorder of the matvecs of an operator and of its minibatches.

    ``bad`` tells which matvecs, counted from 1, return NaN in the last column; ``suspects`` are the vectors there.
    ``products`` lists the number of examples and of columns of each, ``residuals`` the norms of those with all data.
    """

    op: hk.LinearOperator
    bad: Callable[[int], bool] = lambda _: False
    products: list[tuple[int, int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    suspects: list[Tensor] = field(default_factory=list)

    @property
    def cost(self) -> float:
        return sum(examples * columns for examples, columns in self.products) / self.op.num_examples

    def operator(self) -> hk.LinearOperator:
        def sample(num_examples: int, seed: int) -> hk.LinearOperator:
            self.seeds.append(seed)
            return self._noted(self.op.sample(num_examples, seed))

        return replace(self._noted(self.op), sample=sample)

    def _noted(self, op: hk.LinearOperator) -> hk.LinearOperator:
        def product(vectors: Tensor) -> Tensor:
            self.products.append((op.num_examples, vectors.shape[1]))
            images = op.product(vectors)
            if self.bad(len(self.products)):
                images[0, -1] = float("nan")
                self.suspects.append(vectors[:, -1].clone())
            if op.num_examples == self.op.num_examples:
                rest = images - vectors * (vectors * images).sum(dim=0)
                self.residuals.append(float(torch.linalg.matrix_norm(rest)))
            return images

        return replace(op, product=product)
