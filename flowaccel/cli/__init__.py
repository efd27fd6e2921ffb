"""The command line: `flowaccel`, also `python -m flowaccel`."""

from flowaccel.cli.app import app, main

__all__ = ["app", "main"]
