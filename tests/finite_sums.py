"""Means of small matrices that can draw minibatches of themselves: what stochastic solvers are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import hvpkit as hk
from problems import matrix


def mean_of(matrices: Tensor, share: float = 1.0) -> hk.LinearOperator:
    """The mean of ``[N, n, n]``, whose samples are means of random subsets."""
    total = len(matrices)

    def sample(num_examples: int, seed: int) -> hk.LinearOperator:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed % 2**62))
        return mean_of(matrices[order[:num_examples]], share * num_examples / total)

    op = hk.aslinearoperator(matrices.mean(0))
    return replace(op, sample=sample, num_examples=total, cost=share)


def scattered(
    values: Sequence[float],
    *,
    num_examples: int = 64,
    noise: float = 0.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensor:
    """``[N, n, n]`` symmetric matrices that differ by ``noise`` in norm, and whose mean has these eigenvalues."""
    center = matrix(list(values), seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    scatter = torch.randn(num_examples, *center.shape, generator=g, dtype=torch.float64)
    scatter = (scatter + scatter.mT) / (8 * len(center)) ** 0.5 * noise
    return (center + scatter - scatter.mean(0)).to(dtype)
