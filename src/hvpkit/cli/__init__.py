"""The command line, ``hvpkit``: a file for each command, beside the files that commands share."""

# each of these registers its command on the application
from hvpkit.cli import (  # noqa: F401
    blocks,
    check,
    demo,
    density,
    extremes,
    plan,
    report,
    sharpness,
    solve,
    top,
    trace,
    track,
    train,
)
from hvpkit.cli.application import app

__all__ = ["app"]
