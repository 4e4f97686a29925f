"""The pictures: predicted against actual changes, and what the error of a prediction has to do with leverage."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from refluence.report.plots import HARMFUL, HELPFUL, INK
from refluence.studies.folder import StudyFolder
from refluence.studies.leave_one_out.methods import TITLES
from refluence.studies.page import png

COLUMNS = 3
METRICS = (("pearson", "Pearson"), ("spearman", "Spearman"), ("slope", "slope"), ("r2", "R² about y = x"))
ROUNDING = 1e-12


def scatter_figure(frame: pd.DataFrame, table: pd.DataFrame, keys: Sequence[str]) -> Figure:
    """Predicted against actual change of the test loss, one panel a method, with y = x and the statistics."""
    rows = -(-len(keys) // COLUMNS)
    figure = Figure(figsize=(4.1 * COLUMNS, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel())
    statistics = table.to_dict("index")
    for ax, key in zip(axes, keys, strict=False):
        _panel(ax, frame["actual"].to_numpy(), frame[f"predicted_{key}"].to_numpy(), TITLES[key], statistics[key])
    for ax in axes[len(keys) :]:
        ax.set_visible(False)
    figure.supxlabel("actual change of the test loss, refitted without the example")
    figure.supylabel("predicted change")
    return figure


def save(folder: StudyFolder, name: str, figure: Figure) -> None:
    """Write a figure as SVG and PNG."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    folder.write_text(f"{name}.svg", text.getvalue())
    (folder.path / f"{name}.png").write_bytes(png(figure))


def _panel(
    ax: Axes, actual: np.ndarray, predicted: np.ndarray, title: str, statistics: Mapping[Hashable, float]
) -> None:
    ends = [float(actual.min()), float(actual.max())]
    ax.plot(ends, ends, color=INK, linewidth=0.9, zorder=1)
    colors = np.where(actual > 0, HELPFUL, HARMFUL)
    ax.scatter(actual, predicted, s=9, c=colors, alpha=0.55, linewidths=0, zorder=2)
    lines = [f"{label} {_digits(statistics[name])}" for name, label in METRICS]
    ax.text(0.04, 0.96, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9, color=INK)
    ax.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    ax.ticklabel_format(style="sci", scilimits=(-3, 4), useMathText=True)
    ax.spines[["top", "right"]].set_visible(False)


def _digits(value: float) -> str:
    """Enough digits to tell 0.9999 from 0.99999."""
    return f"{value:.3f}" if not 0.9995 < value < 1 else f"{np.floor(value * 1e6) / 1e6:.6f}"


def leverage_figure(frame: pd.DataFrame, keys: Sequence[str]) -> Figure:
    """The relative error of predictions against the leverage of the removed example."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    actual = frame["actual"].to_numpy()
    for key, color in zip(keys, (HARMFUL, HELPFUL), strict=True):
        error = np.abs(frame[f"predicted_{key}"].to_numpy() / actual - 1)
        ax.scatter(
            frame["leverage"], error.clip(min=ROUNDING), s=10, color=color, alpha=0.55, linewidths=0, label=TITLES[key]
        )
    line = np.geomspace(frame["leverage"].min(), frame["leverage"].max(), 50)
    ax.plot(line, line, color=INK, linewidth=0.9, linestyle=":", label="error = leverage")
    ax.set(xscale="log", yscale="log", xlabel="leverage of the removed example", ylabel="relative error")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
