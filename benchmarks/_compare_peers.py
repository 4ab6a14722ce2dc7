"""One adapter for each library, which solves the tasks that the library offers by its public functions.

An adapter has a method for each task that its library offers. It takes a seed and an ``effort``: the number that the
user of that function has to choose (a tolerance, a number of steps or of matvecs). ``EFFORT`` lists the choices, which
are tried in turn until one gives the right answer; only that one is timed. ``"steps"`` is the number that a plain
Lanczos recurrence needs, known from the reference. ``HOW`` names the function that is called.

hessian-eigenthings' Lanczos takes a number of steps and reports afterwards whether they were enough. It is compared
twice: as its user can call it, with the steps doubled until they are enough, and given the number that is enough.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpkit as hk
from _problems import Problem
from _references import TOL, gradients, join, plain_product

Spectrum = tuple[Any, Any]
Effort = float | str


class OutOfPasses(RuntimeError):
    """A run has read more data than it may."""


class Counted:
    """Re-iterable batches of a problem, which count the examples that are read."""

    def __init__(self, problem: Problem, limit: float = math.inf) -> None:
        self.problem, self.limit, self.num_read = problem, limit, 0

    @property
    def num_examples(self) -> int:
        return self.problem.num_examples

    @property
    def passes(self) -> float:
        return self.num_read / self.num_examples

    def __len__(self) -> int:
        return self.num_examples // self.problem.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.problem:
            if self.passes >= self.limit:
                raise OutOfPasses(f"stopped after {self.passes:.0f} passes")
            yield x, y
            self.num_read += len(y)


@contextmanager
def derivable() -> Iterator[None]:
    """Set attention's backend that has a second derivative, which a peer's user has to know of."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Library:
    """Base of the adapters: a copy of the network, counted data, and passes over them."""

    NAME: ClassVar[str]
    PACKAGE: ClassVar[str]
    MODULE: ClassVar[str]
    EFFORT: ClassVar[dict[str, tuple[Effort, ...]]] = {}
    HOW: ClassVar[dict[str, str]] = {}

    def __init__(self, problem: Problem, limit: float = math.inf) -> None:
        self.problem = problem
        self.model: nn.Module = deepcopy(problem.model)
        self.data = Counted(problem, limit)
        self.build()

    def build(self) -> None:
        """Make the library's operator."""

    @property
    def passes(self) -> float:
        return self.data.passes

    @classmethod
    def missing(cls) -> bool:
        return importlib.util.find_spec(cls.MODULE) is None

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.PACKAGE)


class HvpKit(Library):
    NAME, PACKAGE, MODULE = "hvpkit", "hvpkit", "hvpkit"
    EFFORT: ClassVar = {"trace": (0.025,)}
    HOW: ClassVar = {
        "gradient": "hk.grad",
        "product": "hk.hessian(...) @ v",
        "extremes": "hk.extreme_eigenvalues(tol=1e-2)",
        "top5": 'hk.lanczos(5, which="LM", tol=1e-2, check_copies=False): no peer searches for copies',
        "trace": 'hk.trace(method="xtrace", tol={effort}), stops by its standard error',
        "density": "hk.spectral_density(num_steps=80)",
    }

    def build(self) -> None:
        self.objective, self.params = hk.from_module(self.model, F.cross_entropy)
        self.examples, self.spent = (self.problem.x, self.problem.y), 0.0
        self.H = hk.hessian(self.objective, self.params, self.examples, batch_size=self.problem.batch_size)

    @property
    def passes(self) -> float:
        return self.spent

    def gradient(self, _seed: int, _effort: Effort) -> Tensor:
        data = hk.as_data(self.examples, batch_size=self.problem.batch_size)
        self.spent += 1
        return self.H.flatten(hk.grad(self.objective, self.params, data))

    def product(self, v: Tensor, _effort: Effort) -> Tensor:
        self.spent += 1
        return self.H @ v

    def extremes(self, seed: int, _effort: Effort) -> list[float]:
        found = hk.extreme_eigenvalues(self.H, tol=1e-2, seed=seed)
        self.spent = found.num_matvecs
        return [found.smallest.value, found.largest.value]

    def top5(self, seed: int, _effort: Effort) -> list[float]:
        found = hk.lanczos(self.H, 5, which="LM", tol=1e-2, check_copies=False, seed=seed)
        self.spent = found.num_matvecs
        return found.values.tolist()

    def trace(self, seed: int, effort: Effort) -> float:
        found = hk.trace(self.H, method="xtrace", tol=float(effort), num_matvecs=400, seed=seed)
        self.spent = found.num_matvecs
        return found.value

    def density(self, seed: int, _effort: Effort) -> Spectrum:
        found = hk.spectral_density(self.H, num_steps=80, seed=seed)
        self.spent = found.num_matvecs
        return found.nodes, found.weights


class ArpackTasks(Library):
    """Eigenvalues by SciPy's ARPACK, for adapters with a SciPy operator."""

    EFFORT: ClassVar = {"extremes": (1e-2, 1e-3), "top5": (1e-2, 1e-3)}

    def scipy_operator(self) -> LinearOperator:
        raise NotImplementedError

    def _eigsh(self, k: int, which: str, seed: int, effort: Effort) -> list[float]:
        v0 = np.random.default_rng(seed).standard_normal(self.problem.n).astype(np.float32)
        found = eigsh(
            self.scipy_operator(), k, which=which, tol=float(effort), v0=v0, return_eigenvectors=False
        )
        return [float(value) for value in found]

    def extremes(self, seed: int, effort: Effort) -> list[float]:
        return self._eigsh(2, "BE", seed, effort)

    def top5(self, seed: int, effort: Effort) -> list[float]:
        return self._eigsh(5, "LM", seed, effort)


class Plain(ArpackTasks):
    """Double backward in plain torch, and SciPy's solvers."""

    NAME, PACKAGE, MODULE = "torch + SciPy", "scipy", "scipy"
    HOW: ClassVar = {
        "gradient": "torch.autograd.grad over the batches",
        "product": "torch.autograd.grad twice over the batches",
        "extremes": 'scipy.sparse.linalg.eigsh(2, which="BE", tol={effort}) on double backward',
        "top5": 'scipy.sparse.linalg.eigsh(5, which="LM", tol={effort}) on double backward',
    }

    def scipy_operator(self) -> LinearOperator:
        def matvec(v: Any) -> Any:
            return self.product(torch.from_numpy(np.array(v, np.float32).reshape(-1)), "").numpy()

        return LinearOperator((self.problem.n, self.problem.n), matvec=matvec, dtype=np.float32)

    def gradient(self, _seed: int, _effort: Effort) -> Tensor:
        return sum(gradients(self.model, self.data), torch.zeros(self.problem.n))

    def product(self, v: Tensor, _effort: Effort) -> Tensor:
        return plain_product(self.model, self.data, v)


class PyHessian(Library):
    NAME, PACKAGE, MODULE = "PyHessian", "PyHessian", "pyhessian"
    EFFORT: ClassVar = {"top5": (1e-3, 1e-4), "trace": (1e-3, 1e-4)}
    HOW: ClassVar = {
        "product": "hessian(dataloader=...).dataloader_hv_product(v)",
        "extremes": "eigenvalues() finds what is largest in magnitude, and cannot be shifted",
        "top5": "eigenvalues(maxIter=100, tol={effort}, top_n=5)",
        "trace": "trace(maxIter=400, tol={effort}), mean of its samples",
        "density": "density(iter=80, n_v=1)",
    }

    def build(self) -> None:
        from pyhessian import hessian

        self.H = hessian(self.model, nn.CrossEntropyLoss(), dataloader=self.data, cuda=False)

    def product(self, v: Tensor, _effort: Effort) -> Tensor:
        pieces = v.split([p.numel() for p in self.H.params])
        leaves = [piece.view_as(p) for piece, p in zip(pieces, self.H.params, strict=True)]
        return join(self.H.dataloader_hv_product(leaves)[1])

    def top5(self, _seed: int, effort: Effort) -> list[float]:
        return [float(value) for value in self.H.eigenvalues(maxIter=100, tol=float(effort), top_n=5)[0]]

    def trace(self, _seed: int, effort: Effort) -> float:
        return float(np.mean(self.H.trace(maxIter=400, tol=float(effort))))

    def density(self, _seed: int, _effort: Effort) -> Spectrum:
        nodes, weights = self.H.density(iter=80, n_v=1)
        return np.ravel(nodes), np.ravel(weights)


class EigenThingsLanczos(Library):
    """Lanczos for a given number of steps, whose residuals tell afterwards whether they were enough."""

    PACKAGE, MODULE = "hessian-eigenthings", "hessian_eigenthings"

    def build(self) -> None:
        import hessian_eigenthings as he

        self.he = he
        self.H = he.HessianOperator(self.model, self.data, he.supervised_loss(nn.CrossEntropyLoss()))

    def ends(self, seed: int, steps: int) -> tuple[list[float], bool]:
        """Return both ends, and whether its test of convergence holds for them."""
        v0 = torch.randn(self.problem.n, generator=torch.Generator().manual_seed(seed))
        found = self.he.lanczos_tridiagonal(self.H, v0 / v0.norm(), steps)
        ritz, vectors = eigh_tridiagonal(np.array(found.alphas, float), np.array(found.betas, float))
        values, residuals = ritz[[0, -1]], found.last_beta * np.abs(vectors[-1, [0, -1]])
        return values.tolist(), bool((residuals < TOL["extremes"] * np.abs(values)).all())

    def five(self, seed: int, steps: int) -> tuple[list[float], bool]:
        """Return the five largest in magnitude, and whether all have converged."""
        found = self.he.lanczos(
            self.H, k=5, which="LM", max_iter=steps, tol=TOL["top5"], reorthogonalize=True, seed=seed
        )
        return found.eigenvalues.tolist(), bool(found.converged.all())


def doubled(run: Callable[[int], tuple[list[float], bool]], steps: int) -> list[float]:
    """Return the values of a run that has converged, doubling the steps until one has."""
    values, converged = run(steps)
    return values if converged else doubled(run, 2 * steps)


class EigenThings(EigenThingsLanczos):
    NAME = "hessian-eigenthings"
    EFFORT: ClassVar = {"extremes": (20,), "top5": (10,), "trace": (30, 60, 120, 240)}
    HOW: ClassVar = {
        "product": "HessianOperator(...).matvec(v)",
        "extremes": "the ends of the Ritz values of lanczos_tridiagonal(max_iter={effort}), the steps doubled until "
        "both residuals are below 1 % of the values, which is the test of its lanczos()",
        "top5": 'lanczos(k=5, which="LM", max_iter={effort}, tol=1e-2, reorthogonalize=True), the steps doubled until '
        "it says that all have converged",
        "trace": 'trace(num_matvecs={effort}, method="hutch++")',
        "density": "spectral_density(num_runs=1, lanczos_steps=80), its raw nodes and weights",
    }

    def product(self, v: Tensor, _effort: Effort) -> Tensor:
        return self.H.matvec(v)

    def extremes(self, seed: int, effort: Effort) -> list[float]:
        return doubled(partial(self.ends, seed), int(effort))

    def top5(self, seed: int, effort: Effort) -> list[float]:
        return doubled(partial(self.five, seed), int(effort))

    def trace(self, seed: int, effort: Effort) -> float:
        return float(self.he.trace(self.H, num_matvecs=int(effort), method="hutch++", seed=seed).estimate)

    def density(self, seed: int, _effort: Effort) -> Spectrum:
        found = self.he.spectral_density(self.H, num_runs=1, lanczos_steps=80, seed=seed)
        return found.raw_eigenvalues.flatten(), found.raw_weights.flatten()


class EigenThingsGivenSteps(EigenThingsLanczos):
    """Lanczos given the number of steps that is enough, which only who knows the answer can give."""

    NAME = "hessian-eigenthings, given the steps"
    EFFORT: ClassVar = {"extremes": ("steps",), "top5": ("steps",)}
    HOW: ClassVar = {
        "extremes": "the ends of the Ritz values of lanczos_tridiagonal(max_iter={effort})",
        "top5": 'lanczos(k=5, which="LM", max_iter={effort}, reorthogonalize=True)',
    }

    def extremes(self, seed: int, effort: Effort) -> list[float]:
        return self.ends(seed, int(effort))[0]

    def top5(self, seed: int, effort: Effort) -> list[float]:
        return self.five(seed, int(effort))[0]


class CurvLinOps(ArpackTasks):
    NAME, PACKAGE, MODULE = "curvlinops", "curvlinops-for-pytorch", "curvlinops"
    EFFORT: ClassVar = ArpackTasks.EFFORT | {"trace": (30, 60, 120, 240)}
    HOW: ClassVar = {
        "gradient": "HessianLinearOperator(...).gradient_and_loss()",
        "product": "HessianLinearOperator(..., check_deterministic=False) @ v",
        "extremes": 'scipy.sparse.linalg.eigsh(H.to_scipy(), 2, which="BE", tol={effort})',
        "top5": 'scipy.sparse.linalg.eigsh(H.to_scipy(), 5, which="LM", tol={effort})',
        "trace": "hutchpp_trace(num_matvecs={effort})",
        "density": "lanczos_approximate_spectrum(ncv=80), smoothed, as it gives no nodes",
    }

    def build(self) -> None:
        import curvlinops

        self.library, self.columns = curvlinops, 0.0
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.H = curvlinops.HessianLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            params,
            self.data,
            check_deterministic=False,  # this check costs passes, and no other library makes one
            num_data=self.problem.num_examples,
        )

    @property
    def passes(self) -> float:
        return max(self.data.passes, self.columns)

    def scipy_operator(self) -> LinearOperator:
        return self.H.to_scipy()

    def gradient(self, _seed: int, _effort: Effort) -> Tensor:
        return join(self.H.gradient_and_loss()[0])

    def product(self, v: Tensor, _effort: Effort) -> Tensor:
        return self.H @ v

    def trace(self, _seed: int, effort: Effort) -> float:
        found = float(self.library.hutchpp_trace(self.H, int(effort)))
        self.columns = float(effort)  # vectors that share one reading of the data
        return found

    def density(self, _seed: int, _effort: Effort) -> Spectrum:
        return self.library.lanczos_approximate_spectrum(self.H, 80)


LIBRARIES: dict[str, type[Library]] = {
    library.NAME: library
    for library in (HvpKit, Plain, PyHessian, EigenThings, EigenThingsGivenSteps, CurvLinOps)
}
