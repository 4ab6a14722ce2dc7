from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import hvpkit as hk
from hvpkit.results.eigen import Eigenpair, EigenResult, ExtremeResult, Interval, Progress, Status

INF, NAN = math.inf, math.nan


def pair(value: float = 2.0, lower: float = 1.5, upper: float = 2.5) -> Eigenpair:
    return Eigenpair(value, torch.ones(3) / 3**0.5, 0.25, 0.125, Interval(lower, upper, "residual"))


def extreme(smallest: Eigenpair, largest: Eigenpair, status: Status = Status.CONVERGED) -> ExtremeResult:
    return ExtremeResult(
        smallest=smallest,
        largest=largest,
        num_matvecs=12.0,
        seconds=0.5,
        status=status,
        message=status.advice,
        history=(Progress(1.0, 0.25, 1.0, 1.0, INF, 0.5), Progress(2.0, 0.5, 0.5, 2.0, 0.25, 0.25)),
        tol=0.01,
        operator="dense matrix: 3 x 3, float32, cpu",
    )


def pairs(status: Status = Status.CONVERGED) -> EigenResult:
    return EigenResult(
        values=torch.tensor([-1.0, 2.0], dtype=torch.float64),
        vectors=torch.eye(3)[:, :2],
        residual_norms=torch.tensor([0.1, 0.2], dtype=torch.float64),
        error_bounds=torch.tensor([0.01, 0.02], dtype=torch.float64),
        intervals=(Interval(-1.1, -1.0, "residual"), Interval(2.0, 2.2, "residual")),
        num_matvecs=7.0,
        seconds=0.5,
        status=status,
        message=status.advice,
        history=(),
    )


CONVERGED = {
    Status.CONVERGED,
    Status.INVARIANT_SUBSPACE,
    Status.ZERO_WITHIN_ATOL,
    Status.ZERO_TO_ROUNDING,
}


@pytest.mark.parametrize("status", list(Status))
def test_results_are_converged_by_their_status(status: Status) -> None:
    assert status.converged is (status in CONVERGED)
    assert pairs(status).converged is status.converged
    assert extreme(pair(), pair(), status).converged is status.converged


@pytest.mark.parametrize("status", list(Status))
def test_each_status_says_what_it_means_in_words_of_its_own(status: Status) -> None:
    assert status.advice
    assert str(status) == status.value == status.value.lower()
    assert [other for other in Status if other.advice == status.advice] == [status]


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (Status.MAX_MATVECS, "raise max_matvecs or tol"),
        (Status.TIME_LIMIT, "raise time_limit or tol"),
        (Status.ROUNDING_LIMITED, "use float64, or raise tol"),
    ],
)
def test_a_status_with_a_remedy_names_it(status: Status, remedy: str) -> None:
    assert remedy in status.advice


def test_interval_contains_its_ends() -> None:
    interval = Interval(-1.0, 2.0, "residual")
    assert [x in interval for x in (-1.0, 0.5, 2.0)] == [True] * 3
    assert [x in interval for x in (-1.0001, 2.0001, NAN)] == [False] * 3
    assert 1e300 in Interval(-INF, INF, "none")
    assert interval.confidence is None


@pytest.mark.parametrize("index", [0, 1, -1])
def test_pair_puts_together_what_belongs_together(index: int) -> None:
    found = pairs()
    one = found.pair(index)
    assert one.value == found.values[index].item()
    assert torch.equal(one.vector, found.vectors[:, index])
    assert one.residual_norm == found.residual_norms[index].item()
    assert one.error_bound == found.error_bounds[index].item()
    assert one.interval is found.intervals[index]


def test_pair_that_is_not_there_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        pairs().pair(2)


def test_results_are_frozen() -> None:
    for result, name in ((pairs(), "values"), (extreme(pair(), pair()), "smallest"), (pair(), "value")):
        with pytest.raises(FrozenInstanceError):
            setattr(result, name, None)


def test_to_dict_has_the_numbers_under_the_documented_keys() -> None:
    plain = extreme(pair(), pair(5.0, 4.0, 6.0)).to_dict()
    assert plain["smallest"]["value"] == 2.0
    assert plain["smallest"]["residual_norm"] == 0.25
    assert plain["smallest"]["error_bound"] == 0.125
    assert plain["largest"]["interval"] == {
        "lower": 4.0,
        "upper": 6.0,
        "kind": "residual",
        "confidence": None,
    }
    assert (plain["num_matvecs"], plain["seconds"], plain["tol"]) == (12.0, 0.5, 0.01)
    assert (plain["status"], plain["converged"]) == ("converged", True)
    assert plain["message"] == Status.CONVERGED.advice
    assert plain["history"][1] == {
        "num_matvecs": 2.0,
        "seconds": 0.5,
        "smallest": 0.5,
        "largest": 2.0,
        "smallest_bound": 0.25,
        "largest_bound": 0.25,
        "level": 0,
        "seconds_left": None,
    }


def test_to_dict_is_strict_json_whatever_is_not_known() -> None:
    unknown = Eigenpair(NAN, torch.full((3,), NAN), INF, INF, Interval(-INF, INF, "none", 0.99))
    plain = extreme(unknown, pair(), Status.NON_FINITE).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["smallest"]["value"] is None
    assert plain["smallest"]["residual_norm"] is None
    interval = {"lower": None, "upper": None, "kind": "none", "confidence": 0.99}
    assert plain["smallest"]["interval"] == interval
    assert plain["history"][0]["smallest_bound"] is None


def test_summary_is_a_table_with_aligned_columns_and_a_closing_line() -> None:
    shown = extreme(pair(-0.51234567, -0.6, -0.5), pair(123.456789, 123.4, 124.0)).summary()
    header, smallest, largest, close = shown.splitlines()
    assert len(header) == len(smallest) == len(largest) <= 79
    assert smallest.split() == ["smallest", "-0.512346", "[-0.6,", "-0.5]", "0.25"]
    assert largest.split()[:2] == ["largest", "123.457"]
    assert close.startswith("converged: 12 passes, 0.5 s; ")
    assert Status.CONVERGED.advice in close


@pytest.mark.parametrize(
    ("kind", "confidence", "status", "expected"),
    [
        (
            "random-start",
            0.9,
            Status.CONVERGED,
            ["0.9 over random starts", "interval", "off by at most 2 tol * |value|"],
        ),
        (
            "random-start",
            0.9,
            Status.ZERO_WITHIN_ATOL,
            ["0.9 over random starts", "interval", "off by at most 2 tol * |value|, or 2 atol * norm"],
        ),
        ("random-start", 0.9, Status.MAX_MATVECS, ["0.9 over random starts", "interval"]),
        ("residual", None, Status.CONVERGED, []),
        ("exact", None, Status.INVARIANT_SUBSPACE, []),
    ],
)
def test_summary_ends_with_what_has_a_probability(
    kind: str, confidence: float | None, status: Status, expected: list[str]
) -> None:
    end = replace(pair(), interval=Interval(1.5, 2.5, kind, confidence))
    lines = extreme(end, end, status).summary().splitlines()
    assert lines[3].startswith(status)
    assert len(lines) == 4 + bool(expected)
    if expected:
        assert all(text in lines[4] for text in expected)
        assert ("off by" in lines[4]) is (len(expected) == 3)


def test_summary_keeps_its_columns_with_the_longest_numbers() -> None:
    long = pair(-1.23456e-30, -1.23457e-30, -1.23456e-30)
    header, *rows, _ = extreme(long, replace(long, residual_norm=1.234e-33)).summary().splitlines()
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize("result", [pairs(), extreme(pair(), pair()), pair()], ids=lambda r: type(r).__name__)
def test_repr_is_one_short_line_with_the_values(result: object) -> None:
    shown = repr(result)
    assert "\n" not in shown
    assert len(shown) < 160
    assert "2" in shown
    assert "tensor" not in shown


def test_names_are_public() -> None:
    assert (hk.Status, hk.Interval, hk.ExtremeResult) == (Status, Interval, ExtremeResult)


def test_pairs_of_a_result_without_vectors_have_empty_ones() -> None:
    found = hk.lanczos(hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0, 3.0]))), 2)
    plain = hk.EigenResult.from_dict(found.to_dict())
    assert plain.pair(1).value == float(found.values[1])
    assert len(plain.pair(1).vector) == 0
