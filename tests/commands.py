"""Commands of fastgate, run inside the process of a test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from fastgate.cli import app


def run(*arguments: object, code: int = 0) -> Any:
    """What a command printed, once it has ended with the exit status `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result
