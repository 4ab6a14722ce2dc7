from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.multifidelity import multifidelity
from problems import SPECTRA, matrix


class Interrupted(Exception):
    pass


@dataclass
class Unreliable:
    """A matrix and a cheap likeness of it; product number ``fails_at`` of the matrix raises, once."""

    A: Tensor
    noise: float
    fails_at: int | None = None
    count: int = 0

    def product(self, v: Tensor) -> Tensor:
        if self.fails_at is not None and self.count >= self.fails_at:
            self.fails_at = None
            raise Interrupted
        self.count += v.shape[1]
        return self.A @ v

    def levels(self, seed: int = 1) -> list[hk.LinearOperator]:
        g = torch.Generator().manual_seed(seed)
        E = torch.randn(self.A.shape, generator=g, dtype=torch.float64)
        E = (E + E.mT) / torch.linalg.matrix_norm(E + E.mT, 2)
        norm = torch.linalg.matrix_norm(self.A.double(), 2)
        like = replace(hk.aslinearoperator((self.A + self.noise * norm * E).to(self.A.dtype)), cost=0.05)
        return [like, replace(hk.aslinearoperator(self.A), product=self.product)]


CASES: dict[str, dict[str, Any]] = {
    "both ends": {"noise": 1e-2},
    "three": {"noise": 1e-2, "k": 3, "which": "LA"},
    "lacking": {"noise": 0.1, "certify": True},
    "poor": {"noise": 5.0},
    "float32": {"noise": 1e-2, "dtype": torch.float32},
    "small basis": {"noise": 0.1, "ncv": 10, "tol": 1e-4},
}


def arguments_of(case: str) -> tuple[Tensor, float, dict[str, Any]]:
    options = dict(CASES[case])
    A = matrix(SPECTRA["bulk_with_outliers"]).to(options.pop("dtype", torch.float64))
    return A, options.pop("noise"), options


def same_bits(first: hk.EigenResult, second: hk.EigenResult) -> bool:
    tensors = ("values", "vectors", "residual_norms", "error_bounds")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    return equal and first.intervals == second.intervals and first.status is second.status


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 5, 7, 9, 12, 16, 20, 30])
def test_interrupted_solve_goes_on_to_the_same_bits(case: str, fails_at: int, tmp_path: Path) -> None:
    A, noise, options = arguments_of(case)
    file, whole = tmp_path / "solve.pt", multifidelity(Unreliable(A, noise).levels(), **options)
    broken = Unreliable(A, noise, fails_at)
    try:
        multifidelity(broken.levels(), checkpoint=file, **options)
    except Interrupted:
        assert file.exists()
        again = multifidelity(broken.levels(), checkpoint=file, **options)
        assert same_bits(again, whole)
        assert whole.num_matvecs <= again.num_matvecs < whole.num_matvecs + 3
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fails_at", [12, 25])
def test_another_operator_is_refused(fails_at: int, tmp_path: Path) -> None:
    A, noise, options = arguments_of("both ends")
    file = tmp_path / "solve.pt"
    with pytest.raises(Interrupted):
        multifidelity(Unreliable(A, noise, min(fails_at, 10)).levels(), checkpoint=file, **options)
    before = file.read_bytes()
    other = Unreliable(A + 1e-3 * torch.diag(torch.arange(len(A)) % 7), noise)
    with pytest.raises(ValueError, match="another operator"):
        multifidelity(other.levels(), checkpoint=file, **options)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        multifidelity(Unreliable(A, noise).levels(), seed=1, checkpoint=file, **options)
    assert file.read_bytes() == before


@pytest.mark.parametrize("fails_at", range(4, 12))
def test_another_sample_is_refused_in_the_midst_of_a_certificate_and_else_right(
    fails_at: int, tmp_path: Path
) -> None:
    A, noise, options = arguments_of("both ends")
    file, truth = tmp_path / "solve.pt", torch.linalg.eigvalsh(A)
    with pytest.raises(Interrupted):
        multifidelity(Unreliable(A, noise, fails_at).levels(), checkpoint=file, **options)
    saved = torch.load(file, weights_only=True)["content"]["state"]
    certificate, levels = saved.get("certificate"), Unreliable(A, noise).levels(seed=2)
    if certificate is not None and certificate["krylov"] is not None:
        with pytest.raises(ValueError, match="another operator"):
            multifidelity(levels, checkpoint=file, **options)
    else:
        found = multifidelity(levels, checkpoint=file, **options)
        assert found.values.tolist() == pytest.approx([float(truth[0]), float(truth[-1])], rel=1e-2)


def test_limits_leave_a_solve_to_go_on_with(tmp_path: Path) -> None:
    A, noise, options = arguments_of("both ends")
    file, whole = tmp_path / "solve.pt", multifidelity(Unreliable(A, noise).levels(), **options)
    part = multifidelity(Unreliable(A, noise).levels(), max_matvecs=8, checkpoint=file, **options)
    assert part.status is hk.Status.MAX_MATVECS
    again = multifidelity(Unreliable(A, noise).levels(), checkpoint=file, **options)
    assert again.converged
    assert again.values.tolist() == pytest.approx(whole.values.tolist(), rel=1e-2)
    assert not file.exists()
