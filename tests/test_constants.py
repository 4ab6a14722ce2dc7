"""docs/constants.md names every number of the package, with its value and its evidence."""

from __future__ import annotations

import ast

import pytest

from tuned_constants import DOCUMENT, HEAD, Constant, constants, document, evaluate, in_file, rows

UPDATE = "run: python tests/tuned_constants.py, and write the evidence into docs/constants.md"


def test_every_constant_is_in_the_table_with_its_value() -> None:
    table = {(row.file, row.name): row.text for row in rows(DOCUMENT.read_text())}
    found = {(one.file, one.name): one for one in constants()}
    assert set(found) == set(table), UPDATE
    for place, one in found.items():
        known = {other.name: other.value for other in found.values() if other.file == one.file}
        assert evaluate(ast.parse(table[place], mode="eval").body, known) == one.value, f"{place}: {UPDATE}"


def test_every_row_has_a_meaning_and_evidence() -> None:
    empty = [
        f"{row.file}: {row.name}" for row in rows(DOCUMENT.read_text()) if not (row.meaning and row.evidence)
    ]
    assert not empty, "a figure and where it is from, or: chosen by feel"


MODULE = '''
LIMIT: int = 2**3 * 5
"""The most
steps."""
SMALL, LARGE = 1e-3, LIMIT / 4
SIZES = (1, -2)
RATES = {"sgd": 0.1}
NAMES = ("a", "b")
FLAG = True
ORDER = [1, 2]
lower = 3
T = TypeVar("T")

def f():
    INNER = 4
'''


def test_numbers_of_the_top_level_are_found() -> None:
    found = {one.name: one for one in in_file(MODULE, "m.py")}
    assert {name: one.value for name, one in found.items()} == {
        "LIMIT": 40,
        "SMALL": 1e-3,
        "LARGE": 10.0,
        "SIZES": (1, -2),
        "RATES": {"sgd": 0.1},
    }
    assert found["LIMIT"] == Constant("LIMIT", "m.py", "2 ** 3 * 5", 40, "The most steps.")


@pytest.mark.parametrize(("file", "words"), [("a.py", "of a | none"), ("moved.py", "of c | some")])
def test_words_are_kept_where_a_constant_moves_or_changes(file: str, words: str) -> None:
    table = f"{HEAD}| `N` | a.py | `1` | of a | none |\n| `N` | b.py | `1` | of b | none |\n"
    table += "| `M` | c.py | `1` | of c | some |\n"
    name = "N" if file == "a.py" else "M"
    text = document(f"Words.\n\n{table}", [Constant(name, file, "2", 2, "From the docstring.")])
    assert text == f"Words.\n\n{HEAD}| `{name}` | {file} | `2` | {words} |\n"


def test_new_constant_has_its_docstring_and_no_evidence() -> None:
    text = document(f"Words.\n\n{HEAD}", [Constant("N", "a.py", "2", 2, "From the docstring.")])
    (row,) = rows(text)
    assert row[3:] == ("From the docstring.", "")
