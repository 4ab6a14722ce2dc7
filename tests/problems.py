"""Shared test problems: small networks, and matrices with prescribed spectra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.operators.space import Space

cross_entropy = partial(F.cross_entropy, reduction="none")


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TiedEmbedding(nn.Module):
    """Token scores by the same matrix that embeds tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.scores = nn.Linear(4, 7, bias=False)
        self.scores.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))


class Unused(nn.Module):
    """A network with a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(4, 3), nn.Linear(2, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    return model


def _conv(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), norm(), nn.GELU(), nn.Conv2d(3, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )


def _tokens(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (n, 5), generator=g)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), 3),
    "conv_batchnorm": (lambda: _conv(lambda: nn.BatchNorm2d(3)), (1, 5, 5), 3),
    "conv_layernorm": (lambda: _conv(lambda: nn.LayerNorm([3, 3, 3])), (1, 5, 5), 3),
    "conv_groupnorm": (lambda: _conv(lambda: nn.GroupNorm(3, 3)), (1, 5, 5), 3),
    "gru": (Gru, (4, 3), 3),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Tanh(), nn.Linear(15, 3)),
        (),
        3,
    ),
    "attention": (Attention, (3, 4), 3),
    "encoder_layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, 0.1, "gelu", batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        (3, 4),
        3,
    ),
    "tied_weights": (TiedEmbedding, (), 7),
    "unused_parameter": (Unused, (4,), 3),
    "frozen_parameter": (_frozen, (4,), 3),
}


@dataclass(frozen=True)
class Problem:
    """A module in float64 with warm running statistics, its objective, parameters and data."""

    model: nn.Module
    objective: hk.Objective
    params: dict[str, Tensor]
    data: tuple[Tensor, Tensor]


def network(name: str, *, num_examples: int = 13, seed: int = 0) -> Problem:
    make, shape, classes = NETWORKS[name]
    g = torch.Generator().manual_seed(seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make().double()
    x = (
        torch.randn(num_examples, *shape, generator=g, dtype=torch.float64)
        if shape
        else _tokens(num_examples, g)
    )
    y = torch.randint(0, classes, (num_examples,), generator=g)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=g)
            module.running_var.uniform_(0.5, 2.0, generator=g)
    return Problem(model, *hk.from_module(model, cross_entropy), (x, y))


def _bulk(n: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, n, dtype=torch.float64).tolist()


SPECTRA: dict[str, list[float]] = {
    "indefinite": [-5.0, *_bulk(98, -1, 1), 20.0],
    "negative_dominant": [-50.0, *_bulk(98, -1, 1), 2.0],
    "clustered": [*_bulk(97, 0, 0.5), 1.0, 1.0 + 1e-4, 1.0 + 2e-4],
    "multiple": [-2.0] * 3 + _bulk(94, -1, 1) + [3.0] * 3,
    "rank_deficient": [0.0] * 90 + _bulk(10, 1, 10),
    "bulk_with_outliers": [-0.05, *_bulk(297, -0.02, 0.3), 50.0, 80.0],
    "decaying": [2.0**-i for i in range(40)],
    "identity": [1.0] * 20,
    "zero": [0.0] * 15,
    "n1": [-2.0],
    "n2": [-1.0, 2.0],
    "n3": [1.0, 2.0, 3.0],
}


def matrix(values: list[float], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    n = len(values)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    dense = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.mT
    return ((dense + dense.mT) / 2).to(dtype)


def reducing(function: Callable[[Tensor], Tensor]) -> Space:
    """Return a space in which a function is applied to each sum over the entries, as ranks add theirs up."""
    return type("Reducing", (Space,), {"reduce": lambda _, share: function(share)})()
