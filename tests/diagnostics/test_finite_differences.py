"""Products from first derivatives, against dense oracles."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian

import hvpkit as hk
from hvpkit.autodiff.pytree import Layout
from hvpkit.curvature.batches import Problem
from hvpkit.data import as_data
from hvpkit.diagnostics.finite_differences import matvec_by_differences
from oracles import _split, hessian_by_double_backward, relative_error
from problems import network


def problem_of(given, *, mean: bool = False, weights: torch.Tensor | None = None) -> Problem:
    loss_fn = given.objective
    if mean:
        loss_fn = hk.Objective(loss_fn.forward, lambda z, batch: given.objective.output_loss(z, batch).mean())
    data = as_data(given.data, batch_size=5)
    if weights is not None:
        data = data.subset(torch.arange(13), weights)
    return Problem(loss_fn, Layout.of(given.params), list(given.params.values()), data)


def dense(kind: str, given, weights: torch.Tensor) -> torch.Tensor:
    """The mean, by weights of examples, of each example's own matrix."""
    point = torch.cat([p.flatten() for p in given.params.values()])
    total = torch.zeros(len(point), len(point), dtype=torch.float64)
    for index, weight in enumerate(weights):
        example = tuple(part[index : index + 1] for part in given.data)

        def outputs(flat, example=example):
            return given.objective.forward(_split(flat, given.params), example)[0]

        if kind == "hessian":
            matrix = hessian_by_double_backward(given.objective, given.params, example)
        else:
            jac, z = jacobian(outputs, point), outputs(point)
            p = torch.softmax(z, 0)
            slope = p - torch.nn.functional.one_hot(example[1][0], len(z))
            inner = torch.diag(p) - torch.outer(p, p) if kind == "ggn" else torch.outer(slope, slope)
            matrix = jac.mT @ inner @ jac
        total += weight * matrix
    return total


KINDS = [(kind, w) for kind in ("hessian", "ggn", "empirical-fisher") for w in ("uniform", "weights", "mean")]


@pytest.mark.parametrize(("kind", "weighing"), KINDS[:-1])  # a mean has no gradients of single examples
@pytest.mark.parametrize("name", ["mlp", "tied_weights"])
def test_each_kind_is_its_dense_matrix_times_the_vector(name, kind, weighing):
    given = network(name)
    weights = torch.linspace(0.01, 0.3, 13, dtype=torch.float64)
    problem = problem_of(given, mean=weighing == "mean", weights=weights if weighing == "weights" else None)
    v = torch.randn(problem.layout.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, unsettled = matvec_by_differences(kind, problem, 100 * v)
    expected = 100 * dense(kind, given, weights if weighing == "weights" else torch.full((13,), 1 / 13)) @ v
    assert relative_error(found, expected) < 1e-6
    assert unsettled < 1e-5 * expected.norm()


def test_a_kink_within_the_step_shows_as_unsettled():
    step = torch.finfo(torch.float64).eps ** 0.5
    for distance, settled in ((0.5, False), (1.5, False), (2.5, True)):  # in steps, on one side
        data = as_data(torch.tensor([[distance * step]], dtype=torch.float64))
        leaf = torch.zeros(1, dtype=torch.float64)
        problem = Problem(
            lambda p, x: ((p - x[:, 0]).relu() + p**2).expand(1),
            Layout.of(leaf),
            [leaf],
            data,
        )
        found, unsettled = matvec_by_differences("hessian", problem, torch.ones(1, dtype=torch.float64))
        assert (unsettled < 1e-6) == settled
        assert abs(float(found) - 2) <= 4 * unsettled + 1e-6
