"""From the errors of the grid to the numbers, the figures and the page of spectrum-bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.errors import interpolated, log_slope
from refluence.studies.projection.output import (
    GUIDE,
    MARK,
    new_figure,
    plot_with_band,
    power,
    projection_page,
    series_colors,
    short,
    table_of,
)

ASYMPTOTIC = 5.0
"""m/d_λ from which the slope is fitted, as published."""
NEAR = (0.5, 4.0)
"""m/d_λ between which the largest error is looked for."""
MEASURES = {
    "eps": "|error| ÷ √τ₀√τ₀",
    "gap": "|error| ÷ √(τ₀−τ_λ)√(τ₀−τ_λ)",
    "relative": "|error| ÷ exact score",
}


def summary_of(facts: Mapping[str, Any], results: pd.DataFrame, plateau: pd.DataFrame, measure: str) -> dict[str, Any]:
    """The content of `summary.json`: flat keys; a list has one entry a damping, in the order of `damping`."""
    summary: dict[str, Any] = {**facts, "measure": measure}
    dampings = sorted(results["damping"].unique())
    dimensions = results.groupby("damping")["effective_dimension"].first()
    summary["damping"] = [float(v) for v in dampings]
    summary["effective_dimension"] = [float(dimensions[v]) for v in dampings]
    for name in ("eps", "gap", *(("relative",) if measure == "relative" else ())):
        column = f"{name}_95"
        summary[f"{name}_plateau"] = [float(plateau.loc[v, column]) for v in dampings]
        for corrected, prefix in ((False, name), (True, f"{name}_corrected")):
            if corrected and not facts["corrected"]:
                continue
            found = [_shape(_curve(results, v, corrected, column), float(plateau.loc[v, column])) for v in dampings]
            for key in found[0]:
                summary[f"{prefix}_{key}"] = [shape[key] for shape in found]
    for prefix in (measure, f"{measure}_corrected"):
        if f"{prefix}_slope" in summary:
            slopes = np.array(summary[f"{prefix}_slope"])
            known = slopes[np.isfinite(slopes)]
            summary[f"{prefix}_median_slope"] = float(np.median(known)) if len(known) else float("nan")
    return summary


def _curve(results: pd.DataFrame, damping: float, corrected: bool, column: str) -> pd.Series:
    """The mean over trials against m/d_λ."""
    some = results[(results["damping"] == damping) & (results["corrected"] == corrected)]
    return some.groupby("m_over_d")[column].mean()


def _shape(curve: pd.Series, plateau: float) -> dict[str, float]:
    x, y = curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)
    first = float(y[0]) if len(y) else float("nan")
    near = y[(x >= NEAR[0]) & (x <= NEAR[1]) & np.isfinite(y)]
    return {
        "slope": log_slope(x, y, ASYMPTOTIC),
        "over_plateau_at_1": interpolated(x, y, 1.0) / plateau,
        "over_plateau_at_10": interpolated(x, y, 10.0) / plateau,
        "over_plateau_at_100": interpolated(x, y, 100.0) / plateau,
        "bump": float(near.max()) / plateau if len(near) else float("nan"),
        "smallest_sketch_over_plateau": first / plateau,
        "over_smallest_sketch_at_10": interpolated(x, y, 10.0) / first,
        "over_smallest_sketch_at_100": interpolated(x, y, 100.0) / first,
    }


def error_figure(results: pd.DataFrame, plateau: pd.DataFrame, summary: Mapping[str, Any]) -> Figure:
    """The 95 % error against m/d_λ, log–log, one colour a damping; plain, and corrected beside it."""
    kinds = [False, True] if summary["corrected"] else [False]
    figure, axes = new_figure(len(kinds), width=6.2, height=4.8)
    measure = summary["measure"]
    for ax, corrected in zip(axes[0], kinds, strict=True):
        _panel(ax, results[results["corrected"] == corrected], f"{measure}_95")
        ax.set_title("corrected: at μ = λ(1 − d_λ/m)" if corrected else "as published: at λ", fontsize=10.5, loc="left")
        ax.set_xlabel("m ÷ d_λ")
    low = min(ax.get_ylim()[0] for ax in axes[0])
    high = max(ax.get_ylim()[1] for ax in axes[0])
    for ax in axes[0]:
        ax.set_ylim(low, high)
    axes[0, 0].set_ylabel(f"95 % quantile of {MEASURES[measure]}")
    axes[0, 0].legend(frameon=False, fontsize=7.5, loc="lower left")
    return figure


def _panel(ax: Axes, results: pd.DataFrame, column: str) -> None:
    ax.set(xscale="log", yscale="log")
    dampings = sorted(results["damping"].unique())
    products = []
    for damping, color in zip(dampings, series_colors(len(dampings)), strict=True):
        some = results[results["damping"] == damping]
        table = some.pivot(index="trial", columns="m_over_d", values=column).dropna(axis=1)
        if table.empty:
            continue
        dimension = some["effective_dimension"].iloc[0]
        label = f"λ = {power(damping)}, d_λ = {short(dimension)}"
        x = table.columns.to_numpy(dtype=float)
        plot_with_band(ax, table, color=color, marker="o", markersize=2.5, linewidth=1.2, label=label)
        mean = table.to_numpy().mean(axis=0)
        products += [float(v) for v in (mean * x**0.5)[x >= ASYMPTOTIC]]
    ax.axvline(1.0, color=MARK, linewidth=0.9, linestyle="--")
    if products:
        ends = np.array([1.0, float(results["m_over_d"].max())])
        for factor in np.geomspace(min(products), max(products), 5):
            ax.plot(ends, factor / ends**0.5, color=GUIDE, linewidth=0.6, zorder=0)
        ax.plot(ends, np.median(products) / ends**0.5, color=GUIDE, linewidth=1.4, linestyle="--", zorder=0)


def spectrum_figure(eigenvalues: np.ndarray, rank: int, summary: Mapping[str, Any]) -> Figure:
    """The eigenvalues of F in order, on a log scale, with the dampings."""
    figure, axes = new_figure(1, width=6.0)
    ax = axes[0, 0]
    ax.semilogy(np.arange(1, rank + 1), eigenvalues[:rank], color="#0a5c9e", linewidth=1.4)
    for damping in summary["damping"]:
        ax.axhline(damping, color=GUIDE, linewidth=0.5, linestyle=":")
    ax.set(xlabel="i", ylabel="σᵢ of the empirical Fisher")
    ax.set_ylim(bottom=max(eigenvalues[rank - 1] / 3, np.finfo(float).tiny))
    return figure


def page_of(summary: Mapping[str, Any], figures: Mapping[str, Figure]) -> StudyPage:
    """The page."""
    measure = summary["measure"]
    columns = {
        "effective_dimension": "d_λ",
        f"{measure}_plateau": "plateau",
        f"{measure}_over_plateau_at_1": "at m = d_λ",
        f"{measure}_over_plateau_at_10": "at 10 d_λ",
        f"{measure}_over_plateau_at_100": "at 100 d_λ",
        f"{measure}_bump": "bump",
        f"{measure}_over_smallest_sketch_at_10": "at 10 d_λ ÷ smallest m",
        f"{measure}_over_smallest_sketch_at_100": "at 100 d_λ ÷ smallest m",
        f"{measure}_slope": "slope",
        f"{measure}_corrected_over_plateau_at_10": "corrected at 10 d_λ",
        f"{measure}_corrected_slope": "corrected slope",
    }
    table = table_of(summary, {title: key for key, title in columns.items() if key in summary}, "damping")
    slope = short(summary[f"{measure}_median_slope"])
    findings = [
        (
            "The error falls as 1/√m",
            f"From m = {ASYMPTOTIC:g} d_λ on, the median slope of the 95 % error on m over the dampings is {slope}; "
            "theory says −0.5. Where d_λ is the right measure of size, the curves of all dampings bend at the same "
            "m/d_λ.",
        ),
        (
            "Below d_λ there is nothing to gain",
            "The plateau is the error where no score is left at all, computed without a sketch. Around m = d_λ a "
            "sketch can be worse than that: it adds damping of its own and noise, but little signal.",
        ),
    ]
    if summary["corrected"]:
        findings.append(
            (
                "Corrected for the damping that a sketch adds",
                "At μ = λ(1 − d_λ/m) the scores estimate those at λ, so that only noise is left. There is no such μ "
                "for m ≤ d_λ.",
            )
        )
    what = "self-influence" if summary["test_mode"] == "self" else "every pair of a train and a test example"
    return projection_page(
        title="How large a sketch for how small an error?",
        lead=f"{summary['model']} on {summary['dataset']}: errors of sketched influence scores, {what}, over "
        f"{summary['num_trials']} independent {summary['proj_type']} sketches of each size.",
        facts=(
            Fact("Train examples", f"{summary['n']:,}", f"and {summary['tests']:,} test examples"),
            Fact("Parameters", f"{summary['parameters']:,}", f"test accuracy {100 * summary['test_accuracy']:.1f} %"),
            Fact("Rank", f"{summary['rank']:,}", f"eigenvalues above {summary['rank_cut']:g} of the largest"),
            Fact("Slope", slope, "median over dampings, from m = 5 d_λ; theory: −0.5"),
            Fact("Pairs", f"{summary['pairs']:,}", "in every quantile"),
        ),
        pictures=(
            Picture(
                figures["errors"],
                "95 % error against sketch size over effective dimension, a line for each damping",
                "Mean over trials with its 95 % interval. Red: m = d_λ. Grey: slope −1/2.",
            ),
            Picture(
                figures["spectrum"],
                "Ordered eigenvalues of the empirical Fisher on a log scale",
                "The spectrum of the empirical Fisher; dotted: the dampings.",
            ),
        ),
        findings=findings,
        table=table,
        table_caption=f"{MEASURES[measure]}, 95 % quantiles, mean over trials. All but d_λ, plateau and slopes are in "
        "units of the plateau, those ÷ smallest m in units of the smallest sketch's. A dash: outside the "
        "sizes that were run.",
        row_name="λ",
    )
