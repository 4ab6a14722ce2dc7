"""Docstrings as the site shows them: roles of Sphinx become links, formulas what ``mathml`` reads."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
DISPLAY_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*|\n\s*\n(?=\1 {3,}\S))*)", re.MULTILINE)

OWN_SECTION = re.compile(r"^( *)((?:Cost|Source|Departures)[a-z ]*):\n((?:\1 +.*\n?|\s*\n)+)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
TABLE = re.compile(r"^( *)(=+(?:  =+)+)\n((?:.*\n)+?)\1\2\n((?:.*\n)+?)\1\2$", re.MULTILINE)

PUBLIC = ("hvpkit", "hvpkit.train", "hvpkit.zoo", "hvpkit.plots")


class Roles(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings once all modules are loaded, so that names can be looked up."""
        public = public_names(pkg)
        for member in walk(pkg):
            if member.docstring:
                member.docstring.value = markdown(member.docstring.value, member, public)


def public_names(pkg: griffe.Module) -> dict[str, str]:
    """Return the public path of each public object, and of its members, by the path where it is defined."""
    found: dict[str, str] = {}
    for namespace in PUBLIC:
        module = pkg if namespace == "hvpkit" else pkg[namespace.partition(".")[2]]
        for name in module.exports or ():
            member = module[str(name)]
            try:
                target = member.final_target if member.is_alias else member
            except griffe.AliasResolutionError:  # a number among several on one line
                continue
            if target.is_module:
                continue
            found[target.path] = f"{namespace}.{name}"
            if target.is_class:
                for inner in target.members:
                    found[f"{target.path}.{inner}"] = f"{namespace}.{name}.{inner}"
    return found


def walk(member: Any) -> Any:
    """Yield an object and all that is defined in it."""
    yield member
    for inner in member.members.values():
        if not inner.is_alias:
            yield from walk(inner)


def markdown(text: str, member: Any, public: dict[str, str]) -> str:
    """Return a docstring as griffe and Markdown read it.

    Roles become links to public objects and code for all others, entries of several names one for each, tables
    those of Markdown, and sections that griffe does not know paragraphs.
    """

    def link(match: re.Match[str]) -> str:
        short, target = match.groups()
        label = target.rpartition(".")[2] if short else target.removeprefix("hvpkit.")
        path = resolve(target, member, public)
        return f"[`{label}`][{path}]" if path else f"`{label}`"

    for pattern, replacement in (
        (TABLE, table),
        (OWN_SECTION, own_section),
        (SEVERAL, one_each),
        (EXAMPLE, r"\1Examples:"),
        (DISPLAY_MATH, display),
        (INLINE_MATH, lambda match: f"`#!math {' '.join(match[1].split())}`"),
        (ROLE, link),
    ):
        text = pattern.sub(replacement, text)
    return text


def display(match: re.Match[str]) -> str:
    """Return a formula on lines of its own as a fence."""
    indent, formula = match.groups()
    body = "\n".join(f"{indent}{line.strip()}" for line in formula.strip().splitlines())
    return f"{indent}```math\n{body}\n{indent}```"


def one_each(match: re.Match[str]) -> str:
    """Return an entry for each of the names that share one."""
    indent, names, words = match.groups()
    return "\n".join(f"{indent}{name}: {words}" for name in names.split(", "))


def own_section(match: re.Match[str]) -> str:
    """Return a section as a bold word and paragraphs."""
    indent, title, body = match.groups()
    return f"{indent}**{title}:**\n\n{textwrap.indent(textwrap.dedent(body).strip(), indent)}\n\n"


def table(match: re.Match[str]) -> str:
    """Return a table."""
    indent, rule, head, body = match.groups()
    starts = [len(indent) + column.start() for column in re.finditer("=+", rule)]
    (names,) = rows(head, starts)
    lines = [names, ["---"] * len(names), *rows(body, starts)]
    return "\n".join(f"{indent}| {' | '.join(cells)} |" for cells in lines)


def rows(lines: str, starts: list[int]) -> list[list[str]]:
    """Return the cells of each row; a line that lacks one continues the row before."""
    found: list[list[str]] = []
    for line in lines.splitlines():
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if found and not all(cells):
            cells = [f"{old} {new}".strip() for old, new in zip(found.pop(), cells, strict=True)]
        found.append(cells)
    return found


def resolve(target: str, member: Any, public: dict[str, str]) -> str | None:
    """Return the public path of what a role names, from the object whose docstring it is; None for what is internal."""
    paths = {*public.values()}
    if target in paths:
        return target
    scope = member
    while scope is not None:
        inside = scope.members.get(target) if not scope.is_alias else None
        if inside is not None:
            found = inside.final_target.path if inside.is_alias else inside.path
            return public.get(found)
        scope = scope.parent
    return next((path for path in (f"{name}.{target}" for name in PUBLIC) if path in paths), None)
