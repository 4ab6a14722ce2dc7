"""The command line: ``hvpkit``. A command a file; what they share is in ``app``, ``options`` and ``output``."""

from hvpkit.cli.app import app
from hvpkit.cli.check import check
from hvpkit.cli.demo import demo
from hvpkit.cli.density import density
from hvpkit.cli.extremes import extremes
from hvpkit.cli.report import report
from hvpkit.cli.sharpness import sharpness
from hvpkit.cli.trace import trace
from hvpkit.cli.track import track
from hvpkit.cli.train import train

__all__ = ["app", "check", "demo", "density", "extremes", "report", "sharpness", "trace", "track", "train"]
