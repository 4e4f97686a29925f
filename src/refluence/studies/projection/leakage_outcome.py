"""The numbers, figures and page of the leakage study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.errors import log_slope
from refluence.studies.projection.output import (
    GUIDE,
    new_figure,
    plot_with_band,
    power,
    projection_page,
    series_colors,
    short,
    table_of,
)


def summary_of(
    facts: dict[str, Any], results: pd.DataFrame, per_test: pd.DataFrame, parts: pd.DataFrame | None
) -> dict[str, Any]:
    """The content of `summary.json`: flat keys; lists in the order of `damping`."""
    by_damping = results.groupby("damping")
    summary: dict[str, Any] = {**facts, "damping": sorted(results["damping"].unique().tolist())}
    summary["effective_dimension"] = by_damping["effective_dimension"].first().tolist()
    for key in ("ratio", "covered", "over_scores"):
        summary[key] = by_damping[key].mean().tolist()
    slopes = []
    for _, rows in by_damping:
        # below d_λ the sketch's own damping rules; the 1/√m of the formula shows beyond
        curve = rows[rows["m"] >= 5 * rows["effective_dimension"]].groupby("m")["measured"].mean()
        slopes.append(log_slope(curve.index.to_numpy(dtype=float), curve.to_numpy(), 0.0))
    summary["slope"] = slopes
    pooled = _pooled(per_test)
    summary["ratio_of_all"] = float(np.sqrt((results["ratio"] ** 2).mean()))
    summary["covered_of_all"] = float(results["covered"].mean())
    summary["correlation_over_tests"] = float(
        np.corrcoef(np.log(pooled["measured"]), np.log(pooled["predicted"]))[0, 1]
    )
    if parts is not None:
        summary["factorised_ratio_smallest"] = float(parts["ratio"].min())
        summary["factorised_ratio_largest"] = float(parts["ratio"].max())
        for part, rows in parts.groupby("part", sort=False):
            key = str(part).replace(" ⊗ ", "_").replace(" ", "_").lower()
            summary[f"factorised_ratio_{key}"] = float(np.sqrt((rows["ratio"] ** 2).mean()))
            for size, other in (("m_A", "m_E"), ("m_E", "m_A")):
                largest = rows[rows[other] == rows[other].max()].sort_values(size)
                slope = log_slope(largest[size].to_numpy(dtype=float), largest["measured"].to_numpy(), 0.0)
                summary[f"factorised_slope_{key}_in_{size.lower()}"] = slope
    return summary


def _pooled(per_test: pd.DataFrame) -> pd.DataFrame:
    """Each test's deviations over trials, at the middle damping and the largest size."""
    dampings = sorted(per_test["damping"].unique())
    some = per_test[(per_test["damping"] == dampings[len(dampings) // 2]) & (per_test["m"] == per_test["m"].max())]
    squares = some.assign(measured=some["measured"] ** 2, predicted=some["predicted"] ** 2)
    return squares.groupby("test")[["measured", "predicted"]].mean() ** 0.5


def leakage_figure(results: pd.DataFrame, per_test: pd.DataFrame) -> Figure:
    """Root mean square leakage against m, measured and predicted, and each test's measured against predicted."""
    figure, axes = new_figure(2)
    left, right = axes[0]
    left.set(xscale="log", yscale="log", xlabel="m", ylabel="root mean square leakage")
    dampings = sorted(results["damping"].unique())
    for damping, color in zip(dampings, series_colors(len(dampings)), strict=True):
        rows = results[results["damping"] == damping]
        table = rows.pivot(index="trial", columns="m", values="measured")
        label = f"λ = {power(damping)}"
        plot_with_band(left, table, color=color, linewidth=1.3, marker="o", markersize=3, label=label)
        left.plot(table.columns, rows.groupby("m")["predicted"].mean(), color=color, linewidth=0.9, linestyle="--")
    left.legend(frameon=False, fontsize=8)
    pooled = _pooled(per_test)
    right.set(xscale="log", yscale="log", xlabel="predicted deviation of a test's leakage", ylabel="measured")
    right.scatter(pooled["predicted"], pooled["measured"], s=9, color="#0a5c9e", alpha=0.5, linewidths=0)
    ends = [float(pooled.to_numpy().min()), float(pooled.to_numpy().max())]
    right.plot(ends, ends, color=GUIDE, linewidth=0.9)
    return figure


def factor_figure(parts: pd.DataFrame) -> Figure:
    """The three parts of the leakage against m_A, one colour an m_E."""
    names = list(parts["part"].unique())
    figure, axes = new_figure(len(names), width=4.2)
    for ax, name in zip(axes[0], names, strict=True):
        rows = parts[parts["part"] == name]
        sizes = sorted(rows["m_E"].unique())
        for m_e, color in zip(sizes, series_colors(len(sizes), "plasma"), strict=True):
            some = rows[rows["m_E"] == m_e].sort_values("m_A")
            ax.loglog(some["m_A"], some["measured"], "o", color=color, markersize=4, label=f"m_E = {m_e}")
            ax.loglog(some["m_A"], some["predicted"], color=color, linewidth=1.0)
        ax.set_title(name, fontsize=10.5, loc="left")
        ax.set_xlabel("m_A")
    axes[0, 0].set_ylabel("root mean square leakage; lines: predicted")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def page_of(summary: Mapping[str, Any], results: pd.DataFrame, figures: Mapping[str, Figure]) -> StudyPage:
    """The page."""
    columns = {
        "d_λ": "effective_dimension",
        "measured ÷ predicted": "ratio",
        "within 1.96 deviations": "covered",
        "leakage ÷ scores": "over_scores",
        "slope in m": "slope",
    }
    table = table_of(summary, columns, "damping")
    findings = [
        (
            "Predicted for every test",
            f"‖v_⊥‖·‖(PFPᵀ+λ)⁻¹Pg‖/√m, from the sketch alone but for ‖v_⊥‖: measured ÷ predicted is "
            f"{short(summary['ratio_of_all'], 4)} over all sizes, dampings and trials, and "
            f"{100 * summary['covered_of_all']:.1f} % of all pairs lie within 1.96 deviations (95 % for a normal law).",
        )
    ]
    pictures = [
        Picture(
            figures["leakage"],
            "Root mean square leakage against sketch size, and measured against predicted for every test",
            "Left: solid measured, dashed predicted. Right: each point is a test, pooled over trials, at the largest "
            "size and the middle damping.",
        )
    ]
    if "factorised" in figures:
        findings.append(
            (
                "The smaller factor governs",
                "With P_A ⊗ P_E the part in ker A ⊗ range E falls with m_A alone and the one in range A ⊗ ker E with "
                f"m_E alone; measured ÷ predicted lies between {short(summary['factorised_ratio_smallest'])} and "
                f"{short(summary['factorised_ratio_largest'])}.",
            )
        )
        pictures.append(
            Picture(
                figures["factorised"],
                "Leakage of the three parts of a factorised sketch against m_A",
                f"One layer, factors of {summary['factor_rows']} examples; points measured over "
                f"{summary['factor_draws']} draws, lines predicted.",
            )
        )
    return projection_page(
        title="What does a sketch invent?",
        lead=f"{summary['model']} on {summary['dataset']}: the part of a test gradient that no train gradient has, "
        "v_⊥, has no score at all. A sketch gives it one.",
        facts=(
            Fact("Tests out of range", f"{summary['tests_outside']:,}", f"of {summary['tests']:,}"),
            Fact(
                "Out of range", f"{100 * summary['median_share_outside']:.1f} %", "‖v_⊥‖ ÷ ‖v‖, median over the tests"
            ),
            Fact("Measured ÷ predicted", short(summary["ratio_of_all"], 4), "root mean square"),
            Fact("Coverage", f"{100 * summary['covered_of_all']:.1f} %", "of pairs within 1.96 predicted deviations"),
        ),
        pictures=tuple(pictures),
        findings=tuple(findings),
        table=table,
        table_caption="Means over sizes and trials; the slope from m = 5 d_λ on.",
        row_name="λ",
    )
