"""From the subsets to the numbers of the study: medians over subsets, and over seeds where a method has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from refluence.evaluation.agreement import METRICS
from refluence.studies.leave_one_out.methods import PAPER_SEED, TITLES
from refluence.studies.leave_one_out.settings import Options
from refluence.studies.leave_one_out.subset import OPTIMUM, REFITS, Subset

PAPER = "lissa_paper"


def shown(subset: Subset) -> list[str]:
    """The methods that have a panel, the nearest to the truth first."""
    order = ["newton", *(key for key in TITLES if key != "newton")]
    return [key for key in order if f"predicted_{key}" in subset.frame]


def table_of(subsets: Sequence[Subset]) -> pd.DataFrame:
    """One row a method: medians of its metrics; LiSSA with the paper's parameters by the median over seeds first."""
    statistics = pd.concat([subset.statistics for subset in subsets], ignore_index=True)
    seeded = statistics["method"].str.startswith(PAPER_SEED)
    single = ~seeded & (statistics["method"] != PAPER)
    statistics = pd.concat([statistics[single], statistics[seeded].assign(method=PAPER)])
    each = statistics.groupby(["subset", "method", "metric"])["value"].median()
    return each.groupby(["method", "metric"]).median().unstack("metric")[list(METRICS)].loc[shown(subsets[0])]


def summary_of(options: Options, subsets: Sequence[Subset]) -> dict[str, Any]:
    """The content of `summary.json`: one object a method, and flat keys for all else."""
    table = table_of(subsets)
    first = subsets[0].facts
    seconds = pd.DataFrame([{name: facts["seconds"] for name, facts in s.facts.items()} for s in subsets]).sum()
    return {
        **{
            str(key): {str(name): float(value) for name, value in row.items()}
            for key, row in table.to_dict("index").items()
        },
        "study": "leave-one-out",
        "setting": options.setting.name,
        "dataset": options.setting.dataset,
        "n": first[OPTIMUM]["examples"],
        "parameters": first[OPTIMUM]["parameters"],
        "varying_pixels": first[OPTIMUM]["varying_pixels"],
        "bias": options.setting.bias,
        "l2": options.setting.l2,
        "subsets": len(subsets),
        "seed": options.seed,
        "test_row": [s.facts[OPTIMUM]["test_row"] for s in subsets],
        "test_accuracy": [s.facts[OPTIMUM]["test_accuracy"] for s in subsets],
        "removed": options.top,
        "refits_converged": sum(s.facts[REFITS]["converged"] for s in subsets),
        "refits": sum(s.facts[REFITS]["removals"] for s in subsets),
        "largest_gradient_norm": max(s.facts[REFITS]["largest_gradient_norm"] for s in subsets),
        "largest_baseline_change": max(abs(s.facts[REFITS]["baseline_change"]) for s in subsets),
        "largest_leverage": max(float(s.frame["leverage"].max()) for s in subsets),
        "mean_leverage": float(pd.concat([s.frame["leverage"] for s in subsets]).mean()),
        "seconds": float(seconds.sum()),
        **{f"seconds_{name}": float(value) for name, value in seconds.items()},
    }
