"""The command line. Only what every command needs is imported here; the rest when a command runs."""

from refluence.cli.commands import app

__all__ = ["app"]
