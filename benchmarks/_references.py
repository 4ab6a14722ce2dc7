"""Reference values of the comparisons, computed independently, and errors of answers.

References come from float64 products by double backward in plain torch, without a line of hvpkit or of its peers: from
the dense matrix where it is small, otherwise from a plain Lanczos recurrence. Only the trace and the density of larger
matrices are hvpkit's own, with many more probes than the answers that are compared with them. They are kept in
``results/references.json`` with a digest of the parameters that they belong to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpkit as hk
from _harness import RESULTS, digest, write
from _problems import Problem, hessian, load

FILE = RESULTS / "references.json"

TOL = {"gradient": 1e-3, "product": 1e-3, "extremes": 1e-2, "top5": 1e-2, "trace": 5e-2, "density": 1e-2}
"""Relative errors; of a density, Wasserstein's distance over the span of the spectrum."""

DENSE = 2000
"""The most parameters for which the matrix is written out."""

NUM_SKETCHES = 32
"""Random vectors by which a vector is known."""


class Batches(Protocol):
    """Batches that together are all examples."""

    @property
    def num_examples(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def probe(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the vector ``[n]`` that all libraries multiply."""
    return torch.randn(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def sketch(v: Tensor) -> list[float]:
    """Return inner products of ``v`` with fixed random vectors: they keep norms of differences, in little space."""
    g = torch.Generator().manual_seed(8)
    signs = torch.randint(2, (NUM_SKETCHES, len(v)), generator=g).to(torch.float64) * 2 - 1
    found: list[float] = (signs @ v.detach().to(torch.float64)).tolist()
    return found


def join(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def gradients(model: nn.Module, batches: Batches, *, create_graph: bool = False) -> Iterator[Tensor]:
    """Yield the share of each batch in the gradient ``[n]`` of the mean loss, by plain torch."""
    for x, y in batches:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(x), y) * (len(y) / batches.num_examples)
            yield join(torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph))


def plain_product(model: nn.Module, batches: Batches, v: Tensor) -> Tensor:
    """Return H v ``[n]`` by double backward in plain torch."""
    total = torch.zeros_like(v)
    for gradient in gradients(model, batches, create_graph=True):
        total += join(torch.autograd.grad(gradient, list(model.parameters()), v))
    return total


def dense(problem: Problem, file: Path) -> Tensor:
    """Return all eigenvalues, ascending, of the matrix written out row by row; kept in a file, as it takes minutes."""
    if not file.exists():
        matrix = torch.zeros(problem.n, problem.n, dtype=torch.float64)
        params = list(problem.model.parameters())
        for gradient in gradients(problem.model, problem, create_graph=True):
            for row, entry in enumerate(gradient):
                matrix[row] += join(torch.autograd.grad(entry, params, retain_graph=True))
        torch.save(torch.linalg.eigvalsh((matrix + matrix.mT) / 2), file)
    values: Tensor = torch.load(file, weights_only=True)
    return values


def pick(values: np.ndarray, task: str) -> np.ndarray:
    """Return the indices of both ends, or of the five largest in magnitude, of ascending values ``[m]``."""
    if task == "extremes":
        return np.array([0, len(values) - 1])
    return np.argsort(-np.abs(values), kind="stable")[:5]


def krylov(problem: Problem, task: str, seed: int, max_steps: int = 300) -> tuple[list[float], int]:
    """Return values by plain Lanczos with full reorthogonalisation, and the steps that reach half of tol."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(problem.n, generator=g, dtype=torch.float64)
    basis, alphas, betas, found = [v / v.norm()], [], [], []
    for _ in range(max_steps):
        w = plain_product(problem.model, problem, basis[-1])
        alphas.append(float(w @ basis[-1]))
        rows = torch.stack(basis)
        for _ in range(2):
            w = w - rows.mT @ (rows @ w)
        betas.append(float(w.norm()))
        basis.append(w / betas[-1])
        values, vectors = eigh_tridiagonal(alphas, betas[:-1])
        chosen = pick(values, task)
        found.append(values[chosen])
        bounds = betas[-1] * np.abs(vectors[-1, chosen])
        if len(values) >= 10 and bool((bounds <= 1e-4 * np.abs(values[chosen])).all()):
            break
    else:
        raise RuntimeError(f"{problem.name}: no reference of {task} in {max_steps} steps")
    off = [len(row) < len(found[-1]) or (relative_errors(row, found[-1]) > TOL[task] / 2) for row in found]
    return found[-1].tolist(), len(off) - off[::-1].index(True) + 1


def relative_errors(found: Any, truth: Any) -> float:
    """Return the worst relative error of several numbers; infinity if they are not finite or not as many."""
    found, truth = np.asarray(found, float), np.asarray(truth, float)
    if found.shape != truth.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.max(np.abs(found - truth) / np.abs(truth)))


def grouped(values: Tensor, alone: int = 60, groups: int = 300) -> dict[str, list[float]]:
    """Return points and weights of a spectrum: the ends one by one, the middle in groups of neighbours."""
    if len(values) <= 2 * alone + groups:
        return {"points": values.tolist(), "weights": [1 / len(values)] * len(values)}
    middle = np.array_split(values[alone:-alone].numpy(), groups)
    points = [*values[:alone].tolist(), *(float(part.mean()) for part in middle), *values[-alone:].tolist()]
    weights = [1.0] * alone + [float(len(part)) for part in middle] + [1.0] * alone
    return {"points": points, "weights": [weight / len(values) for weight in weights]}


def of_spectrum(problem: Problem, task: str, cache: Path) -> dict[str, Any]:
    """Return the reference of a task that eigenvalues answer."""
    small = problem.n <= DENSE
    values = dense(problem, cache / f"eigenvalues_{digest(problem.model)}.pt") if small else None
    if task in ("extremes", "top5"):
        runs = [krylov(problem, task, seed) for seed in range(3 if small else 1)]
        if values is None:
            return {"by": "Lanczos", "value": runs[0][0], "steps": runs[0][1]}
        truth = values[torch.from_numpy(pick(values.numpy(), task)).long()].tolist()
        assert all(relative_errors(run[0], truth) < 1e-4 for run in runs), "Lanczos disagrees with the matrix"
        return {"by": "dense", "value": truth, "steps": max(steps for _, steps in runs)}
    if values is not None and task == "trace":
        return {"by": "dense", "value": float(values.sum())}
    if values is not None:
        moments = {"mean": float(values.mean()), "second_moment": float(values.square().mean())}
        return {"by": "dense", "value": moments | grouped(values)}
    H = hessian(problem)
    if task == "trace":
        found = hk.trace(H, method="xtrace", num_matvecs=600, seed=99)
        return {"by": "hk.trace, XTrace, 600 products", "value": found.value, "stderr": found.stderr}
    density = hk.spectral_density(H, num_steps=80, num_probes=8, seed=99)
    kept = density.weights > 1e-9
    points, weights = density.nodes[kept], density.weights[kept]
    moments = {"mean": float(weights @ points), "second_moment": float(weights @ points**2)}
    value = moments | {"points": points.tolist(), "weights": weights.tolist()}
    return {"by": "hk.spectral_density, 8 probes", "value": value}


def of_vector(problem: Problem, task: str, _cache: Path) -> dict[str, Any]:
    """Return the reference of a product or of the gradient, by its sketch."""
    if task == "gradient":
        exact = sum(gradients(problem.model, problem), torch.zeros(problem.n, dtype=torch.float64))
    else:
        exact = plain_product(problem.model, problem, probe(problem.n).double())
    return {"by": "plain torch", "value": sketch(exact)}


def known_of(name: str, own: str) -> dict[str, Any]:
    """Return the references in the file, without those of other parameters of this problem."""
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    if known.get(name, {}).get("parameters") != own:
        known[name] = {"parameters": own}
    return known


def reference(name: str, task: str, cache: Path) -> dict[str, Any]:
    """Return a reference from the file; compute and store it if the parameters are others."""
    own = digest(load(name, cache).model)
    known = known_of(name, own)
    if task not in known[name]:
        print(f"{name}: computing the reference of {task}", flush=True)
        make = of_vector if task in ("gradient", "product") else of_spectrum
        made = make(load(name, cache, torch.float64), task, cache)
        known = known_of(name, own)  # again, as that took minutes
        known[name][task] = made
        write(FILE, known)
    found: dict[str, Any] = known[name][task]
    return found


def error(task: str, answer: Any, truth: Any, n: int) -> float:
    """Return the relative error of an answer; infinity if it is not finite or not of the right shape."""
    if task in ("gradient", "product"):
        if answer.numel() != n:
            return math.inf
        found, exact = np.array(sketch(answer.flatten())), np.array(truth)
        value = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    elif task == "density":
        value = density_error(*answer, truth, n)
    else:
        value = relative_errors(sorted(np.atleast_1d(answer)), sorted(np.atleast_1d(truth)))
    return value if math.isfinite(value) else math.inf


def density_error(points: Any, weights: Any, truth: dict[str, Any], n: int) -> float:
    r"""Return Wasserstein's distance over the span; more if the mean is more than five standard errors off.

    One random direction has a mean of variance :math:`2 (E \lambda^2 - (E \lambda)^2) / (n + 2)`.
    """
    points, weights = np.asarray(points, float), np.asarray(weights, float)
    if not (np.isfinite(points).all() and np.isfinite(weights).all() and weights.sum() > 0):
        return math.inf
    weights = np.maximum(weights, 0) / np.maximum(weights, 0).sum()
    span = max(truth["points"]) - min(truth["points"])
    distance = wasserstein_distance(points, truth["points"], weights, truth["weights"]) / span
    stderr = math.sqrt(2 * (truth["second_moment"] - truth["mean"] ** 2) / (n + 2))
    return max(distance, TOL["density"] * abs(float(weights @ points) - truth["mean"]) / (5 * stderr))
