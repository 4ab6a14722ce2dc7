from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hvpkit as hk
from hvpkit._utils.checkpoints import digest
from hvpkit.results.eigen import Eigenpair, Interval, Progress
from hvpkit.results.estimate import as_floats
from hvpkit.results.saving import Result

INF, NAN = math.inf, math.nan
MATRIX = torch.diag(torch.tensor([-1.0, *torch.linspace(0, 1, 30), 7.0], dtype=torch.float64))
TREE = {
    "first.weight": torch.ones(3),
    "first": {"weight": torch.arange(2.0)},
    "rest": [torch.ones(()), (None,)],
}


def operator(matrix: torch.Tensor = MATRIX) -> hk.LinearOperator:
    return hk.aslinearoperator(matrix)


def broken() -> hk.LinearOperator:
    return hk.aslinearoperator((lambda v: v * torch.nan, 2000, torch.float64))


def unknown() -> hk.ExtremeResult:
    """Return every kind of a number that is not finite, and a negative zero."""
    ends = [
        Eigenpair(value, torch.tensor([NAN, -0.0, INF]), INF, INF, Interval(-INF, INF, "none", confidence))
        for value, confidence in ((NAN, None), (-INF, 0.5))
    ]
    history = (Progress(1, -0.0, NAN, INF, -INF), Progress())
    return hk.ExtremeResult(*ends, 0, 5e-324, hk.Status.NON_FINITE, "µ <b>\n", history, 0.1, "1/3")


def solution(x: Any, residual: Any = 1e-3) -> hk.SolveResult:
    solved = hk.solve(operator(), torch.ones(len(MATRIX), dtype=torch.float64), damping=2.0)
    return replace(solved, x=x, residual_norm=residual)


def solved(method: str, columns: int | None = None, **options: Any) -> hk.SolveResult:
    shape = (len(MATRIX),) if columns is None else (len(MATRIX), columns)
    return hk.solve(operator(), torch.ones(shape, dtype=torch.float64), method=method, **options)


def wrong() -> hk.Report:
    return hk.check(operator(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))


BLOCK_PARAMS = {
    "a": torch.ones(len(MATRIX), dtype=torch.float64),
    "b": torch.tensor(2.0, dtype=torch.float64),
}


def block_loss(params: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return (rows @ params["a"] * params["b"]) ** 2


RESULTS: dict[str, Callable[[], Result]] = {
    "extremes": lambda: hk.extreme_eigenvalues(operator()),
    "float32": lambda: hk.extreme_eigenvalues(operator(MATRIX.float()), seed=1),
    "bfloat16": lambda: replace(hk.lanczos(operator(), 2), vectors=torch.ones(5, 2, dtype=torch.bfloat16)),
    "at a limit": lambda: hk.extreme_eigenvalues(operator(), max_matvecs=3),
    "not finite": lambda: hk.extreme_eigenvalues(broken()),
    "unknown": unknown,
    "pairs": lambda: hk.lanczos(operator(), 3),
    "no pairs": lambda: hk.lanczos(broken(), 2),
    "trace": lambda: hk.trace(operator(), num_matvecs=9),
    "no sample": lambda: hk.trace(broken()),
    "diagonal": lambda: hk.diagonal(operator(), num_matvecs=9),
    "moments": lambda: hk.moments(operator(), 3),
    "function of a density": lambda: hk.spectral_density(operator()).expectation(torch.exp),
    "one sample": lambda: hk.spectral_density(operator(), num_steps=6, num_probes=1).expectation(torch.exp),
    "density": lambda: hk.spectral_density(operator(), num_steps=6, num_probes=3),
    "density of one probe": lambda: hk.spectral_density(operator(), num_steps=6, num_probes=1),
    "density of nothing": lambda: hk.spectral_density(broken(), num_steps=3),
    "report": lambda: hk.check(operator()),
    "report of a failure": wrong,
    "solution": lambda: solved("minres", damping=2.0),
    "solutions": lambda: solved("minres", 3, damping=2.0),
    "negative curvature": lambda: solved("cg"),
    "solution at a limit": lambda: solved("minres", max_matvecs=2),
    "tree": lambda: solution(TREE),
    "complex": lambda: solution({1: torch.tensor([1 + 2j, NAN], dtype=torch.complex128).conj()}),
    "array": lambda: solution(np.arange(3.0), torch.tensor([INF], dtype=torch.float64)),
    "function": lambda: hk.matrix_function(
        operator(), torch.exp, torch.ones(len(MATRIX), dtype=torch.float64)
    ),
    "plan": lambda: hk.plan(operator()),
    "blocks": lambda: hk.blocks(block_loss, BLOCK_PARAMS, MATRIX, by="parameter", density=True),
    "blocks alone": lambda: hk.blocks(block_loss, BLOCK_PARAMS, MATRIX, by=["a"], trace=False),
}
TENSORLESS = {"report", "report of a failure", "plan"}
each_result = pytest.mark.parametrize("name", RESULTS)


def assert_same(one: Any, other: Any) -> None:
    """Compare to the bit, types included; a NaN is a NaN."""
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, torch.Tensor | np.ndarray):
        one, other = torch.as_tensor(one).resolve_conj(), torch.as_tensor(other).resolve_conj()
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        assert (
            one.numpy(force=True).tobytes() == other.numpy().tobytes()
            if one.dtype != torch.bfloat16
            else torch.equal(one, other)
        )
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other)
    else:
        assert one == other


def refuse(constant: str) -> None:
    raise AssertionError(constant)


@each_result
def test_what_is_saved_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    result, path = RESULTS[name](), tmp_path / "result.json"
    result.save(path)
    assert_same(result, hk.load(path))
    assert_same(result, type(result).load(str(path)))
    beside = [] if name in TENSORLESS else ["result.json.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["result.json", *beside]


@each_result
def test_file_is_strict_json_with_versions_and_date(name: str, tmp_path: Path) -> None:
    result, path = RESULTS[name](), tmp_path / "result.json"
    result.save(path)
    body = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert (body["class"], body["hvpkit"], body["torch"]) == (
        type(result).__name__,
        hk.__version__,
        torch.__version__,
    )
    assert body["date"].endswith("+00:00")
    assert body["summary"] == repr(result)
    assert (body["tensors"] is None) is (name in TENSORLESS)


@each_result
def test_plain_dict_is_strict_json_and_comes_back(name: str) -> None:
    result = RESULTS[name]()
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    again = type(result).from_dict({**plain, "another": 1})
    assert again.to_dict() == plain
    if hasattr(result, "converged"):
        assert getattr(again, "status", None) is getattr(result, "status", None)
        assert plain["converged"] is result.converged


def test_numbers_that_are_not_known_come_back_from_a_dict_as_documented() -> None:
    known = hk.ExtremeResult.from_dict(unknown().to_dict())
    assert math.isnan(known.smallest.value)
    assert known.smallest.error_bound == known.smallest.residual_norm == INF
    assert (known.largest.interval.lower, known.largest.interval.upper) == (-INF, INF)
    assert known.smallest.interval.confidence is None
    assert known.largest.interval.confidence == 0.5
    assert known.smallest.vector.shape == (0,)
    assert known.history[1].largest_bound == INF
    pairs = hk.lanczos(operator(), 3)
    again = hk.EigenResult.from_dict(pairs.to_dict())
    assert torch.equal(again.values, pairs.values)
    assert again.vectors.shape == (0,)
    single = hk.spectral_density(operator(), num_steps=6, num_probes=1)
    assert torch.equal(hk.Density.from_dict(single.to_dict()).stderr, single.stderr)
    failed = hk.check(broken())
    assert_same(hk.Report.from_dict(failed.to_dict()), failed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "done"}, "done"),
        ({"tol": "small"}, "tol is 'small', not a number"),
        ({"tol": True}, "tol is True, not a number"),
        ({"message": 3}, "message is 3, not str"),
        ({"history": 3}, "history is 3"),
        ({"history": [{"level": 1.5}]}, "history.0.level is 1.5, not int"),
        ({"history": [{"passes": 1}]}, "history.0 is not what a Progress consists of"),
        ({"smallest": {"value": 1.0}}, "smallest.residual_norm is missing"),
        ({"smallest": None}, "smallest is not what"),
    ],
)
def test_dict_of_another_form_is_refused(change: dict[str, Any], words: str) -> None:
    plain = {**unknown().to_dict(), **change}
    with pytest.raises(ValueError, match=f"^plain is not what ExtremeResult.to_dict makes.*{words}"):
        hk.ExtremeResult.from_dict(plain)


@pytest.mark.parametrize("plain", [None, 3, "text", [], {}])
def test_what_is_no_dict_is_refused(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"^plain is not what"):
        hk.ExtremeResult.from_dict(plain)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    unknown().save(tmp_path / "ex.json")
    return tmp_path / "ex.json"


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_flipped_byte_is_refused_or_changes_nothing(saved: Path, suffix: str) -> None:
    expected, path = unknown(), Path(f"{saved}{suffix}")
    whole, refusals, num_tried = path.read_bytes(), [], 0
    for place in range(0, len(whole), 5):
        for bit in (1, 32, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            num_tried += 1
            try:
                assert_same(hk.load(saved), expected)
            except ValueError as error:
                refusals.append(str(error))
    assert all(text.startswith("path: ") for text in refusals)
    assert len(refusals) > 0.8 * num_tried  # the rest is white space


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_truncated_file_is_refused(saved: Path, suffix: str) -> None:
    path = Path(f"{saved}{suffix}")
    whole = path.read_bytes()
    for size in [
        *range(0, len(whole) - 1, 7),
        len(whole) - 2,
    ]:  # the last byte of the JSON is the end of its line
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^path: "):
            hk.load(saved)


def test_tensors_that_are_missing_or_of_another_result_are_refused(saved: Path, tmp_path: Path) -> None:
    beside = tmp_path / "ex.json.safetensors"
    tensors = load_file(beside)
    tensors["smallest.vector"] = torch.zeros(3)
    save_file(tensors, beside)
    with pytest.raises(ValueError, match=r"^path: .*of another result"):
        hk.load(saved)
    beside.unlink()
    with pytest.raises(ValueError, match=r"^path: .*ex.json.safetensors, which is missing"):
        hk.load(saved)


def test_another_class_and_another_version_are_refused(saved: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^path: .*holds an ExtremeResult, not a Density; .*ExtremeResult.load"
    ):
        hk.Density.load(saved)
    body = json.loads(saved.read_text(encoding="utf-8"))
    saved.write_text(json.dumps({**body, "format": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^path: .*another version of hvpkit \(format 99"):
        hk.load(saved)
    with pytest.raises(FileNotFoundError):
        hk.load(saved.with_name("nothing"))
    with pytest.raises(TypeError, match="path"):
        hk.load(3)


def test_only_results_of_hvpkit_are_made(saved: Path) -> None:
    """A checksum can be made by anybody: what it covers is still not trusted."""
    body = json.loads(saved.read_text(encoding="utf-8"))
    del body["checksum"]
    for change in (
        {"class": "Path"},
        {"class": ["ExtremeResult"]},
        {"result": None},
        {"result": {**body["result"], "seconds": {"tensor": "smallest.vector"}}},
        {"result": {**body["result"], "smallest": {**body["result"]["smallest"], "vector": "other"}}},
        {"result": {**body["result"], "smallest": {**body["result"]["smallest"], "vector": {"tensor": []}}}},
        {"tensors": None},
    ):
        forged = {**body, **change}
        saved.write_text(json.dumps({**forged, "checksum": digest(forged)}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"^path: "):
            hk.load(saved)


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("protocol", [0, 5, "torch"])
def test_pickle_is_not_run(saved: Path, tmp_path: Path, suffix: str, protocol: Any) -> None:
    path, trace = Path(f"{saved}{suffix}"), tmp_path / "run"
    if protocol == "torch":
        torch.save(Trap(trace), path)
    else:
        path.write_bytes(pickle.dumps(Trap(trace), protocol))
    with pytest.raises(ValueError, match=r"^path: "):
        hk.load(saved)
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '{"format": NaN}', '{"format": 1}', "[" * 10**5, '{"checksum": ' + "[" * 500],
)
def test_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^path: .*other\.json"):
        hk.load(path)


@pytest.mark.parametrize("failing", ["json", "tensors"])
def test_failure_while_saving_leaves_the_old_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    target = "safetensors.torch.save_file" if failing == "tensors" else "os.fsync"
    other = hk.lanczos(operator(), 2)
    if failing == "json":
        monkeypatch.setattr("hvpkit.results.saving.check_file", lambda _, path: Path(path))  # it syncs too
    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="disk full"):
        other.save(saved)
    monkeypatch.undo()
    assert_same(hk.load(saved), unknown())
    assert sorted(os.listdir(tmp_path)) == ["ex.json", "ex.json.safetensors"]


def test_stop_between_the_two_files_leaves_a_pair_that_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_tensors_only(source: Any, target: Any) -> None:
        if not str(target).endswith(".safetensors"):
            raise KeyboardInterrupt
        original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace_tensors_only)
    with pytest.raises(KeyboardInterrupt):
        hk.lanczos(operator(), 2).save(saved)
    with pytest.raises(ValueError, match=r"^path: .*of another result"):
        hk.load(saved)


def test_density_of_the_former_format_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "density.npz", grid=np.zeros(3))
    with pytest.raises(ValueError, match=r"^path: .*density.npz"):
        hk.Density.load(tmp_path / "density.npz")


def test_later_result_replaces_an_earlier_one(saved: Path) -> None:
    other = hk.lanczos(operator(), 2)
    other.save(saved)
    assert_same(hk.load(saved), other)
    hk.check(operator()).save(saved)
    assert hk.load(saved).ok


def test_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path: there is no folder"):
        unknown().save(tmp_path / "nowhere" / "ex.json")
    (tmp_path / "ex.json.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"^path: .*ex.json.safetensors is not a regular file"):
        unknown().save(tmp_path / "ex.json")
    assert os.listdir(tmp_path) == ["ex.json.safetensors"]


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (Pair(torch.ones(1), torch.ones(2)), "x holds a Pair"),
        ({"a": [3.0]}, "x.a.0 holds a float"),
        ({(1, 2): torch.ones(1)}, r"x has the key \(1, 2\)"),
    ],
)
def test_trees_that_would_come_back_as_others_are_refused(tmp_path: Path, x: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        solution(x).save(tmp_path / "x.json")
    assert os.listdir(tmp_path) == []


def test_ordered_dicts_come_back_as_dicts_in_order(tmp_path: Path) -> None:
    x = OrderedDict(b=torch.ones(1), a=torch.zeros(2))
    solution(x).save(tmp_path / "x.json")
    assert_same(hk.load(tmp_path / "x.json").x, dict(x))


def test_saving_changes_no_tensor_and_shares_none(tmp_path: Path) -> None:
    x = torch.arange(6.0, requires_grad=True)
    whole = x.detach().reshape(2, 3).mT  # a view that is not contiguous
    result = replace(hk.lanczos(operator(), 2), vectors=whole)
    result.save(tmp_path / "a.json")
    one, two = hk.load(tmp_path / "a.json"), hk.load(tmp_path / "a.json")
    assert torch.equal(one.vectors, whole)
    one.vectors.zero_()
    assert torch.equal(two.vectors, whole)
    assert torch.equal(x, torch.arange(6.0))
    solution(x).save(tmp_path / "b.json")
    assert not hk.load(tmp_path / "b.json").x.requires_grad


def test_tensors_of_one_dotted_name_are_kept_apart(tmp_path: Path) -> None:
    x = {"a.b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}}
    solution(x).save(tmp_path / "x.json")
    assert_same(hk.load(tmp_path / "x.json").x, x)


COLUMNS = {
    "extremes": (2, ["end", "value", "lower", "upper", "kind", "confidence", "residual_norm", "error_bound"]),
    "pairs": (3, ["value", "lower", "upper", "kind", "confidence", "residual_norm", "error_bound"]),
    "no pairs": (0, ["value", "lower", "upper", "kind", "confidence", "residual_norm", "error_bound"]),
    "trace": (None, ["sample"]),
    "diagonal": (len(MATRIX), ["value", "stderr"]),
    "density": (None, ["node", "weight", "mass", "residual_norm"]),
    "density of nothing": (0, ["node", "weight", "mass", "residual_norm"]),
    "report": (8, ["check", "figure", "threshold", "verdict", "detail", "suspects", "mend"]),
    "solution": (1, ["status", "residual_norm", "relative_residual"]),
    "solutions": (3, ["status", "residual_norm", "relative_residual"]),
    "function": (1, ["error_estimate"]),
    "plan": (
        3,
        [
            *(
                "call",
                "method",
                "passes_low",
                "passes",
                "passes_high",
                "seconds_low",
                "seconds",
                "seconds_high",
            ),
            *("num_vectors", "num_bytes", "remedy"),
        ],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_frames_have_their_rows_and_columns(name: str) -> None:
    pandas = pytest.importorskip("pandas")
    result, (size, columns) = RESULTS[name](), COLUMNS[name]
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == columns
    assert len(frame) == (
        size if size is not None else len(getattr(result, "samples", getattr(result, "nodes", ())))
    )


def test_frames_hold_the_numbers() -> None:
    pytest.importorskip("pandas")
    ex, pairs = hk.extreme_eigenvalues(operator()), hk.lanczos(operator(), 3)
    assert ex.to_frame()["value"].tolist() == [ex.smallest.value, ex.largest.value]
    assert ex.to_frame()["upper"].tolist() == [ex.smallest.interval.upper, ex.largest.interval.upper]
    assert pairs.to_frame()["value"].tolist() == pairs.values.tolist()
    trace = hk.trace(operator(), num_matvecs=9)
    assert trace.to_frame()["sample"].mean() == pytest.approx(trace.value)
    assert hk.spectral_density(operator()).to_frame()["weight"].sum() == pytest.approx(1)


def test_frames_without_pandas_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        unknown().to_frame()


@each_result
def test_html_is_a_small_escaped_table_without_colours(name: str) -> None:
    from xml.etree import ElementTree

    result = RESULTS[name]()
    shown = result._repr_html_()
    table = ElementTree.fromstring(shown)  # well formed: what is not escaped would not be
    assert table.tag == "table"
    caption = table.find("caption")
    assert caption is not None
    assert caption.text == repr(result)[1:-1]
    assert {name for element in table.iter() for name in element.attrib} <= {"colspan"}
    assert len(table.findall("tr")) <= 14


def test_html_escapes_what_users_named() -> None:
    report = hk.check(operator())
    bad = replace(report.findings[0], detail="<script>alert(1)</script> & more", suspects=("<b>", "b"))
    shown = replace(report, findings=(bad,))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in shown
    assert "&lt;b&gt;, b" in shown


def test_every_result_can_be_saved() -> None:
    """What has a status, and is public, is a result."""
    public = [getattr(hk, name) for name in hk.__all__]
    with_status = [
        kind
        for kind in public
        if is_dataclass(kind)
        and isinstance(kind, type)
        and {"status", "findings", "tasks"} & {f.name for f in fields(kind)}
    ] + [hk.BlockSpectra]
    assert len(with_status) >= 8
    assert all(issubclass(kind, Result) for kind in with_status)
    tested = {type(make()) for make in RESULTS.values()}
    assert tested == set(with_status)


def test_number_from_a_tensor_is_the_same_kind_of_estimate(tmp_path: Path) -> None:
    moments = hk.moments(operator(), 1)
    single = as_floats(replace(moments, value=moments.value[0], stderr=moments.stderr[0]))
    single.save(tmp_path / "m.json")
    assert_same(hk.load(tmp_path / "m.json"), single)
