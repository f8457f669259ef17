"""Commands of fastgate, run inside the process of a test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from fastgate.cli.main import app


def run(*arguments: object, code: int = 0) -> Any:
    """What a command printed, once it has ended with the exit status `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def call(*arguments, code=0):
    """The result of a command; anything but 0 has said why in one line."""
    result = run(*arguments, code=code)
    assert "Traceback" not in result.output
    if code:
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: "), result.stderr
    return result


def refused(*arguments, code=1):
    result = call(*arguments, code=code)
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr
