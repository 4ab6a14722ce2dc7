"""The application, and how a function becomes one of its commands."""

from __future__ import annotations

import copy
import inspect
import signal
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import torch
import typer
from typer.models import ArgumentInfo

import hvpkit
from hvpkit._utils.signals import terminating_signals_raised
from hvpkit.cli.config import read_config
from hvpkit.cli.interruption import signal_of
from hvpkit.cli.output import diverted_stdout, print_message
from hvpkit.cli.ranks import joined
from hvpkit.cli.verbosity import is_verbose, verbosity
from hvpkit.errors import NonFiniteError

EXIT_CODES = (
    "Exit codes: 0 converged or done; 1 not converged (a limit, NaN or infinity, a failed check); 2 wrong usage or a "
    "target that cannot be used; 128 + the number of the signal if interrupted, as 130 by Ctrl-C."
)
INPUT_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    SyntaxError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
)
"""Errors that bad input causes. Any other that was not raised in the user's code is a defect: it shows a traceback."""

LIBRARY_FOLDERS = tuple(Path(module.__file__ or "").parent for module in (torch, hvpkit, typer))
"""Where the code is that is not the user's, beside site-packages and the standard library."""

COMMON = {
    "config": Annotated[
        Path | None,
        typer.Option(
            help="File in TOML with options, as tol = 1e-3, or in a table with the name of a command. Those on the "
            "command line come first.",
            dir_okay=False,
            callback=read_config,
            is_eager=True,
        ),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="Say how matvecs are made; show tracebacks of errors.")
    ],
}
"""Options of all commands."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"hvpkit {hvpkit.__version__}")
        raise typer.Exit


@app.callback(
    help=f"Both extreme eigenvalues of a network's full-data Hessian, with error intervals.\n\n{EXIT_CODES}"
)
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that come before a command."""


def command(*examples: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function as the command of its name.

    The function returns True for the exit code 0 and False for 1. Its parameters are options as typer knows them, or
    dataclasses whose fields are options.

    Args:
        examples: command lines for the command's help.
    """

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        shown = "\n".join(f"  {example}" for example in examples)
        paragraphs = (" ".join(text.split()) for text in (inspect.getdoc(function) or "").split("\n\n"))
        text = "\n\n".join([*paragraphs, f"Examples:\n{shown}", EXIT_CODES])
        made = _with_common_options(_with_exit_code(_with_flat_options(function)))
        app.command(name=function.__name__, help=text)(made)
        return function

    return register


def _with_flat_options(function: Callable[..., bool]) -> Callable[..., bool]:
    """Replace each dataclass among a function's parameters by the fields of that dataclass."""
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
            hint = _in_panel(inner[own.name], _panel_of(groups[name], own.name))
            parameters.append(own.replace(kind=own.KEYWORD_ONLY, annotation=hint))

    def flat(**values: Any) -> bool:
        options: dict[str, Any] = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return function(**options, **values)

    _set_signature(flat, inspect.Signature(parameters))
    return flat


def _panel_of(group: type[Any], name: str) -> str | None:
    """Return the heading in a command's help for an option of a group: of the class that names the option."""
    owner = next(kind for kind in group.__mro__ if name in inspect.get_annotations(kind))
    return getattr(owner, "PANEL", None)


def _in_panel(hint: Any, panel: str | None) -> Any:
    """Return the annotation of an option that is shown under a heading."""
    kind, option = get_args(hint)
    if panel is None or isinstance(option, ArgumentInfo):
        return hint
    option = copy.copy(option)
    option.rich_help_panel = panel
    return Annotated[kind, option]


def _with_exit_code(function: Callable[..., bool]) -> Callable[..., None]:
    """End a function in an exit code, with one line on standard error if something went wrong."""

    def ending(**values: Any) -> None:
        with joined(values) as options:
            _run(function, options)

    _set_signature(ending, inspect.signature(function))
    return ending


def _run(function: Callable[..., bool], options: dict[str, Any]) -> NoReturn:
    """Run a function, and end in its exit code."""
    try:
        # standard output is for results only: whatever a target prints goes to standard error
        with terminating_signals_raised(), diverted_stdout():
            done = function(**options)
    except BrokenPipeError:
        raise  # nobody reads the output any more: click ends the program quietly
    except KeyboardInterrupt as error:
        number = signal_of(error)
        print_message("interrupted" if number == signal.SIGINT else f"interrupted by {number.name}")
        raise typer.Exit(128 + number) from None
    except SystemExit as error:
        place = user_code_location(error) or " (in the target)"
        print_message(f"the program was ended by SystemExit({error.code!r}){place}: a target must return")
        raise typer.Exit(2) from None
    except Exception as error:
        if is_verbose():
            traceback.print_exc()
        _end_for(error)
    raise typer.Exit(0 if done else 1)


def _end_for(error: Exception) -> NoReturn:
    """End in the exit code for an error, with a line on standard error; raise it again if it is a defect."""
    if isinstance(error, NonFiniteError):
        print_message(str(error))
        raise typer.Exit(1) from None
    place = user_code_location(error)
    if not (place or isinstance(error, INPUT_ERRORS) or _notes(error)):
        raise error
    print_message(f"{_one_line(error)}{place}")
    raise typer.Exit(2) from None


def _with_common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all commands, whose values the function need not know."""
    signature = inspect.signature(function)
    defaults = {"config": None, "quiet": False, "verbose": False}
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in COMMON.items()
    ]

    def spoken(*, config: Path | None, quiet: bool, verbose: bool, **values: Any) -> None:  # noqa: ARG001
        with verbosity(quiet=quiet, verbose=verbose):
            function(**values)

    _set_signature(spoken, signature.replace(parameters=[*signature.parameters.values(), *common]))
    return spoken


def _set_signature(function: Callable[..., Any], signature: inspect.Signature) -> None:
    """Give a function the signature that typer is to read."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}


def _one_line(error: BaseException) -> str:
    """Return an error's message on one line, with the error's type where the message alone may say too little."""
    text = " ".join(str(error).split())
    plain = type(error) in (ValueError, TypeError, ImportError, FileNotFoundError, MemoryError) and text
    return "; ".join([text if plain else f"{type(error).__name__}: {text}", *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    """Return what the library has added to an error: the batch that it came from, and the remedy."""
    notes: list[str] = getattr(error, "__notes__", [])
    return [" ".join(note.removeprefix("hvpkit: ").split()) for note in notes if note.startswith("hvpkit: ")]


def user_code_location(error: BaseException) -> str:
    """Return the innermost line of the user's own code in an error's traceback; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = "site-packages" in path.parts or frame.filename.startswith("<")
        standard = path.is_relative_to(Path(inspect.__file__).parent) and not installed
        if not (installed or standard or any(path.is_relative_to(folder) for folder in LIBRARY_FOLDERS)):
            return f" ({frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"
    return ""
