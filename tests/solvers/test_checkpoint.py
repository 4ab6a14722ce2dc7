from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers import checkpoint as checkpoint_module
from problems import SPECTRA, matrix


class Interrupted(Exception):
    pass


@dataclass
class Unreliable:
    """A matrix whose product number ``fails_at`` raises, once."""

    A: Tensor
    fails_at: int | None = None
    count: int = 0

    def product(self, v: Tensor) -> Tensor:
        if self.fails_at is not None and self.count >= self.fails_at:
            self.fails_at = None
            raise Interrupted
        self.count += v.shape[1]
        return self.A @ v

    def operator(self) -> hk.LinearOperator:
        return replace(hk.aslinearoperator(self.A), product=self.product)


ARGUMENTS: dict[str, dict[str, object]] = {
    "one start": {"k": 2, "which": "BE", "tol": 1e-8},
    "restarts": {"k": 2, "which": "BE", "tol": 1e-8, "ncv": 16},
    "blocks and copies": {"k": 3, "which": "SA", "tol": 1e-8, "ncv": 20, "block_size": 2},
    "float32": {"k": 2, "which": "LA", "tol": 1e-3},
}


def same_bits(first: hk.EigenResult, second: hk.EigenResult) -> bool:
    tensors = ("values", "vectors", "residual_norms", "error_bounds")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    return equal and first.intervals == second.intervals and first.status is second.status


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("fails_at", [2, 7, 13, 14, 15, 30])
def test_interrupted_solve_goes_on_to_the_same_bits(case: str, fails_at: int, tmp_path: Path) -> None:
    A = matrix(SPECTRA["multiple"], dtype=torch.float32 if case == "float32" else torch.float64)
    file, arguments = tmp_path / "solve.pt", ARGUMENTS[case]
    whole = hk.lanczos(hk.aslinearoperator(A), **arguments)
    unreliable = Unreliable(A, fails_at)
    if fails_at >= whole.num_matvecs - 1:
        pytest.skip("over before")
    with pytest.raises(Interrupted):
        hk.lanczos(unreliable.operator(), checkpoint=file, **arguments)
    assert file.exists()
    again = hk.lanczos(unreliable.operator(), checkpoint=file, **arguments)
    assert same_bits(again, whole)
    assert again.num_matvecs == whole.num_matvecs + 1 == unreliable.count
    assert not file.exists()


def test_solve_at_its_budget_goes_on_with_a_larger_one_and_a_smaller_tol(tmp_path: Path) -> None:
    op, file = hk.aslinearoperator(matrix(SPECTRA["bulk_with_outliers"])), tmp_path / "solve.pt"
    whole = hk.extreme_eigenvalues(op, tol=1e-6)
    part = hk.extreme_eigenvalues(op, tol=1e-2, max_matvecs=9, checkpoint=file)
    assert part.status is hk.Status.MAX_MATVECS
    rest = hk.extreme_eigenvalues(op, tol=1e-6, checkpoint=file)
    assert rest.converged
    assert (rest.smallest.value, rest.largest.value) == (whole.smallest.value, whole.largest.value)
    assert rest.history[: len(part.history)] == part.history[: len(rest.history)]
    assert rest.num_matvecs == whole.num_matvecs + 1
    assert [entry.seconds for entry in rest.history] == sorted(entry.seconds for entry in rest.history)


def test_time_limit_counts_from_the_call_and_seconds_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ticking = tmp_path / "solve.pt", Unreliable(matrix(SPECTRA["clustered"]))
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + ticking.count)  # a second for each product
    first = hk.lanczos(ticking.operator(), tol=1e-12, time_limit=10, checkpoint=file)
    again = hk.lanczos(ticking.operator(), tol=1e-12, time_limit=10, checkpoint=file)
    assert first.status is again.status is hk.Status.TIME_LIMIT
    assert first.seconds == 10
    assert 18 <= again.seconds <= 20


def test_what_a_monitor_raises_can_be_gone_on_from(tmp_path: Path) -> None:
    op, file = hk.aslinearoperator(matrix(SPECTRA["clustered"])), tmp_path / "solve.pt"
    whole = hk.lanczos(op, 2, which="BE", ncv=12, tol=1e-10)

    def stop(entry: hk.Progress) -> None:
        if entry.num_matvecs >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hk.lanczos(op, 2, which="BE", ncv=12, tol=1e-10, monitor=stop, checkpoint=file)
    assert same_bits(hk.lanczos(op, 2, which="BE", ncv=12, tol=1e-10, checkpoint=file), whole)


def test_saves_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint_module, "SAVE_COST_FACTOR", 0.0)
    file, seen = tmp_path / "solve.pt", []

    def assess(_: hk.Progress) -> None:
        seen.append(file.exists() and torch.load(file, weights_only=True)["state"]["num_products"])

    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    found = hk.lanczos(op, tol=1e-6, monitor=assess, checkpoint=file)
    assert seen == [entry.num_matvecs for entry in found.history]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[hk.LinearOperator, Path]:
    op, file = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), tmp_path / "solve.pt"
    hk.lanczos(op, 2, tol=1e-10, max_matvecs=8, checkpoint=file)
    return op, file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 3}, "k was 2 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"which": "SA"}, "which was 'LA' and is 'SA'"),
        ({"ncv": 30}, "ncv was"),
    ],
    ids=str,
)
def test_checkpoint_of_another_solve_is_refused_and_kept(
    interrupted: tuple[hk.LinearOperator, Path], change: dict[str, object], said: str
) -> None:
    op, file = interrupted
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"^checkpoint.*{said}"):
        hk.lanczos(op, **{"k": 2, "tol": 1e-10, "checkpoint": file, **change})
    assert file.read_bytes() == before


def test_checkpoint_of_another_operator_is_refused(interrupted: tuple[hk.LinearOperator, Path]) -> None:
    op, file = interrupted
    with pytest.raises(ValueError, match=r"^checkpoint.*another operator"):
        hk.lanczos(1.001 * op, 2, tol=1e-10, checkpoint=file)
    with pytest.raises(ValueError, match=r"^checkpoint.*dtype was"):
        hk.lanczos(hk.aslinearoperator(matrix(SPECTRA["indefinite"]).float()), 2, checkpoint=file)


def test_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    op, file = hk.aslinearoperator(matrix(SPECTRA["indefinite"])), tmp_path / "notes.txt"
    file.write_text("my notes")
    with pytest.raises(ValueError, match=r"^checkpoint.*not a checkpoint"):
        hk.lanczos(op, checkpoint=file)
    assert file.read_text() == "my notes"


def test_bad_path_is_named(tmp_path: Path) -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match=r"^checkpoint.*no folder"):
        hk.lanczos(op, checkpoint=tmp_path / "nowhere" / "solve.pt")
    with pytest.raises(TypeError, match=r"^checkpoint"):
        hk.lanczos(op, checkpoint=3)


def test_failed_save_leaves_the_old_file(
    interrupted: tuple[hk.LinearOperator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, file = interrupted
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        hk.lanczos(op, 2, tol=1e-10, max_matvecs=12, checkpoint=file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_file_holds_only_the_rows_in_use(tmp_path: Path) -> None:
    n, file = 200_000, tmp_path / "solve.pt"
    op = hk.aslinearoperator((lambda v: v * torch.arange(float(n)), n, torch.float32))
    hk.lanczos(op, tol=1e-6, max_matvecs=6, checkpoint=file)
    assert 6 * 4 * n < file.stat().st_size < 8 * 4 * n
