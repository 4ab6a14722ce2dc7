"""Linear systems: accuracy, matvecs and seconds beside SciPy's cg and minres, and passes saved by a sample.

    python benchmarks/bench_solve.py [--problems NAME ...] [--cache DIR] [--cifar10 DIR]

Each answer is first compared with a direct one in float64, or by its residual from a matvec of its own where the matrix
is too large. ``spectra`` are dense matrices of 400 with a damping of a thousandth of their norm; the trained networks
are those with 20,000 examples, with their Gauss-Newton matrices and the same damping: plain conjugate gradients, and
both methods with the preconditioner from a sample, whose matvecs count by their share of the data.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record
from _problems import MODE, available, load

TOL, DAMPING = 1e-6, 1e-3
NETWORKS = ("transformer, characters", "CIFAR-10 ResNet")
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


def by_scipy(solver: Callable[..., Any], A: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Return SciPy's solution and its matvecs, to the first residual within tol: its own tests differ by method."""
    count, found = 0, torch.zeros_like(b)

    class Reached(Exception):
        pass

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return (A @ torch.from_numpy(v).reshape(-1)).numpy()

    def note(x: np.ndarray) -> None:
        nonlocal found
        found = torch.from_numpy(x.copy())
        if float((b - A @ found).norm()) <= TOL * float(b.norm()):
            raise Reached

    op = scipy.sparse.linalg.LinearOperator(A.shape, matvec=matvec, dtype=np.float64)
    with contextlib.suppress(Reached):
        solver(op, b.numpy(), rtol=1e-14, maxiter=2000, callback=note)
    return found, count


def on_spectrum(name: str, n: int, seeds: int) -> Record:
    """Return the runs of each method on a dense matrix; errors are relative to a direct solution."""
    A, runs = dense(name, n), {}
    op = hk.aslinearoperator(A)
    for method in ("cg", "minres", *SCIPY):
        runs[method] = []
        for seed in range(seeds):
            b = right_hand_side(n, seed)
            if method in SCIPY:
                (x, count), seconds = harness.timed(lambda m=method, b=b: by_scipy(SCIPY[m], A, b))
                status = "-"
            else:
                found, seconds = harness.timed(lambda m=method, b=b: hk.solve(op, b, method=m, tol=TOL))
                x, count, status = found.x, found.num_matvecs, str(found.status)
            runs[method].append({"matvecs": count, "seconds": seconds, "status": status, **accuracy(A, b, x)})
    return {"n": n, "runs": runs}


def accuracy(A: Tensor, b: Tensor, x: Tensor) -> Record:
    """Return the relative residual, and the error relative to a direct solution."""
    exact = torch.linalg.solve(A, b)
    return {
        "residual": float((b - A @ x).norm() / b.norm()),
        "error": float((x - exact).norm() / exact.norm()),
    }


def on_network(name: str, cache: Path, seeds: int) -> Record:
    """Return the runs of each method on the Gauss-Newton matrix of a trained network."""
    problem = load(name, cache)
    objective, params = hk.from_module(problem.model, F.cross_entropy)
    data = (problem.x, problem.y)
    H = hk.ggn(objective, params, data, batch_size=problem.batch_size, mode=MODE)
    damping = DAMPING * float(hk.lanczos(H, 1, which="LA", tol=1e-2).values[-1])
    runs: Record = {method: [] for method in METHODS}
    for seed in range(seeds):
        b = right_hand_side(H.n, seed, H.dtype)
        for method, options in METHODS.items():
            found = hk.solve(H, b, damping=damping, tol=TOL, seed=seed, **options)
            residual = b - (H @ found.x + damping * found.x)
            run = {
                "matvecs": found.num_matvecs,
                "seconds": found.seconds,
                "status": str(found.status),
                "residual": float(residual.norm() / b.norm()),
            }
            runs[method].append(run)
            print(f"{name}, {method}: {run}", flush=True)
    return {"n": H.n, "num_examples": H.num_examples, "damping": damping, "runs": runs}


def table(record: Record) -> str:
    """Return matvecs, worst residuals and seconds of each method, as Markdown."""
    columns = [*METHODS, *SCIPY]
    rows = []
    for name, entry in record["problems"].items():
        for what in ("matvecs", "residual", "seconds"):
            cells = []
            for method in columns:
                values = [run[what] for run in entry["runs"].get(method, [])]
                cells.append(
                    "-"
                    if not values
                    else f"{max(values):.1e}"
                    if what == "residual"
                    else harness.median(values)
                )
            rows.append([name if what == "matvecs" else "", what, *cells])
    return harness.markdown(["problem", "", *columns], rows)


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
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"tol": TOL, "damping_over_largest": DAMPING, "machine": harness.machine()}
        record = harness.open_record(given.out, header, problems={})
        names = given.problems or [*SPECTRA, *(name for name in NETWORKS if name in available())]
        for name in harness.pending(given, names, record["problems"]):
            spectrum = name in SPECTRA
            found = (
                on_spectrum(name, given.size, given.seeds)
                if spectrum
                else on_network(name, given.cache, given.seeds)
            )
            record["problems"][name] = found
            harness.write(given.out, record)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
