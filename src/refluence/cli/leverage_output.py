"""What `refluence leverage` says: the head of the list, the flat summary, and the page with its pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from refluence.cli.leverage_source import Rows
from refluence.leverage import LeverageScores
from refluence.report.formatting import number, percent
from refluence.studies.page import Fact, Picture, StudyPage, render

GRID_COLUMNS, GRID_ROWS = 30, 10
LISTED = 20
NEAR_ONE = 0.99


@dataclass(frozen=True, eq=False)
class Found:
    """The scores, and whose they are."""

    title: str
    rows: Rows
    scores: LeverageScores

    @property
    def kind(self) -> str:
        """Plain or ridge leverage, in words."""
        plain = self.scores.damping == 0
        return "plain leverage" if plain else f"ridge leverage at λ = {number(self.scores.damping)}"

    def label(self, row: int) -> str:
        """The name of a row's class; empty where it has none."""
        if self.rows.labels is None:
            return ""
        label = int(self.rows.labels[row])
        return self.rows.class_names[label] if self.rows.class_names else str(label)


def summary(found: Found) -> dict[str, Any]:
    """Every number under a flat key."""
    facts = dict(found.scores.facts())
    gap = facts.pop("gap") or {}
    values = found.scores.values
    quantiles = np.quantile(values.cpu().numpy(), [0.01, 0.5, 0.99])
    return {
        **facts,
        **{f"singular_value_{name}": value for name, value in gap.items()},
        "mean": float(values.mean()),
        "largest": float(values.max()),
        "smallest": float(values.min()),
        "quantile_01": float(quantiles[0]),
        "median": float(quantiles[1]),
        "quantile_99": float(quantiles[2]),
        "rows_above_0.99": int((values > NEAR_ONE).sum()),
    }


def print_head(console: Console, found: Found, top: int) -> None:
    """What was computed, and the rows of the highest leverage."""
    scores = found.scores
    console.print(f"[bold]{escape(found.title)}[/bold]: {found.kind}, {scores!r}", highlight=False, soft_wrap=True)
    table = Table("row", "leverage", "times the mean", *(["label"] if found.rows.labels is not None else []))
    mean = float(scores.values.mean())
    for row in scores.top(top).tolist():
        value = float(scores.values[row])
        table.add_row(str(row), f"{value:.6g}", f"{value / mean:.3g}" if mean else "—", escape(found.label(row)))
    console.print(table)


def page(found: Found) -> str:
    """The page as HTML."""
    return render(
        StudyPage(
            title=f"Which rows of {found.title} are unlike the others?",
            lead=(
                "The leverage of a row, between 0 and 1, is the share of its own fitted value that a least-squares fit "
                "takes from the row itself: near 1, no other row is like it; near 0, many are."
            ),
            facts=_facts(found),
            pictures=[_curve(found), *_grids(found)],
            findings=_findings(found),
            table=_table(found),
            table_caption=f"The {min(LISTED, found.scores.values.numel())} rows of the highest leverage.",
            source=f"refluence leverage: {found.kind}, method {found.scores.method}.",
            findings_title="What the scores say",
            row_name="Row",
            kind="leverage",
        )
    )


def _facts(found: Found) -> list[Fact]:
    scores = found.scores
    mean = float(scores.values.mean())
    dimension = (
        Fact("Rank", str(scores.rank), "Dimensions that the rows span; the scores add up to it.")
        if scores.rank is not None
        else Fact("Effective dimension", number(scores.effective_dimension, 4), "The scores add up to it.")
    )
    facts = [
        Fact("Rows", f"{scores.values.numel():,}", f"Method {scores.method}."),
        dimension,
        Fact("Mean", number(mean), "What every row would have, were all alike."),
        Fact("Largest", number(float(scores.values.max())), f"{int((scores.values > NEAR_ONE).sum()):,} above 0.99."),
    ]
    if scores.relative_error is not None and scores.method in ("sketch", "recursive"):
        facts.append(Fact("Relative error", number(scores.relative_error), "Measured on sixteen random rows."))
    return facts


def _curve(found: Found) -> Picture:
    values = np.sort(found.scores.values.cpu().numpy())[::-1]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-300), color="#3949ab")
    axes.axhline(values.mean(), color="#999", linewidth=1, linestyle="--")
    axes.annotate("mean", (1, values.mean()), textcoords="offset points", xytext=(2, 4), color="#666")
    positive = values[values > 0]
    if len(positive):
        axes.set_ylim(max(float(positive.min()), float(values.max()) * 1e-9) / 2, min(2.0, 2 * float(values.max())))
    axes.set(xscale="log", yscale="log", xlabel="rows, the highest leverage first", ylabel="leverage")
    half = int(np.searchsorted(np.cumsum(values), values.sum() / 2)) + 1
    caption = (
        f"Leverage of every row, sorted: {half:,} rows ({percent(half / len(values))}) hold half of the sum "
        f"{number(float(values.sum()), 4)}."
    )
    return Picture(figure, "Curve of the sorted leverage scores on logarithmic axes", caption)


def _grids(found: Found) -> list[Picture]:
    if found.rows.images is None:
        return []
    shown = min(GRID_COLUMNS * GRID_ROWS, found.scores.values.numel())
    return [
        Picture(
            _grid(found.rows.images[order.cpu()]),
            f"Grid of the {shown} pictures of the {which} leverage",
            f"The {shown} rows of the {which} leverage, row by row, the {which} first.",
        )
        for which, order in (("highest", found.scores.top(shown)), ("lowest", found.scores.bottom(shown)))
    ]


def _grid(images: Tensor) -> Figure:
    """Pictures (k, C, H, W) in bytes, side by side."""
    k, channels, height, width = images.shape
    lines = math.ceil(k / GRID_COLUMNS)
    sheet = np.full((lines * (height + 1), GRID_COLUMNS * (width + 1), channels), 255, dtype=np.uint8)
    for place, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        line, column = divmod(place, GRID_COLUMNS)
        y, x = line * (height + 1), column * (width + 1)
        sheet[y : y + height, x : x + width] = image
    figure = Figure(figsize=(9, 9 * sheet.shape[0] / sheet.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet if channels == 3 else sheet[..., 0], cmap="gray", interpolation="nearest", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def _findings(found: Found) -> list[tuple[str, str]]:
    scores = found.scores
    said = []
    if scores.gap is not None:
        below = f"the next is {number(scores.gap.dropped)}" if scores.gap.dropped else "nothing was dropped"
        verdict = "so the rank is certain" if scores.gap.clear else "so the rank is not certain: use a ridge"
        said.append(
            (
                "Rank",
                f"{scores.rank}: the smallest singular value that counts is {number(scores.gap.kept)}, {below}, and "
                f"the cut is {number(scores.gap.cut)}, {verdict}.",
            )
        )
    near = int((scores.values > NEAR_ONE).sum())
    if near:
        said.append(
            (
                "Alone in a direction",
                f"{near:,} rows have a leverage above 0.99: each is almost alone in some direction of the features, "
                "however small its part there. A ridge weighs directions by their size.",
            )
        )
    if found.rows.labels is not None:
        first = scores.top(max(1, scores.values.numel() // 100)).cpu()
        counts = found.rows.labels[first].bincount()
        label = int(counts.argmax())
        name = found.rows.class_names[label] if found.rows.class_names else str(label)
        said.append(
            ("Labels", f"Of the top 1 % of the rows, {percent(int(counts[label]) / len(first))} are of class {name}.")
        )
    said.append(("Unusual is not useful", "Rows of high leverage are unlike the others; that does not make them good."))
    return said


def _table(found: Found) -> pd.DataFrame:
    top = found.scores.top(LISTED).tolist()
    table = pd.DataFrame({"leverage": [f"{float(found.scores.values[row]):.6g}" for row in top]}, index=top)
    if found.rows.labels is not None:
        table["label"] = [found.label(row) for row in top]
    return table
