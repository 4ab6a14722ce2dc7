"""Linear systems: accuracy, matvecs and seconds beside SciPy's cg and minres and curvlinops's inverse by cg.

    python benchmarks/bench_solve.py [--problems NAME ...] [--cache DIR] [--cifar10 DIR]

Each answer is first compared with a direct one in float64, or by its residual from a matvec of its own where the matrix
is too large. ``spectra`` are dense matrices of 400 with a damping of a thousandth of their norm, whose matvecs cost
next to nothing; the networks are trained ones, with their Gauss-Newton matrices and the same damping: also with the
preconditioner from a sample, whose matvecs count by their share of the data. All methods take turns in rounds; ratios
of seconds, those of the processor, are to hvpkit's default, ``minres``, in the same round. SciPy's solvers multiply by
the same torch matrix; ``array``: by NumPy's array of it, whose products are another library's, as hvpkit's of an array.
They are given the number of steps that is enough, as their own tests differ; curvlinops's has its thresholds for small
numbers off, with which it stops early.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import MODE, available, load

TOL, DAMPING = 1e-6, 1e-3
NETWORKS = ("digits CNN, late", "transformer, characters", "CIFAR-10 ResNet")
SPECTRA: dict[str, Callable[[int], np.ndarray]] = {
    "evenly spread": lambda n: np.linspace(0, 1, n),
    "few outliers": lambda n: np.r_[np.linspace(0, 0.02, n - 6), np.linspace(0.3, 1, 6)],
    "decaying": lambda n: 10.0 ** -np.linspace(0, 8, n),
    "indefinite": lambda n: np.r_[-0.5, np.linspace(-0.05, 0.1, n - 2), 1],
}
METHODS: dict[str, dict[str, Any]] = {
    "cg": {"method": "cg"},
    "minres": {"method": "minres"},
    "cg, sample": {"method": "cg", "preconditioner": "sample"},
    "minres, sample": {"method": "minres", "preconditioner": "sample"},
}
SCIPY = {"scipy cg": scipy.sparse.linalg.cg, "scipy minres": scipy.sparse.linalg.minres}
ARRAYS = {f"{name}, array": name for name in SCIPY}
OWN_ARRAYS = {f"{name}, array": name for name in ("cg", "minres")}
PEERS = (*SCIPY, *OWN_ARRAYS, *ARRAYS, "curvlinops cg")
MOST_STEPS = 2000
SHARP = {"eps": 1e-30, "stop_updating_after": 1e-30}

Solver = Callable[[], tuple[Tensor, float, str]]
"""Solve, and return the solution, the matvecs and the status."""


def dense(name: str, n: int) -> Tensor:
    """Return a float64 matrix with this spectrum, damping included."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    values = torch.from_numpy(SPECTRA[name](n)) + DAMPING
    matrix = (basis * values) @ basis.mT
    return (matrix + matrix.mT) / 2


def right_hand_side(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random vector."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Counted:
    """A symmetric matrix for other libraries, that counts its matvecs."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.product, self.like, self.count = product, like, 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.count += 1
        return self.product(vectors)

    def numpy(self) -> scipy.sparse.linalg.LinearOperator:
        def matvec(v: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(v).reshape(-1).to(self.like)).numpy()

        dtype = torch.empty(0, dtype=self.like.dtype).numpy().dtype
        return scipy.sparse.linalg.LinearOperator((len(self.like),) * 2, matvec=matvec, dtype=dtype)


def steps_of_scipy(solver: Callable[..., Any], A: Counted, b: Tensor) -> int:
    """Return the steps to the first residual within tol, which SciPy's own tests say in different ways."""

    class Reached(Exception):
        pass

    steps = 0

    def note(x: np.ndarray) -> None:
        nonlocal steps
        steps += 1
        if float((b - A.product(torch.from_numpy(x).to(b))).norm()) <= TOL * float(b.norm()):
            raise Reached

    with contextlib.suppress(Reached):
        solver(A.numpy(), b.numpy(), rtol=torch.finfo(b.dtype).eps, maxiter=MOST_STEPS, callback=note)
    return steps


def by_scipy(name: str, A: Counted, b: Tensor, array: np.ndarray | None = None) -> Solver:
    """Return SciPy's solver with the number of steps that is enough, on an array instead of ``A`` if there is one."""
    own = A if array is None else Counted(lambda v: torch.from_numpy(array @ v.numpy()), b)
    solver, steps = SCIPY[name], steps_of_scipy(SCIPY[name], own, b)

    def solve() -> tuple[Tensor, float, str]:
        A.count = 0
        matrix = A.numpy() if array is None else array
        x, _ = solver(matrix, b.numpy(), rtol=torch.finfo(b.dtype).eps, maxiter=steps)
        return torch.from_numpy(x).to(b), A.count if array is None else steps, "-"

    return solve


def by_curvlinops(A: Any, b: Tensor, products: Counted) -> Solver | None:
    """Return curvlinops's inverse by conjugate gradients to the same residual; None: it is not installed.

    Args:
        A: an operator of its own.
        b: right-hand side.
        products: counts its matvecs.
    """
    if find_spec("curvlinops") is None:
        return None
    import curvlinops

    inverse = curvlinops.CGInverseLinearOperator(
        A, tolerance=TOL, max_iter=MOST_STEPS, max_tridiag_iter=0, **SHARP
    )

    def solve() -> tuple[Tensor, float, str]:
        products.count = 0
        with warnings.catch_warnings(action="ignore"):
            x = inverse @ b
        return x, products.count, "-"

    return solve


def in_rounds(solvers: dict[str, Solver | None], measure: Callable[[Tensor], Record], rounds: int) -> Record:
    """Return the runs of each solver, which take turns."""
    runs: Record = {name: [] for name, solver in solvers.items() if solver is not None}
    for _ in range(rounds):
        for name in runs:
            began = time.process_time()
            x, count, status = solvers[name]()
            seconds = time.process_time() - began
            runs[name].append({"matvecs": count, "seconds": seconds, "status": status, **measure(x)})
    return runs


def by_hvpkit(op: hk.LinearOperator, b: Tensor, **options: Any) -> Solver:
    def solve() -> tuple[Tensor, float, str]:
        found = hk.solve(op, b, tol=TOL, **options)
        return found.x, found.num_matvecs, str(found.status)

    return solve


def joined(parts: Sequence[Record]) -> Record:
    """Return the runs of several right-hand sides together."""
    return {name: [run for part in parts for run in part[name]] for name in parts[0]}


def on_spectrum(spectrum: str, n: int, seeds: int, rounds: int) -> Record:
    """Return the runs of each method on a dense matrix; errors are relative to a direct solution."""
    A, parts = dense(spectrum, n), []
    op, of_array = hk.aslinearoperator(A), hk.aslinearoperator(A.numpy())
    for seed in range(seeds):
        b = right_hand_side(n, seed)
        products = Counted(lambda v: A @ v, b)
        solvers: dict[str, Solver | None] = {
            method: by_hvpkit(op, b, method=method) for method in ("cg", "minres")
        }
        solvers |= {name: by_hvpkit(of_array, b, method=method) for name, method in OWN_ARRAYS.items()}
        solvers |= {peer: by_scipy(peer, products, b) for peer in SCIPY}
        solvers |= {peer: by_scipy(name, products, b, A.numpy()) for peer, name in ARRAYS.items()}
        solvers["curvlinops cg"] = by_curvlinops(_tensor_operator(A, products), b, products)
        parts.append(in_rounds(solvers, lambda x, b=b: accuracy(A, b, x), rounds))
    return {"n": n, "runs": joined(parts)}


def _tensor_operator(A: Tensor, products: Counted) -> Any:
    """Return curvlinops's operator of a matrix, or None where it is not installed."""
    if find_spec("curvlinops") is None:
        return None
    from curvlinops.examples import TensorLinearOperator

    class Operator(TensorLinearOperator):  # type: ignore[misc]
        def _matmat(self, X: Any) -> Any:
            products.count += 1
            return super()._matmat(X)

    return Operator(A)


def accuracy(A: Tensor, b: Tensor, x: Tensor) -> Record:
    """Return the relative residual, and the error relative to a direct solution."""
    exact = torch.linalg.solve(A, b)
    return {
        "residual": float((b - A @ x).norm() / b.norm()),
        "error": float((x - exact).norm() / exact.norm()),
    }


def on_network(name: str, cache: Path, seeds: int, rounds: int) -> Record:
    """Return the runs of each method on the Gauss-Newton matrix of a trained network."""
    problem = load(name, cache)
    objective, params = hk.from_module(problem.model, F.cross_entropy)
    data = (problem.x, problem.y)
    H = hk.ggn(objective, params, data, batch_size=problem.batch_size, mode=MODE)
    damping = DAMPING * float(hk.lanczos(H, 1, which="LA", tol=1e-2).values[-1])
    damped, parts = H.shift(damping), []
    for seed in range(seeds):
        b = right_hand_side(H.n, seed, H.dtype)
        products = Counted(lambda v: damped @ v, b)
        solvers: dict[str, Solver | None] = {
            method: by_hvpkit(H, b, damping=damping, seed=seed, **options)
            for method, options in METHODS.items()
        }
        solvers |= {peer: by_scipy(peer, products, b) for peer in SCIPY}
        solvers["curvlinops cg"] = by_curvlinops(_network_operator(problem, damping, products), b, products)
        found = in_rounds(
            solvers, lambda x, b=b: {"residual": float((b - damped @ x).norm() / b.norm())}, rounds
        )
        parts.append(found)
        print(
            f"{name}, right-hand side {seed}: {harness.median([run['seconds'] for run in found['minres']])} s"
        )
    return {"n": H.n, "num_examples": H.num_examples, "damping": damping, "runs": joined(parts)}


def _network_operator(problem: Any, damping: float, products: Counted) -> Any:
    """Return curvlinops's Gauss-Newton matrix with damping, or None where it is not installed."""
    if find_spec("curvlinops") is None:
        return None
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator

    class Operator(curvlinops.GGNLinearOperator):  # type: ignore[misc]
        def _matmat(self, X: Any) -> Any:
            products.count += 1
            return super()._matmat(X)

    params = [p for p in problem.model.parameters() if p.requires_grad]
    size = problem.batch_size or len(problem.x)
    batches = [(problem.x[i : i + size], problem.y[i : i + size]) for i in range(0, len(problem.x), size)]
    G = Operator(
        problem.model,
        nn.CrossEntropyLoss(),
        params,
        batches,
        check_deterministic=False,
        num_data=len(problem.x),
    )
    shapes = [p.shape for p in params]
    return G + damping * IdentityLinearOperator(shapes, params[0].device, params[0].dtype)


def table(record: Record) -> str:
    """Return matvecs, worst residuals, seconds and their ratios to the default, as Markdown."""
    columns = [*METHODS, *PEERS]
    rows = []
    for name, entry in record["problems"].items():
        for what in ("matvecs", "residual", "seconds", "over minres"):
            cells = [_cell(entry["runs"], method, what) for method in columns]
            rows.append([name if what == "matvecs" else "", what, *cells])
    return harness.markdown(["problem", "", *columns], rows)


def _cell(runs: Record, method: str, what: str) -> str:
    if method not in runs:
        return "-"
    if what == "over minres":
        return f"{ratio(runs, method):.2g} x"
    values = [run[what] for run in runs[method]]
    return f"{max(values):.1e}" if what == "residual" else harness.median(values)


def ratio(runs: Record, method: str) -> float:
    """Return the median, over rounds, of a method's seconds over those of the default."""
    pairs = zip(runs[method], runs["minres"], strict=True)
    return statistics.median(run["seconds"] / own["seconds"] for run, own in pairs)


def saved(entry: Record) -> float:
    """Return the passes of plain conjugate gradients over those with a sample, medians over right-hand sides."""
    medians = [
        statistics.median(run["matvecs"] for run in entry["runs"][name]) for name in ("cg", "cg, sample")
    ]
    return medians[0] / medians[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "solve.json")
    harness.add_trained(parser)
    harness.add_names(parser)
    parser.add_argument("--size", type=int, default=400, help="n of the spectra; default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="right-hand sides; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of all methods, each; default %(default)s")
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "damping_over_largest": DAMPING, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        names = given.problems or [*SPECTRA, *(name for name in NETWORKS if name in available())]
        for name in harness.pending(given, names, record["problems"]):
            spectrum = name in SPECTRA
            found = (
                on_spectrum(name, given.size, given.seeds, given.rounds)
                if spectrum
                else on_network(name, given.cache, given.seeds, given.rounds)
            )
            record["problems"][name] = found
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
