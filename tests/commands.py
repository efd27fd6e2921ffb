"""Running the command line within the tests' process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from flowaccel.cli import app


def run(*arguments: str, code: int = 0) -> Any:
    """Run a command in this process; whatever its end, it is not a traceback."""
    result = CliRunner().invoke(app, list(arguments))
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    assert unexpected is None, repr(unexpected)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def fails(*arguments: str, code: int = 2) -> str:
    """Run a command that must fail; what it says, in one line."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    return " ".join(result.stderr.split())
