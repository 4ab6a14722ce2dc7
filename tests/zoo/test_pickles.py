from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvpkit.zoo.pickles import load_plain


class Calls:
    """What unpickles by a call."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(8)[::2],
        np.array([], dtype=np.int64),
        np.array(3, dtype=">i2"),
        np.zeros((0, 5), dtype=np.uint8),
    ],
    ids=["bytes", "fortran", "strided", "empty", "big_endian", "no_rows"],
)
def test_arrays_come_back_in_every_protocol(array: np.ndarray, protocol: int) -> None:
    raw = pickle.dumps({"a": [array]}, protocol=protocol)
    found = load_plain(raw)["a"][0]
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(found, pickle.loads(raw)["a"][0], strict=True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_back_in_every_protocol(protocol: int) -> None:
    data = {b"labels": [3, 2**40, -1.5, None, True], "name": "grün", "nested": ({"deep": b"\xff\x00"},)}
    assert load_plain(pickle.dumps(data, protocol=protocol)) == data


def test_arrays_under_the_names_of_numpy_1_and_2_come_back() -> None:
    raw = pickle.dumps(np.arange(3), protocol=2)
    assert b"numpy._core.multiarray" in raw or b"numpy.core.multiarray" in raw
    for core in (b"numpy.core.", b"numpy._core."):
        other = raw.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)
        np.testing.assert_array_equal(load_plain(other), np.arange(3), strict=True)


def test_text_of_python_2_comes_as_bytes() -> None:
    assert load_plain(b"(dp0\nS'caf\\xe9'\np1\nI7\ns.") == {b"caf\xe9": 7}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_create_a_file_is_refused(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    raw = pickle.dumps({"data": Calls(os.mkdir, str(target))}, protocol=protocol)
    with pytest.raises(ValueError, match=r"it asks for \w+.mkdir, .*refused"):
        load_plain(raw)
    assert not target.exists()
    pickle.loads(raw)
    assert target.exists(), "the pickle would have done it"


@pytest.mark.parametrize(
    "value",
    [
        Calls(eval, "1"),
        Calls(getattr, "text", "encode"),
        Calls(np.load, "file"),
        Calls(np.frombuffer, b"1"),
        Calls(bytes, 3),
        Calls(pickle.loads, b"N."),
        Path("somewhere"),
        {1, 2}.__class__,
        np.float64,
        np.ma.masked_array([1]),
    ],
)
def test_every_other_name_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="refused"):
        load_plain(pickle.dumps([value]))


def test_what_stands_for_numpys_functions_cannot_be_told_to_do_more() -> None:
    raw = b"cnumpy\nndarray\n(I99999999999\ntR."
    with pytest.raises(ValueError, match="cannot be read"):
        load_plain(raw)
    reach = b"cnumpy._core.multiarray\n_reconstruct.__globals__\n."
    with pytest.raises(ValueError, match="refused"):
        load_plain(reach)


def test_a_pickle_leaves_nothing_behind_in_what_it_names() -> None:
    defaults = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\nN}X\x0c\x00\x00\x00__defaults__(I1\nts\x86b."
    assert load_plain(defaults).__defaults__ == (1,), "it can set attributes"
    raw = b"cnumpy._core.multiarray\n_reconstruct\n."
    assert load_plain(raw).__defaults__ is None
    for name in (b"dtype", b"ndarray"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_plain(b"\x80\x02cnumpy\n" + name + b"\nN}X\x04\x00\x00\x00evilI1\ns\x86b.")


@pytest.mark.parametrize("length", [0, 1, 30, -1])
def test_a_pickle_that_is_cut_short_is_refused(length: int) -> None:
    raw = pickle.dumps({"data": np.arange(100), "labels": list(range(100))})
    with pytest.raises(ValueError, match="its pickle cannot be read"):
        load_plain(raw[:length])


def test_what_is_no_pickle_is_refused() -> None:
    for raw in (b"<html>404</html>", bytes(range(256)), b"\x80\x63."):
        with pytest.raises(ValueError, match="its pickle cannot be read"):
            load_plain(raw)
