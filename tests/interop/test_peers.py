"""Operators of other libraries: the same numbers where they are right, a failed check where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hvpkit as hk
from hvpkit.diagnostics.check import check
from oracles import hessian_by_double_backward, relative_error

CRITERION = nn.CrossEntropyLoss()


def network(norm: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))
        for n in sizes
    ]


def curvlinops_hessian(model: nn.Module, data: list) -> object:
    curvlinops = pytest.importorskip("curvlinops")
    return curvlinops.HessianLinearOperator(model, CRITERION, list(model.parameters()), data)


def eigenthings_hessian(model: nn.Module, data: list) -> object:
    eigenthings = pytest.importorskip("hessian_eigenthings")
    return eigenthings.HessianOperator(model, data, eigenthings.supervised_loss(CRITERION))


def dense(model: nn.Module, data: list) -> Tensor:
    objective, params = hk.from_module(model, CRITERION)
    return hessian_by_double_backward(objective, params, tuple(map(torch.cat, zip(*data, strict=True))))


PEERS = pytest.mark.parametrize("peer", [curvlinops_hessian, eigenthings_hessian])


@PEERS
def test_products_are_those_of_the_dense_matrix(peer):
    model, data = network(nn.Identity()), batches(6, 6)
    expected, op = dense(model, data), hk.aslinearoperator(peer(model, data))
    assert op.shape == expected.shape
    assert op.dtype == torch.float64
    eye = torch.eye(op.n, dtype=op.dtype)
    assert relative_error(op @ eye, expected) < 1e-12
    assert relative_error(op @ eye[0], expected[0]) < 1e-12


@PEERS
def test_solvers_give_the_same_numbers_through_them(peer):
    model, data = network(nn.Identity()), batches(6, 6)
    values = torch.linalg.eigvalsh(dense(model, data))
    op = hk.aslinearoperator(peer(model, data))
    found = hk.extreme_eigenvalues(op, tol=1e-8)
    assert found.converged
    assert found.smallest.value == pytest.approx(float(values[0]), rel=1e-7)
    assert found.largest.value == pytest.approx(float(values[-1]), rel=1e-7)
    top = hk.lanczos(op, 3, which="LA", tol=1e-8)
    assert relative_error(top.values, values[-3:]) < 1e-7


@PEERS
def test_right_operators_pass_the_preflight(peer):
    model, data = network(nn.Identity()), batches(6, 6)
    assert check(hk.aslinearoperator(peer(model, data))).ok


def test_curvlinops_on_a_layer_norm_is_found_to_be_asymmetric():
    model, data = network(nn.LayerNorm(6)), batches(6, 6)
    expected, op = dense(model, data), hk.aslinearoperator(curvlinops_hessian(model, data))
    report = check(op)
    assert [found.check for found in report.findings if found.verdict == "failed"] == ["symmetric"]
    assert relative_error(op @ torch.eye(op.n, dtype=op.dtype), expected) > 0.01


def test_eigenthings_on_a_layer_norm_passes():
    model, data = network(nn.LayerNorm(6)), batches(6, 6)
    expected, op = dense(model, data), hk.aslinearoperator(eigenthings_hessian(model, data))
    assert check(op).ok
    assert relative_error(op @ torch.eye(op.n, dtype=op.dtype), expected) < 1e-12


def test_eigenthings_weighs_a_ragged_batch_like_the_others():
    model, data = network(nn.Identity()), batches(9, 3)
    op = hk.aslinearoperator(eigenthings_hessian(model, data))
    error = relative_error(op @ torch.eye(op.n, dtype=op.dtype), dense(model, data))
    assert check(op).ok, "no product alone can tell"
    assert error > 0.1
