"""Matplotlib pictures of evaluations and spectra: each draws into the axes given, or new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from refluence.errors import DataError, RefluenceError
from refluence.evaluation.mislabel import Detection
from refluence.report.plots import HARMFUL, HELPFUL, INK
from refluence.theory.spectrum import Spectrum, as_spectrum, effective_dimension, numerical_rank

NEUTRAL = "#9aa2ab"
CYCLE = (HELPFUL, HARMFUL, "#3f8f5b", "#7a4fa3", "#b0324a", "#2f8f95")


def plot_comparison(table: pd.DataFrame, metric: str = "lds", ax: Axes | None = None) -> Axes:
    """Bars of one metric for every method of an `evaluate` table, the best on top, with intervals; baselines grey.

    Raises:
        DataError: no such metric.
    """
    rows = table[table["metric"] == metric].sort_values("value", kind="stable")
    if rows.empty:
        raise DataError(f"the table has no metric {metric!r}: use one of {', '.join(table['metric'].unique())}")
    value = rows["value"].to_numpy(float)
    error = np.vstack([value - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - value])
    ax = ax or _axes(height=0.9 + 0.32 * len(rows))
    colors = [NEUTRAL if kind == "baseline" else HELPFUL for kind in rows["kind"]]
    ax.barh(range(len(rows)), value, xerr=np.clip(error, 0, None), color=colors, ecolor=INK, height=0.7)
    ax.set_yticks(range(len(rows)), rows["method"].tolist())
    ax.axvline(0, color=INK, linewidth=0.8)
    confidence = float(rows["confidence"].iloc[0])
    ax.set(xlabel=f"{metric} ({confidence:.0%} intervals)")
    return _quiet(ax)


def plot_agreement(
    predicted: Tensor | ArrayLike, measured: Tensor | ArrayLike, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Predicted change against actual change, with the line y = x."""
    p, a = _array(predicted).ravel(), _array(measured).ravel()
    ax = ax or _axes(height=4.6)
    color = CYCLE[len(ax.collections) % len(CYCLE)]
    ax.scatter(a, p, s=12, color=color, alpha=0.55, linewidth=0, label=label)
    ax.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle="--")
    ax.set(xlabel="actual change after removal", ylabel="predicted change")
    if label is not None:
        ax.legend(frameon=False)
    return _quiet(ax)


def plot_detection(detections: Detection | Mapping[str, Detection], ax: Axes | None = None) -> Axes:
    """Share of the wrong labels found against the share of examples inspected, with the best possible and chance."""
    named = {"": detections} if isinstance(detections, Detection) else dict(detections)
    ax = ax or _axes(height=4.0)
    for color, (name, detection) in zip(_colors(len(named)), named.items(), strict=True):
        curve = detection.curve
        area = f"area {detection.area.value:.3f}"
        ax.plot(
            curve["inspected"], curve["found"], color=color, linewidth=1.5, label=f"{name} ({area})" if name else area
        )
        ax.fill_between(curve["inspected"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
    curve = next(iter(named.values())).curve
    ax.plot(curve["inspected"], curve["best"], color=INK, linewidth=0.8, linestyle="--", label="best possible")
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="chance")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of examples inspected", ylabel="share of wrong labels found")
    ax.legend(frameon=False, loc="lower right")
    return _quiet(ax)


def plot_removal(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rows of `removal_curve`: helpful removals as full lines, harmful ones dashed, random ones grey."""
    ax = ax or _axes(height=4.0)
    names = [name for name in curve["method"].unique() if name != "random"]
    colors = dict(zip(names, _colors(len(names)), strict=True)) | {"random": NEUTRAL}
    styles = {"helpful": "-", "harmful": "--", "random": "-"}
    for (name, end), part in curve.groupby(["method", "end"], sort=False):
        label, color = (name if name == "random" else f"{name}, {end}"), colors[str(name)]
        ax.plot(part["removed"], part["change"], styles[str(end)], color=color, marker="o", markersize=3, label=label)
        ax.fill_between(part["removed"], part["low"], part["high"], color=color, alpha=0.15, linewidth=0)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="training examples removed", ylabel="change of the measurement, mean over tests")
    ax.legend(frameon=False)
    return _quiet(ax)


def plot_brittleness(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The curve of `brittleness`: share of predictions flipped against examples removed."""
    ax = ax or _axes(height=4.0)
    names = [name for name in curve["method"].unique() if name != "random"]
    colors = dict(zip(names, _colors(len(names)), strict=True)) | {"random": NEUTRAL}
    for name, part in curve.groupby("method", sort=False):
        color = colors[str(name)]
        ax.plot(part["removed"], part["flipped"], color=color, marker="o", markersize=3, label=name)
        ax.fill_between(part["removed"], part["low"], part["high"], color=color, alpha=0.15, linewidth=0)
    ax.set(ylim=(0, 1.02), xlabel="helpful examples removed", ylabel="share of predictions flipped")
    ax.legend(frameon=False)
    return _quiet(ax)


def plot_spectrum(eigenvalues: Spectrum, damping: float | None = None, ax: Axes | None = None) -> Axes:
    """Eigenvalues σ_i of C against i, falling, on a logarithmic scale; with a damping, λ and d_λ as lines across it.

    Left of d_λ lie about the directions in which the data outweigh the damping. Eigenvalues that are rounding, up to
    r·ε·σ_max, are left out.

    Raises:
        RefluenceError: no positive eigenvalue, or a damping that is not positive.
    """
    values = np.sort(as_spectrum(eigenvalues))[::-1]
    values = values[: numerical_rank(values)]
    if not values.size or (damping is not None and not damping > 0):
        raise RefluenceError(f"a spectrum's plot needs a positive eigenvalue and damping, not damping {damping!r}")
    ax = ax or _axes()
    color = CYCLE[sum(line.get_gid() == "spectrum" for line in ax.lines) % len(CYCLE)]
    ax.semilogy(np.arange(1, values.size + 1), values, color=color, linewidth=1.5, gid="spectrum")
    if damping is not None:
        dimension = effective_dimension(values, damping)
        ax.axhline(damping, color=INK, linewidth=0.8, linestyle="--", label=f"λ = {damping:.3g}")
        ax.axvline(dimension, color=INK, linewidth=0.8, linestyle=":", label=f"d_λ = {dimension:.1f}")
        ax.legend(frameon=False)
    ax.set(xlabel="i", ylabel="eigenvalue σ_i of the curvature")
    return _quiet(ax)


def _colors(count: int) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(count)]


def _array(values: Tensor | ArrayLike) -> NDArray[np.float64]:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _axes(height: float = 3.4) -> Axes:
    return plt.subplots(figsize=(6.4, height), layout="constrained")[1]


def _quiet(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
