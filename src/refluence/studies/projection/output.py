"""What all studies write: figures, tables for people, and the finish of a folder."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

from refluence.files import replacing
from refluence.studies.folder import REPORT, RESULTS, SUMMARY, StudyFolder
from refluence.studies.page import StudyPage, png, render

PAPER = 'After "A Unified Theory of Random Projection for Influence Functions", arXiv 2602.10449'
projection_page = partial(StudyPage, source=PAPER, findings_title="What the numbers say")
"""A page of these studies."""
GUIDE = "#8a8f98"
MARK = "#c62828"


def new_figure(columns: int, rows: int = 1, width: float = 5.2, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A figure that no window knows, and its axes as an array (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel():
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def series_colors(count: int, name: str = "viridis") -> list[Any]:
    """A colour for each of an ordered series."""
    return [colormaps[name](0.92 * i / max(count - 1, 1)) for i in range(count)]


def plot_with_band(ax: Axes, table: pd.DataFrame, **style: Any) -> None:
    """The mean over trials (one row each) against the names of the columns, with its 95 % t interval as a band."""
    x, trials = table.columns.to_numpy(), table.to_numpy()
    mean = trials.mean(axis=0)
    ax.plot(x, mean, **style)
    if len(trials) > 1:
        half = student.ppf(0.975, len(trials) - 1) * trials.std(axis=0, ddof=1) / len(trials) ** 0.5
        low = np.maximum(mean - half, mean * 1e-2) if ax.get_yscale() == "log" else mean - half
        ax.fill_between(x, low, mean + half, color=style.get("color"), alpha=0.18, linewidth=0)


def write_figure(folder: StudyFolder, name: str, figure: Figure) -> None:
    """As PNG and as SVG."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    folder.write_text(f"{name}.svg", text.getvalue())
    with replacing(folder.path / f"{name}.png") as temporary:
        temporary.write_bytes(png(figure))


def finish(
    folder: StudyFolder,
    summary: Mapping[str, Any],
    results: pd.DataFrame,
    figures: Mapping[str, Figure],
    page: StudyPage,
) -> None:
    """Write all that the study found; the summary last but one, so that it stands for a whole folder."""
    folder.write_frame(RESULTS, results)
    for name, figure in figures.items():
        write_figure(folder, name, figure)
    folder.write_text(REPORT, render(page))
    folder.write_json(SUMMARY, summary)
    folder.write_manifest("complete")


def table_of(summary: Mapping[str, Any], columns: Mapping[str, str], by: str, digits: int = 3) -> pd.DataFrame:
    """Lists of a summary side by side, title → key: a row for each "m" or "damping"."""
    shown = power if by == "damping" else "{:,}".format
    return pd.DataFrame(
        {title: [short(value, digits) for value in summary[key]] for title, key in columns.items()},
        index=pd.Index([shown(value) for value in summary[by]]),
    )


def short(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def power(value: float) -> str:
    """A damping for people: 1e-5, not 1e-05."""
    return f"{value:.3g}" if value >= 0.01 else np.format_float_scientific(value, 2, trim="-", exp_digits=1)
