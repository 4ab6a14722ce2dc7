"""Checkpoints of several ranks: parts of each, any number of ranks after, a killed job, files that are damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import hvpkit as hk
from distributed import restarted
from distributed.ranks import run, told, torchrun
from hvpkit._utils import checkpoints
from hvpkit.solvers import checkpoint

X = torch.randn(40, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
P = torch.linspace(-1, 1, 31, dtype=torch.float64)
Y = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(1))


def hessian(mesh: DeviceMesh | None) -> hk.CurvatureOperator:
    objective = hk.Objective(
        lambda p, batch: torch.stack([batch[0] @ p, (batch[0] * p).cos().sum(-1)], dim=1),
        lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none"),
    )
    data = hk.as_data((X, Y), mesh=mesh, batch_size=8)
    return hk.hessian(objective, P, data, mode="reverse-over-reverse", memory_limit=0)


class Stopped(Exception):
    pass


Question = Callable[..., Any]


def levels(H: hk.CurvatureOperator, **options: Any) -> Any:
    return hk.multifidelity([H.coarsen(30), H], ncv=8, tol=1e-6, atol=0.0, **options)


B = torch.linspace(0, 1, 62, dtype=torch.float64).reshape(31, 2)

QUESTIONS: dict[str, tuple[Question, int, Callable[[Any], Any]]] = {
    "lanczos": (partial(hk.lanczos, k=2, which="BE", tol=1e-12, atol=0.0), 5, lambda found: found.values),
    "multifidelity": (levels, 12, lambda found: found.values),
    "trace": (partial(hk.trace, num_matvecs=10, block_size=1), 4, lambda found: found.value),
    "norm": (partial(hk.frobenius_norm, num_matvecs=10, block_size=1), 4, lambda found: found.value),
    "diagonal": (partial(hk.diagonal, num_matvecs=9, block_size=1), 4, lambda found: found.value),
    "XDiag": (
        partial(hk.diagonal, method="xdiag", num_matvecs=10, block_size=1),
        4,
        lambda found: found.value,
    ),
    "density": (partial(hk.spectral_density, num_steps=5, num_probes=2), 3, lambda found: found.values),
    "Chebyshev density": (
        partial(hk.spectral_density, method="chebyshev", num_steps=9, num_probes=2),
        34,
        lambda found: found.values,
    ),
    "minres": (partial(hk.solve, b=B, damping=1.0, tol=1e-10), 8, lambda found: found.x),
    "cg": (partial(hk.solve, b=B, damping=9.0, method="cg", tol=1e-12), 8, lambda found: found.x),
}
"""Of each: the question, the matvecs after which it is interrupted, and what of the answer is compared."""


def ask(mesh: DeviceMesh | None, name: str, path: Path, *, stop: bool = False) -> Any:
    """Ask with a checkpoint, and return the answer; or stop when it has taken some matvecs."""
    question, most, part = QUESTIONS[name]

    def monitor(entry: Any) -> None:
        if stop and entry.num_matvecs >= most:
            raise Stopped

    try:
        found = question(hessian(mesh), checkpoint=path, monitor=monitor)
    except (Stopped, hk.RemoteError) as error:
        return str(error) if mesh is not None and mesh.get_local_rank() else "stopped"
    return part(found.full_tensor())


def stopped(mesh: DeviceMesh | None, folder: Path) -> list[Any]:
    return [ask(mesh, name, folder / name, stop=True) for name in QUESTIONS]


def finished(mesh: DeviceMesh | None, folder: Path) -> list[Any]:
    return [ask(mesh, name, folder / name) for name in QUESTIONS]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Return the answers of runs that began on 3 ranks and ended on 2 or 1, and that began on one and ended on 2."""
    three, copy, one = (tmp_path_factory.mktemp(name) for name in ("three", "copy", "one"))
    begun = run(3, lambda mesh: stopped(mesh, three))[0]
    assert begun[0] == ["stopped"] * len(QUESTIONS)
    assert all(text.startswith("rank 0 failed: Stopped") for text in begun[1])
    for name in QUESTIONS:  # all vectors are in parts
        index = torch.load(three / name, weights_only=True)
        assert index["content"]["parts"]["shapes"], name
        assert os.path.getsize(three / name) < 60_000
    shutil.copytree(three, copy, dirs_exist_ok=True)
    assert stopped(None, one) == ["stopped"] * len(QUESTIONS)
    two = run(2, lambda mesh: finished(mesh, three), lambda mesh: finished(mesh, one))
    found = {"3 to 2": two[0], "1 to 2": two[1], "3 to 1": [finished(None, copy)]}
    assert [[*folder.iterdir()] for folder in (three, copy, one)] == [[], [], []]
    return found


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return [part(question(hessian(None))) for question, _, part in QUESTIONS.values()]


@pytest.mark.parametrize("change", ["3 to 2", "3 to 1", "1 to 2"])
@pytest.mark.parametrize("place", range(len(QUESTIONS)), ids=[*QUESTIONS])
def test_another_number_of_ranks_goes_on(
    change: str, place: int, answers: dict[str, list[list[Any]]], expected: list[Any]
) -> None:
    for found in answers[change]:
        assert isinstance(found, list), found
        torch.testing.assert_close(found[place], expected[place], rtol=1e-6, atol=1e-8)


def test_a_job_whose_rank_is_killed_is_restarted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else torch 2.13's restarted workers look for each other where the killed ones were
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    done = torchrun("--max-restarts", "1", restarted.__file__, str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr
    loss_fn = restarted.Loss()
    whole = restarted.solve(restarted.hessian(None, loss_fn))
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["life"] == 1
        torch.testing.assert_close(torch.tensor(found["values"], dtype=torch.float64), whole.values)
        assert found["num_matvecs"] <= whole.num_matvecs + 2  # one verifies the operator, once or twice
        assert found["here"] <= whole.num_matvecs - restarted.NUM_BEFORE + 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.json", "rank1.json"]


def one_part(folder: Path) -> Path:
    (save,) = Path(f"{folder}/solve.ckpt.parts").iterdir()
    return sorted(save.iterdir())[1]


def flip(folder: Path) -> None:
    content = bytearray(one_part(folder).read_bytes())
    content[-9] ^= 1
    one_part(folder).write_bytes(content)


def cut(folder: Path) -> None:
    one_part(folder).write_bytes(one_part(folder).read_bytes()[:-8])


def leave_out(folder: Path) -> None:
    one_part(folder).unlink()


def mix(folder: Path) -> None:
    """Take one part of another save."""
    other = folder / "other"
    shutil.copytree(folder.parent / "other", other)
    shutil.copy(one_part(other), one_part(folder))
    shutil.rmtree(other)


def take_another_index(folder: Path) -> None:
    shutil.copy(folder.parent / "other/solve.ckpt", folder / "solve.ckpt")


def lose_the_folder(folder: Path) -> None:
    shutil.rmtree(f"{folder}/solve.ckpt.parts")


def plant(folder: Path) -> None:
    """Add a part that is a pickle, which would run code."""
    one_part(folder).with_name("shard-00009.safetensors").write_bytes(pickle.dumps(print))


DAMAGES: dict[Callable[[Path], None], str] = {
    flip: "shard-00002-model-00001-of-00001.safetensors not as saved",
    cut: "shard-00002-model-00001-of-00001.safetensors not as saved",
    leave_out: "shard-00002-model-00001-of-00001.safetensors missing",
    mix: "shard-00002-model-00001-of-00001.safetensors not as saved",
    take_another_index: "No such file or directory",
    lose_the_folder: "No such file or directory",
    plant: "shard-00009.safetensors not as saved",
}


def solve(mesh: DeviceMesh | None, path: Path, most: int = 1000) -> Any:
    return hk.lanczos(
        hessian(mesh), 2, which="BE", tol=1e-12, atol=0.0, max_matvecs=most, checkpoint=path / "solve.ckpt"
    )


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.category is hk.UnsavedWarning]


def damaged(mesh: DeviceMesh, folder: Path) -> list[str]:
    """Save, damage copies of what is saved, and return what is said of each."""
    first = mesh.get_local_rank() == 0
    for name, most in (("good", 5), ("other", 6)):
        if first:
            (folder / name).mkdir()
        solve(mesh, folder / name, most)
    found = []
    for damage in DAMAGES:
        if first:
            shutil.copytree(folder / "good", folder / damage.__name__)
            damage(folder / damage.__name__)
        torch.distributed.barrier()
        found.append(told(lambda damage=damage: solve(mesh, folder / damage.__name__)))
    return found


def two_jobs(mesh: DeviceMesh, folder: Path) -> list[Any]:
    """Write the file as another job would while a solve runs; return what is warned of, and whether that stays."""
    (path := folder / "twice").mkdir(exist_ok=True)
    solve(mesh, path, 5)

    def monitor(entry: hk.Progress) -> None:
        if entry.num_matvecs == 6:
            (path / "solve.ckpt").rename(path / "moved")
            shutil.copy(path / "moved", path / "solve.ckpt")

    H = hessian(mesh)
    options: dict[str, Any] = {"which": "BE", "tol": 1e-12, "atol": 0.0, "max_matvecs": 8}
    said = warned(lambda: hk.lanczos(H, 2, monitor=monitor, checkpoint=path / "solve.ckpt", **options))
    return [
        said,
        (path / "solve.ckpt").read_bytes() == (path / "moved").read_bytes(),
        solve(mesh, path).converged,
    ]


def full_disk(mesh: DeviceMesh, folder: Path) -> list[Any]:
    """Let one rank's part fail; return what is warned of, and whether the former save is continued."""
    import torch.distributed.checkpoint.hf_storage as storage

    (path := folder / "full").mkdir(exist_ok=True)
    solve(mesh, path, 5)
    before = (path / "solve.ckpt").read_bytes()
    write = storage.HuggingFaceStorageWriter.write_data

    def fail(self: Any, *args: Any) -> Any:
        if mesh.get_local_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    storage.HuggingFaceStorageWriter.write_data = fail
    try:
        said = warned(lambda: solve(mesh, path, 7))
    finally:
        storage.HuggingFaceStorageWriter.write_data = write
    kept = (path / "solve.ckpt").read_bytes() == before
    torch.distributed.barrier()
    num_saves = len([*Path(f"{path}/solve.ckpt.parts").iterdir()])
    torch.distributed.barrier()
    return [said, kept, num_saves, solve(mesh, path).converged]


def own_disk(mesh: DeviceMesh, folder: Path) -> list[Any]:
    """Save where each rank sees another folder, and continue from one that only the first rank has."""
    rank, write = mesh.get_local_rank(), checkpoint.checkpoint_parts.write
    if rank == 0:
        (folder / "own").mkdir()
    checkpoint.checkpoint_parts.write = lambda path, *args: write(
        path if rank == 0 else folder / "far", *args
    )
    try:
        said = warned(lambda: solve(mesh, folder / "own", 5))
    finally:
        checkpoint.checkpoint_parts.write = write
    return [said, told(lambda: solve(mesh, folder / ("good" if rank == 0 else "nowhere")))]


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("troubles")
    calls = [damaged, two_jobs, full_disk, own_disk]
    found = run(2, *(partial(call, folder=folder) for call in calls))
    return folder, dict(zip([call.__name__ for call in calls], found, strict=True))


@pytest.mark.parametrize("place", range(len(DAMAGES)), ids=[damage.__name__ for damage in DAMAGES])
def test_damage_is_refused_by_name(place: int, troubles: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, found = troubles
    damage, said = [*DAMAGES.items()][place]
    alone = told(lambda: solve(None, folder / damage.__name__))
    for text in [alone, *(texts[place] for texts in found["damaged"])]:
        assert "ValueError: checkpoint: " in text
        assert f"is damaged ({said})" in text
        assert "restore both from one copy" in text


def test_two_jobs_that_write_one_checkpoint_are_told(troubles: tuple[Path, dict[str, list[Any]]]) -> None:
    (first, *rest), (other, *others) = troubles[1]["two_jobs"]
    (text,) = first
    assert "another process writes" in text
    assert other == []
    assert rest == others == [True, True]


def test_a_part_that_cannot_be_written_leaves_the_former_save(
    troubles: tuple[Path, dict[str, list[Any]]],
) -> None:
    (first, *rest), (other, *others) = troubles[1]["full_disk"]
    assert any("No space left on device" in text and "its last save" in text for text in first)
    assert other == []
    assert rest == others == [True, 1, True]


def test_ranks_that_share_no_disk_are_told(troubles: tuple[Path, dict[str, list[Any]]]) -> None:
    (first, one), (_, two) = troubles[1]["own_disk"]
    assert "could not be written (ranks do not see one folder; name a place that all share)" in first[0]
    for text in (one, two):
        assert "checkpoint, in a folder that all ranks share, must be the same on all ranks" in text


@pytest.mark.parametrize("at", ["parts", "index", "cleanup"])
def test_a_kill_at_any_time_leaves_a_whole_checkpoint(at: str, tmp_path: Path) -> None:
    def call(mesh: DeviceMesh) -> Any:
        if mesh.get_local_rank():
            return [solve(mesh, tmp_path, most).num_matvecs for most in (5, 7)]
        solve(mesh, tmp_path, 5)
        places = {"parts": checkpoint.checkpoint_parts, "index": checkpoints, "cleanup": checkpoint}
        names = {"parts": "digests", "index": "write", "cleanup": "delete_folders"}
        setattr(places[at], names[at], lambda *_, **__: os.kill(os.getpid(), 9))
        return solve(mesh, tmp_path, 7).num_matvecs

    killed, _ = run(2, call, timeout=10)[0]
    assert killed == "exit code -9"
    (_, *stale) = Path(f"{tmp_path}/solve.ckpt.parts").iterdir()
    assert len(stale) <= 1
    found = solve(None, tmp_path)
    torch.testing.assert_close(
        found.values, hk.lanczos(hessian(None), 2, which="BE", tol=1e-12, atol=0.0).values
    )
    assert [*tmp_path.iterdir()] == []
