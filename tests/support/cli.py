"""The command line, run in this process."""

from typing import Any

from typer.testing import CliRunner

from refluence.cli import app


def run(*arguments: Any, code: int = 0) -> Any:
    """What `refluence` does with these arguments; fails on another exit status, and raises what it did not catch."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
