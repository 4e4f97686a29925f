"""What the numbers say, one paragraph a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from refluence.studies.leave_one_out.methods import (
    AUTOMATIC_REPEATS,
    TITLES,
    TRUNCATED_DEPTH,
    TRUNCATED_SCALE,
    paper_seed,
)
from refluence.studies.leave_one_out.settings import TRUNCATED, TRUNCATED_MEAN, Setting


def findings(
    setting: Setting, table: pd.DataFrame, facts: Mapping[str, Mapping[str, Any]], frame: pd.DataFrame
) -> list[tuple[str, str]]:
    """(title, paragraph) for each method of the table, from one subset's facts and rows."""
    written = {
        "newton": _newton(frame),
        "exact": _exact(table, frame),
        "cg": _cg(facts["cg"]),
        "lissa": _lissa(setting, facts["lissa"]),
        "lissa_paper": _paper(setting, [facts[paper_seed(seed)] for seed in range(setting.seeds)]),
    }
    if TRUNCATED in setting.truncated:
        written[TRUNCATED] = (
            f"{TRUNCATED_DEPTH:,} steps at scale {TRUNCATED_SCALE:g} on batches of 512, ten repeats, as in a published "
            "reproduction that got a Pearson correlation of 0.9694, slope 0.65, and took the gap for noise. Here the "
            f"slope is {_value(table, TRUNCATED, 'slope'):.3f}. " + _missing(setting, TRUNCATED_DEPTH, TRUNCATED_SCALE)
        )
    if TRUNCATED_MEAN in setting.truncated:
        written[TRUNCATED_MEAN] = (
            "The steps and scale of a published reproduction, with all examples at each step, so with no noise at all: "
            f"the slope is still {_value(table, TRUNCATED_MEAN, 'slope'):.3f} and the Pearson correlation "
            f"{_value(table, TRUNCATED_MEAN, 'pearson'):.4f}. It is truncation, not noise; more repeats would not "
            "help. " + _missing(setting, TRUNCATED_DEPTH, TRUNCATED_SCALE)
        )
    return [(TITLES[key], written[key]) for key in table.index]


def _newton(frame: pd.DataFrame) -> str:
    return (
        "One Newton step with the Hessian of the examples that are left, H₋ᵢ, by a solve for each of the outputs: "
        f"{_error(frame, 'newton')}, {_error(frame, 'exact')} without the correction. It costs no refit."
    )


def _exact(table: pd.DataFrame, frame: pd.DataFrame) -> str:
    leverage = frame["leverage"]
    return (
        "The influence function itself, with the exact inverse of the Hessian. What is left of its error is that the "
        "Hessian still holds the removed example: the leverage of the removed examples, tr Fᵢ H⁻¹ Fᵢᵀ/n, has a mean of "
        f"{leverage.mean():.3g} and a maximum of {leverage.max():.3g}, and the slope is "
        f"{_value(table, 'exact', 'slope'):.3f}."
    )


def _cg(facts: Mapping[str, Any]) -> str:
    return (
        f"The same inverse without a matrix: {_first(facts['iterations'])} steps to a relative residual of "
        f"{_first(facts['residual']):.1e}, so its predictions are those of the exact Hessian."
    )


def _lissa(setting: Setting, facts: Mapping[str, Any]) -> str:
    [scale] = facts["scale"].values()
    batches = "" if setting.batch is None else f", {AUTOMATIC_REPEATS} repeats on random batches of {setting.batch}"
    return (
        f"With the scale measured, {scale:.3g}, and the depth that leaves no more than 1 % of any component missing, "
        f"{facts['depth']:,} steps{batches}, the relative residual is {facts['residual']:.1e}, of which "
        f"{facts['residual_noise']:.1e} is noise."
    )


def _paper(setting: Setting, facts: Sequence[Mapping[str, Any]]) -> str:
    noise = sum(f["residual_noise"] for f in facts) / len(facts)
    return (
        "Scale 25, depth 5,000, ten repeats, one example a step, no damping: the numbers are medians over "
        f"{len(facts)} seeds. The scatter is noise, {noise:.2g} of the relative residual, which steep directions "
        "dominate; the slope is truncation. " + _missing(setting, 5_000, 25.0)
    )


def _missing(setting: Setting, depth: int, scale: float) -> str:
    share = (1 - setting.l2 / scale) ** (depth + 1)
    return (
        f"Along the flattest directions, where the Hessian is l2 = {setting.l2:g}, a share (1 − l2/scale)^(depth+1) = "
        f"{share:.2f} of the answer is missing."
    )


def _error(frame: pd.DataFrame, key: str) -> str:
    error = ((frame[f"predicted_{key}"] - frame["actual"]).abs() / frame["actual"].abs()).median()
    return f"a median relative error of {100 * error:.2g} %"


def _value(table: pd.DataFrame, key: str, metric: str) -> float:
    return float(table[metric].to_dict()[key])


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
