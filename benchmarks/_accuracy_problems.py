"""Problems of bench_accuracy.py: perceptrons along training, prescribed spectra, trained networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bench_tracking
import hvpkit as hk
from _harness import save
from _problems import MODE, RECIPES, available, cached, diagonal, hessian, load, over, spectra
from _references import reference
from _training import Data
from hvpkit.zoo import digits
from hvpkit.zoo.seeding import seeded
from interval_coverage import SHAPES

TOL, ATOL = 1e-2, 1e-5
NUM_EPOCHS = 20
NUM_DRAWS = 5
"""Spectra of a family in each dtype."""

STEPS = (10, 20, 30, 45, 60, 100, 200, 400, 800, 1600)
"""Steps of training after which the Hessian is a problem; the second eigenvalue is nearest to the first in the first
hundred."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD": partial(torch.optim.SGD, lr=0.5),
    "Adam": partial(torch.optim.Adam, lr=3e-3),
}


@dataclass(frozen=True)
class Case:
    """An operator and its ends.

    Attributes:
        ends: the smallest and the largest eigenvalue.
        make: makes the operator.
        spectrum: all eigenvalues ``[n]``, where they are known.
    """

    ends: tuple[float, float]
    make: Callable[[], hk.LinearOperator]
    spectrum: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """A perceptron with tanh and how it is trained, in batches of 64."""

    hidden: tuple[int, ...]
    optimizer: str
    seed: int
    num_examples: int

    @property
    def name(self) -> str:
        """Widths, optimiser and seed."""
        return f"{'-'.join(map(str, (64, *self.hidden, 10)))}, {self.optimizer}, seed {self.seed}"

    def data(self) -> Data:
        """Return the first digits, standardised ``[num_examples, 64]``, float64."""
        x, y = digits()
        x = x[: self.num_examples].flatten(1).double()
        return (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-6), y[: self.num_examples]

    def model(self) -> nn.Module:
        """Return the perceptron, initialised from torch's global random state."""
        layers: list[nn.Module] = []
        for one, other in pairwise((64, *self.hidden, 10)):
            layers += [nn.Linear(one, other), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()

    def states(self) -> list[dict[str, Tensor]]:
        """Train; return the parameters after each of ``STEPS``."""
        (x, y), found = self.data(), []
        with seeded(self.seed):
            model = self.model()
            optimizer = OPTIMIZERS[self.optimizer](model.parameters())
            for step in range(1, max(STEPS) + 1):
                chosen = torch.randint(len(x), (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
                if step in STEPS:
                    found.append({key: value.clone() for key, value in model.state_dict().items()})
        return found

    def hessian(self, state: dict[str, Tensor]) -> hk.LinearOperator:
        """Return the Hessian at parameters."""
        model = self.model()
        model.load_state_dict(state)
        return over(model, self.data(), batch_size=self.num_examples, mode=MODE)


SMALL = [
    Training((16,), optimizer, seed, 1500)
    for optimizer, seeds in {"momentum": 8, "SGD": 3, "Adam": 4}.items()
    for seed in range(seeds)
]
LARGE = [
    Training(hidden, optimizer, 0, 1797)
    for hidden, optimizer in (
        ((40,), "Adam"),
        ((60,), "momentum"),
        ((32, 32), "momentum"),
        ((38, 38), "Adam"),
    )
]


def along_training(training: Training, cache: Path) -> list[Case]:
    """Return the Hessians along a training run; their spectra are of the dense matrices."""

    def compute() -> list[tuple[dict[str, Tensor], Tensor]]:
        return [(state, dense_spectrum(training.hessian(state))) for state in training.states()]

    return [
        Case((float(spectrum[0]), float(spectrum[-1])), partial(training.hessian, state), spectrum)
        for state, spectrum in kept(cached(cache, f"spectra {training.name}"), compute)
    ]


def dense_spectrum(H: hk.LinearOperator) -> Tensor:
    """Return all eigenvalues, ascending."""
    columns = torch.eye(H.n, dtype=H.dtype).split(64, dim=1)
    matrix = torch.cat([H.product(some.contiguous()) for some in columns], dim=1)
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)


def kept(file: Path, compute: Callable[[], Any]) -> Any:
    """Return what a file holds; compute and save it if there is none."""
    if not file.exists():
        save(file, compute())
    return torch.load(file, weights_only=True)


def near_pairs(distance: float, rng: np.random.Generator) -> np.ndarray:
    """Return a spectrum with two eigenvalues at either end, that many tol from each other."""
    inner = 1 - distance * TOL
    return np.r_[-1, -inner, rng.uniform(-0.8, 1, 996), 10 * inner, 10]


def near_groups(rng: np.random.Generator) -> np.ndarray:
    """Return a spectrum with ten eigenvalues within three tol at either end."""
    return np.r_[
        -1 + 3 * TOL * rng.uniform(0, 1, 10), rng.uniform(-0.8, 1, 980), 10 - 0.3 * rng.uniform(0, 1, 10)
    ]


def power_law(exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Return a spectrum that decays from both ends, the lower a tenth as large."""
    ranks = np.arange(1, 501.0) ** -exponent
    return np.r_[ranks, -0.1 * ranks] * rng.uniform(0.9, 1.1, 1000)


def lehmer(n: int = 80) -> np.ndarray:
    """Return the eigenvalues of the matrix min(i, j) / max(i, j): positive, the smallest close to each other."""
    ranks = np.arange(1.0, n + 1)
    return np.linalg.eigvalsh(np.minimum.outer(ranks, ranks) / np.maximum.outer(ranks, ranks))


FAMILIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    **{name: lambda _, values=values: values for name, values in spectra().items()},
    **{f"random: {name}": partial(lambda shape, rng: shape(1000, rng)[:1000], shape) for name, shape in SHAPES.items()},
    **{f"pairs {distance:g} tol apart": partial(near_pairs, distance) for distance in (0.5, 1, 1.5, 2, 3)},
    "groups within 3 tol": near_groups,
    **{f"power law {exponent:g}": partial(power_law, exponent) for exponent in (0.5, 1, 2)},
    "Lehmer": lambda _: lehmer(),
    "positive, one zero": lambda rng: np.r_[0, rng.uniform(0.01, 1, 998), 5],
    "negative, many zeros": lambda rng: np.r_[-5, -rng.exponential(0.1, 499), np.zeros(500)],
    "tiny low end": lambda rng: np.r_[-1e-5, rng.exponential(0.1, 998), 30],
}  # fmt: skip
"""Spectra by a generator, of sizes 80 to 2,000."""


def prescribed(family: str) -> list[Case]:
    """Return diagonal operators of a family, in float64 and float32."""
    found = []
    for draw in range(NUM_DRAWS):
        values = torch.from_numpy(FAMILIES[family](np.random.default_rng(draw)))
        for spectrum in (values.double(), values.float()):
            ends = float(spectrum.min()), float(spectrum.max())
            found.append(Case(ends, partial(diagonal, spectrum), spectrum))
    return found


def trained(name: str, cache: Path) -> list[Case]:
    """Return the Hessian of a problem of ``_problems.RECIPES``, and its stored reference."""
    low, high = reference(name, "extremes", cache)["value"]
    return [Case((low, high), lambda: hessian(load(name, cache), batch_size=1000))]


def checkpoints(name: str, cache: Path) -> list[Case]:
    """Return the Hessians of a network's checkpoints; their ends by Lanczos at a tolerance a hundred times smaller."""
    operators = bench_tracking.operators(name, cache, NUM_EPOCHS)

    def compute() -> list[tuple[float, float]]:
        exact = [hk.extreme_eigenvalues(H, method="lanczos", tol=TOL / 100, seed=99) for H in operators]
        return [(ex.smallest.value, ex.largest.value) for ex in exact]

    ends = kept(cached(cache, f"ends {name}"), compute)
    return [Case(own, lambda H=H: H) for own, H in zip(ends, operators, strict=True)]


def problems() -> dict[str, dict[str, Callable[[Path], list[Case]]]]:
    """Return, by set and name, what makes the cases of a problem from the folder of the cache."""
    return {
        "small": {training.name: partial(along_training, training) for training in SMALL},
        "large": {training.name: partial(along_training, training) for training in LARGE},
        "spectra": {name: lambda _, name=name: prescribed(name) for name in FAMILIES},
        "trained": {
            **{name: partial(trained, name) for name in [*RECIPES][:7] if name in available()},
            **{f"{name}, epochs": partial(checkpoints, name) for name in bench_tracking.NAMES},
        },
    }
