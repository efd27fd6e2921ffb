"""The command line: `flowaccel`, also `python -m flowaccel`."""

from flowaccel.cli.app import app as app
from flowaccel.cli.app import main as main

__all__ = ["app", "main"]
