from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hvpkit as hk
from hvpkit.solvers.common.request import check_arguments
from hvpkit.solvers.ends import Bound, End, ascending, distinct, rank, reach, reach_of, wanted_sides
from problems import matrix


def ritz(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values of an orthonormal basis, ascending, and their residuals as columns."""
    values, rotation = torch.linalg.eigh(X.mT @ A @ X)
    return values, A @ X @ rotation - X @ rotation * values


def cases(num: int) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Eigenvalues, Ritz values near the m largest ones, residuals, and a number between them and the rest."""
    found, g = [], torch.Generator().manual_seed(0)
    while len(found) < num:
        m = int(torch.randint(1, 5, (), generator=g))
        A = matrix(torch.randn(30, generator=g, dtype=torch.float64).tolist())
        truth, V = torch.linalg.eigh(A)
        error = 10 ** -float(3 * torch.rand((), generator=g))
        X = torch.linalg.qr(V[:, -m:] + error * torch.randn(30, m, generator=g, dtype=torch.float64))[0]
        values, residuals = ritz(A, X)
        at = float(truth[-m - 1] + torch.rand((), generator=g) * (values[0] - truth[-m - 1]))
        if truth[-m - 1] <= at < values[0]:
            found.append((truth[-m:], values, residuals, at))
    return found


def test_no_eigenvalue_lies_beyond_its_reach() -> None:
    tight = []
    for truth, values, residuals, at in cases(200):
        distances = reach(values, residuals.mT @ residuals, at)
        assert bool((truth - values <= distances + 1e-12).all())
        tight += (distances / (truth - values).clamp(min=1e-300)).tolist()
    assert torch.tensor(tight).quantile(0.1) < 4


def test_reach_is_sharp_for_two_by_two() -> None:
    A = torch.tensor([[3.0, 0.4], [0.4, 1.0]], dtype=torch.float64)
    distance = reach(
        torch.tensor([3.0], dtype=torch.float64), torch.tensor([[0.16]], dtype=torch.float64), 1.0
    )
    exact = float(torch.linalg.eigvalsh(A)[-1]) - 3.0
    assert exact <= float(distance[0]) < 1.2 * exact


def end(value: float) -> End:
    return End(value, torch.empty(0), torch.empty(0), 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bounds_of_either_end_say_the_same(sign: float) -> None:
    values, gram = [5.0, 6.0, 9.0], torch.diag(torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64))
    places = [-3, -2, -1] if sign > 0 else [2, 1, 0]
    pairs = sorted(zip(places, values, range(3), strict=True), key=lambda pair: sign * pair[1])
    ends = {place: end(sign * value) for place, value, _ in pairs}
    order = [index for _, _, index in pairs]
    gram = gram[order][:, order]
    inner, middle, outer = places
    assert reach_of(ends, gram, inner, Bound(sign * 5.1, 2)) == pytest.approx(0.1)
    expected = reach(
        torch.tensor([6.0, 9.0], dtype=torch.float64), torch.diag(torch.tensor([0.02, 0.03])).double(), 5.1
    )
    assert reach_of(ends, gram, middle, Bound(sign * 5.1, 2)) == pytest.approx(float(expected[0]))
    assert reach_of(ends, gram, outer, Bound(sign * 5.1, 2)) == pytest.approx(float(expected[1]))
    assert reach_of(ends, gram, outer, Bound(sign * 9.2, 0)) == pytest.approx(0.2)
    assert reach_of(ends, gram, outer, Bound(sign * 5.1, 3)) == math.inf  # one more may be there
    assert reach_of(ends, gram, middle, Bound(sign * 6.1, 1)) == pytest.approx(0.1)


def test_places() -> None:
    op = hk.aslinearoperator(torch.eye(30))

    def sides(k: int, which: str) -> list[list[int]]:
        return wanted_sides(
            check_arguments(op, k, which, v0=None, tol=0.1, max_matvecs=None, time_limit=None, seed=0)
        )

    assert sides(3, "LA") == [[-1, -2, -3]]
    assert sides(2, "SA") == [[0, 1]]
    assert sides(5, "BE") == [[-1, -2, -3], [0, 1]]
    assert ascending([-1, -2, 0, 1]) == [0, 1, -2, -1]
    assert [rank(place) for place in (0, 2, -1, -3)] == [0, 2, 0, 2]
    assert distinct([0, 1, -2, -1], 3) == [0, -2, -1]
