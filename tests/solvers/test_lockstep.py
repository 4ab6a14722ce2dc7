from __future__ import annotations

import pytest
import torch

import hvpkit as hk
from hvpkit._utils.deadline import DeadlineReached
from hvpkit.solvers.lockstep import asking, in_lockstep


def operator(entries):
    return hk.aslinearoperator(torch.diag(torch.tensor(entries, dtype=torch.float64)))


def power(op, times):
    """Multiply a vector of ones several times, a number of matvecs that differs between computations."""
    vector = torch.ones(op.n, 1, dtype=torch.float64)
    for _ in range(times):
        vector = op.product(vector)
    return vector[:, 0].tolist()


def test_computations_share_rounds_and_finish_at_their_own():
    ops, rounds = [operator([1.0, 2.0]), operator([3.0])], []

    def products(asked):
        rounds.append(sorted(asked))
        return {number: ops[number].product(vectors) for number, vectors in asked.items()}

    computations = [
        asking(op, lambda op, times=times: power(op, times)) for op, times in zip(ops, (1, 3), strict=True)
    ]
    assert in_lockstep(computations, products) == [[1.0, 2.0], [27.0]]
    assert rounds == [[0, 1], [1], [1]]


def test_computation_without_a_matvec_needs_no_round():
    def products(asked):
        raise AssertionError(asked)

    assert in_lockstep([asking(operator([1.0]), lambda op: op.n)], products) == [1]


def test_deadline_is_raised_by_the_matvec():
    def products(asked):  # noqa: ARG001
        raise DeadlineReached

    def caught(op):
        try:
            return power(op, 1)
        except DeadlineReached:
            return "late"

    assert in_lockstep([asking(operator([1.0]), caught)], products) == ["late"]
    with pytest.raises(DeadlineReached):
        in_lockstep([asking(operator([1.0]), lambda op: power(op, 1))], products)


def test_solve_is_that_of_the_operator():
    op = operator(torch.linspace(-1, 2, 60).tolist())
    found = in_lockstep(
        [asking(op, lambda op: hk.lanczos(op, 2, which="BE", ncv=60))],
        lambda asked: {0: op.product(asked[0])},
    )
    assert torch.equal(found[0].values, hk.lanczos(op, 2, which="BE", ncv=60).values)
