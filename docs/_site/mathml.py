"""Formulas as MathML, which browsers draw without a script: fences ``math``, and inline code after ``#!math``."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, *_: Any, **__: Any) -> str:
    """Return a displayed formula."""
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


def inline(source: str, *_: Any) -> str:
    """Return a formula within a line."""
    return f"<span>{convert(source.strip())}</span>"
