"""The numbers of the study as tables and as the flat summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from scipy.stats import t as student

from refluence.studies.leverage_basis.agreement import top_of
from refluence.studies.leverage_basis.bases import Basis
from refluence.studies.leverage_basis.heads import MODEL as HEAD
from refluence.studies.leverage_basis.options import Options

SUMMARISED = ("tau", "rho", "rbo", "kappa")
ONE_OF_A_GROUP = ("rank_all", "zero_columns", "max_plain_all", "max_ridge_all", "damping_all")


def intervals(accuracies: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Mean test and train accuracy by model, group of the basis, arm and k, with Student intervals over seeds.

    Of a single training, as of a linear head on rows that do not depend on the seed, the interval is NaN.
    """
    table = (
        accuracies.groupby(["model", "group", "arm", "k"], sort=False)
        .agg(
            mean=("test_accuracy", "mean"),
            sd=("test_accuracy", "std"),
            n=("test_accuracy", "size"),
            train=("train_accuracy", "mean"),
        )
        .reset_index()
    )
    factor = student.ppf((1 + confidence) / 2, (table["n"] - 1).clip(lower=1))
    half = factor * table["sd"] / table["n"] ** 0.5
    return table.assign(low=table["mean"] - half, high=table["mean"] + half)


def value(table: pd.DataFrame, model: str, arm: str, k: int, group: str = "", column: str = "mean") -> float:
    """One number of `intervals`; NaN where that was not trained."""
    found = table[(table["model"] == model) & (table["group"] == group) & (table["arm"] == arm) & (table["k"] == k)]
    return math.nan if found.empty else float(found[column].iloc[0])


def agreed(means: pd.DataFrame, kind: str, measure: str, a: str, b: str, seeds: str = "different") -> dict[str, float]:
    """One row of `group_means`, in either order of the groups."""
    of_kind = means[(means["kind"] == kind) & (means["measure"] == measure) & (means["seeds"] == seeds)]
    found = of_kind[
        ((of_kind["group_a"] == a) & (of_kind["group_b"] == b))
        | ((of_kind["group_a"] == b) & (of_kind["group_b"] == a))
    ]
    return {name: float(found[name].iloc[0]) for name in ("mean", "low", "high", "smallest", "largest")}


def basis_frame(bases: Sequence[Basis], facts: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a basis: what it is, its rank, zero columns, ridge and leverage, and its network's accuracy."""
    rows = []
    for basis in bases:
        own = {name: item for name, item in facts[f"basis/{basis.name}"].items() if name not in ("heads", "seconds")}
        network = facts.get(f"network/{basis.name}", {})
        known = {name: network.get(name, math.nan) for name in ("train_accuracy", "test_accuracy")}
        rows.append({"basis": basis.name, "group": basis.group, "seed": basis.seed, **own, **known})
    return pd.DataFrame(rows)


def summary_of(
    options: Options,
    n: int,
    n_train: int,
    sizes: Sequence[int],
    basis: pd.DataFrame,
    table: pd.DataFrame,
    means: pd.DataFrame,
    artefact: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`, flat."""
    summary: dict[str, Any] = {
        "study": "leverage-basis",
        **{key: item for key, item in asdict(options).items() if key not in ("n_train", "n_test", "sizes")},
        "n": n,
        "n_train": n_train,
        "n_test": n - n_train,
        "sizes": list(sizes),
        "top": top_of(n),
        "bases": len(basis),
    }
    for group, own in basis.groupby("group", sort=False):
        for name in ONE_OF_A_GROUP:
            key = f"{name.removesuffix('_all')}_{group}"
            summary |= {f"{key}_smallest": own[name].min().item(), f"{key}_largest": own[name].max().item()}
        if own["test_accuracy"].notna().any():
            summary[f"network_test_accuracy_{group}"] = float(own["test_accuracy"].mean())
    for row in means[means["measure"].isin(SUMMARISED)].to_dict("records"):
        same = "_same_seed" if row["seeds"] == "same" else ""
        key = f"{row['measure']}_{row['kind']}_{row['group_a']}_{row['group_b']}{same}"
        summary |= {key: row["mean"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    for row in table.to_dict("records"):
        model = f"head_{row['group']}" if row["model"] == HEAD else row["model"]
        key = f"accuracy_{model}_{row['arm']}_{row['k']}"
        summary |= {key: row["mean"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    for name, item in artefact.items():
        if name == "overlap":
            summary |= {f"artefact_overlap_{k}": share for k, share in item.items()}
        elif name != "seconds":
            summary[f"raw_{name}" if name.startswith(("effective", "max")) else f"artefact_{name}"] = item
    return summary
