"""Results as tables: pandas frames, and HTML for notebooks. A table is a dict of columns of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Columns = Mapping[str, Sequence[Any]]

MAX_ROWS = 12
"""Rows of a table in a notebook; a line says how many more there are. Chosen by feel."""


def to_frame(columns: Columns) -> Any:
    """Return a ``pandas.DataFrame``.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise ImportError(
            "to_frame needs pandas: pip install pandas; to_dict has the same numbers"
        ) from error
    return DataFrame(dict(columns))


def to_html(caption: str, columns: Columns) -> str:
    """Return a table in HTML, escaped, without colours of its own: it is right on light and dark ground.

    Example:
        >>> to_html("a < b", {"value": [1.23456789]})
        '<table><caption>a &lt; b</caption><tr><th>value</th></tr><tr><td>1.23457</td></tr></table>'
    """
    rows = list(zip(*columns.values(), strict=True))
    lines = [_row("th", list(columns)), *(_row("td", row) for row in rows[:MAX_ROWS])]
    if len(rows) > MAX_ROWS:
        more = f"{len(rows) - MAX_ROWS} more rows: to_frame()"
        lines.append(f'<tr><td colspan="{len(columns)}">{more}</td></tr>')
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[Any]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(_text(cell))}</{tag}>' for cell in cells)}</tr>"


def _text(cell: Any) -> str:
    if isinstance(cell, tuple | list):
        return ", ".join(map(str, cell))
    return f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else str(cell)
