"""`refluence study`: published experiments, repeated."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from refluence.cli import options as o
from refluence.cli.root import Command, Group, examples

if TYPE_CHECKING:
    from refluence.studies.leave_one_out import ConvolutionalOptions, Options


class StudyCommand(Command):
    """A command that takes its options in the published spelling too, with underscores."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the underscores of options' names read as hyphens."""
        return super().parse_args(ctx, _hyphenated(args))


def _hyphenated(args: list[str]) -> list[str]:
    spelled: list[str] = []
    for place, arg in enumerate(args):
        if arg == "--":
            return spelled + args[place:]
        name, equals, value = arg.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if arg.startswith("--") else arg)
    return spelled


app = typer.Typer(cls=Group, no_args_is_help=True, help="Repeat a published experiment, with a figure and a page.")


@app.callback()
def main() -> None:
    """Repeat a published experiment, with a figure and a page."""


class SettingName(StrEnum):
    """The settings of leave-one-out."""

    PAPER = "paper"
    REDUCED = "reduced"
    DIGITS = "digits"
    CNN = "cnn"


class DatasetName(StrEnum):
    """The data sets of leave-one-out."""

    MNIST = "mnist"
    DIGITS = "digits"


_WHAT = "What to repeat"


@app.command(
    "leave-one-out",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study leave-one-out --out loo --test-mode", "on the digits, in a minute, without a download"),
        ("refluence study leave-one-out --out loo", "the paper's setting: 55,000 images of MNIST, 500 refits"),
        ("refluence study leave-one-out --out loo --setting reduced --subsets 5", "20,000 images, five times"),
        ("refluence study leave-one-out --out loo --setting cnn", "the paper's convolutional network"),
    ),
)
def leave_one_out(
    out: o.Out,
    setting: Annotated[
        SettingName | None,
        typer.Option(
            "--setting",
            help="paper (the default), reduced (20,000 images, weaker l2), digits, or cnn (the paper's network).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    dataset: Annotated[
        DatasetName | None,
        typer.Option(
            "--dataset", help="mnist for the paper's setting, digits for the one on digits.", rich_help_panel=_WHAT
        ),
    ] = None,
    test_mode: Annotated[
        bool, typer.Option("--test-mode", help="The digits: quick, and no download.", rich_help_panel=_WHAT)
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            help="Examples of largest influence that are removed; default the setting's.",
            min=3,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    subsets: Annotated[
        int,
        typer.Option(
            "--subsets", help="Repeat on so many random subsets; medians count.", min=1, rich_help_panel=_WHAT
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the first subset and of LiSSA's examples.", min=0, rich_help_panel=_WHAT)
    ] = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Predicted against actual leave-one-out changes (Koh & Liang 2017, Figure 2)."""
    from refluence.studies.leave_one_out import run, run_convolutional

    if setting is SettingName.CNN:
        summary = run_convolutional(_convolutional(dataset, test_mode, top, subsets, seed), out, progress=not quiet)
    else:
        summary = run(_options(setting, dataset, test_mode, top, subsets, seed), out, progress=not quiet)
    if not quiet:
        _print(Console(), summary, out)


def _convolutional(
    dataset: DatasetName | None, test_mode: bool, top: int | None, subsets: int, seed: int
) -> ConvolutionalOptions:
    """The network's panel.

    Raises:
        typer.BadParameter: an option that it does not have.
    """
    from refluence.studies.leave_one_out import ConvolutionalOptions

    if test_mode or dataset is DatasetName.DIGITS:
        given = "--test-mode" if test_mode else "--dataset"
        raise typer.BadParameter("is for the digits, and the setting cnn is on mnist: leave one out", param_hint=given)
    if subsets > 1:
        raise typer.BadParameter("the setting cnn has one subset; use --seed for another", param_hint="--subsets")
    options = ConvolutionalOptions(seed=seed)
    if top is not None and top > options.n:
        raise typer.BadParameter(f"{top} of {options.n} train rows cannot be removed", param_hint="--top")
    return options if top is None else replace(options, top=top)


def _options(
    setting: SettingName | None, dataset: DatasetName | None, test_mode: bool, top: int | None, subsets: int, seed: int
) -> Options:
    """The setting that the options name together.

    Raises:
        typer.BadParameter: options that contradict each other, or more removals than train rows.
    """
    from refluence.studies.leave_one_out import SETTINGS, Options

    if test_mode and setting not in (None, SettingName.DIGITS):
        raise typer.BadParameter(f"is the digits setting, not {setting}: leave one out", param_hint="--test-mode")
    if test_mode and dataset not in (None, DatasetName.DIGITS):
        raise typer.BadParameter(f"runs on the digits, not on {dataset}: leave one out", param_hint="--test-mode")
    small = test_mode or (setting is None and dataset is DatasetName.DIGITS)
    chosen = SETTINGS[SettingName.DIGITS if small else setting or SettingName.PAPER]
    if dataset is not None and chosen.dataset != dataset:
        raise typer.BadParameter(
            f"the setting {chosen.name} is on {chosen.dataset}, not on {dataset}: leave one out", param_hint="--dataset"
        )
    if subsets > 1 and chosen.drawn is None:
        raise typer.BadParameter(
            f"the setting {chosen.name} has all its train rows, and so one subset: use --setting reduced or digits",
            param_hint="--subsets",
        )
    rows = chosen.drawn or (chosen.n_train or 0) - chosen.skipped
    if top is not None and top > rows:
        raise typer.BadParameter(f"{top} of {rows} train rows cannot be removed", param_hint="--top")
    return Options(chosen, seed, subsets, top or chosen.top)


def _print(console: Console, summary: dict[str, Any], out: Path) -> None:
    columns = {"pearson": "Pearson", "spearman": "Spearman", "slope": "slope", "r2": "R² about y = x"}
    table = Table("method", *columns.values(), box=None, pad_edge=False)
    for name, values in summary.items():
        if isinstance(values, dict):
            table.add_row(name, *(f"{values[column]:.6f}" for column in columns))
    console.print(table)
    console.print(
        f"{summary['refits_converged']} of {summary['refits']} refits converged; {summary['seconds']:.0f} s. "
        f"Open {out / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
