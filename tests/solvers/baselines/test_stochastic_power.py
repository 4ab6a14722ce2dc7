from __future__ import annotations

import pytest
import torch

import hvpkit as hk
from finite_sums import Tally, mean_of, scattered
from hvpkit.solvers.baselines.power import power
from hvpkit.solvers.baselines.stochastic_power import geometric, stochastic_power
from problems import SPECTRA


def test_the_schedule_is_honoured() -> None:
    tally = Tally(mean_of(scattered(SPECTRA["clustered"])))
    numbers: list[int] = []

    def schedule(number: int) -> int:
        numbers.append(number)
        return 3 + 2 * number

    stochastic_power(tally.operator(), which="LA", batch_schedule=schedule, tol=1e-12, max_matvecs=30)
    drawn = [examples for examples, _ in tally.products if examples < 64]
    assert drawn == [3 + 2 * number for number in range(31)]  # 3 to 63, and all from then on
    assert sorted(set(numbers)) == list(range(32))


def test_the_default_schedule_grows_to_all_data_for_six_products() -> None:
    schedule = geometric(6400)
    sizes = [schedule(number) for number in range(40)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 100
    assert sizes[-1] == 6400
    assert sum(size for size in sizes if size < 6400) / 6400 == pytest.approx(5, rel=0.1)
    assert [geometric(3)(number) for number in (0, 10**6)] == [1, 3]


def test_full_data_is_looked_at_whenever_minibatches_have_cost_two_products() -> None:
    tally = Tally(mean_of(scattered(SPECTRA["clustered"])))
    stochastic_power(tally.operator(), batch_schedule=lambda _: 16, tol=1e-12, max_matvecs=20)
    examples = [examples for examples, _ in tally.products]
    assert examples[: 1 + 2 * 9] == [64, *([16] * 8 + [64]) * 2]


def test_on_outliers_it_takes_fewer_products_than_with_all_data() -> None:
    op = mean_of(scattered(SPECTRA["bulk_with_outliers"]))
    full, stochastic = power(op, tol=1e-2), stochastic_power(op, tol=1e-2)
    assert full.converged
    assert stochastic.converged
    assert stochastic.num_matvecs <= 0.5 * full.num_matvecs


def test_minibatches_that_do_not_grow_leave_an_error_that_their_size_sets() -> None:
    op = mean_of(scattered([1.0, *torch.linspace(-0.3, 0.3, 19).tolist()], num_examples=256))
    squares, errors = [], []
    for size in (8, 32):
        tally = Tally(op)
        found = stochastic_power(tally.operator(), batch_schedule=lambda _, size=size: size, max_matvecs=200)
        assert found.status is hk.Status.MAX_MATVECS
        settled = torch.tensor(tally.residuals[5:-1]).square()  # looks are many steps apart
        squares.append(float(settled.mean()))
        errors.append(float(settled.std()) / len(settled) ** 0.5)
    expected = (1 / 8 - 1 / 256) / (1 / 32 - 1 / 256)  # variance of a mean without replacement
    relative = sum((error / square) ** 2 for error, square in zip(errors, squares, strict=True)) ** 0.5
    assert relative < 0.1
    assert squares[0] / squares[1] == pytest.approx(expected, rel=3 * relative)


@pytest.mark.parametrize("momentum", [0.02, 1.0])
def test_momentum_leaves_the_value_as_it_is(momentum: float) -> None:
    matrices = scattered(SPECTRA["multiple"])
    found = stochastic_power(mean_of(matrices), which="LA", momentum=momentum, tol=1e-6)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(3.0, rel=1e-9)


def test_a_real_hessian_gives_the_top_of_its_dense_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    y = torch.randn(200, generator=g, dtype=torch.float64)

    def loss(p: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 0.5 * (batch[0] @ p - batch[1]) ** 2

    op = hk.hessian(loss, torch.zeros(6, dtype=torch.float64), (x, y))
    found = stochastic_power(op, 2, tol=1e-6)
    assert found.converged
    assert found.values.tolist() == pytest.approx(
        torch.linalg.eigvalsh(x.T @ x / 200)[-2:].tolist(), rel=1e-6
    )
    assert found.num_matvecs != round(found.num_matvecs)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"batch_schedule": 16}, TypeError, "batch_schedule"),
        ({"batch_schedule": lambda _: 0}, ValueError, r"batch_schedule\(0\)"),
        ({"batch_schedule": lambda number: 8.0 if number else 8}, TypeError, r"batch_schedule\(1\)"),
        ({"momentum": -1.0}, ValueError, "momentum"),
        ({"momentum": "much"}, TypeError, "momentum"),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}"):
        stochastic_power(mean_of(scattered(SPECTRA["clustered"])), **arguments)
