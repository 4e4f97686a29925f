"""`refluence data`: which data sets there are, getting them, and where they are."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refluence.cli import options as o
from refluence.cli.root import Command, Group, examples

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List, download and find data sets.",
    epilog=examples(
        ("refluence data list", "what there is, and what is on this machine"),
        ("refluence data fetch mnist", "download once, checksums verified"),
        ("refluence data path mnist", "where it is"),
    ),
)
Name = Annotated[str, typer.Argument(help="A built-in data set.")]


@app.command("list", cls=Command, epilog=examples(("refluence data list", "checksums are verified on the way")))
def list_(debug: o.Debug = False) -> None:
    """List the built-in data sets and whether they are on this machine."""
    from refluence.zoo import dataset_names, model_names
    from refluence.zoo.availability import availability

    table = Table("data set", "models", "here", "where", box=None, pad_edge=False)
    for name in dataset_names():
        found = availability(name)
        where = found.detail if found.folder is None else f"{found.folder} ({found.detail})"
        table.add_row(name, ", ".join(model_names(name)), "yes" if found.available else "no", escape(where))
    Console().print(table)


@app.command(
    cls=Command,
    epilog=examples(("refluence data fetch mnist", "11.6 MB into the cache, unless it is here")),
)
def fetch(name: Name, debug: o.Debug = False) -> None:
    """Download a data set into the cache, verified by its published checksums."""
    from refluence.zoo.availability import fetch_dataset

    _check(name)
    found = fetch_dataset(name)
    typer.echo(f"{name}: {found.folder or found.detail}")


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence data path mnist", "the folder of its files"),
        ("refluence data path", "where data sets are downloaded to"),
    ),
)
def path(
    name: Annotated[str | None, typer.Argument(help="A built-in data set.")] = None, debug: o.Debug = False
) -> None:
    """Print the folder of a data set, or the one that data sets are downloaded to."""
    from refluence.errors import DataError
    from refluence.zoo.availability import availability
    from refluence.zoo.folders import cache_folder

    if name is None:
        typer.echo(cache_folder() / "data")
        return
    _check(name)
    found = availability(name)
    if not found.available:
        raise DataError(f"{name}: {found.detail}")
    typer.echo(found.folder or found.detail)


def _check(name: str) -> None:
    from refluence.zoo import dataset_names

    if name not in dataset_names():
        raise typer.BadParameter(
            f"unknown data set {name!r}: use one of {', '.join(dataset_names())}", param_hint="NAME"
        )
