"""What all commands share: errors as one line, warnings as notices, `--debug` for the traceback."""

from __future__ import annotations

import errno
import warnings
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from refluence.errors import RefluenceError

DEBUG = "refluence.debug"
EXAMPLES_TITLE = "[bold]Examples[/bold]"


class Command(typer.core.TyperCommand):
    """A command whose context is the `typer.Context` that its annotations say."""

    context_class = typer.Context


class Group(typer.core.TyperGroup):
    """A group whose context is the `typer.Context` that its annotations say."""

    context_class = typer.Context


class Root(Group):
    """Runs a command; an error in what the user gave ends it with one clear message and exit code 1 (usage: 2)."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command of this context."""
        with warnings.catch_warnings():
            warnings.showwarning = _notice
            try:
                return super().invoke(ctx)
            except (RefluenceError, typer.BadParameter, OSError) as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise
                if ctx.meta.get(DEBUG):
                    _errors().print_exception()
                if isinstance(error, typer.BadParameter):
                    raise
                _fail(error)


def _errors() -> Console:
    return Console(stderr=True)


def _fail(error: Exception) -> NoReturn:
    _errors().print(f"[bold red]Error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1) from error


def _notice(message: Warning | str, *_where: Any, **_more: Any) -> None:
    _errors().print(f"[yellow]Note:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)


def remember_debug(ctx: typer.Context, value: bool) -> bool:
    """The callback of `--debug`, which may stand before or after the command."""
    if value:
        ctx.meta[DEBUG] = True
    return value


def examples(*lines: tuple[str, str]) -> str:
    """A help epilogue of (command, what it does)."""
    shown = [f"[cyan]{command}[/cyan]  [dim]{meaning}[/dim]" for command, meaning in lines]
    return "\n\n".join([EXAMPLES_TITLE, *shown])
