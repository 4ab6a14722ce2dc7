from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.operators.offload import HOST, HostOperator, on_host
from problems import SPECTRA, matrix
from variants import explained

ELSEWHERE = torch.device("cpu", 0)
"""A device that is not ``HOST`` by name, and that every machine has."""


def elsewhere(A: Tensor) -> hk.LinearOperator:
    return replace(hk.aslinearoperator(A.to(ELSEWHERE)), device=ELSEWHERE)


SOLVES: dict[str, Callable[..., Any]] = {
    "lanczos": lambda op, **options: hk.lanczos(op, 2, which="BE", tol=1e-6, **options),
    "blocks": lambda op, **options: hk.lanczos(op, 3, which="SA", block_size=2, tol=1e-6, **options),
    "levels": lambda op, **options: hk.multifidelity([replace(0.99 * op, cost=0.1), op], tol=1e-4, **options),
    "extremes": lambda op, **options: hk.extreme_eigenvalues(op, tol=1e-6, **options),
}


def test_an_operator_in_host_memory_stays_as_it_is() -> None:
    op = hk.aslinearoperator(matrix(SPECTRA["clustered"]))
    assert on_host(op) is op


@pytest.mark.parametrize("solve", SOLVES)
def test_solves_with_the_basis_in_host_memory_give_the_same_bits(solve: str) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    there, here = SOLVES[solve](elsewhere(A), offload=True), SOLVES[solve](hk.aslinearoperator(A))
    assert torch.equal(there.vectors.to(HOST), here.vectors)
    assert there.num_matvecs == here.num_matvecs
    assert there.status is here.status


def test_products_get_vectors_of_the_device_and_the_basis_lies_in_host_memory() -> None:
    seen: list[torch.device] = []
    op = elsewhere(matrix(SPECTRA["clustered"]))

    def product(v: Tensor) -> Tensor:
        seen.append(v.device)
        return op.product(v)

    on = on_host(replace(op, product=product))
    v = torch.ones(op.n, 2, dtype=op.dtype)
    assert on.product(v).device == HOST == on.device
    assert torch.equal(on.product(v), op.product(v))
    assert set(seen) <= {ELSEWHERE, HOST}
    assert (on.n, on.dtype, on.cost, on.name) == (op.n, op.dtype, op.cost, op.name)


def test_the_operator_is_asked_about_its_precision_and_its_faults() -> None:
    op = explained(elsewhere(torch.eye(3)), lambda v: f"{v.sum():g} is at fault")
    on = on_host(op)
    assert isinstance(on, HostOperator)
    assert on.blame(torch.ones(3, 1)) == "3 is at fault"
    assert on.precision == op.precision
    assert on.exact is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solve", SOLVES)
def test_on_a_gpu_the_basis_lies_in_host_memory(solve: str) -> None:
    A = matrix(SPECTRA["bulk_with_outliers"])
    there = SOLVES[solve](hk.aslinearoperator(A.cuda()), offload=True)
    here = SOLVES[solve](hk.aslinearoperator(A))
    assert there.vectors.device.type == "cuda"
    assert there.status is here.status
    if isinstance(here, hk.EigenResult):
        assert there.values.tolist() == pytest.approx(here.values.tolist(), rel=1e-8)
