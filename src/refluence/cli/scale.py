"""`refluence plan --examples … --parameters …`: a job of any size, without a model or data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import typer

from refluence.cli.execution_options import StoreDtypeName
from refluence.cli.options import SolverName

_SIZE = "A job of any size, without a model or data"

Examples = Annotated[
    float | None,
    typer.Option("--examples", metavar="N", help="Train examples, such as 1e9.", min=1, rich_help_panel=_SIZE),
]
Parameters = Annotated[
    float | None,
    typer.Option("--parameters", metavar="D", help="Of a transformer, such as 70e9.", min=1, rich_help_panel=_SIZE),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="T", help="Of an example; default 1.", min=1, rich_help_panel=_SIZE)
]
Tests = Annotated[
    int | None, typer.Option("--tests", metavar="K", help="Test examples; default 500.", min=1, rich_help_panel=_SIZE)
]
PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="A sketch and a curvature for each weight matrix.", rich_help_panel=_SIZE)
]
StoreDtype = Annotated[
    StoreDtypeName | None,
    typer.Option("--store-dtype", help="Of the stored rows; default float32.", rich_help_panel=_SIZE),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="W", help="Processes that share the rows; default 1.", min=1, rich_help_panel=_SIZE
    ),
]
DeviceRate = Annotated[
    float | None,
    typer.Option(
        "--device-rate",
        metavar="FLOPS",
        help="FLOP/s that a device sustains, half of it in float64; instead of --device h100 | h200 | a100.",
        rich_help_panel=_SIZE,
    ),
]
Utilisation = Annotated[
    float | None,
    typer.Option(
        "--utilisation", help="Share of the device's rate that is reached; default 0.4.", rich_help_panel=_SIZE
    ),
]

OPTIONS = (
    "examples",
    "parameters",
    "tokens",
    "tests",
    "per_layer",
    "store_dtype",
    "workers",
    "device_rate",
    "utilisation",
)
"""The options that ask for a plan of a job of any size."""
SHARED = ("solver", "sketch", "sketch_size", "device", "batch_size", "memory", "seed")
"""The options of `plan` that it takes too."""


def asked(ctx: typer.Context) -> bool:
    """Whether the command was given an option of a job of any size.

    Raises:
        typer.BadParameter: without its number of examples or parameters, or beside options of a model and data.
    """
    from refluence.cli.solver import flag

    given = [name for name in ctx.params if _by_hand(ctx, name)]
    if not any(name in OPTIONS for name in given):
        return False
    for name, example in (("examples", "1e9"), ("parameters", "70e9")):
        if name not in given:
            raise typer.BadParameter(
                f"is needed for a job of any size, such as {flag(name)} {example}", param_hint=flag(name)
            )
    for name in given:
        if name not in (*OPTIONS, *SHARED):
            raise typer.BadParameter(
                "is about a model and data; a job of any size (--examples) has none: leave out one of the two",
                param_hint=flag(name),
            )
    return True


def print_plan(ctx: typer.Context) -> None:
    """Print the plan of the job.

    Raises:
        typer.BadParameter: a value that cannot be.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from refluence.scale import scale_plan
    from refluence.scale_words import facts, headline

    plan = scale_plan(_scale(ctx.params))
    console = Console()
    console.print(escape(headline(plan)), highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for section, rows in facts(plan):
        table.add_row()
        table.add_row(f"[bold]{section}[/bold]")
        for row in rows:
            table.add_row(*map(escape, row))
    console.print(table, highlight=False)
    console.print("\nassumed", style="bold")
    for one in plan.assumptions:
        console.print(f"- {escape(one)}", highlight=False, soft_wrap=True)


def _scale(options: dict[str, Any]) -> Any:
    import torch

    from refluence.cli.solver import SolverChoice
    from refluence.scale import Scale
    from refluence.scale_sizes import UTILISATION

    if options["solver"] not in (SolverName.AUTO, SolverName.SKETCHED):
        raise typer.BadParameter(
            f"a job of any size is planned for the sketched solver, not for {options['solver'].value}",
            param_hint="--solver",
        )
    choice = SolverChoice(SolverName.SKETCHED, options["sketch"], options["sketch_size"])
    stored = options["store_dtype"]
    sustained = options["device_rate"] is not None
    utilisation = options["utilisation"]
    if sustained and utilisation is not None:
        raise typer.BadParameter(
            "is part of --device-rate already: leave out one of the two", param_hint="--utilisation"
        )
    if utilisation is not None and not 0 < utilisation <= 1:
        raise typer.BadParameter(f"is a share above 0 and at most 1, not {utilisation:g}", param_hint="--utilisation")
    return Scale(
        n=_whole(options["examples"], "--examples"),
        d=_whole(options["parameters"], "--parameters"),
        positions=options["tokens"] or 1,
        tests=options["tests"] or 500,
        sketch=choice.build(options["seed"]).sketch,
        blocks="module" if options["per_layer"] else "full",
        store_dtype=None if stored is None else getattr(torch, stored.value),
        batch_size=options["batch_size"],
        workers=options["workers"] or 1,
        device=_device(options),
        utilisation=1.0 if sustained else utilisation or UTILISATION,
    )


def _device(options: dict[str, Any]) -> Any:
    from refluence.execution import parse_bytes
    from refluence.scale import DEVICES, Device

    name, rate, memory = options["device"], options["device_rate"], options["memory"]
    if rate is not None:
        if name is not None:
            raise typer.BadParameter(
                "has a rate of its own: leave out one of --device and --device-rate", param_hint="--device"
            )
        if not 0 < rate < math.inf:
            raise typer.BadParameter(
                f"must be a positive number of FLOP/s, such as 4e14, not {rate:g}", param_hint="--device-rate"
            )
        device = Device("a device", rate, rate / 2)
    else:
        if name is not None and name not in DEVICES:
            raise typer.BadParameter(
                f"of a job of any size is {', '.join(DEVICES)}, not {name!r}; for another give --device-rate and "
                "--memory",
                param_hint="--device",
            )
        device = DEVICES[name or "h100"]
    return device if memory is None else replace(device, memory=float(parse_bytes(memory)))


def _whole(value: float, name: str) -> int:
    if not (math.isfinite(value) and value == int(value)):
        raise typer.BadParameter(f"must be a whole number, such as 1e9, not {value:g}", param_hint=name)
    return int(value)


def _by_hand(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
