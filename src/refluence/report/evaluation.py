"""The page of an evaluation: tables with intervals, pictures, and what they say in plain language."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from refluence.files import write_text
from refluence.report.facts import Fact
from refluence.report.formatting import shorten, statistic
from refluence.report.page import asset, environment

MAX_DETAILS = 12_000
MAX_PICTURE = 2_000_000
MAX_OPEN = 6


@dataclass(frozen=True)
class Figure:
    """A picture in PNG with what it shows, for those who do not see it."""

    png: bytes
    description: str

    @property
    def uri(self) -> str:
        """The picture as a part of the page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Part:
    """One test of the methods: its rows of the tidy table (method, kind, metric, value, low, high), and a picture.

    Many metrics beside a picture, the points of a curve, are folded away on the page.
    """

    name: str
    title: str
    meaning: str
    table: pd.DataFrame
    figure: Figure | None = None

    @property
    def folded(self) -> bool:
        """Whether the numbers are folded away below the picture."""
        return self.figure is not None and self.table["metric"].nunique() > MAX_OPEN


@dataclass(frozen=True)
class Evaluated:
    """All that the page shows; `skipped` is what was not tested, with the reason."""

    title: str
    description: str
    findings: Sequence[str]
    facts: Sequence[Fact]
    parts: Sequence[Part]
    skipped: Mapping[str, str]
    notes: Sequence[str]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A value with its interval, and their places on a line from 0 to 100."""

    method: str
    baseline: bool
    value: str
    interval: str
    place: float
    low: float
    high: float


@dataclass(frozen=True)
class Board:
    """One metric of all methods on one line, the highest first; `zero` is where 0 lies."""

    metric: str
    bars: tuple[Bar, ...]
    zero: float


def write_evaluation(path: str | os.PathLike[str], evaluated: Evaluated) -> Path:
    """Write the page as one HTML file that needs no network; returns its path."""
    boards = {part.name: list(part_boards(part.table)) for part in evaluated.parts}
    page = environment().get_template("evaluation.html.j2")
    text = page.render(
        evaluated=evaluated,
        boards=boards,
        figures={
            part.name: Markup(part.figure.uri)
            for part in evaluated.parts
            if part.figure is not None and len(part.figure.png) <= MAX_PICTURE
        },
        style=Markup(asset("report.css") + asset("evaluation.css")),
        manifest=shorten(json.dumps(evaluated.manifest, indent=2, default=str, ensure_ascii=False), MAX_DETAILS),
    )
    path = Path(path)
    write_text(path, text)
    return path


def part_boards(table: pd.DataFrame) -> list[Board]:
    """A board for each metric of a tidy table, in its order."""
    return [_board(str(metric), part) for metric, part in table.groupby("metric", sort=False)]


def _board(metric: str, part: pd.DataFrame) -> Board:
    rows = part.sort_values("value", ascending=False, kind="stable", na_position="last")
    ends = [v for column in ("value", "low", "high") for v in rows[column] if math.isfinite(v)]
    left, right = min([*ends, 0.0]), max([*ends, 0.0])
    span = (right - left) or 1.0

    def place(value: float, otherwise: float) -> float:
        return 100 * ((value if math.isfinite(value) else otherwise) - left) / span

    bars = []
    for row in rows.to_dict("records"):
        value, low, high = (float(row[column]) for column in ("value", "low", "high"))
        known = math.isfinite(low) and math.isfinite(high)
        middle = value if math.isfinite(value) else 0.0
        bars.append(
            Bar(
                method=shorten(str(row["method"]), 80),
                baseline=row["kind"] == "baseline",
                value=statistic(value),
                interval=f"{statistic(low)} to {statistic(high)}" if known else "—",
                place=place(value, 0.0),
                low=place(low, middle),
                high=place(high, middle),
            )
        )
    return Board(metric, tuple(bars), place(0.0, 0.0))
