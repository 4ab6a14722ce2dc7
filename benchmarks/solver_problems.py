"""Operators to measure solvers on: prescribed spectra of size 1,000 to 2,000, and small trained networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.zoo import digits, digits_cnn, train_classifier

cross_entropy = partial(F.cross_entropy, reduction="none")


def _wigner(n: int) -> np.ndarray:
    """Eigenvalues of a Gaussian symmetric matrix with its semicircle on [-1, 1]."""
    g = np.random.default_rng(0).standard_normal((n, n))
    return np.linalg.eigvalsh((g + g.T) / np.sqrt(8 * n))


def spectra() -> dict[str, np.ndarray]:
    """Prescribed spectra: what Hessians look like, and what is hard about them, one at a time."""
    rng, linspace = np.random.default_rng(1), np.linspace
    return {
        "indefinite": np.r_[-5, linspace(-1, 1, 998), 20],
        "negative dominant": np.r_[-50, linspace(-1, 1, 998), 2],
        "clustered ends": np.r_[-0.5, -0.47, -0.45, linspace(-0.2, 1, 1500), 30, 100],
        "bulk with outliers": np.r_[-0.05, linspace(-0.02, 0.3, 1997), 50, 80],
        "late training": np.r_[
            -0.5,
            -0.4,
            -0.35,
            -rng.exponential(0.03, 900),
            rng.exponential(0.1, 1100),
            linspace(5, 30, 8),
            100,
        ],
        "wigner": _wigner(800),
        "wigner with outliers": np.r_[_wigner(800), 10, 20, -1.2],
        "decaying": 50 * 2.0 ** -np.arange(200.0) - 1e-3,
        "multiple ends": np.r_[[-2.0] * 3, linspace(-1, 1, 994), [3.0] * 3],
    }


def diagonal(values: np.ndarray) -> hk.LinearOperator:
    """A diagonal operator: products cost nothing, and random starts make it as good as any other."""
    entries = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return hk.LinearOperator(
        lambda v: entries[:, None] * v, len(entries), entries.dtype, entries.device, name="diagonal"
    )


def _early(data: tuple[Tensor, Tensor]) -> nn.Module:
    model = digits_cnn()
    train_classifier(model, data, max_epochs=2)
    return model


def _late(data: tuple[Tensor, Tensor]) -> nn.Module:
    model = digits_cnn()
    train_classifier(model, data)
    return model


def _dense(data: tuple[Tensor, Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
        )
    train_classifier(model, data, max_epochs=6)
    return model


NETWORKS: dict[str, Callable[[tuple[Tensor, Tensor]], nn.Module]] = {
    "digits CNN, 2 epochs": _early,
    "digits CNN, trained": _late,  # the smallest end a thousandth of the largest
    "dense network, 6 epochs": _dense,
}


def networks() -> Iterator[tuple[str, hk.LinearOperator]]:
    """Hessians over all digits, float32."""
    data = digits()
    for name, make in NETWORKS.items():
        objective, params = hk.from_module(make(data), cross_entropy)
        yield name, hk.hessian(objective, params, data, batch_size=600)
