"""Vectors that are split over ranks: the space of a process and of a part agree, and solvers compute in it alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import hvpkit
from distributed.ranks import run
from hvpkit._utils.ranks import Ranks
from hvpkit.operators.space import LOCAL, Space

LIKE = torch.empty(0, dtype=torch.float64)


def figures(space: Space, n: int) -> list[torch.Tensor | int]:
    rows = torch.stack([space.random(n, like=LIKE, seed=3, stream=stream) for stream in range(4)])
    spoiled = rows.clone()
    if spoiled.shape[1] and (space.ranks is None or space.ranks.rank == 0):
        spoiled[2, 0] = torch.nan
    return [
        space.dots(rows, rows[1]),
        space.dots(rows, rows.mT),
        space.norm(rows[0]),
        space.row_norms(rows),
        space.reduce((rows * rows).sum(dim=1)),
        space.peak(rows),
        space.peak(spoiled).isnan().double(),
        space.finite(spoiled).double(),
        space.whole(rows.mT, n),
        space.whole(space.local(torch.arange(n)), n).double(),
        space.whole(torch.full((space.size(n),), 1.0), n).sum(),
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_parts_have_the_figures_of_the_whole(size: int) -> None:
    sizes = (1, 3, 4, 5, 37)
    found = run(size, *(lambda mesh, n=n: figures(Space(Ranks(mesh), sharded=True), n) for n in sizes))
    for n, of_ranks in zip(sizes, found, strict=True):
        expected = figures(LOCAL, n)
        for rank in of_ranks:
            for one, other in zip(rank, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def summed(mesh: DeviceMesh) -> list[list[torch.Tensor]]:
    """Return this rank's parts of sums: by an exchange, as on a CPU, and by reduce_scatter, as on GPUs."""
    ranks, found = Ranks(mesh), []
    for n in (1, 3, 4, 37):
        rows = torch.arange(2 * n, dtype=torch.float64).view(2, n) + 100 * ranks.rank
        part = slice(*ranks.part(n).indices(n)[:2])
        parts = [ranks.sum_parts(rows), torch.empty(2, part.stop - part.start, dtype=torch.float64)]
        sizes = [len(range(n)[ranks.part(n, rank)]) for rank in range(ranks.size)]
        for row, own in zip(rows, parts[1], strict=True):
            ranks._reduce_and_scatter(row, own, sizes)
        total = ranks.size * torch.arange(2 * n, dtype=torch.float64).view(2, n)
        total += 100 * sum(range(ranks.size))
        found.append([*parts, total[:, part]])
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_both_ways_to_sum_parts_give_each_rank_its_own(size: int) -> None:
    for of_rank in run(size, summed)[0]:
        for exchanged, scattered, expected in of_rank:
            assert torch.equal(exchanged, expected)
            assert torch.equal(scattered, expected)


def test_ranks_hold_parts_of_equal_size_but_the_last() -> None:
    (sizes,) = run(3, lambda mesh: [Space(Ranks(mesh), sharded=True).size(n) for n in (1, 2, 7, 9)])
    assert sizes == [[1, 1, 3, 3], [0, 1, 3, 3], [0, 0, 1, 3]]


FOLDERS = ("solvers", "estimators")
SUSPECT = {
    "normal_vector": "space.random",
    "randn": "space.random",
    "randn_like": "space.random",
    "vector_norm": "space.norm",
    "norm": "space.norm",
    "isfinite": "space.finite, or isfinite(space.peak(...))",
    "abs": "space.peak",
}
"""Functions that would see one part of a vector only, and what takes their place."""

WHOLE = {
    *(f"solvers/baselines/{name}.py" for name in ("momentum_block", "recording_operator", "scipy_eigs")),
}
"""Files whose vectors every rank has whole: SciPy's solvers and baselines."""

SMALL = {
    "solvers/certificate.py": {"abs"},
    "solvers/certified_davidson.py": {"abs", "isfinite"},
    "solvers/chebyshev.py": {"abs", "isfinite"},
    "solvers/checkpoint.py": {"randn", "isfinite"},
    "solvers/common/block_subspace.py": {"abs"},
    "solvers/common/bounds.py": {"abs"},
    "solvers/common/convergence.py": {"abs", "isfinite"},
    "solvers/common/orthogonalize.py": {"abs", "vector_norm", "isfinite", "normal_vector"},
    "solvers/common/rayleigh_ritz.py": {"abs", "vector_norm"},
    "solvers/common/request.py": {"abs", "isfinite"},
    "solvers/congruence.py": {"abs"},
    "solvers/davidson.py": {"abs"},
    "solvers/driver.py": {"isfinite"},
    "solvers/krylov.py": {"vector_norm", "isfinite"},
    "solvers/lanczos.py": {"abs", "isfinite"},
    "solvers/linear/cg.py": {"isfinite"},
    "solvers/linear/minres.py": {"abs", "isfinite"},
    "solvers/linear/preconditioner.py": {"abs"},
    "solvers/pairs.py": {"vector_norm"},
    "solvers/linear/recurrence.py": {"isfinite"},
    "solvers/lobpcg.py": {"isfinite"},
    "solvers/monitors.py": {"isfinite"},
    "solvers/sample_space.py": {"abs"},
    "estimators/kernel_polynomials.py": {"abs", "isfinite"},
    "estimators/leave_one_out.py": {"vector_norm"},
    "estimators/probe.py": {"zeros"},
    "estimators/quadrature.py": {"randn", "abs"},
    "estimators/sampling.py": {"abs"},
    "estimators/diagonal.py": {"zeros"},
    "estimators/sketch.py": {"isfinite"},
    "estimators/trace_functions.py": {"abs"},
}
"""What files compute of numbers, of matrices that all ranks have, and of vectors of the caller's, which are whole."""

BUFFERS = {"empty", "zeros", "ones", "full", "eye"}


def calls(path: Path) -> set[str]:
    """Return the names of the suspect functions that a file calls, but for a space's, and of buffers of n entries."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        whole = name in BUFFERS and any(ast.unparse(one).endswith("op.n") for one in node.args)
        if (name in SUSPECT and not owner.endswith("space")) or whole:
            found.add(name)
    return found


SOURCE = Path(hvpkit.__file__).parent
FILES = [
    str(path.relative_to(SOURCE)) for folder in FOLDERS for path in sorted((SOURCE / folder).rglob("*.py"))
]


@pytest.mark.parametrize("file", [file for file in FILES if file not in WHOLE])
def test_solvers_compute_in_the_space(file: str) -> None:
    beside = calls(SOURCE / file) - SMALL.get(file, set())
    assert not beside, {name: SUSPECT.get(name, "op.space.size(op.n)") for name in beside}


def test_the_exceptions_are_of_this_source() -> None:
    assert set(FILES) >= WHOLE
    assert all(found <= calls(SOURCE / file) for file, found in SMALL.items())
