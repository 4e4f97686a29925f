"""`refluence study leverage-basis`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from refluence.cli import options as o
from refluence.cli.root import examples
from refluence.cli.study import DatasetName, StudyCommand, app

if TYPE_CHECKING:
    from refluence.studies.leverage_basis import Options

_WHAT, _BASES, _SELECTIONS = "What to study", "Bases", "Training on selections"
_GROUPS = ("classification", "regression", "untrained")


@app.command(
    "leverage-basis",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study leverage-basis --dataset digits --out lb", "on the digits, in a minute, without a download"),
        ("refluence study leverage-basis --out lb", "the 70,000 images of MNIST, 70 minutes of CPU"),
        ("refluence study leverage-basis --out lb --sizes 10,100,1000,10000 --seeds 10", "other sizes, more seeds"),
        ("refluence study leverage-basis --out lb --convolutional-steps 12000", "the original's 15 epochs at every k"),
    ),
)
def leverage_basis(
    out: o.Out,
    dataset: Annotated[
        DatasetName, typer.Option("--dataset", help="mnist, or digits for a quick run.", rich_help_panel=_WHAT)
    ] = DatasetName.MNIST,
    test_mode: Annotated[
        bool, typer.Option("--test-mode", help="The digits: quick, and no download.", rich_help_panel=_WHAT)
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="Of networks and random rows; default 5.", min=2, rich_help_panel=_WHAT),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", help="Of the embedding networks; default 5 (digits: 20).", min=1, rich_help_panel=_BASES
        ),
    ] = None,
    dimension: Annotated[
        float | None,
        typer.Option(
            "--dimension",
            help="d_λ of the ridge leverage in every basis; default 20 (digits: 8).",
            min=1.0,
            rich_help_panel=_BASES,
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes",
            metavar="K,K,…",
            help="Numbers of selected rows; the whole train set is added.",
            rich_help_panel=_SELECTIONS,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Of the small network, batches of 64; default 1000 (digits: 300).",
            min=1,
            rich_help_panel=_SELECTIONS,
        ),
    ] = None,
    convolutional_sizes: Annotated[
        str | None,
        typer.Option(
            "--convolutional-sizes",
            metavar="K,K,…",
            help="Sizes at which the embedding's architecture is trained too; 0: none.",
            rich_help_panel=_SELECTIONS,
        ),
    ] = None,
    convolutional_steps: Annotated[
        int | None,
        typer.Option(
            "--convolutional-steps",
            help="Of these trainings, batches of 64; at most 15 epochs; default 800 (digits: 200).",
            min=1,
            rich_help_panel=_SELECTIONS,
        ),
    ] = None,
    greedy: Annotated[
        int | None,
        typer.Option(
            "--greedy",
            help="Largest k of D-optimal design, k-center and herding; default 1000 (digits: 100).",
            min=1,
            rich_help_panel=_SELECTIONS,
        ),
    ] = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Leverage in 18 bases of the same images: do they agree, and does training on high leverage pay?"""
    from refluence.studies.leverage_basis import DEFAULTS, run

    given = {
        "seeds": seeds,
        "epochs": epochs,
        "dimension": dimension,
        "sizes": _numbers(sizes, "--sizes"),
        "steps": steps,
        "convolutional_sizes": _numbers(convolutional_sizes, "--convolutional-sizes"),
        "convolutional_steps": convolutional_steps,
        "greedy": greedy,
    }
    start: Options = DEFAULTS[DatasetName.DIGITS if test_mode else dataset]
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    summary = run(replace(start, **chosen), out, progress=not quiet)
    if not quiet:
        _print(Console(), summary, out)


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Numbers with commas between them; "0" is none.

    Raises:
        typer.BadParameter: something else.
    """
    if text is None:
        return None
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 10,100,1000", param_hint=option) from None
    if numbers == [0]:
        return ()
    if numbers[0] < 1:
        raise typer.BadParameter(f"{numbers[0]} rows cannot be selected", param_hint=option)
    return tuple(numbers)


def _print(console: Console, summary: dict[str, Any], out: Path) -> None:
    table = Table(
        "leverage, other seed", "Kendall's τ", "95 % interval", f"κ@{summary['top']}", box=None, pad_edge=False
    )
    for kind in ("plain", "ridge"):
        for group in _GROUPS:
            key = f"{kind}_{group}_{group}"
            low, high = summary[f"tau_{key}_low"], summary[f"tau_{key}_high"]
            table.add_row(
                f"{kind}, {group}",
                f"{summary[f'tau_{key}']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{summary[f'kappa_{key}']:.3f}",
            )
    console.print(table)
    rows = Table("k", "random", "raw leverage, top", box=None, pad_edge=False)
    for k in summary["sizes"]:
        top = summary.get(f"accuracy_network_raw_top_{k}")
        rows.add_row(f"{k:,}", f"{summary[f'accuracy_network_random_{k}']:.3f}", "" if top is None else f"{top:.3f}")
    console.print(rows)
    console.print(
        f"Test accuracy of the small network; {summary['seconds']:.0f} s of work. Open {out / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
