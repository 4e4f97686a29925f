"""What the tables of an evaluation say, in plain language."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from refluence.cli.trial import Trial
from refluence.evaluation.lds import lds_difference
from refluence.report.formatting import count, statistic

TIMES = {1: "once", 2: "twice"}


def findings(trial: Trial, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the tables say, in sentences."""
    found = []
    if "lds" in tables:
        found.append(_about_lds(trial, tables["lds"]))
    if "loo" in tables:
        best = _best(tables["loo"], "loo_spearman")
        slope = tables["loo"].query("metric == 'loo_slope' and method == @best.method").iloc[0]
        found.append(
            f"Leaving single rows out: {best.method} ranks the measured changes with a Spearman correlation of "
            f"{_value(best)}; its predictions are {statistic(slope.value)} times as large as the measured changes."
        )
    if "mislabel" in tables:
        best = _best(tables["mislabel"], "auroc")
        found.append(
            f"Wrong labels: {best.method} puts a wrong label before a right one with probability {_value(best)}; "
            "chance is 0.5."
        )
    if "tail-patch" in tables:
        best = _best(tables["tail-patch"], "tail_patch")
        found.append(
            f"One more step on the ten rows named by {best.method} lowers a test row's loss by {_value(best)}."
        )
    if "retrieval" in tables:
        best = _best(tables["retrieval"], "class_retrieval")
        found.append(
            f"The most helpful row named by {best.method} has the test row's own class with share {_value(best)}."
        )
    if "randomisation" in tables:
        most = tables["randomisation"].sort_values("value").iloc[-1]
        found.append(
            f"Scores of an untrained model correlate with those of {most.method} by {_value(most)}; they should not."
        )
    return found or ["See the tables."]


def _about_lds(trial: Trial, table: pd.DataFrame) -> str:
    """Who is best, and whether by more than the noise of subsets and test rows."""
    effort = trial.effort
    times = TIMES.get(effort.seeds, f"{effort.seeds} times")
    ordered = table.sort_values("value", ascending=False)
    best = ordered.iloc[0]
    text = (
        f"Over {effort.subsets:,} random halves of the data, each trained {times}, the scores "
        f"of {best.method} order the models best: LDS {_value(best)}, on {count(len(trial.reported), 'test row')}."
    )
    if len(ordered) == 1:
        return text
    second, scores = ordered.iloc[1], trial.everything
    gap = lds_difference(
        scores[best.method],
        scores[second.method],
        trial.half_subsets().tests(trial.reported),
        measurement=trial.measurement,
        seed=effort.seed,
    )
    verdict = "more than the noise" if gap.low > 0 else "within the noise, so the order of the two is not settled"
    return (
        f"{text} The next is {second.method} with {statistic(second.value)}; the difference is {statistic(gap.value)} "
        f"({statistic(gap.low)} to {statistic(gap.high)}), {verdict}."
    )


def _best(table: pd.DataFrame, metric: str) -> Any:
    return table[table["metric"] == metric].sort_values("value", ascending=False).iloc[0]


def _value(row: Any) -> str:
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return statistic(row.value)
    return f"{statistic(row.value)} (95 % interval {statistic(row.low)} to {statistic(row.high)})"
