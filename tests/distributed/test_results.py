"""Results over a mesh: eigenvectors and diagonals are DTensors, which operators, solvers and files take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import hvpkit as hk
from distributed.ranks import run, told
from hvpkit._utils.ranks import Ranks
from hvpkit.operators.space import Space

G = torch.Generator().manual_seed(0)
X, N = torch.randn(40, 7, dtype=torch.float64, generator=G), 7
PARAMS = {"a": torch.linspace(-1, 1, 4, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
V = torch.randn(N, 2, dtype=torch.float64, generator=G)


def loss_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ torch.cat([p["a"], p["b"]])).square() + 0.1 * (x[:, :4] * p["a"]).cos().sum(-1)


def hessian(mesh: DeviceMesh | None) -> hk.CurvatureOperator:
    data = hk.as_data(X, mesh=mesh, batch_size=6)
    return hk.hessian(loss_fn, PARAMS, data, mode="reverse-over-reverse", memory_limit=0)


def split(mesh: DeviceMesh, whole: Tensor) -> DTensor:
    return distribute_tensor(whole, mesh, [Shard(0)])


def placed(mesh: DeviceMesh) -> Any:
    """Return, of each vector, whether it is where torch has a vector of that size."""
    H = hessian(mesh)
    solvers = (hk.lanczos, hk.lobpcg, hk.chebyshev, hk.power, hk.eigsh, hk.top_eigenvalues)
    vectors = [solve(H, 2, tol=1e-2).vectors for solve in solvers]
    vectors += [
        hk.multifidelity([H.coarsen(20, importance="loss"), H]).vectors,
        hk.diagonal(H, num_matvecs=4).value,
    ]
    ex = hk.extreme_eigenvalues(H)
    vectors += [ex.largest.vector, ex.vectors, hk.lanczos(H, 2).pair(1).vector]
    blocks = hk.blocks(loss_fn, PARAMS, hk.as_data(X, mesh=mesh), by="parameter", mode="reverse-over-reverse")
    vectors += [block.extremes.largest.vector for block in blocks.blocks]
    early = hk.extreme_eigenvalues(H, time_limit=1e-9)
    return [is_placed(mesh, vector) for vector in [*vectors, early.largest.vector]]


def is_placed(mesh: DeviceMesh, vector: Any) -> bool:
    local = split(mesh, torch.zeros(vector.shape)).to_local()
    same = isinstance(vector, DTensor) and vector.device_mesh == mesh and vector.placements == (Shard(0),)
    return same and vector.to_local().shape == local.shape


def chunks(mesh: DeviceMesh) -> Any:
    space = Space(Ranks(mesh), sharded=True)
    wholes = [torch.arange(n) for n in (1, 2, 4, 7, 9)]
    return [torch.equal(space.local(whole), split(mesh, whole).to_local()) for whole in wholes]


def algebra(mesh: DeviceMesh | None) -> Any:
    H = hessian(mesh)
    v = V if mesh is None else split(mesh, V)
    u = v[:, 0]
    found = [H @ v, H @ u, H(u), v.mT @ H, u @ H, (H @ H) @ v, (2 * H - H.shift(0.3)) @ v, H.matvec(u)]
    found += [hk.precondition(H, u.abs() + 1) @ u, u @ (H @ u)]
    return [one.full_tensor() if isinstance(one, DTensor) else one for one in found]


def next_steps(mesh: DeviceMesh | None) -> Any:
    H = hessian(mesh)
    ex = hk.extreme_eigenvalues(H, tol=1e-8)
    u = ex.largest.vector
    sign = torch.sign(ex.full_tensor().largest.vector[0])
    b = V[:, 0] if mesh is None else split(mesh, V)[:, 0]
    columns = V if mesh is None else split(mesh, V)
    solved = [hk.solve(H, one, damping=2.0, tol=1e-10) for one in (b, columns)]
    applied = hk.matrix_function(H, torch.exp, b, tol=1e-10)
    tree = H.unflatten(u)
    diagonal = hk.diagonal(H, num_matvecs=N)
    again = [hk.lanczos(H, v0=v0, tol=1e-8) for v0 in (u, ex, hk.lanczos(H, 2))]
    kinds = {type(x) for x in (solved[0].x, solved[1].x, applied.x, u)}
    assert kinds == {Tensor if mesh is None else DTensor}
    return [
        *(one.full_tensor().x for one in (*solved, applied)),
        {name: sign * leaf for name, leaf in tree.items()},
        diagonal.full_tensor().value,
        hk.Estimate.interval(diagonal)[1] @ b if mesh is None else (diagonal.interval()[1] @ b).full_tensor(),
        [one.value for one in (ex.smallest, ex.largest)],
        *(one.values for one in again),
        (u @ (H @ u)) if mesh is None else (u @ (H @ u)).full_tensor(),
        hk.loss(loss_fn, tree, X),
    ]


def shown(mesh: DeviceMesh) -> Any:
    """Return what needs no other rank, made by one rank alone."""
    H = hessian(mesh)
    ex, found = hk.extreme_eigenvalues(H, max_matvecs=3), hk.lanczos(H, 2)
    if mesh.get_local_rank():
        return []
    ex = replace(ex, seconds=0.0)
    return [
        repr(ex),
        ex.summary(),
        repr(found),
        [*json.loads(json.dumps(ex.to_dict()))],
        len(found.to_frame()),
    ]


def saved(mesh: DeviceMesh, folder: Path) -> Any:
    H = hessian(mesh)
    results = [hk.extreme_eigenvalues(H), hk.lanczos(H, 2), hk.diagonal(H, num_matvecs=4)]
    results.append(hk.lanczos(H, 2, max_matvecs=5))
    for number, result in enumerate(results):
        result.save(folder / f"{number}.json")
    failed = told(lambda: results[0].save(folder / "nowhere" / "ex.json"))
    wholes = [result.full_tensor() for result in results]
    return [
        failed,
        wholes[0].largest.vector,
        wholes[1].vectors,
        wholes[2].value,
        wholes[3].vectors,
    ]


def drawn(mesh: DeviceMesh) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    ex = hk.extreme_eigenvalues(hessian(mesh))
    data = hk.as_data(X, mesh=mesh)
    axis = hk.plots.loss_along_eigenvector(loss_fn, PARAMS, data, ex.largest)
    plane = hk.plots.loss_landscape(loss_fn, PARAMS, data, ex, num_points=3)
    return [axis.lines[0].get_ydata().tolist(), plane.get_ylabel()]


def tracked(mesh: DeviceMesh | None) -> Any:
    tracker = hk.train.SpectrumTracker(loss_fn, hk.as_data(X, mesh=mesh), k=2, tol=1e-8)
    for step in range(2):
        tracker({name: p + 0.1 * step for name, p in PARAMS.items()}, step=step)
    return [tracker.alignments[step].gradient_share for step in range(2)] + [tracker.alignments[1].overlap]


def refused(mesh: DeviceMesh) -> Any:
    H, u = hessian(mesh), split(mesh, V)
    alone = hk.aslinearoperator(torch.eye(N, dtype=torch.float64))
    spoiled = V.clone()
    spoiled[6, 0] = torch.nan  # on the last rank
    tree = {"a": u[:4, 0], "b": u[4:, 0]}
    odd = DTensor.from_local(V[: 1 + mesh.get_local_rank()], mesh, [Shard(0)], run_check=False)
    found = [
        told(lambda: alone @ u),
        told(lambda: hk.aslinearoperator(split(mesh, torch.eye(N)))),
        told(lambda: H @ distribute_tensor(V, mesh, [Replicate()])),
        told(lambda: H @ split(mesh, spoiled)),
        told(lambda: H @ u.float()),
        told(lambda: H @ u[:6]),
        told(lambda: H @ odd),
        told(lambda: H @ tree),
        told(lambda: hk.hvp(loss_fn, PARAMS, X, tree)),
        told(lambda: hk.diagonal(H, num_matvecs=4).to_dict()),
        told(lambda: hk.diagonal(H, num_matvecs=4).to_frame()),
    ]
    diverged = told(
        lambda: hk.lanczos(H).full_tensor() if mesh.get_local_rank() else hk.lanczos(H).save("/nowhere/x")
    )
    return [*found, diverged, (H @ u).full_tensor()]


NUM_RANKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[Any]]:
    calls = [placed, chunks, algebra, next_steps, shown, lambda mesh: saved(mesh, folder), drawn, tracked]
    found = run(NUM_RANKS, *calls, refused)
    names = ["placed", "chunks", "algebra", "next_steps", "shown", "saved", "drawn", "tracked", "refused"]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", ["placed", "chunks"])
def test_vectors_are_where_torch_has_them(name: str, answers: dict[str, list[Any]]) -> None:
    for found in answers[name]:
        assert isinstance(found, list), found
        assert all(found), found


@pytest.mark.parametrize("call", [algebra, next_steps, tracked], ids=lambda call: call.__name__)
def test_dtensors_are_taken_for_the_vectors_that_they_are(call: Any, answers: dict[str, list[Any]]) -> None:
    expected = call(None)
    for found in answers[call.__name__]:
        assert isinstance(found, list), found
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_one_rank_alone_prints_a_result_and_makes_plain_data_of_it(answers: dict[str, list[Any]]) -> None:
    alone = replace(hk.extreme_eigenvalues(hessian(None), max_matvecs=3), seconds=0.0)
    shown, *_ = answers["shown"]
    assert shown[:2] == [repr(alone), alone.summary()]
    assert shown[3:] == [[*alone.to_dict()], 2]


def test_files_hold_whole_vectors_that_one_process_loads(answers: dict[str, list[Any]], folder: Path) -> None:
    loaded = [hk.load(folder / f"{number}.json") for number in range(4)]
    vectors = [
        loaded[0].largest.vector,
        loaded[1].vectors,
        loaded[2].value,
        loaded[3].vectors,
    ]
    assert {type(vector) for vector in vectors} == {Tensor}
    for rank, (failed, *expected) in enumerate(answers["saved"]):
        assert failed.startswith(
            "RemoteError: rank 0 failed: ValueError: path" if rank else "ValueError: path"
        )
        assert all(map(torch.equal, vectors, expected))


def test_pictures_are_those_of_one_process(answers: dict[str, list[Any]]) -> None:
    ex = hk.extreme_eigenvalues(hessian(None))
    axis = hk.plots.loss_along_eigenvector(loss_fn, PARAMS, X, ex.largest)
    for line, label in answers["drawn"]:
        torch.testing.assert_close(line, axis.lines[0].get_ydata().tolist(), rtol=1e-5, atol=1e-6)
        assert label.startswith("along")


def test_what_takes_no_dtensor_says_so_and_ranks_go_on(answers: dict[str, list[Any]]) -> None:
    product = hessian(None) @ V
    for *found, diverged, after in answers["refused"]:
        alone, matrix, whole, spoiled, dtype, shape, odd, tree, hvp, plain, frame = found
        for text in (alone, matrix, tree, hvp, plain, frame):
            assert text.startswith("TypeError: ")
            assert "full_tensor()" in text
        assert "v must be Shard(0) on the mesh of the data" in whole
        assert spoiled == "ValueError: v contains NaN or infinity"
        assert dtype.startswith("ValueError: v has dtype torch.float32")
        assert shape.startswith("ValueError: v must have shape [7]")
        assert odd.startswith(("ValueError", "RemoteError"))
        assert diverged.startswith("RemoteError: ranks ask different questions")
        torch.testing.assert_close(after, product)
