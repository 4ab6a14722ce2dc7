"""The application, and how a function becomes one of its commands."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import typer

import hvpkit
from hvpkit.cli.output import Aside, say
from hvpkit.errors import NonFiniteError

EXIT_CODES = (
    "Exit codes: 0 converged or done; 1 not converged (a limit, NaN or infinity, a failed check); 2 wrong usage or a "
    "target that cannot be used; 130 interrupted."
)
REFUSED = (ValueError, TypeError, OSError, ImportError, SyntaxError, RuntimeError, ArithmeticError)
"""What stands for bad input; any other error that no target raised is a defect, and shows its traceback."""

INSTALLED = tuple(Path(module.__file__ or "").parent for module in (torch, hvpkit, typer))

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Both extreme eigenvalues of a network's full-data Hessian, with error intervals.\n\n" + EXIT_CODES,
)


def command(*examples: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Makes a function a command of its name; it returns whether all went well.

    Its parameters are options as typer knows them, or dataclasses of options.

    Args:
        examples: command lines that its help shows.
    """

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        shown = "\n".join(f"  {example}" for example in examples)
        text = f"{inspect.getdoc(function)}\n\n\b\nExamples:\n{shown}\n\n{EXIT_CODES}"
        app.command(name=function.__name__, help=text)(_guarded(_spread(function)))
        return function

    return register


def _spread(function: Callable[..., bool]) -> Callable[..., bool]:
    """The function with each dataclass among its parameters spread into that one's fields."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        inner = get_type_hints(groups[name], include_extras=True)
        for own in inspect.signature(groups[name]).parameters.values():
            parameters.append(own.replace(kind=own.KEYWORD_ONLY, annotation=inner[own.name]))

    def spread(**values: Any) -> bool:
        made: dict[str, Any] = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return function(**made, **values)

    _describe(spread, inspect.Signature(parameters))
    return spread


def _guarded(function: Callable[..., bool]) -> Callable[..., None]:
    """The function ending in an exit code, with one line on standard error for what went wrong."""

    def guarded(**values: Any) -> None:
        # a target may print: with --json that must not reach standard output
        quiet: AbstractContextManager[Any] = (
            redirect_stdout(Aside(sys.stdout)) if values.get("json") else nullcontext()
        )
        try:
            with quiet:
                well = function(**values)
        except BrokenPipeError:
            raise  # nobody reads on: click ends it quietly
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except NonFiniteError as error:
            say(str(error))
            raise typer.Exit(1) from None
        except Exception as error:
            place = where(error)
            if not place and not isinstance(error, REFUSED):
                raise
            say(f"{_in_words(error)}{place}")
            raise typer.Exit(2) from None
        raise typer.Exit(0 if well else 1)

    _describe(guarded, inspect.signature(function))
    return guarded


def _describe(function: Callable[..., Any], signature: inspect.Signature) -> None:
    """Gives a function the signature that typer is to read."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}


def _in_words(error: Exception) -> str:
    """The error on one line; of which type where the message may not say enough."""
    text = " ".join(str(error).split())
    plain = type(error) in (ValueError, TypeError, ImportError, FileNotFoundError) and text
    return text if plain else f"{type(error).__name__}: {text}"


def where(error: BaseException) -> str:
    """The innermost line of the user's own code that an error passed through; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        foreign = "site-packages" in path.parts or frame.filename.startswith("<")
        standard = path.is_relative_to(Path(inspect.__file__).parent) and not foreign
        if not (foreign or standard or any(path.is_relative_to(folder) for folder in INSTALLED)):
            return f" ({frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"
    return ""
