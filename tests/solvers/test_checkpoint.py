from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers import checkpoint as checkpoint_module
from hvpkit.solvers.lanczos import Lanczos
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


@pytest.mark.parametrize("num_loads", [1, 3])
def test_a_budget_cuts_a_continued_solve_where_it_cuts_a_whole_one(num_loads: int, tmp_path: Path) -> None:
    A, file = matrix(SPECTRA["bulk_with_outliers"]), tmp_path / "solve.pt"
    arguments: dict[str, Any] = {"k": 2, "which": "BE", "tol": 1e-12, "max_matvecs": 25}
    whole = hk.lanczos(hk.aslinearoperator(A), **arguments)
    assert whole.status is hk.Status.MAX_MATVECS
    for _ in range(num_loads):
        with pytest.raises(Interrupted):
            hk.lanczos(Unreliable(A, 6).operator(), checkpoint=file, **arguments)
    again = hk.lanczos(hk.aslinearoperator(A), checkpoint=file, **arguments)
    assert same_bits(again, whole)
    assert again.num_matvecs == whole.num_matvecs + num_loads


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


def saved_products(file: Path) -> int:
    return torch.load(file, weights_only=True)["content"]["state"]["num_products"]


def test_saves_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint_module, "SAVE_COST_FACTOR", 0.0)
    file, seen = tmp_path / "solve.pt", []

    def assess(_: hk.Progress) -> None:
        seen.append(file.exists() and saved_products(file))

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
        ({"certify": True}, "certify was False and is True"),
        ({"v0": torch.ones(100, dtype=torch.float64)}, "v0 differs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
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
    other = hk.aslinearoperator(1.001 * matrix(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match=r"^checkpoint.*another operator"):
        hk.lanczos(other, 2, tol=1e-10, checkpoint=file)
    with pytest.raises(ValueError, match=r"^checkpoint.*operands differs"):
        hk.lanczos(1.001 * op, 2, tol=1e-10, checkpoint=file)
    with pytest.raises(ValueError, match=r"^checkpoint.*dtype was"):
        hk.lanczos(hk.aslinearoperator(matrix(SPECTRA["indefinite"]).float()), 2, checkpoint=file)


def test_operator_that_differs_far_from_the_start_is_refused(
    interrupted: tuple[hk.LinearOperator, Path],
) -> None:
    """The first vector's matvec is the same: only a combination of all shows it."""
    _, file = interrupted
    state = torch.load(file, weights_only=True)["content"]["state"]
    last = state["basis"][state["num_multiplied"] - 1]
    A = matrix(SPECTRA["indefinite"])
    other = hk.aslinearoperator(A + 1e-3 * torch.outer(last, last))
    torch.testing.assert_close(other.product(state["basis"][0][:, None])[:, 0], A @ state["basis"][0])
    with pytest.raises(ValueError, match=r"^checkpoint.*another operator"):
        hk.lanczos(other, 2, tol=1e-10, checkpoint=file)


def test_what_differs_of_a_hessian_is_named(tmp_path: Path) -> None:
    x, file = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), tmp_path / "solve.pt"

    def solve(
        params: torch.Tensor, x: torch.Tensor, curvature: Any = hk.hessian, **options: Any
    ) -> hk.EigenResult:
        H = curvature(lambda p, batch: torch.cosh(batch @ p), params, x, **options)
        return hk.lanczos(H, tol=1e-6, ncv=20, max_matvecs=8, checkpoint=file)

    mode = {"mode": "reverse-over-reverse"}
    solve(torch.zeros(30), x, **mode)
    for params, data, said in (
        (torch.full((30,), 1e-3), x, r"\(parameters differs\)"),
        (torch.zeros(30), x + 1e-3, r"\(data differs\)"),
    ):
        with pytest.raises(ValueError, match=rf"^checkpoint.*{said}"):
            solve(params, data, **mode)
    again = solve(torch.zeros(30), x, batch_size=7, **mode)  # batches are not the question
    assert again.num_matvecs == 9


def test_basis_with_a_matvec_that_is_not_finite_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before the bad matvec are verified; the solve ends as it would have."""
    monkeypatch.setattr("hvpkit.solvers.lanczos.assessment_interval", lambda *_: 4)
    A, file = matrix(SPECTRA["indefinite"]), tmp_path / "solve.pt"
    unreliable = Unreliable(A)
    product = unreliable.product

    def bad(v: Tensor) -> Tensor:
        image = product(v)
        if unreliable.count == 10:
            unreliable.fails_at = 10
            return image * torch.nan
        return image

    op = replace(hk.aslinearoperator(A), product=bad)
    with pytest.raises(Interrupted):
        hk.lanczos(op, 2, tol=1e-10, block_size=2, checkpoint=file)
    found = hk.lanczos(hk.aslinearoperator(A), 2, tol=1e-10, block_size=2, checkpoint=file)
    assert found.status is hk.Status.NON_FINITE


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
    for bad in (tmp_path, "/dev/full", "/dev/null", "/proc/solve.pt", __file__ + "/solve.pt"):
        with pytest.raises(ValueError, match=r"^checkpoint"):
            hk.lanczos(op, checkpoint=bad)


@pytest.mark.parametrize("bit", range(0, 8 * 14_000, 4_999))
def test_a_flipped_bit_is_damage_or_does_no_harm(
    interrupted: tuple[hk.LinearOperator, Path], bit: int
) -> None:
    op, file = interrupted
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    try:
        found = hk.lanczos(op, 2, tol=1e-10, checkpoint=file)
    except ValueError as error:
        said = str(error)
    else:
        said = "checkpoint is not damaged"
        assert torch.equal(found.values, hk.lanczos(op, 2, tol=1e-10).values)
    assert said.startswith("checkpoint")
    assert "damaged" in said


def test_damage_another_version_and_another_solve_are_three_messages(
    interrupted: tuple[hk.LinearOperator, Path],
) -> None:
    op, file = interrupted
    content, whole = torch.load(file, weights_only=True), file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged .*restore it"):
        hk.lanczos(op, 2, checkpoint=file)
    content["content"]["state"]["projected"][0, 0] += 1e-9
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged \(its checksum does not fit\)"):
        hk.lanczos(op, 2, checkpoint=file)
    torch.save({**content, "format": 2}, file)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is of another version .*format 2"):
        hk.lanczos(op, 2, checkpoint=file)
    torch.save({"model": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is not a checkpoint of hvpkit"):
        hk.lanczos(op, 2, checkpoint=file)


@pytest.mark.parametrize(("spectrum", "max_matvecs"), [("multiple", None), ("clustered", 30)])
def test_signal_during_any_assessment_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spectrum: str, max_matvecs: int | None
) -> None:
    """The last one, by convergence or at a limit, included: the solve takes no step more."""
    op, file = hk.aslinearoperator(matrix(SPECTRA[spectrum])), tmp_path / "solve.pt"
    arguments: dict[str, Any] = {"k": 2, "which": "BE", "ncv": 8, "tol": 1e-6, "max_matvecs": max_matvecs}
    assess, count, signal_at = Lanczos.assess, 0, 0

    def assess_and_signal(self: Lanczos, state: Any) -> Any:
        nonlocal count
        count += 1
        if count == signal_at:
            signal.raise_signal(signal.SIGINT)
        return assess(self, state)

    monkeypatch.setattr(Lanczos, "assess", assess_and_signal)
    whole = hk.lanczos(op, **arguments)
    last = count
    assert last > 2 * arguments["ncv"]  # it has restarted
    assert whole.converged is (max_matvecs is None)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number in range(2, last + 1):
            count, signal_at = 0, number
            with pytest.raises(KeyboardInterrupt):
                hk.lanczos(op, checkpoint=file, **arguments)
            count = -1000
            assert same_bits(hk.lanczos(op, checkpoint=file, **arguments), whole)
            file.unlink(missing_ok=True)
    finally:
        signal.signal(signal.SIGINT, handler)


SCRIPT = """
import sys, time, torch
import hvpkit as hk
d = torch.linspace(-1, 3, 300, dtype=torch.float64)

def product(v):
    print("product", flush=True)
    time.sleep(0.01)
    return d * v

op = hk.aslinearoperator((product, 300, torch.float64))
try:
    found = hk.lanczos(op, tol=1e-10, checkpoint="solve.pt")
except KeyboardInterrupt:
    print("caught")
else:
    print(found.values.item().hex())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_ends_the_process_saves_before(number: signal.Signals, tmp_path: Path) -> None:
    args = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline() == "product\n"
        process.send_signal(number)
        rest = process.communicate()[0].splitlines()
    assert process.returncode == -number
    assert set(rest) <= {"product"}
    assert saved_products(tmp_path / "solve.pt") >= 18
    d = torch.linspace(-1, 3, 300, dtype=torch.float64)
    op = hk.aslinearoperator((lambda v: d * v, 300, torch.float64))
    whole = hk.lanczos(op, tol=1e-10)
    assert same_bits(hk.lanczos(op, tol=1e-10, checkpoint=tmp_path / "solve.pt"), whole)


def test_interruption_of_the_final_check_is_saved(tmp_path: Path) -> None:
    A, file = matrix(SPECTRA["clustered"]), tmp_path / "solve.pt"
    whole = hk.lanczos(hk.aslinearoperator(A), tol=1e-8)
    unreliable = Unreliable(A, int(whole.num_matvecs) - 1)
    with pytest.raises(Interrupted):
        hk.lanczos(unreliable.operator(), tol=1e-8, checkpoint=file)
    again = hk.lanczos(unreliable.operator(), tol=1e-8, checkpoint=file)
    assert same_bits(again, whole)
    assert again.num_matvecs == whole.num_matvecs + 1


def test_failed_save_leaves_the_old_file(
    interrupted: tuple[hk.LinearOperator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, file = interrupted
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(hk.UnsavedWarning, match=rf"^checkpoint: {file} .*no space.*its last save"):
        found = hk.lanczos(op, 2, tol=1e-10, max_matvecs=12, checkpoint=file)
    assert found.status is hk.Status.MAX_MATVECS
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_link_stays_and_its_target_holds_the_solve(tmp_path: Path) -> None:
    op, link, target = (
        hk.aslinearoperator(matrix(SPECTRA["indefinite"])),
        tmp_path / "link",
        tmp_path / "far.pt",
    )
    link.symlink_to(target)
    hk.lanczos(op, tol=1e-10, max_matvecs=8, checkpoint=link)
    assert link.is_symlink()
    assert saved_products(target) == 7
    assert hk.lanczos(op, tol=1e-6, checkpoint=link).converged
    assert link.is_symlink()
    assert not target.exists()


def test_folder_of_a_relative_path_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    op = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    hk.lanczos(
        op,
        tol=1e-10,
        max_matvecs=8,
        checkpoint="solve.pt",
        monitor=lambda _: monkeypatch.chdir(tmp_path / "elsewhere"),
    )
    assert (tmp_path / "solve.pt").exists()


def test_file_holds_only_the_rows_in_use(tmp_path: Path) -> None:
    n, file = 200_000, tmp_path / "solve.pt"
    op = hk.aslinearoperator((lambda v: v * torch.arange(float(n)), n, torch.float32))
    hk.lanczos(op, tol=1e-6, max_matvecs=6, checkpoint=file)
    assert 6 * 4 * n < file.stat().st_size < 8 * 4 * n


def test_two_processes_with_one_file_are_told_and_the_first_one_keeps_it(tmp_path) -> None:
    """As ranks without a mesh: both begin, then both save."""
    path, op = (
        tmp_path / "both.ckpt",
        hk.aslinearoperator(torch.diag(torch.linspace(-1, 2, 60, dtype=torch.float64))),
    )

    def solve(number: int, **options: object) -> hk.EigenResult:
        return hk.lanczos(op, 2, which="BE", tol=1e-12, atol=0.0, seed=number, checkpoint=path, **options)

    def second(entry: hk.Progress) -> None:
        if entry.num_matvecs >= 5 and not path.exists():
            solve(1, max_matvecs=9)  # another one begins and saves while the first one is under way

    with pytest.warns(hk.UnsavedWarning, match=r"another process writes .*both.ckpt too.*mesh=mesh"):
        solve(0, max_matvecs=12, monitor=second)
    assert str(solve(1).status) == "converged"  # the one whose file it is goes on, and deletes it
    assert not path.exists()
    assert solve(0, max_matvecs=12).num_matvecs == 12
    assert path.exists()
