"""What measured changes say about predicted ones, in numbers, in a word and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

from refluence.evaluation.agreement import agreement

Verdict = Literal["agrees", "partly", "disagrees", "not converged"]

SLOPES = (0.7, 1.4)
SAME_SCALE = (0.9, 1.1)
STRONG, WEAK, EXPLAINED = 0.9, 0.5, 0.8
HELD = (
    "The refits are held to the outputs and the weights of the model as it is: this checks the local approximation, "
    "not what another training would give."
)
METRICS = ("slope", "spearman", "pearson", "r2")
RESAMPLES = 200


def agreement_of(rows: pd.DataFrame, column: str) -> dict[str, float | None]:
    """The metrics, None where the pairs do not define one."""
    predicted = rows.pivot(index="test", columns="removed", values=column).to_numpy(copy=True)
    measured = rows.pivot(index="test", columns="removed", values="measured").to_numpy(copy=True)
    if measured.size < 3:
        return dict.fromkeys(METRICS)
    table = agreement(predicted, measured, resamples=RESAMPLES).set_index("metric")["value"]
    return {name: finite_or_none(table[name]) for name in METRICS}


def verdict_of(statistics: Mapping[str, float | None]) -> Verdict:
    """What the statistics say in a word; without a slope, a rank correlation and an R² they do not agree."""
    slope, spearman, r2 = (statistics[name] for name in ("slope", "spearman", "r2"))
    if slope is None or spearman is None or r2 is None or spearman < WEAK or slope <= 0:
        return "disagrees"
    strong = SLOPES[0] <= slope <= SLOPES[1] and spearman >= STRONG and r2 >= EXPLAINED
    return "agrees" if strong else "partly"


def sentence_of(
    verdict: Verdict,
    statistics: Mapping[str, float | None],
    newton: Mapping[str, float | None] | None,
    examples: pd.Series,
    frame: pd.DataFrame,
    details: Mapping[str, Any],
) -> str:
    """The verdict with what it rests on, for people."""
    tests = frame["test"].nunique()
    removed = f"{len(examples)} training example{'s' if len(examples) > 1 else ''}"
    done = f"{removed} were really removed, one at a time, and the model refitted"
    if verdict == "not converged":
        held = details.get("objective") == "held"
        why = "the loss bends too much around the model" if held else "the model is far from a minimum of its objective"
        return (
            f"{done}, but only {details['converged']} of {len(examples)} refits settled within {details['maxiter']} "
            f"steps ({why}), so the changes measured are not those of a "
            f"finished training and check nothing. As far as they go: {_words(statistics)}."
        )
    words = {
        "agrees": "the predictions agree with what happened",
        "partly": "the predictions agree with what happened in part",
        "disagrees": "the predictions do not agree with what happened",
    }[verdict]
    over = f"on {tests} test example{'s' if tests > 1 else ''} {words}: {_words(statistics)}"
    scale = _scale(statistics["slope"]) if verdict != "disagrees" else ""
    better = f" Newton-corrected: {_words(newton)}." if newton is not None else ""
    left = len(examples) - details["converged"]
    more = f" Refits that did not settle, and are left out: {left}." if left else ""
    local = f" {HELD}" if details.get("objective") == "held" else ""
    return f"{done}; {over}{scale}.{better}{more}{local}"


def _words(statistics: Mapping[str, float | None]) -> str:
    names = {"slope": "slope", "spearman": "rank correlation", "r2": "R²"}
    return ", ".join(
        f"{word} {'undefined' if (value := statistics[name]) is None else f'{value:.3g}'}"
        for name, word in names.items()
    )


def _scale(slope: float | None) -> str:
    if slope is None or SAME_SCALE[0] <= slope <= SAME_SCALE[1]:
        return ""
    return f"; they are too {'small' if slope < 1 else 'large'}, about {slope:.2g} of the real changes"


def finite_or_none(value: Any) -> float | None:
    """A finite float, or None, as JSON has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
