"""``--config FILE``: options of commands from a file in TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of a command.

    Keys are long options, with ``-`` or ``_``, or TARGET. At the top they are for all commands that have them; in a
    table with the name of a command, for that one.

    Raises:
        typer.BadParameter: the file cannot be read, or names what there is not.
    """
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from None
    assert context.parent is not None
    application: Any = context.parent.command
    known = {name: _options(command) for name, command in application.commands.items()}
    own = known[str(context.info_name)]
    tables = {name: table for name, table in content.items() if isinstance(table, dict)}
    top = _spelled({name: value for name, value in content.items() if name not in tables})
    for name, table in tables.items():
        if name not in known:
            raise typer.BadParameter(f"{path}: there is no command {name}; there are {', '.join(known)}")
        _check(path, f"[{name}]", _spelled(table), known[name])
    _check(path, "the top", top, set().union(*known.values()))
    found = {name: value for name, value in top.items() if name in own}
    context.default_map = found | _spelled(tables.get(str(context.info_name), {}))
    return path


def _options(command: Any) -> set[str]:
    """Return the names of a command's parameters."""
    return {parameter.name for parameter in command.params} - {"config", "help"}


def _spelled(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with its keys as parameters are called."""
    return {name.removeprefix("--").replace("-", "_").lower(): value for name, value in table.items()}


def _check(path: Path, where: str, table: dict[str, Any], known: set[str]) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"{path}: {where} has {', '.join(unknown)}, which is no option; want the long options that --help shows"
        )
