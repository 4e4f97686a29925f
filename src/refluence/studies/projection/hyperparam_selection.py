"""Choose λ at a large m by validation, then the smallest m that keeps the utility: the paper's Figure 4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.output import MARK, new_figure, plot_with_band, power, projection_page, short
from refluence.studies.projection.study import Study
from refluence.studies.projection.utility import UtilityMeter, UtilityOptions, best_damping

ENOUGH = 0.95
"""Share of the best utility that the smallest m must keep."""


@dataclass(frozen=True)
class HyperparamSelection(UtilityOptions):
    """One run of the study, see `UtilityOptions`."""

    NAME = "hyperparam-selection"


def run(
    options: HyperparamSelection,
    out: Path,
    *,
    cache_dir: Path | None = None,
    ground_truth: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings.
    """
    study = Study.open(options, out, cache_dir, progress)
    every = options.meter(study, ground_truth)
    dampings = every.dampings
    sizes = options.sizes.below(study.problem.parameters)

    def rows(meter: UtilityMeter, part: str, some: list[int]) -> pd.DataFrame:
        """One row a trial, size and damping."""
        grid = study.measure(options.sketching, sizes, meter.measure, part=part, only=some)
        return pd.concat(
            [
                pd.DataFrame(
                    {"damping": meter.dampings}
                    | {f"{part}_lds": stage.tensors[part].numpy() for part in ("validation", "test")}
                ).assign(trial=trial, m=m)
                for trial, m, stage in grid
            ],
            ignore_index=True,
        )

    sweep = rows(every, "lambda_sweep", sizes[-1:]).assign(sweep="lambda")
    mean = sweep.groupby("damping")["validation_lds"].mean()
    chosen = dampings[best_damping(dampings, torch.tensor(mean.loc[list(dampings)].to_numpy()))]
    at_chosen = replace(every, dampings=(chosen,))
    small = rows(at_chosen, f"m_sweep_{chosen:.6e}", sizes[:-1]) if len(sizes) > 1 else sweep.iloc[:0]
    m_sweep = pd.concat([small, sweep[sweep["damping"] == chosen].drop(columns="sweep")]).assign(sweep="m")
    results = pd.concat([sweep, m_sweep], ignore_index=True)
    exact = every.exact(study.spectral)
    facts = study.facts(
        validation_tests=len(every.validation),
        reported_tests=len(every.reported),
        largest_size=sizes[-1],
        exact_validation_lds=exact["validation"].tolist(),
        exact_test_lds=exact["test"].tolist(),
    )
    summary = summary_of(facts, results, chosen, study.spectral.dimension(chosen))
    figures = {"selection": selection_figure(results, summary)}
    return study.finish(summary, results, figures, page_of(summary, figures["selection"]))


def summary_of(facts: dict[str, Any], results: pd.DataFrame, chosen: float, dimension: float) -> dict[str, Any]:
    """The content of `summary.json`: flat keys; lists in the order of `damping` or of `m`.

    Standard deviations are over trials.
    """
    sweep, by_size = results[results["sweep"] == "lambda"], results[results["sweep"] == "m"]
    summary: dict[str, Any] = {**facts}
    over_dampings, over_sizes = sweep.groupby("damping"), by_size.groupby("m")
    summary["damping"] = sorted(sweep["damping"].unique().tolist())
    summary["m"] = sorted(by_size["m"].unique().tolist())
    for part in ("validation", "test"):
        column = f"{part}_lds"
        for key, groups in (("by_damping", over_dampings), ("by_m", over_sizes)):
            summary[f"{column}_{key}"] = groups[column].mean().tolist()
            summary[f"{column}_{key}_std"] = groups[column].std(ddof=1).tolist()
    best = summary["damping"].index(chosen)
    curve = np.array(summary["validation_lds_by_m"])
    enough = int(summary["m"][int(np.argmax(curve >= ENOUGH * curve.max()))])
    return summary | {
        "best_damping": chosen,
        "best_damping_at_edge": best in (0, len(summary["damping"]) - 1),
        "best_damping_of_trials": [
            float(rows["damping"].iloc[int(rows["validation_lds"].argmax())]) for _, rows in sweep.groupby("trial")
        ],
        "effective_dimension": dimension,
        "validation_lds": summary["validation_lds_by_damping"][best],
        "validation_lds_std": summary["validation_lds_by_damping_std"][best],
        "test_lds": summary["test_lds_by_damping"][best],
        "test_lds_std": summary["test_lds_by_damping_std"][best],
        "m_95": enough,
        "m_95_over_d": enough / dimension,
        "implied_epsilon": (dimension / enough) ** 0.5,
    }


def selection_figure(results: pd.DataFrame, summary: dict[str, Any]) -> Figure:
    """LDS against λ with a star at λ*, and LDS against m/d_λ* with a square at m₉₅."""
    figure, axes = new_figure(2)
    left, right = axes[0]
    for part, color in (("validation", "#0a5c9e"), ("test", "#c8640f")):
        table = results[results["sweep"] == "lambda"].pivot(index="trial", columns="damping", values=f"{part}_lds")
        plot_with_band(left, table, color=color, linewidth=1.4, label=part)
        table = results[results["sweep"] == "m"].pivot(index="trial", columns="m", values=f"{part}_lds")
        table.columns = table.columns / summary["effective_dimension"]
        plot_with_band(right, table, color=color, linewidth=1.4, marker="o", markersize=3, label=part)
    left.plot(
        summary["damping"],
        summary["exact_validation_lds"],
        color="#0a5c9e",
        linewidth=0.8,
        linestyle=":",
        label="validation, exact scores",
    )
    left.plot(summary["best_damping"], summary["validation_lds"], "*", color=MARK, markersize=13)
    left.set(xscale="log", xlabel="λ", ylabel="LDS", title=f"m = {summary['largest_size']:,}")
    at = summary["m"].index(summary["m_95"])
    right.plot(summary["m_95_over_d"], summary["validation_lds_by_m"][at], "s", color=MARK, markersize=8)
    right.axvline(1.0, color=MARK, linewidth=0.9, linestyle="--")
    right.set(xscale="log", xlabel="m ÷ d_λ*", title=f"λ* = {power(summary['best_damping'])}")
    left.legend(frameon=False, fontsize=8)
    return figure


def page_of(summary: dict[str, Any], figure: Figure) -> StudyPage:
    """The page."""
    rows = zip(
        summary["m"],
        *(summary[f"{part}_lds_by_m{kind}"] for part in ("validation", "test") for kind in ("", "_std")),
        strict=True,
    )
    table = pd.DataFrame(
        [
            [short(m / summary["effective_dimension"]), f"{v:.4f} ± {short(vs, 2)}", f"{t:.4f} ± {short(ts, 2)}"]
            for m, v, vs, t, ts in rows
        ],
        columns=["m ÷ d_λ*", "validation LDS", "test LDS"],
        index=pd.Index([f"{m:,}" for m in summary["m"]]),
    )
    edge = " It lies at the edge of the grid." if summary["best_damping_at_edge"] else ""
    return projection_page(
        title="Which damping, and then which sketch size?",
        lead=f"{summary['model']} on {summary['dataset']}: λ* has the best LDS on {summary['validation_tests']} "
        f"validation tests at m = {summary['largest_size']:,}; all else is reported on the other "
        f"{summary['reported_tests']}. {summary['num_subsets']} halves of the data were retrained.",
        facts=(
            Fact("λ*", power(summary["best_damping"]), "chosen on the validation tests only." + edge),
            Fact("d_λ*", short(summary["effective_dimension"]), "effective dimension at λ*"),
            Fact(
                "Validation LDS",
                f"{summary['validation_lds']:.4f}",
                f"± {short(summary['validation_lds_std'], 2)} over trials",
            ),
            Fact("Test LDS", f"{summary['test_lds']:.4f}", f"± {short(summary['test_lds_std'], 2)} over trials"),
            Fact(
                "m₉₅",
                f"{summary['m_95']:,}",
                f"{short(summary['m_95_over_d'])} × d_λ*: the first with 95 % of the best LDS",
            ),
        ),
        pictures=(
            Picture(
                figure,
                "LDS against damping at the largest sketch, and against sketch size at the chosen damping",
                "Means over trials with 95 % intervals. Star: λ*. Square: the smallest m with 95 % of the best "
                "validation LDS.",
            ),
        ),
        findings=(
            (
                "Choose λ first",
                f"The trials on their own choose {', '.join(power(v) for v in summary['best_damping_of_trials'])}.",
            ),
            (
                "Then m",
                f"m₉₅/d_λ* = {short(summary['m_95_over_d'])}, which by m = d_λ/ε² would be ε = "
                f"{short(summary['implied_epsilon'])}.",
            ),
        ),
        table=table,
        table_caption="LDS at λ*, mean ± standard deviation over trials.",
        row_name="m",
    )
