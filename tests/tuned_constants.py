"""The table in docs/constants.md: every number that src/hvpkit names in capitals, with its evidence.

    python tests/tuned_constants.py

brings the table up to date: values and files from the source, new constants with their docstring and without evidence.
The words of known constants stay as they are in the document; write those there.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE, DOCUMENT = ROOT / "src" / "hvpkit", ROOT / "docs" / "constants.md"
HEAD = "| name | file | value | meaning | evidence |\n|---|---|---|---|---|\n"

OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


class Constant(NamedTuple):
    """A number, several in a tuple, or several by name in a dictionary; ``text`` is its expression."""

    name: str
    file: str
    text: str
    value: Any
    doc: str = ""


class Row(NamedTuple):
    name: str
    file: str
    text: str
    meaning: str
    evidence: str


class NotANumber(Exception):
    """An expression is not made of numbers."""


def evaluate(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return the value of an expression of numbers.

    Raises:
        NotANumber: the expression holds something else.
    """
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](evaluate(operand, known))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](evaluate(left, known), evaluate(right, known))
        case ast.Tuple(elts=[_, *_] as parts):
            return tuple(evaluate(part, known) for part in parts)
        case ast.Dict(keys=[_, *_] as keys, values=values):
            names = [key.value for key in keys if isinstance(key, ast.Constant)]
            numbers = [evaluate(value, known) for value in values]
            if len(names) == len(keys) and not any(isinstance(number, tuple) for number in numbers):
                return dict(zip(names, numbers, strict=True))
    raise NotANumber(ast.unparse(node))


def in_file(text: str, file: str) -> Iterator[Constant]:
    """Yield the constants of a module's top level, with the docstring below each."""
    body, known = ast.parse(text).body, {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                pairs = [*zip(names, values, strict=True)]
            case (
                ast.Assign(targets=[target], value=value)
                | ast.AnnAssign(target=target, value=ast.expr() as value)
            ):
                pairs = [(target, value)]
            case _:
                continue
        doc = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            doc = " ".join(str(below.value.value).split())
        for target, value in pairs:
            if isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target.id):
                try:
                    known[target.id] = evaluate(value, known)
                except NotANumber:
                    continue
                yield Constant(target.id, file, ast.unparse(value), known[target.id], doc)


def constants() -> list[Constant]:
    """Return all constants of the package, by file."""
    files = sorted(SOURCE.rglob("*.py"))
    return [
        found for file in files for found in in_file(file.read_text(), file.relative_to(SOURCE).as_posix())
    ]


def rows(text: str) -> list[Row]:
    """Return the rows of the table in a document."""
    table = text.split(HEAD)[1].strip().splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table)
    return [Row(name.strip("`"), file, value.strip("`"), *words) for name, file, value, *words in cells]


def document(text: str, found: list[Constant]) -> str:
    """Return a document with the table brought up to date.

    A constant keeps its words if its name stands in the table for the same file, or else for one file only.
    """
    known = rows(text)
    lines = []
    for one in found:
        same_name = [row for row in known if row.name == one.name]
        same = [row for row in same_name if row.file == one.file] or (
            same_name if len(same_name) == 1 else []
        )
        words = same[0][3:] if same else (one.doc, "")
        lines.append(f"| `{one.name}` | {one.file} | `{one.text}` | {' | '.join(words)} |\n")
    return text.split(HEAD)[0] + HEAD + "".join(lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(), constants()))
