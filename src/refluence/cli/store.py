"""`refluence store`: what a store of gradients holds, whether it is whole, and clearing it up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refluence.cli import options as o
from refluence.cli.root import Command, Group, examples

if TYPE_CHECKING:
    from refluence.store import Damage

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look after a store of train gradients, which rf.Execution(store=PATH) makes.",
    epilog=examples(
        ("refluence store info gradients", "what it holds, how large and how old it is"),
        ("refluence store verify gradients", "every file against its checksum"),
        ("refluence store prune gradients --dry-run", "what is of no use in it"),
    ),
)
Path = Annotated[str, typer.Argument(help="A folder, or a URL such as s3://bucket/folder.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars on a terminal.")]
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


@app.command(cls=Command, epilog=examples(("refluence store info gradients", "nothing is read but the labels")))
def info(path: Path, debug: o.Debug = False) -> None:
    """Show what a store holds: rows, files, bytes, age, and what it was made of."""
    from refluence.execution import format_bytes
    from refluence.store import describe
    from refluence.store.places import open_place

    found = describe(open_place(path))
    console = Console()
    console.print(f"{escape(found.store)}: {format_bytes(found.size)}", highlight=False, soft_wrap=True)
    table = Table("part", box=None, pad_edge=False)
    for name in ("rows", "files", "size", "oldest", "newest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rounding error")
    table.add_column("to look at")
    now = time.time()
    for part in found.parts:
        notes = [f"{len(part.damaged)} damaged"] * bool(part.damaged) + [f"{part.temporary} temporary"] * bool(
            part.temporary
        )
        table.add_row(
            escape(part.name or "(whole)"),
            f"{part.rows:,}",
            f"{part.shards:,}",
            format_bytes(part.size),
            _age(part.oldest, now),
            _age(part.newest, now),
            f"{max(part.rounding.values(), default=0.0):.1e}",
            ", ".join(notes),
        )
    console.print(table)
    for name, value in found.parts[0].fingerprint.items():
        console.print(f"  {escape(name)}: {escape(_short(value))}", highlight=False, soft_wrap=True)


@app.command(cls=Command, epilog=examples(("refluence store verify gradients", "exit code 1 if a file is damaged")))
def verify(path: Path, progress: Progress = True, debug: o.Debug = False) -> None:
    """Read every file against its checksum; name the damaged ones and exit with code 1 if there are any."""
    from refluence.store import describe
    from refluence.store import verify as damages
    from refluence.store.places import open_place

    place = open_place(path)
    found = damages(place, progress)
    for damage in found:
        typer.echo(f"{damage.name}: {damage.why}")
    total = sum(part.shards for part in describe(place).parts)
    typer.echo(f"{total - len(found):,} of {total:,} files are whole")
    if found:
        raise typer.Exit(1)


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence store prune gradients --dry-run", "list, and remove nothing"),
        ("refluence store prune gradients", "remove what is damaged, left over or held twice"),
    ),
)
def prune(
    path: Path,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    progress: Progress = True,
    debug: o.Debug = False,
) -> None:
    """Remove damaged files, files of another fingerprint, files whose rows others hold, and temporary files."""
    from refluence.execution import format_bytes
    from refluence.store import prune as removed
    from refluence.store.places import open_place

    found: list[Damage] = removed(open_place(path), dry_run, progress)
    for damage in found:
        typer.echo(f"{damage.name} ({format_bytes(damage.size)}): {damage.why}")
    freed = format_bytes(sum(damage.size for damage in found))
    typer.echo(f"{len(found):,} files, {freed}, {'would be removed' if dry_run else 'removed'}")


def _age(when: float | None, now: float) -> str:
    if when is None:
        return ""
    seconds = max(0.0, now - when)
    for unit, size in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _short(value: object) -> str:
    if isinstance(value, dict):
        shown = (f"{key} ({len(item)})" if isinstance(item, list) else f"{key}={item}" for key, item in value.items())
        return ", ".join(shown)
    return str(value)
