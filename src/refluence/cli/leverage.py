"""`refluence leverage`: which rows are unlike the others, of a file, of a data set, or of what a model makes of it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refluence.cli import options as o
from refluence.cli.root import examples

if TYPE_CHECKING:
    from refluence.leverage.routes import Ridge

_WHAT, _HOW, _SHOW = "Of what", "How to compute it", "What comes out"

EXAMPLES = examples(
    ("refluence leverage --dataset digits --out unusual", "of raw pixels, with the most and least unusual digits"),
    ("refluence leverage --dataset mnist --part all --n-train 60000 --n-test 10000 --ridge 1e-3 --out mnist", "ridge"),
    ("refluence leverage --dataset digits --model mlp --layer 2 --out embedded", "of a trained network's layer"),
    ("refluence leverage --input features.npy --effective-dimension 100 --out chosen", "λ by effective dimension"),
    ("refluence leverage --input table.csv --columns height,weight --intercept --out table", "columns of a table"),
)


class MethodName(StrEnum):
    """The ways of computing leverage."""

    AUTO = "auto"
    EXACT = "exact"
    GRAM = "gram"
    DUAL = "dual"
    SKETCH = "sketch"
    RECURSIVE = "recursive"


class PartName(StrEnum):
    """The rows of a data set."""

    TRAIN = "train"
    TEST = "test"
    ALL = "all"


def leverage(
    ctx: typer.Context,
    *,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="A .npy, .zarr, .parquet or .csv; rows are examples.", rich_help_panel=_WHAT),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="LIST", help="Columns of a table, by commas.", rich_help_panel=_WHAT),
    ] = None,
    dataset: o.Dataset = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A built-in model, trained; needs --layer.", rich_help_panel=_WHAT)
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="Name of the model's layer.", rich_help_panel=_WHAT)
    ] = None,
    part: Annotated[
        PartName, typer.Option("--part", help="Rows of the data set.", rich_help_panel=_WHAT)
    ] = PartName.TRAIN,
    n_train: o.TrainSize = None,
    n_test: o.TestSize = None,
    ridge: Annotated[
        float | None,
        typer.Option("--ridge", metavar="λ", help="In units of XᵀX/n; default 0, plain.", rich_help_panel=_HOW),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", metavar="C", help="λ = C × mean eigenvalue of XᵀX/n.", rich_help_panel=_HOW),
    ] = None,
    effective_dimension: Annotated[
        float | None,
        typer.Option("--effective-dimension", metavar="K", help="The λ with Σ h = K.", rich_help_panel=_HOW),
    ] = None,
    method: Annotated[
        MethodName, typer.Option("--method", help="sketch and recursive are approximate.", rich_help_panel=_HOW)
    ] = MethodName.AUTO,
    intercept: Annotated[
        bool, typer.Option("--intercept", help="Of [1 X], the 1 not damped.", rich_help_panel=_HOW)
    ] = False,
    center: Annotated[bool, typer.Option("--center", help="Of X less its mean.", rich_help_panel=_HOW)] = False,
    accuracy: Annotated[
        float, typer.Option("--accuracy", help="Relative error approximate methods aim at.", rich_help_panel=_HOW)
    ] = 0.25,
    seed: Annotated[int, typer.Option("--seed", help="Of random methods and training.", rich_help_panel=_HOW)] = 0,
    out: o.Out,
    top: Annotated[int, typer.Option("--top", help="Rows printed.", min=1, rich_help_panel=_SHOW)] = 10,
    no_report: o.NoReport = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Find the rows that are unlike the others; writes their leverage scores, a summary and a report."""
    from rich.console import Console

    import refluence as rf
    from refluence.cli.commands import given
    from refluence.cli.leverage_output import Found, page, print_head, summary
    from refluence.cli.leverage_source import Source
    from refluence.cli.output_folder import OutputFolder
    from refluence.cli.summary import print_files
    from refluence.files import write_text

    folder = OutputFolder(out)
    folder.check()
    listed = None if columns is None else [name.strip() for name in columns.split(",")]
    source = Source(input_file, listed, dataset, model, layer, part.value, n_train, n_test, seed)
    source.check()
    chosen = _ridge(ridge, ratio, effective_dimension)
    rows = source.load(progress=not quiet)
    folder.begin("leverage")
    with folder.marked():
        scores = rf.leverage_scores(
            rows.X,
            chosen,
            method.value,
            columns=listed,
            intercept=intercept,
            center=center,
            accuracy=accuracy,
            seed=seed,
            progress=not quiet,
        )
        found = Found(source.title, rows, scores)
        scores.save(folder.leverage)
        write_text(folder.summary, json.dumps(summary(found), indent=2) + "\n")
        if not no_report:
            write_text(folder.report, page(found))
        folder.finish({"command": "leverage", "options": given(ctx), "scores": scores.facts()})
    if not quiet:
        console = Console()
        print_head(console, found, top)
        print_files(console, folder)


def _ridge(ridge: float | None, ratio: float | None, effective_dimension: float | None) -> Ridge:
    """λ as it was asked for.

    Raises:
        typer.BadParameter: in two ways at once.
    """
    import refluence as rf

    asked: dict[str, Any] = {"--ridge": ridge, "--ratio": ratio, "--effective-dimension": effective_dimension}
    named = [option for option, value in asked.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter("each decides λ: give one of them", param_hint=" / ".join(named))
    if ratio is not None:
        return rf.RelativeDamping(ratio)
    if effective_dimension is not None:
        return rf.EffectiveDimension(effective_dimension)
    return 0.0 if ridge is None else ridge
