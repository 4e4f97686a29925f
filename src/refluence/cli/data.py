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
Name = Annotated[str, typer.Argument(help="A built-in data set: one of `refluence data list`.")]


@app.command("list", cls=Command, epilog=examples(("refluence data list", "checksums are verified on the way")))
def list_(debug: o.Debug = False) -> None:
    """List the built-in data sets and whether they are on this machine."""
    from refluence.zoo import dataset_names, model_names
    from refluence.zoo.availability import availability

    table = Table("data set", "models", box=None, pad_edge=False)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("here")
    table.add_column("where", overflow="fold")
    for name in dataset_names():
        found = availability(name)
        where = f"{found.folder} ({found.detail})" if found.folder else found.detail if found.available else ""
        size = f"{found.download / 1e6:.1f} MB" if found.download else ""
        table.add_row(name, ", ".join(model_names(name)), size, "yes" if found.available else "no", escape(where))
    Console().print(table)


@app.command(
    cls=Command,
    epilog=examples(("refluence data fetch mnist", "11.6 MB into the cache, unless it is here")),
)
def fetch(name: Name, debug: o.Debug = False) -> None:
    """Download a data set into the cache, verified by its published checksums."""
    from refluence.zoo.availability import fetch_dataset

    found = fetch_dataset(_known(name))
    typer.echo(f"{found.name}: {found.folder or found.detail}")


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
    from refluence.zoo.folders import download_folder

    if name is None:
        typer.echo(download_folder())
        return
    found = availability(_known(name))
    if not found.available:
        raise DataError(f"{found.name}: {found.detail}")
    typer.echo(found.folder or found.detail)


def _known(name: str) -> str:
    from refluence.errors import DataError
    from refluence.zoo.datasets import canonical_name

    try:
        return canonical_name(name)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
